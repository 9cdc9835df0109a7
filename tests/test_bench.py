"""``advrad-fast bench``: its rows, and that a broken parity prints no ratio."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import small_model

from advrad_fast import bench
from advrad_fast.bench import inspection, network, operations, peaks, votes
from advrad_fast.bench.timing import Timing, alternate, row
from advrad_fast.cli import main
from advrad_fast.config import DetectorConfig, ImageConfig, UNetConfig
from advrad_fast.errors import InferenceError
from advrad_fast.graph import expected_tensors

KEYS = [
    "name", "shape", "batch", "backend", "precision", "p50_ms", "p20_ms", "p80_ms", "p99_ms", "ratio_eager",
    "ratio_best_torch", "peak_share", "commit", "machine",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks are not measured: the machine's are of no interest here."""
    monkeypatch.setattr(peaks, "measure", lambda **options: peaks.Peaks(1e10, 1e11, 1e12))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "small.safetensors"
    small_model().save(path)
    return path


def test_rows_of_a_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    assert (
        main(["bench", str(model), "--parts", "network,inspect,votes", "--seconds", "0", "--no-compile", "--json", str(out)]) == 0
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(list(r) == [*KEYS, "details"] for r in rows)
    names = {r["name"] for r in rows}
    assert names == {"network small", "inspect small", "votes small"}
    for r in rows:
        assert 0 < r["p20_ms"] <= r["p50_ms"] <= r["p80_ms"] <= r["p99_ms"]
        assert r["ratio_eager"] > 0
        assert (r["ratio_best_torch"] is None) == (r["name"] != "network small")
    printed = capsys.readouterr().out
    assert "x best torch" in printed and printed.count("inspect small") == sum(r["name"] == "inspect small" for r in rows)


def test_a_processor_without_bf16_is_measured_in_fp32(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("advrad_fast.backends.cpu_network.KERNELS", ("portable",))
    monkeypatch.setattr("advrad_fast.backends.openvino_engine.computes_bf16", lambda: False)
    out = tmp_path / "rows.jsonl"
    assert main(["bench", str(model), "--parts", "network,inspect", "--seconds", "0", "--no-compile", "--json", str(out)]) == 0
    assert {json.loads(line)["precision"] for line in out.read_text().splitlines()} == {"fp32"}


def test_rows_of_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "SIDE", 32)
    rows = list(operations.rows(peaks.Peaks(1e10, 1e11, 1e12), seconds=0.0, compile_torch=False))
    assert len(rows) == 5 * (len(operations.BATCHES) + 1)
    assert all(list(r) == KEYS and r["peak_share"] > 0 for r in rows)


@pytest.mark.parametrize(
    ("part", "module", "name"), [("network", network, "PARITY"), ("inspect", inspection, "BOUNDS"), ("votes", votes, "BOUNDS")]
)
def test_no_figure_without_parity(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part: str, module: Any, name: str
) -> None:
    monkeypatch.setattr(module, name, {"fp32": 0.0, "bf16": 0.0})
    assert main(["bench", str(model), "--parts", part, "--seconds", "0", "--no-compile"]) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and "fp32" in streams.err


def test_no_figure_of_an_operation_without_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    work = operations.Work(1, 1, 1)
    work.check()
    work.mu += 1.0  # the native operation sees it as well: no difference
    work.check()
    work.images = 255 - work.images  # only the native operation sees this
    with pytest.raises(InferenceError, match="noise: differs from the reference"):
        work.check()


@pytest.mark.parametrize("arguments", [["--parts", "speed"], ["--seconds", "-1"], ["--seconds", "nan"]])
def test_refuses_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert f"{arguments[0]}: expected" in capsys.readouterr().err


def test_flops_by_hand() -> None:
    """A stem, a block of two convolutions down, two in the middle, two (one wider, with a 1 x 1 skip) up, a head, at 8 x 8."""
    unet = UNetConfig(in_channels=1, base_channels=4, channel_mult=(1,), norm_groups=0, patch=1)
    config = DetectorConfig(unet=unet, image=ImageConfig(height=8, width=8, channels=1))
    weights = {name: np.ones(shape, dtype=np.float32) for name, shape in expected_tensors(unet).items()}
    square = 9 * 4 * 4  # multiplications a pixel of a 3 x 3 convolution from 4 to 4 channels
    blocks = [2 * square] * 3 + [2 * square + square + 8 * 4] * 2
    assert network.flops(config, weights, 3) == 2 * 3 * 64 * (9 * 4 + sum(blocks) + 9 * 4)


def test_contestants_take_turns() -> None:
    calls: list[str] = []
    timings = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0.0, least=3)
    turn = ["a"] * 4 + ["b"] * 4
    assert calls == turn * (len(calls) // 8) and len(calls) >= 5 * 8
    assert set(timings) == {"a", "b"} and timings["a"].p20 <= timings["a"].p99


def test_ratios_are_of_medians() -> None:
    ours, eager = Timing(1.0, 2.0, 3.0, 4.0), Timing(5.0, 9.0, 10.0, 11.0)
    made = row("x", (8, 8), 1, "cpu", "fp32", ours, eager=eager, peak_share=0.5)
    assert made["ratio_eager"] == 4.5 and made["ratio_best_torch"] is None and made["peak_share"] == 0.5
    assert "50 %" in bench.table([made]) and "4.50" in bench.table([made])
