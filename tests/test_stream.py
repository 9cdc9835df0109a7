"""Streams: one result a frame, in order, with drops counted; faults are ERROR and the stream goes on."""

from __future__ import annotations

import gc
import itertools
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from streams import Hang, Memory, Scripted, detector, frames, wait_until

from advrad_fast import ConfigError, Detector, ImageError, InferenceError, Outcome
from advrad_fast.errors import SourceError, SourceStalledError
from advrad_fast.line import IDLE, Backoff, Calls, Frame, Frames, InspectionStream
from advrad_fast.line.reader import MAX_FAULTS

QUICK = Backoff(first=0.001, cap=0.002)


@pytest.fixture(scope="module")
def model() -> Detector:
    return detector()


@pytest.fixture
def hang() -> Iterator[Hang]:
    made = Hang()
    yield made
    made.release.set()


def test_one_result_a_frame_equal_to_inspect(model: Detector) -> None:
    given = frames(20)
    with InspectionStream(model, given) as stream:
        results = list(stream)
    assert [r.sequence for r in results] == list(range(20))
    for frame, result in zip(given, results, strict=True):
        alone = model.inspect(frame)
        assert (result.outcome, result.score, result.error, result.dropped) == (alone.outcome, alone.score, None, 0)
        assert result.inspection.anomaly_map is not None and alone.anomaly_map is not None
        assert np.array_equal(result.inspection.anomaly_map, alone.anomaly_map)
        assert np.array_equal(result.frame, frame)  # type: ignore[arg-type]
        assert (result.source, result.run) == ("frames", stream.run)
        assert result.captured_at.utcoffset() is not None and result.latency_ms > 0.0
    status = stream.status
    assert sum(status.outcomes.values()) == status.read == 20
    assert (status.dropped, status.faults, status.opened, status.hanging, status.connected) == (0, 0, 1, 0, False)


def test_bad_frames_are_errors_and_the_stream_goes_on(model: Detector) -> None:
    good = frames(1)[0]
    unreadable = Frame(None, item="cut.png", error=ImageError("cut short"))
    given: list[Any] = [good, None, np.full((8, 8), np.nan), "text", unreadable, np.zeros((0, 4), np.uint8), good]
    with InspectionStream(model, given) as stream:
        results = list(stream)
    assert [r.outcome is Outcome.ERROR for r in results] == [False, True, True, True, True, True, False]
    assert all(isinstance(r.error, ImageError) and r.score is None for r in results[1:-1])
    assert (results[4].item, str(results[4].error)) == ("cut.png", "cut short")
    assert results[1].inspection.threshold == model.threshold
    assert stream.status.outcomes[Outcome.ERROR] == 5


