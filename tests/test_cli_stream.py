"""``advrad-fast stream``: its output, its exit codes, and how signals end it."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import small_model
from PIL import Image
from streams import frames

from advrad_fast import cli
from advrad_fast.line.results import ROW_KEYS

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    small_model().save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADVRAD_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "camera"
    made.mkdir()
    for i, frame in enumerate(frames(3)):
        Image.fromarray(frame).save(made / f"{i}.png")
    return made


def run(model: Path, source: object, *options: object) -> int:
    common = ("--backend", "cpu", "--precision", "fp32", "--threads", 1)
    return cli.main(["stream", str(model), str(source), *map(str, (*common, *options))])


@pytest.mark.parametrize(("threshold", "code", "outcome"), [(1e9, 0, "OK"), (-1.0, 1, "DEFECT")])
def test_exit_codes_and_rows(
    model: Path, folder: Path, tmp_path: Path, capsys: Capture, threshold: float, code: int, outcome: str
) -> None:
    database = tmp_path / "a.db"
    options = ("--existing", "--settle-ms", 0, "--limit", 3, "--threshold", threshold)
    assert run(model, folder, *options, "--jsonl", "-", "--sqlite", database) == code
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [list(row) for row in rows] == [list(ROW_KEYS)] * 3
    assert [row["outcome"] for row in rows] == [outcome] * 3
    assert sorted(Path(row["item"]).name for row in rows) == ["0.png", "1.png", "2.png"]
    assert f"3 {outcome}" in captured.err and "0 dropped" in captured.err
    with sqlite3.connect(database) as opened:
        assert opened.execute("SELECT count(*) FROM inspections").fetchone() == (3,)
    assert run(model, folder, *options, "--jsonl", tmp_path / "a.jsonl") == code
    assert capsys.readouterr().out.count(outcome) == 3
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 3


def test_a_frame_that_cannot_be_inspected_is_a_failure(model: Path, folder: Path, capsys: Capture) -> None:
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:100])
    assert run(model, folder, "--existing", "--settle-ms", 0, "--limit", 3, "--threshold", 1e9) == 2
    assert "1 ERROR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere", (), "source: expected a folder, a video file"),
        ("folder", ("--deadline-ms", "-5"), "deadline_ms: expected"),
        ("folder", ("--policy", "oldest"), "policy: expected"),
        ("folder", ("--limit", "0"), "--limit: expected"),
        ("folder", ("--mqtt", "http://x"), "--mqtt: expected"),
        ("folder", ("--sqlite", "no/such/folder/a.db"), "unable to open database file"),
        ("genicam:none.cti", (), "genicam"),
    ],
)
def test_what_cannot_be_done(model: Path, folder: Path, capsys: Capture, source: str, options: Any, message: str) -> None:
    assert run(model, folder if source == "folder" else source, *options) == 2
    assert message in capsys.readouterr().err


def test_a_missing_library_names_its_extra(model: Path, folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, options, extra in (
        ("cv2", (), "line"),
        ("paho.mqtt.client", ("--mqtt", "mqtt://127.0.0.1"), "mqtt"),
        ("prometheus_client", ("--prometheus", 0), "prometheus"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        assert run(model, "0" if module == "cv2" else folder, *options) == 2
        assert f"pip install 'advrad-fast[{extra}]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_cleanly(model: Path, folder: Path, tmp_path: Path, name: signal.Signals) -> None:
    """Every line it has printed is in the database, and the exit code is that of what was seen."""
    database = tmp_path / "a.db"
    line = [sys.executable, "-m", "advrad_fast.cli", "stream", model, folder, "--backend", "cpu", "--existing"]
    line += ["--threshold", "1e9", "--sqlite", database, "--jsonl", "-"]
    process = subprocess.Popen([*map(str, line)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = [json.loads(process.stdout.readline()) for _ in range(3)]
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "late.png")
    process.send_signal(name)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "3 OK" in errors or "4 OK" in errors
    assert "Traceback" not in errors
    with sqlite3.connect(database) as opened:
        (count,) = opened.execute("SELECT count(*) FROM inspections").fetchone()
    assert count == len(told) + len(rest.splitlines())


def test_the_help_names_the_command(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["stream", "--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--deadline-ms", "--policy", "--jsonl", "--sqlite", "--mqtt", "--prometheus"))
