"""Where results go: what was handed over is there after a crash, and what was not is counted, shown and offered again."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from streams import Memory, detector, frames, wait_until

from advrad_fast import ConfigError, Detector, Outcome
from advrad_fast.errors import SinkError
from advrad_fast.line import Backoff, InspectionStream, StreamInspection
from advrad_fast.line.results import ROW_KEYS
from advrad_fast.line.sinks import Background, Callback, Delivery, JsonLines, Sqlite

AT_ONCE = Backoff(first=1e-9, cap=1e-9)


@pytest.fixture(scope="module")
def model() -> Detector:
    return detector()


@pytest.fixture(scope="module")
def results(model: Detector) -> list[StreamInspection]:
    with InspectionStream(model, [*frames(5), None]) as stream:
        return list(stream)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows(path: Path) -> list[dict[str, Any]]:
    with sqlite3.connect(path) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute("SELECT * FROM inspections ORDER BY run, sequence")]


def test_rows_have_the_promised_keys_and_can_be_json(results: list[StreamInspection]) -> None:
    for result in results:
        row = result.row()
        assert tuple(row) == ROW_KEYS
        assert json.loads(json.dumps(row, allow_nan=False)) == row
    good, bad = results[0].row(), results[-1].row()
    assert (good["outcome"], good["error"], good["sequence"]) == (str(results[0].outcome), None, 0)
    assert good["captured_at"].endswith("+00:00")  # type: ignore[union-attr]
    assert (bad["outcome"], bad["score"], bad["error"]) == ("ERROR", None, "ImageError")
    assert "frame: expected" in str(bad["message"])


@pytest.mark.parametrize("kind", [JsonLines, Sqlite])
def test_every_result_is_there_before_it_is_given_out(model: Detector, tmp_path: Path, kind: Any) -> None:
    path, read = tmp_path / "out", lines if kind is JsonLines else rows
    for repeat in range(2):  # the second stream goes on in the same file
        with InspectionStream(model, [*frames(3), None], sinks=[kind(path)]) as stream:
            for result in stream:
                there = [row for row in read(path) if row["run"] == stream.run]
                assert there[-1] == result.row()
                assert len(there) == result.sequence + 1
        assert len(read(path)) == 4 * (repeat + 1)


def test_sqlite_rows_go_in_once(results: list[StreamInspection], tmp_path: Path) -> None:
    sink = Sqlite(tmp_path / "a.db")
    for result in [*results, *results]:
        sink.write(result)
    sink.close()
    assert rows(tmp_path / "a.db") == [result.row() for result in results]
    with sqlite3.connect(tmp_path / "a.db") as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_sqlite_keeps_a_name_that_is_not_utf8(results: list[StreamInspection], tmp_path: Path) -> None:
    sink = Sqlite(tmp_path / "kept")
    sink.write(dataclasses.replace(results[0], item="\udce9.png"))
    sink.close()
    assert [row["item"] for row in rows(tmp_path / "kept")] == ["\\udce9.png"]


def test_sqlite_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database" * 100)
    with sqlite3.connect(tmp_path / "other.db") as database:
        database.execute("CREATE TABLE parts (a)")
    with sqlite3.connect(tmp_path / "newer.db") as database:
        database.execute("CREATE TABLE inspections (a)")
        database.execute("PRAGMA user_version=3")
    for name in ("text", "other.db", "newer.db", "none/a.db"):
        with pytest.raises(SinkError, match=name):
            Sqlite(tmp_path / name)
    with sqlite3.connect(tmp_path / "other.db") as database:
        assert database.execute("SELECT name FROM sqlite_master").fetchall() == [("parts",)]
    with pytest.raises(SinkError, match="Is a directory"):
        JsonLines(tmp_path)


def test_a_locked_database_is_offered_the_rows_again(model: Detector, tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    sink = Sqlite(path, busy_ms=1.0)
    other = sqlite3.connect(path, isolation_level=None)
    with InspectionStream(model, frames(4), sinks=[sink]) as stream:
        assert next(stream).unstored == ()
        other.execute("BEGIN IMMEDIATE")
        locked = next(stream)
        assert [str(e) for e in locked.unstored] == [f"sqlite {path}: database is locked"]
        assert locked.outcome is not Outcome.ERROR  # of the part nothing is wrong
        assert next(stream).unstored
        status = stream.status.sinks[0]
        assert (status.taken, status.waiting, status.lost) == (1, 2, 0) and status.failures >= 1
        other.execute("ROLLBACK")
        other.close()
        assert next(stream).sequence == 3
    assert [row["sequence"] for row in rows(path)] == [0, 1, 2, 3]


def test_a_line_that_was_cut_short_is_ended_first(results: list[StreamInspection], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"run": "x"}\n{"run": "y", "seq')
    sink = JsonLines(path, fsync=True)
    sink.write(results[0])
    sink.close()
    text = path.read_text().splitlines()
    assert text[1] == '{"run": "y", "seq'
    assert json.loads(text[2]) == results[0].row()


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full and file size limits are Linux's")
def test_a_full_disk_leaves_no_half_line_and_loses_none(results: list[StreamInspection], tmp_path: Path) -> None:
    """The limit on a file's size stands in for a full disk: a write gets through in part, then fails."""
    import resource

    path = tmp_path / "a.jsonl"
    delivery = Delivery(JsonLines(path), backoff=AT_ONCE)
    assert delivery.deliver(results[0]) is None
    size = path.stat().st_size
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
        for result in results[1:3]:
            assert isinstance(delivery.deliver(result), SinkError)
        assert path.stat().st_size == size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert (delivery.status.waiting, delivery.status.failures) == (2, 2)
    assert delivery.deliver(results[3]) is None
    assert delivery.close() is None
    assert lines(path) == [result.row() for result in results[:4]]