@pytest.mark.parametrize("failure", [MemoryError("out"), ZeroDivisionError(), InferenceError("engine")])
def test_an_engine_that_fails_is_an_error_and_the_stream_goes_on(
    model: Detector, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    given = frames(3)
    inspect = model.inspect

    def failing(frame: Any, **options: Any) -> Any:
        if np.array_equal(frame, given[1]):
            raise failure
        return inspect(frame, **options)

    monkeypatch.setattr(model, "inspect", failing)
    with InspectionStream(model, given) as stream:
        results = list(stream)
    assert [r.outcome is Outcome.ERROR for r in results] == [False, True, False]
    assert isinstance(results[1].error, InferenceError)
    assert failure in (results[1].error, results[1].error.__cause__)


def test_an_iterable_may_use_its_memory_again(model: Detector) -> None:
    given, buffer = frames(12), np.zeros((32, 32, 3), np.uint8)

    def reused() -> Iterator[Any]:
        for frame in given:
            buffer[:] = frame
            yield buffer

    with InspectionStream(model, reused()) as stream:
        assert [r.score for r in stream] == [model.inspect(frame).score for frame in given]


def test_newest_drops_and_counts(model: Detector) -> None:
    """While one frame is inspected, 30 more come: the last of them is next."""
    given, more = frames(31), threading.Event()

    def camera() -> Iterator[Any]:
        yield given[0]
        more.wait(20.0)
        yield from given[1:]

    with InspectionStream(model, Frames(camera(), live=True)) as stream:
        first = next(stream)
        more.set()
        wait_until(lambda: stream.status.read == 31)
        second = next(stream)
        assert (first.sequence, first.dropped) == (0, 0)
        assert (second.sequence, second.dropped) == (30, 29)
        assert second.score == model.inspect(given[30]).score
        assert list(stream) == []
    assert (stream.status.dropped, sum(stream.status.outcomes.values())) == (29, 2)


def test_the_policy_can_be_chosen(model: Detector) -> None:
    with InspectionStream(model, iter(frames(9)), policy="newest") as stream:
        wait_until(lambda: stream.status.read == 9)
        assert [r.sequence for r in stream] == [8]


def test_a_full_queue_is_filled_again_once_half_of_it_is_taken(model: Detector) -> None:
    """In bursts: waking the thread that reads for every frame costs the engine a core for longer than the reading does."""
    with InspectionStream(model, itertools.repeat(frames(1)[0]), policy="queue", capacity=8) as stream:
        wait_until(lambda: stream.status.read == 8)
        for taken in (1, 2, 3):
            assert next(stream).sequence == taken - 1
        time.sleep(0.05)
        assert stream.status.read == 8
        next(stream)
        wait_until(lambda: stream.status.read == 12)


@pytest.mark.parametrize(("policy", "capacity", "alive"), [("queue", 3, 4), ("newest", 3, 1)])
def test_memory_is_bounded(model: Detector, policy: Any, capacity: int, alive: int) -> None:
    """A source without end, and nobody who takes: the frames that are alive are those that wait, and one in hand."""
    made: list[weakref.ref[Any]] = []

    def endless() -> Iterator[Any]:
        for i in range(200):
            frame = np.full((32, 32, 3), i, np.uint8)
            made.append(weakref.ref(frame))
            yield frame
            del frame

    with InspectionStream(model, Frames(endless(), copy=False), policy=policy, capacity=capacity) as stream:
        wait_until(lambda: stream.status.read == (200 if policy == "newest" else capacity))
        wait_until(lambda: sum(ref() is not None for ref in made) == alive)
        if policy == "queue":
            for _ in range(50):
                next(stream)
        gc.collect()
        assert sum(ref() is not None for ref in made) <= capacity + 2


def test_frames_lost_at_the_source_are_counted(model: Detector) -> None:
    a, b = frames(2)
    with InspectionStream(model, [Frame(a), Frame(b, lost=3)]) as stream:
        assert [(r.sequence, r.dropped) for r in stream] == [(0, 0), (4, 3)]
    assert stream.status.dropped == 3


def test_a_source_that_fails_is_opened_again(model: Detector) -> None:
    a, b, c = frames(3)

    def breaks() -> Iterator[Any]:
        yield a
        raise OSError("cable pulled")

    def refused() -> Iterator[Any]:
        raise SourceError("no answer")

    def whole() -> Iterator[Any]:
        yield b
        yield c

    source = Scripted(breaks, refused, refused, whole)
    with InspectionStream(model, source, backoff=QUICK) as stream:
        results = list(stream)
    assert [r.outcome is Outcome.ERROR for r in results] == [False, True, True, True, False, False]
    assert [str(r.error) for r in results[1:4]] == ["scripted: OSError: cable pulled", "no answer", "no answer"]
    assert isinstance(results[1].error, SourceError) and isinstance(results[1].error.__cause__, OSError)
    assert [r.sequence for r in results] == list(range(6))
    assert results[1].frame is None and results[1].inspection.score is None
    assert (stream.status.faults, stream.status.opened) == (3, 2)


def test_even_an_exit_in_a_source_is_a_fault(model: Detector) -> None:
    def leaves() -> Iterator[Any]:
        raise SystemExit(3)
        yield

    with InspectionStream(model, Scripted(leaves, lambda: iter([])), backoff=QUICK) as stream:
        (result,) = stream
    assert (result.outcome, str(result.error)) == (Outcome.ERROR, "scripted: SystemExit: 3")


def test_pauses_double_up_to_a_cap() -> None:
    steady = Backoff(first=0.5, cap=3.0, jitter=0.0)
    assert [steady.pause(n) for n in (1, 2, 3, 4, 5, 10_000)] == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0]
    drawn = [Backoff(first=1.0, cap=1.0, jitter=0.5).pause(1) for _ in range(200)]
    assert 0.5 <= min(drawn) < 0.6 and 0.9 < max(drawn) <= 1.0
    for bad in ({"first": 0.0}, {"first": 2.0, "cap": 1.0}, {"jitter": 1.1}, {"cap": math.nan}):
        with pytest.raises(ConfigError, match="backoff"):
            Backoff(**bad)


