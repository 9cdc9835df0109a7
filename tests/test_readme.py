"""What README shows runs as printed, and the keys it promises are those that are written."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from models import small_model
from PIL import Image

from advrad_fast import batch
from advrad_fast.bench.timing import Timing, row
from advrad_fast.cli import certification
from advrad_fast.line.results import ROW_KEYS

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    first, on_the_line = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADVRAD_CACHE", str(tmp_path / "cache"))
    small_model().save(tmp_path / "bottle.safetensors")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)).save("part.png")
    names: dict[str, object] = {}
    exec(compile(first, "README.md", "exec"), names)  # noqa: S102  (our own text)
    printed = capsys.readouterr().out
    assert re.match(r"(OK|DEFECT) [\d.e+-]+ [\d.]+\n", printed)
    assert printed.startswith("OK") or "defect pixels:" in printed

    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    writer = cv2.VideoWriter("line.avi", cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for level in range(0, 250, 50):
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()
    exec(compile(on_the_line, "README.md", "exec"), names)  # noqa: S102
    with sqlite3.connect("line.db") as database:
        outcomes = [outcome for (outcome,) in database.execute("SELECT outcome FROM inspections ORDER BY sequence")]
    assert len(outcomes) == 5 == len(Path("line.jsonl").read_text().splitlines())
    assert len(capsys.readouterr().out.splitlines()) == sum(outcome != "OK" for outcome in outcomes)


def promised(command: str) -> list[str]:
    (keys,) = re.findall(rf"^\| `{command}`[^|]*\| ([^|]+) \|$", README, re.MULTILINE)
    return [key.strip() for key in keys.split(",")]


def test_promised_keys() -> None:
    assert promised("inspect") == list(batch.ROW_KEYS)
    assert promised("serve") == [*batch.ROW_KEYS, "error", "message"]
    assert promised("stream --jsonl") == list(ROW_KEYS)
    assert promised("bench") == [*row("x", (), 1, "cpu", "fp32", Timing(1, 1, 1, 1)), "details"]


def test_promised_keys_of_certify() -> None:
    assert promised("certify") == list(certification.CERTIFY_KEYS)