def test_what_a_sink_refuses_is_kept_offered_again_in_order_and_bounded(results: list[StreamInspection]) -> None:
    broken = [True]
    sink = Memory(fail=lambda result: broken[0])
    delivery = Delivery(sink, backoff=AT_ONCE, waiting=3)
    for result in results[:5]:
        error = delivery.deliver(result)
        assert isinstance(error, SinkError) and str(error) == "memory: OSError: no space left"
    assert (delivery.status.taken, delivery.status.waiting, delivery.status.lost) == (0, 3, 2)
    broken[0] = False
    assert delivery.deliver(results[5]) is None
    assert [r.sequence for r in sink.taken] == [2, 3, 4, 5]
    assert sink.taken[0].inspection.anomaly_map is None and sink.taken[0].frame is None  # no frames pile up
    assert sink.taken[-1].inspection.outcome is Outcome.ERROR
    assert (delivery.status.taken, delivery.status.waiting) == (4, 0)
    assert delivery.close() is None


def test_while_a_sink_fails_it_is_not_asked_with_every_frame(results: list[StreamInspection]) -> None:
    sink = Memory(fail=lambda result: True)
    delivery = Delivery(sink, backoff=Backoff(first=1000.0, cap=1000.0))
    assert all(delivery.deliver(result) is not None for result in results)
    assert (delivery.status.failures, delivery.status.waiting) == (1, len(results))
    error = delivery.close()
    assert error is not None and f"{len(results)} results were not stored" in str(error)
    assert (delivery.status.waiting, delivery.status.lost, sink.closed) == (0, len(results), 1)


def test_a_callback_gets_everything_and_may_fail(model: Detector) -> None:
    seen: list[StreamInspection] = []

    def function(result: StreamInspection) -> None:
        seen.append(result)
        if result.sequence == 1:
            raise KeyError("bug")

    with InspectionStream(model, frames(3), sinks=[Callback(function)]) as stream:
        results = list(stream)
    assert [len(r.unstored) for r in results] == [0, 1, 0]
    assert isinstance(results[1].unstored[0].__cause__, KeyError)
    assert [s.sequence for s in seen] == [0, 1, 2]
    assert seen[0].frame is not None and seen[0].inspection.anomaly_map is not None
    (status,) = stream.status.sinks
    assert (status.taken, status.failures, status.waiting, status.lost) == (2, 1, 0, 1)
    with pytest.raises(ConfigError, match="function: expected"):
        Callback("function")  # type: ignore[arg-type]