def stalls(model: Detector, count: int, deadline_ms: float) -> list[float]:
    """Milliseconds from the beginning of a read that hangs to the ERROR, ``count`` times, with a frame before each."""
    hangs = [Hang() for _ in range(count)]
    frame = frames(1)[0]

    def connection(hang: Hang) -> Any:
        def script() -> Iterator[Any]:
            yield frame
            hang()

        return script

    source = Scripted(*(connection(hang) for hang in hangs), lambda: iter([]))
    took = []
    with InspectionStream(model, source, deadline_ms=deadline_ms, backoff=QUICK, max_hanging=count) as stream:
        for number, result in enumerate(stream):
            assert (result.outcome is Outcome.ERROR) == (number % 2 == 1)
            if number % 2 == 1:
                assert isinstance(result.error, SourceStalledError)
                took.append(1e3 * (time.monotonic() - hangs[number // 2].since[0]))
        assert stream.status.hanging == count
        for hang in hangs:
            hang.release.set()
        wait_until(lambda: stream.status.hanging == 0)
    assert (len(took), stream.status.faults) == (count, count)
    return took


def test_a_read_that_hangs_is_an_error_in_time(model: Detector) -> None:
    took = stalls(model, 10, 200.0)
    assert all(200.0 <= ms < 400.0 for ms in took), took


@pytest.mark.slow
def test_a_hundred_stalls_are_reported_within_the_deadline_and_100_ms(model: Detector) -> None:
    took = stalls(model, 100, 200.0)
    assert all(200.0 <= ms <= 300.0 for ms in took), took


def test_opening_that_hangs_is_an_error(model: Detector, hang: Hang) -> None:
    class Source(Scripted):
        def open(self) -> Iterator[Any]:
            self.opened += 1
            if self.opened == 1:
                hang()
            return iter(frames(1))

    with InspectionStream(model, Source(), deadline_ms=None, open_timeout_ms=200.0, backoff=QUICK) as stream:
        results = list(stream)
    assert [type(r.error) for r in results] == [SourceStalledError, type(None)]
    assert "opening it did not return within 200 ms" in str(results[0].error)


def test_threads_that_hang_are_bounded_and_the_last_is_waited_for(model: Detector, hang: Hang) -> None:
    frame = frames(1)[0]

    def hangs() -> Iterator[Any]:
        hang()
        yield frame

    source = Scripted(hangs)
    with InspectionStream(model, source, deadline_ms=10.0, backoff=QUICK, max_hanging=2) as stream:
        results = [next(stream) for _ in range(12)]
        assert all(isinstance(r.error, SourceStalledError) for r in results)
        assert (source.opened, stream.status.hanging) == (3, 2)
        hang.release.set()
        assert next(r for r in stream if r.error is None).outcome is not Outcome.ERROR
        wait_until(lambda: stream.status.hanging == 0)


@pytest.mark.parametrize("kind", [Frames, Calls])
def test_what_cannot_be_opened_again_is_reported_and_waited_for(model: Detector, hang: Hang, kind: Any) -> None:
    a, b = frames(2)
    given = iter([a, None, b])

    def read() -> Any:
        frame = next(given)
        if frame is None:
            hang()
            frame = next(given)
        return frame

    source: Any = Calls(read, live=False) if kind is Calls else Frames(read() for _ in range(2))
    with InspectionStream(model, source, deadline_ms=100.0, backoff=QUICK) as stream:
        results = [next(stream) for _ in range(4)]
        assert [type(r.error) for r in results] == [type(None), *[SourceStalledError] * 3]
        assert (stream.status.hanging, stream.status.connected) == (0, False)
        hang.release.set()
        rest = list(stream)
    assert [r.score for r in rest if r.error is None] == [model.inspect(b).score]


def test_nothing_yet_is_no_fault(model: Detector) -> None:
    a, b = frames(2)

    def triggered() -> Iterator[Any]:
        yield a
        for _ in range(60):
            time.sleep(0.02)
            yield IDLE
        yield b

    with InspectionStream(model, triggered(), deadline_ms=800.0) as stream:
        assert [(r.sequence, r.error) for r in stream] == [(0, None), (1, None)]


def test_a_call_that_raises_is_called_again(model: Detector) -> None:
    frame = frames(1)[0]
    answers = iter([frame, OSError("once"), frame, StopIteration()])

    def grab() -> Any:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with InspectionStream(model, grab, policy="queue", backoff=QUICK) as stream:
        assert [str(r.error) for r in stream] == ["None", "frames: OSError: once", "None"]


def test_faults_that_nobody_takes_are_bounded(model: Detector) -> None:
    def refused() -> Iterator[Any]:
        raise SourceError("no answer")

    with InspectionStream(model, Scripted(refused), backoff=Backoff(first=1e-5, cap=1e-5)) as stream:
        wait_until(lambda: stream.status.faults > 3 * MAX_FAULTS)
        assert stream.status.read - stream.status.dropped <= MAX_FAULTS
        result = next(stream)
    assert result.outcome is Outcome.ERROR and result.dropped == result.sequence > MAX_FAULTS


def test_the_wall_clock_may_jump(model: Detector, monkeypatch: pytest.MonkeyPatch, hang: Hang) -> None:
    """Backwards by a year at every look: neither latencies nor the deadline notice."""
    clock = [time.time()]

    def jumping() -> float:
        clock[0] -= 3e7
        return clock[0]

    monkeypatch.setattr(time, "time", jumping)

    def one() -> Iterator[Any]:
        yield frames(1)[0]
        hang()

    with InspectionStream(model, Scripted(one, lambda: iter([])), deadline_ms=200.0, backoff=QUICK) as stream:
        results = list(stream)
    assert [r.outcome is Outcome.ERROR for r in results] == [False, True]
    assert all(0.0 <= r.latency_ms < 60_000.0 for r in results)


def test_stop_from_another_thread_and_in_a_wait(model: Detector) -> None:
    blocked = threading.Event()
    with InspectionStream(model, Calls(lambda: blocked.wait(60.0)), deadline_ms=None) as stream:
        threading.Timer(0.05, stream.stop).start()
        assert list(stream) == []
        blocked.set()
    with pytest.raises(StopIteration):
        next(stream)


def test_threads_end_with_the_stream(model: Detector) -> None:
    before = set(threading.enumerate())
    for _ in range(5):
        with InspectionStream(model, lambda: frames(1)[0]) as stream:
            next(stream)
    assert set(threading.enumerate()) <= before


def test_several_threads_share_the_results(model: Detector) -> None:
    given, results = frames(60), []
    with InspectionStream(model, given) as stream:
        threads = [threading.Thread(target=lambda: results.extend(stream)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    results.sort(key=lambda r: r.sequence)
    assert [r.score for r in results] == [model.inspect(frame).score for frame in given]


def test_sinks_get_every_result_in_order_and_are_closed_once(model: Detector) -> None:
    sinks = [Memory(), Memory(retry=False)]
    with InspectionStream(model, [*frames(3), None], sinks=sinks) as stream:
        results = list(stream)
    assert stream.close() == ()
    for sink in sinks:
        assert [s.sequence for s in sink.taken] == [r.sequence for r in results] == [0, 1, 2, 3]
        assert sink.closed == 1


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[("deadline_ms", value) for value in (0, -1, math.nan, math.inf, True, "1", 4e6)],
        *[("open_timeout_ms", value) for value in (0, None)],
        *[("capacity", value) for value in (0, 1.0, True, 10_001)],
        ("max_hanging", -1),
        ("policy", "oldest"),
        ("sinks", [print]),
    ],
)
def test_arguments_that_are_refused(model: Detector, argument: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{argument}: expected"):
        InspectionStream(model, [], **{argument: value})


def test_sources_and_detectors_that_are_refused(model: Detector) -> None:
    for source in ("folder", 3, None):
        with pytest.raises(ConfigError, match="source: expected"):
            InspectionStream(model, source)
    with pytest.raises(ConfigError, match="detector: expected"):
        InspectionStream(object(), [])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="function: expected"):
        Calls(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="iterable: expected"):
        Frames("text")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_stream_does_not_hang_in_a_forked_child(model: Detector) -> None:
    script = _SCRIPTS["fork"]
    done = run(script)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


_START = """
import os, sys, threading, time
import numpy as np
from streams import detector
from advrad_fast.errors import SourceError
from advrad_fast.line import Calls, InspectionStream
model = detector()
frame = np.zeros((32, 32, 3), np.uint8)
def grab():
    time.sleep(0.001)
    return frame
"""

_SCRIPTS = {
    "never closed": "stream = InspectionStream(model, grab)\nnext(stream)",
    "exit in the loop": "for result in InspectionStream(model, grab):\n    sys.exit(0)",
    "a read that hangs": "stream = InspectionStream(model, lambda: time.sleep(1e6), deadline_ms=20)\nnext(stream)",
    "read in a thread": (
        "stream = InspectionStream(model, grab)\n"
        "threading.Thread(target=lambda: [None for _ in stream], daemon=True).start()\n"
        "time.sleep(0.1)"
    ),
    "fork": (
        "from streams import Memory\nsink = Memory()\n"
        "stream = InspectionStream(model, grab, sinks=[sink])\nnext(stream)\nchild = os.fork()\n"
        "if child == 0:\n"
        "    try:\n        next(stream)\n"
        "    except SourceError as error:\n        refused = 'does not survive a fork' in str(error)\n"
        "    stream.close()\n"
        "    sys.exit(0 if refused and sink.closed == 0 else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0"
    ),
}


def run(script: str) -> subprocess.CompletedProcess[str]:
    here = os.path.dirname(__file__)  # noqa: PTH120
    environment = {**os.environ, "PYTHONPATH": here}
    line = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", _START + script]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize("case", [case for case in _SCRIPTS if case != "fork"])
def test_the_interpreter_exits_cleanly(case: str) -> None:
    done = run(_SCRIPTS[case])
    stderr = "".join(line for line in done.stderr.splitlines() if "did not return within" not in line)
    assert (done.returncode, stderr) == (0, ""), done.stderr
