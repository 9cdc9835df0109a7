"""Random damage to the JSON that commands and the drift test go on from: documented errors, or values that can be used."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fuzzing import edit_bytes, edit_json, edit_text, fuzz
from reports import category
from test_robust import row

from advrad_fast.errors import AdvRADError, ConfigError, DatasetError, DriftStateError, InferenceError, ReportError
from advrad_fast.evaluation import certified, rows
from advrad_fast.evaluation.report import data
from advrad_fast.evaluation.report.page import page
from advrad_fast.line.drift import Drift

COUNTS = [pytest.param(300, id="quick"), pytest.param(20_000, id="long", marks=pytest.mark.slow)]


def damaged(rng: np.random.Generator, lines: list[str]) -> bytes:
    """JSON lines, one of them edited as a value, as text or as bytes; cut off at the end now and then."""
    lines = list(lines)
    at = int(rng.integers(len(lines)))
    value = json.loads(lines[at])
    for _ in range(rng.integers(1, 4)):
        edit_json(rng, value)
    lines[at] = json.dumps(value)
    text = "".join(f"{line}\n" for line in lines).encode()
    kind = rng.integers(5)
    return edit_text(rng, text) if kind == 0 else edit_bytes(rng, text) if kind == 1 else text[:-1] if kind == 2 else text


def reads(path: Path, lines: list[str], read: Callable[[], object], errors: tuple[type[AdvRADError], ...], count: int) -> None:
    def attempt(rng: np.random.Generator) -> bool:
        path.write_bytes(damaged(rng, lines))
        try:
            read()
        except errors as error:
            assert len(str(error)) < 10_000
            return False
        return True

    assert 0 < fuzz(attempt, count, seed=0) < count


@pytest.mark.parametrize("count", COUNTS)
def test_attack_rows(tmp_path: Path, count: int) -> None:
    """What ``evaluate --robust --results`` goes on from."""
    path = tmp_path / "rows.jsonl"
    lines = [rows.to_line(row(f"{label}.png", label, 1.5, attack)) for label in (0, 1) for attack in ("clean", "pgd")]
    reads(path, lines, lambda: rows.robust_figures(rows.read_rows(path)), (DatasetError,), count)


@pytest.mark.parametrize("count", COUNTS)
def test_draws(tmp_path: Path, count: int) -> None:
    """What ``evaluate --certified --scores`` goes on from."""
    path, header = tmp_path / "draws.jsonl", {"model": "00", "draws": 3}
    lines = [json.dumps(header), *(json.dumps({"image": f"{i}.png", "scores": [1.0, 2.5, 3]}) for i in range(3))]

    def read() -> None:
        kept = certified._kept(path, header, 3)
        assert all(isinstance(name, str) and (s is None or np.isfinite(s).all()) for name, s in kept.items())

    reads(path, lines, read, (ConfigError, InferenceError), count)


@pytest.mark.parametrize("count", COUNTS)
def test_drift_states(tmp_path: Path, count: int) -> None:
    path, calibration = tmp_path / "drift.json", np.arange(9.0)
    drift = Drift(calibration)
    for score in (3.0, 9.5, 1.0, 20.0):
        drift.update(SimpleNamespace(score=score))
    drift.save(path)

    def read() -> None:
        state = Drift.restore(path, calibration).update(SimpleNamespace(score=5.0))
        assert 0.0 <= state.e_value < math.inf and 0.0 < state.p_value <= 1.0

    reads(path, [path.read_text()], read, (DriftStateError,), count)


@pytest.mark.parametrize("count", [pytest.param(100, id="quick"), pytest.param(5_000, id="long", marks=pytest.mark.slow)])
def test_report_data(tmp_path: Path, count: int) -> None:
    """What ``evaluate --report`` finds in its folder: refused, or a page."""
    data.save(tmp_path, category(count=3))
    (path,) = tmp_path.glob(f"*{data.SUFFIX}")
    text = json.dumps(json.loads(path.read_text()))
    reads(path, [text], lambda: page(data.load(tmp_path)), (ReportError,), count)