def test_a_sink_that_hangs_in_the_background_holds_up_nothing(model: Detector) -> None:
    hang, sink = threading.Event(), Memory(fail=lambda result: not hang.wait(60.0))
    background = Background(sink, waiting=3, closing_s=0.05)
    with InspectionStream(model, frames(5), sinks=[background]) as stream:
        results = list(stream)
        status = stream.status.sinks[0]
        assert (status.taken, status.waiting, status.lost) == (0, 3, 2)
        assert [len(r.unstored) for r in results] == [0, 0, 0, 1, 1]
    (problem,) = stream.close()
    assert "did not take 3 results within 0.05 s" in str(problem)
    assert stream.status.sinks[0].lost == 5
    hang.set()


def test_a_background_sink_without_a_thread_says_so_and_stores_later(
    results: list[StreamInspection], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    sink = Memory()
    background = Background(sink)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert "no thread to be had" in str(background.deliver(results[0]))
    assert background.status.waiting == 1
    assert background.close() is None
    assert [row.sequence for row in sink.taken] == [results[0].sequence]


def test_the_background_brings_all_in_order_and_waits_at_the_end(model: Detector) -> None:
    refused = [0]

    def fail(result: StreamInspection) -> bool:
        refused[0] += 1
        return refused[0] <= 2

    sink = Memory(fail=fail)
    with InspectionStream(model, frames(20), sinks=[Background(sink)]) as stream:
        wanted = [result.sequence for result in stream]
        wait_until(lambda: stream.status.sinks[0].waiting == 0)  # offered again though nothing new comes
    assert stream.close() == ()
    assert [r.sequence for r in sink.taken] == wanted and sink.closed == 1
    status = stream.status.sinks[0]
    assert (status.taken, status.failures, status.waiting, status.lost) == (20, 2, 0, 0)
    for arguments in ({"sink": print}, {"sink": sink, "waiting": 0}):
        with pytest.raises(ConfigError, match="expected"):
            Background(**arguments)


_WRITER = """
import sys
from streams import detector, frames
from advrad_fast.line import InspectionStream
from advrad_fast.line.sinks import JsonLines, Sqlite
frame = frames(1)[0]
kind, _, fsync = sys.argv[1].partition(" ")
sink = {"sqlite": Sqlite, "jsonl": JsonLines}[kind](sys.argv[2], fsync=bool(fsync))
with InspectionStream(detector(), lambda: frame, policy="queue", maps=False, sinks=[sink]) as stream:
    for result in stream:
        sys.stdout.write(f"{result.run} {result.sequence} {len(result.unstored)}\\n")
        sys.stdout.flush()
"""


@pytest.mark.parametrize("kind", ["sqlite", "sqlite fsync", "jsonl"])
@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_no_acknowledged_row_is_lost_to_kill_9(tmp_path: Path, kind: str, kills: int) -> None:
    path, chance = tmp_path / "out", random.Random(1)
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}  # noqa: PTH120
    acknowledged: set[tuple[str, int]] = set()
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, kind, str(path)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.3))
        process.kill()
        told = [line.split() for line in [first, *process.stdout] if line.endswith("\n")]
        process.wait()
        process.stdout.close()
        assert told and all(unstored == "0" for _, _, unstored in told)
        acknowledged |= {(run, int(sequence)) for run, sequence, _ in told}
    if kind.startswith("sqlite"):
        with sqlite3.connect(path) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        stored = rows(path)
    else:  # a line that was being written may be cut short; none that was acknowledged
        stored = []
        for line in path.read_text().splitlines():
            try:
                stored.append(json.loads(line))
            except json.JSONDecodeError:
                assert not line.endswith("}")
    keys = [(row["run"], row["sequence"]) for row in stored]
    assert len(keys) == len(set(keys))
    assert acknowledged <= set(keys)
    assert len(set(keys) - acknowledged) <= kills  # at most the one that was in hand
