"""Faults at every step of a stream and of a certificate: an error, or the result without the fault.  Never OK, and no silence."""

from __future__ import annotations

import gc
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from injection import FAULTS, Line, inject, injected_once, lines
from models import certifiable, small_model
from parts import disc, scratched

from advrad_fast import Detector, Outcome
from advrad_fast.errors import AdvRADError
from advrad_fast.line import Frames, InspectionStream
from advrad_fast.line.reader import Reader
from advrad_fast.line.sinks import Background, JsonLines

_rng = np.random.default_rng(1)
FRAMES = [disc(_rng, 32), scratched(_rng, 32)]
# Of files that were opened on the line of the fault.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """What a fault left open is gone before the next test."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def detector() -> Detector:
    made = Detector(certifiable(small_model(spread=True), 0.25), backend="cpu", precision="fp32", threads=1, cache_dir=False)
    made.threshold = 1e-6  # every frame is a DEFECT: an OK is the fault's
    return made


def run(detector: Detector, folder: Path) -> list[Outcome]:
    """A stream of two bad parts; what it says of them."""
    source = Frames(iter(FRAMES))
    with InspectionStream(detector, source, deadline_ms=150, sinks=[JsonLines(folder / "rows.jsonl")]) as stream:
        return [result.outcome for result in itertools.islice(stream, 2)]


def said(folder: Path) -> str:
    path = folder / "rows.jsonl"
    return path.read_text() if path.exists() else ""


def test_a_fault_at_any_line_of_a_stream(detector: Detector, tmp_path: Path) -> None:
    """In the thread that iterates."""

    def action() -> list[Outcome]:
        return run(detector, tmp_path)

    assert action() == [Outcome.DEFECT] * 2
    at = lines(action)
    assert {"InspectionStream._handle", "Reader.get", "JsonLines.write"} <= {line.code.co_qualname for line in at}
    for line, fault in zip(at, itertools.cycle(FAULTS), strict=False):
        try:
            outcomes = inject(action, line, fault("injected"))
        except (fault, AdvRADError):
            continue
        assert len(outcomes) == 2 and set(outcomes) <= {Outcome.DEFECT, Outcome.ERROR}, line
    assert '"OK"' not in said(tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the last lines that the thread runs
def test_a_fault_at_any_line_of_reading(detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the thread that reads: a result that says so, within the deadline."""
    whole: Callable[..., None] = Reader._run
    found: list[Line] = []
    monkeypatch.setattr(Reader, "_run", lambda *arguments: found.extend(lines(lambda: whole(*arguments))))
    assert run(detector, tmp_path) == [Outcome.DEFECT] * 2
    at = list(dict.fromkeys(found))
    assert {"Reader._put", "Reader._sleep", "_Limit.__enter__", "_Copies.__next__"} <= {line.code.co_qualname for line in at}
    for line, fault in zip(at, itertools.cycle(FAULTS), strict=False):
        monkeypatch.setattr(Reader, "_run", injected_once(whole, line, fault("injected")))
        outcomes: list[Outcome] = []
        ended = threading.Thread(target=lambda: outcomes.extend(run(detector, tmp_path)), daemon=True)  # noqa: B023
        ended.start()
        ended.join(30.0)
        assert not ended.is_alive(), f"{line}: silence"
        assert outcomes and set(outcomes) <= {Outcome.DEFECT, Outcome.ERROR}, f"{line}: {outcomes}"
    assert '"OK"' not in said(tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_at_any_line_of_storing(tmp_path: Path, detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sink's own thread: every row is there, or it is said that one is missing."""
    whole: Callable[..., None] = Background._work
    path, found = tmp_path / "rows.jsonl", list[Line]()

    def action() -> bool:
        """Whether both rows are there; fails where one is missing and nothing says so."""
        path.unlink(missing_ok=True)
        sink = Background(JsonLines(path), closing_s=2.0)
        with InspectionStream(detector, FRAMES, sinks=[sink]) as stream:
            told = [error for result in stream for error in result.unstored]
            told += stream.close()
        stored = {json.loads(line)["sequence"] for line in path.read_text().splitlines()} if path.exists() else set()
        assert stored == {0, 1} or told or sink.status.lost, (stored, sink.status)
        return stored == {0, 1}

    monkeypatch.setattr(Background, "_work", lambda sink: found.extend(lines(lambda: whole(sink))))
    assert action()
    at = list(dict.fromkeys(found))
    assert {"Background._work", "JsonLines.write", "Delivery.deliver"} <= {line.code.co_qualname for line in at}
    there = 0
    for line, fault in zip(at, itertools.cycle(FAULTS), strict=False):
        monkeypatch.setattr(Background, "_work", injected_once(whole, line, fault("injected")))
        try:
            there += action()
        except AssertionError as error:
            raise AssertionError(str(line)) from error
    assert there > 0.9 * len(at)


def test_a_fault_at_any_line_of_certifying(detector: Detector) -> None:
    def action() -> Any:
        found = detector.certify(FRAMES[1], sigma=0.25, max_votes=40, seed=3)
        return found.outcome, found.radius, found.votes

    wanted = action()
    at = lines(action)
    assert wanted[0] == "DEFECT" and len(at) > 100
    for line, fault in zip(at, itertools.cycle(FAULTS), strict=False):
        try:
            assert inject(action, line, fault("injected")) == wanted, line
        except (fault, AdvRADError):
            continue
    assert action() == wanted
