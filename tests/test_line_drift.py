"""The drift test in a stream: in its results, sinks and command line; it changes no outcome."""

from __future__ import annotations

import json
import sqlite3
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import small_model
from PIL import Image
from streams import Memory, detector, frames

from advrad_fast import Detector, cli
from advrad_fast.errors import ConfigError
from advrad_fast.line import Direction, Drift, InspectionStream
from advrad_fast.line.results import ROW_KEYS
from advrad_fast.line.sinks import DriftFile, Prometheus, Sqlite


@pytest.fixture(scope="module")
def model() -> Detector:
    return detector()


@pytest.fixture(scope="module")
def calibration(model: Detector) -> Any:
    """Of 40 frames of the same kind as ``frames``."""
    return np.sort([model.inspect(frame, maps=False).score for frame in frames(40, seed=9)])  # type: ignore[type-var]


def dull(count: int) -> list[Any]:
    return [frame // 8 for frame in frames(count, seed=5)]


def test_a_stream_tells_of_a_drift_and_changes_no_outcome(model: Detector, calibration: Any) -> None:
    drift = Drift(calibration)
    source = [*frames(30), None, *dull(60)]
    with InspectionStream(model, source, drift=drift, maps=False) as stream:
        with_test = list(stream)
    with InspectionStream(model, source, maps=False) as stream:
        without = list(stream)
    assert [(r.outcome, r.score) for r in with_test] == [(r.outcome, r.score) for r in without]
    states = [r.drift for r in with_test]
    assert all(state is not None for state in states) and all(r.drift is None for r in without)
    first = next(i for i, state in enumerate(states) if state is not None and state.alarm)
    state = states[first]
    assert state is not None and 31 < first < 80
    assert state.frames == first  # the frame that was an ERROR was not taken
    assert state.alarm_at == with_test[first].captured_at
    assert states[-1] == drift.state
    row = with_test[-1].row()
    assert row["drift_alarm"] is True and row["drift_direction"] == str(state.direction)
    assert row["drift_since"] == state.alarm_at.isoformat(timespec="microseconds")
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert [without[0].row()[key] for key in ROW_KEYS[-4:]] == [None] * 4


def test_a_drift_test_that_fails_stops_nothing(model: Detector, calibration: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drift = Drift(calibration)

    def fail(*_: object) -> Any:
        raise MemoryError

    monkeypatch.setattr(drift, "update", fail)
    with InspectionStream(model, frames(3), drift=drift) as stream:
        results = list(stream)
    assert [r.drift for r in results] == [drift.state] * 3 and not any(r.error for r in results)
    with pytest.raises(ConfigError, match="drift: expected a Drift"):
        InspectionStream(model, frames(1), drift=calibration)


def test_the_state_is_saved_at_the_alarm_now_and_then_and_at_the_end(
    model: Detector, calibration: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "drift.json"
    saved: list[int] = []
    drift = Drift(calibration)
    save = drift.save
    monkeypatch.setattr(drift, "save", lambda path: (saved.append(drift.state.frames), save(path)))
    with InspectionStream(model, [*frames(5), *dull(60)], drift=drift, sinks=[DriftFile(drift, path, every_s=1e6)]) as stream:
        list(stream)
    assert saved == [drift.state.alarm_frame, 65]
    assert Drift.restore(path, calibration).state == drift.state
    saved.clear()
    with InspectionStream(model, frames(3), drift=drift, sinks=[DriftFile(drift, path, every_s=1e-9)]) as stream:
        list(stream)
    assert len(saved) >= 3
    with pytest.raises(ConfigError, match="every_s"):
        DriftFile(drift, path, every_s=0.0)


def test_a_state_that_cannot_be_saved_is_reported(model: Detector, calibration: Any, tmp_path: Path) -> None:
    drift = Drift(calibration)
    sink = DriftFile(drift, tmp_path / "no folder" / "drift.json", every_s=1e-9)
    with InspectionStream(model, frames(2), drift=drift, sinks=[sink]) as stream:
        results = list(stream)
    assert all("cannot be written" in str(r.unstored[0]) for r in results)
    assert "cannot be written" in str(stream.close()[0])


def test_an_older_database_gets_the_new_columns(model: Detector, calibration: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with InspectionStream(model, frames(2), sinks=[Sqlite(path)]) as stream:
        list(stream)
    with sqlite3.connect(path) as database:  # back to version 1
        for key in ROW_KEYS[-4:]:
            database.execute(f"ALTER TABLE inspections DROP COLUMN {key}")
        database.execute("PRAGMA user_version=1")
    drift = Drift(calibration)
    memory = Memory()
    with InspectionStream(model, dull(40), drift=drift, sinks=[Sqlite(path), memory]) as stream:
        list(stream)
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (2,)
        rows = database.execute(f"SELECT {', '.join(ROW_KEYS)} FROM inspections ORDER BY run, sequence").fetchall()
    old, new = rows[:2], rows[2:]
    assert [row[-4:] for row in old] == [(None,) * 4] * 2
    assert new == [tuple(result.row().values()) for result in memory.taken]
    assert new[-1][-3] == 1


def test_prometheus_serves_the_drift(model: Detector, calibration: Any) -> None:
    sink, drift = Prometheus(0), Drift(calibration)
    with InspectionStream(model, dull(40), drift=drift, sinks=[sink]) as stream:
        list(stream)
        with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics") as response:
            text = response.read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert drift.state.alarm
    assert float(values['advrad_drift_e_value{source="frames"}']) == drift.state.e_value
    for direction in Direction:
        at = f'advrad_drift_alarm{{direction="{direction}",source="frames"}}'
        assert float(values[at]) == (direction is drift.state.direction)


def test_the_command_goes_on_after_a_restart(
    calibration: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADVRAD_CACHE", str(tmp_path / "cache"))
    file, state, folder = tmp_path / "m.safetensors", tmp_path / "drift.json", tmp_path / "camera"
    small_model(calibration_scores=calibration, threshold=1e9).save(file)
    folder.mkdir()
    for i, frame in enumerate(dull(12)):
        Image.fromarray(frame).save(folder / f"{i:02}.png")

    def run(*options: object) -> tuple[int, list[dict[str, Any]], str]:
        common = ("--backend", "cpu", "--precision", "fp32", "--threads", 1, "--existing", "--settle-ms", 0, "--limit", 12)
        code = cli.main(["stream", str(file), str(folder), *map(str, (*common, "--jsonl", "-", *options))])
        captured = capsys.readouterr()
        return code, [json.loads(line) for line in captured.out.splitlines()], captured.err

    kept = ("--drift-state", state)
    values, alarms, said = [], [], ""
    for _ in range(4):
        code, rows, errors = run(*kept)
        assert code == 0  # no outcome, and so no exit code, comes from a drift
        values += [row["drift_e_value"] for row in rows]
        alarms += [row["drift_alarm"] for row in rows]
        said += errors
    assert alarms[0] is False and alarms[-1] is True and alarms == sorted(alarms)
    assert "drift: scores have gone " in said
    drift = Drift.restore(state, calibration)
    assert drift.state.frames == 48 and drift.state.alarm

    code, rows, errors = run(*kept, "--drift-rate", 0.05)
    assert code == 0 and "begins anew" in errors and rows[0]["drift_alarm"] is False
    state.write_text("{}")
    code, rows, errors = run(*kept)
    assert code == 2 and not rows and "drift.json" in errors
    code, rows, _ = run("--no-drift")
    assert code == 0 and rows[0]["drift_e_value"] is None
    assert run("--no-drift", *kept)[0] == 2
    assert run("--drift-rate", 2)[0] == 2
