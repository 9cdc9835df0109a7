"""What README shows runs as printed, and the keys it promises are those that are written."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from models import small_model
from PIL import Image

from advrad_fast.bench.timing import Timing, row
from advrad_fast.cli import certification, inspection

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADVRAD_CACHE", str(tmp_path / "cache"))
    small_model().save(tmp_path / "bottle.safetensors")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)).save("part.png")
    exec(compile(example, "README.md", "exec"), {})  # noqa: S102  (our own text)
    printed = capsys.readouterr().out
    assert re.match(r"(OK|DEFECT) [\d.e+-]+ [\d.]+\n", printed)
    assert printed.startswith("OK") or "defect pixels:" in printed


def promised(command: str) -> list[str]:
    (keys,) = re.findall(rf"^\| `{command}`[^|]*\| ([^|]+) \|$", README, re.MULTILINE)
    return [key.strip() for key in keys.split(",")]


def test_promised_keys() -> None:
    assert promised("inspect") == list(inspection.INSPECT_KEYS)
    assert promised("bench") == [*row("x", (), 1, "cpu", "fp32", Timing(1, 1, 1, 1)), "details"]


def test_promised_keys_of_certify() -> None:
    assert promised("certify") == list(certification.CERTIFY_KEYS)
