"""The stream: a detector on a source of frames, for as long as the line runs."""

from __future__ import annotations

import atexit
import logging
import secrets
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self

from advrad_fast import checks
from advrad_fast.detector import Detector, Inspection, Outcome
from advrad_fast.errors import AdvRADError, ConfigError, InferenceError, SinkError, expected
from advrad_fast.line.backoff import Backoff
from advrad_fast.line.drift import Drift, DriftState
from advrad_fast.line.frames import as_source
from advrad_fast.line.reader import STOPPING, Event, Reader, ReaderSettings
from advrad_fast.line.results import StreamInspection
from advrad_fast.line.sinks.background import Background
from advrad_fast.line.sinks.base import Sink
from advrad_fast.line.sinks.delivery import Delivery, SinkStatus

_log = logging.getLogger(__name__)

Policy = Literal["auto", "newest", "queue"]
POLICIES: tuple[Policy, ...] = ("auto", "newest", "queue")


@dataclass(frozen=True)
class StreamStatus:
    """A stream's counts so far.

    Attributes:
        outcomes: results by outcome.
        read: frames and faults that the source has given.
        dropped: those that were not inspected.
        faults: of the source: stalls, failed reads, failed attempts to open it.
        opened: how often the source was opened.
        hanging: reads that were given up and have not returned yet, each with its thread.
        connected: whether the source's last sign was one of life.
        sinks: each one's counts.
    """

    outcomes: Mapping[Outcome, int]
    read: int
    dropped: int
    faults: int
    opened: int
    hanging: int
    connected: bool
    sinks: tuple[SinkStatus, ...]


class InspectionStream:
    """Inspects what a source gives, one result a frame, until the source ends or :meth:`stop` is called.

    >>> with InspectionStream(detector, Camera(0), deadline_ms=200, sinks=[Sqlite("line.db")]) as stream:
    ...     for inspection in stream:
    ...         gate.open() if inspection.outcome is Outcome.OK else gate.close()

    A frame that breaks the contract, a source that hangs, fails or cannot be opened, and an engine that fails are results too,
    with the outcome ERROR, and the stream goes on.  A source is read in a thread of its own; inspecting and storing happen in
    the thread that iterates, before the result is given out.  Several threads may iterate over one stream: each result goes
    to one of them.

    Args:
        detector: what inspects.
        source: one of :mod:`advrad_fast.line`, an iterable, or a callable.
        deadline_ms: how long a read may take.  Then a result with the outcome ERROR comes, and the source is opened again
            in another thread; an iterable or a callable, which cannot be, is waited for, and reported again.  None for a source
            that may rightly block for any time.
        policy: ``newest``: a frame that is still waiting when the next one comes is dropped and counted.  ``queue``: none is
            dropped, the source has to wait.  ``auto``: newest for live sources, queue for others.
        sinks: where results go, in this order; closed with the stream.  One that fails does not stop the inspection: see
            ``StreamInspection.unstored`` and :attr:`status`.  One that may be slow or hang belongs into a ``Background``.
        maps: also compute anomaly maps and masks.
        drift: gets every score, in the order of the results; what it says is in ``StreamInspection.drift``.  It changes no
            outcome, and an error in it stops nothing.  ``sinks.DriftFile`` keeps its state.
        self_test: run ``Detector.self_test`` before the first frame; while it fails, every frame is an ERROR, and it is run again
            before the next one.
        capacity: frames that may wait with the policy ``queue``; once so many do, the source is read again when half are taken.
        open_timeout_ms: how long opening the source may take.
        backoff: pauses before a source that failed is opened again.
        max_hanging: reads that may hang at the same time, each in a thread that was given up; beyond it the last is waited
            for.

    Raises:
        ConfigError: an argument is out of range or of the wrong type.
    """

    def __init__(
        self,
        detector: Detector,
        source: object,
        *,
        deadline_ms: float | None = 1000.0,
        policy: Policy = "auto",
        sinks: Sequence[Sink | Background] = (),
        maps: bool = True,
        drift: Drift | None = None,
        self_test: bool = True,
        capacity: int = 8,
        open_timeout_ms: float = 10_000.0,
        backoff: Backoff | None = None,
        max_hanging: int = 4,
    ) -> None:
        if not callable(getattr(detector, "inspect", None)):
            raise ConfigError(expected("detector", "a Detector", type(detector)))
        if not isinstance(policy, str) or policy not in POLICIES:
            raise ConfigError(expected("policy", f"one of {list(POLICIES)}", policy))
        if drift is not None and not isinstance(drift, Drift):
            raise ConfigError(expected("drift", "a Drift", type(drift)))
        if backoff is not None and not isinstance(backoff, Backoff):
            raise ConfigError(expected("backoff", "a Backoff", type(backoff)))
        if not isinstance(sinks, Sequence) or not all(isinstance(sink, Sink | Background) for sink in sinks):
            raise ConfigError(expected("sinks", "a list of sinks of advrad_fast.line.sinks", sinks))
        self._detector, self._source, self._drift = detector, as_source(source), drift
        self._maps = checks.truth("maps", maps)
        settings = ReaderSettings(
            deadline=None if deadline_ms is None else _seconds("deadline_ms", deadline_ms),
            open_timeout=_seconds("open_timeout_ms", open_timeout_ms),
            newest=policy == "newest" or (policy == "auto" and self._source.live),
            capacity=_count("capacity", capacity, 1),
            max_hanging=_count("max_hanging", max_hanging, 0),
            backoff=backoff or Backoff(),
        )
        self._deliveries = [sink if isinstance(sink, Background) else Delivery(sink) for sink in sinks]
        self._reader = Reader(self._source, settings)
        self._run = f"{time.time_ns():x}-{secrets.token_hex(4)}"
        self._outcomes: Counter[Outcome] = Counter()
        self._untested, self._testing = checks.truth("self_test", self_test), threading.Lock()
        self._lock, self._closing = threading.Lock(), threading.Lock()
        self._idle = threading.Condition()
        self._busy: set[int] = set()  # threads in __next__
        self._closed = False
        self._problems: tuple[SinkError, ...] = ()
        _open.add(self)

    @property
    def run(self) -> str:
        """Names this stream in every row; no two have the same."""
        return self._run

    @property
    def detector(self) -> Detector:
        """What inspects."""
        return self._detector

    @property
    def source(self) -> str:
        """The source's name."""
        return self._source.name

    @property
    def status(self) -> StreamStatus:
        """Counts so far; from any thread."""
        reader = self._reader.status
        with self._lock:
            outcomes = {outcome: self._outcomes[outcome] for outcome in Outcome}
        sinks = tuple(delivery.status for delivery in self._deliveries)
        return StreamStatus(MappingProxyType(outcomes), **vars(reader), sinks=sinks)

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[StreamInspection]:
        return self

    def __next__(self) -> StreamInspection:
        """The next result.

        Raises:
            StopIteration: the source has ended, or the stream was stopped.
            SourceError: this is a forked child of the process that made the stream.
        """
        self._reader.start()
        me = threading.get_ident()
        with self._idle:
            self._busy.add(me)
        try:
            event = self._reader.get()
            if event is None:
                raise StopIteration
            return self._handle(event)
        finally:
            with self._idle:
                self._busy.discard(me)
                self._idle.notify_all()

    def _handle(self, event: Event) -> StreamInspection:
        result = self._inspect(event)
        if self._drift is not None:
            result = replace(result, drift=_drifted(self._drift, result))
        with self._lock:
            self._outcomes[result.outcome] += 1
        for delivery in self._deliveries:
            error = delivery.deliver(result)
            if error is not None:
                result = replace(result, unstored=(*result.unstored, error))
        return result

    def stop(self) -> None:
        """End the iteration after the frame in hand; what waits is dropped and counted.  Safe in a signal handler."""
        self._reader.stop()

    def close(self) -> tuple[SinkError, ...]:
        """Stop, wait for reads and inspections to end, a second at most each, offer the sinks what they have not taken, and close
        them.

        In a forked child of the process that made the stream this does nothing.

        Returns:
            What went wrong in the sinks' last attempt; the counts are in :attr:`status`.
        """
        self._reader.stop()
        if self._reader.is_forked:  # the sinks' files and connections are the parent's
            return ()
        self._reader.join()
        with self._idle:
            self._idle.wait_for(lambda: not self._busy - {threading.get_ident()}, STOPPING)
        with self._closing:
            if not self._closed:
                self._closed = True
                self._problems = tuple(error for d in self._deliveries if (error := d.close()) is not None)
                _open.discard(self)
            return self._problems

    def _test(self) -> None:
        if self._untested:
            with self._testing:
                test = getattr(self._detector, "self_test", None)  # a stand-in may have none
                if self._untested and test is not None:
                    test()
                self._untested = False

    def _inspect(self, event: Event) -> StreamInspection:
        detector, frame = self._detector, event.frame
        error = event.error if frame is None else frame.error
        inspection = None
        if frame is not None and error is None:
            try:
                self._test()
                inspection = detector.inspect(frame.pixels, maps=self._maps)
            except AdvRADError as failure:
                error = failure
            except Exception as failure:  # out of memory, a bug: a line must hear of it frame by frame, and run on
                _log.exception("%s: inspecting frame %d failed", self._source.name, event.sequence)
                error = InferenceError(f"inspecting failed: {type(failure).__name__}: {failure}")
                error.__cause__ = failure
        if inspection is None:
            nothing: Mapping[str, float] = MappingProxyType({})
            inspection = Inspection(Outcome.ERROR, None, detector.threshold, None, None, None, detector.backend, nothing, error)
        return StreamInspection(
            inspection=inspection,
            frame=None if frame is None else frame.pixels,
            run=self._run,
            sequence=event.sequence,
            source=self._source.name,
            item=None if frame is None else frame.item,
            captured_at=event.captured_at,
            latency_ms=(time.monotonic() - event.at) * 1e3,
            dropped=event.dropped,
        )


def _drifted(drift: Drift, result: StreamInspection) -> DriftState:
    try:
        return drift.update(result)
    except Exception:
        _log.exception("%s: the drift test did not take frame %d", result.source, result.sequence)
        return drift.state


_open: weakref.WeakSet[InspectionStream] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A read or an inspection must not return into an interpreter that is being taken apart: that ends the process by abort."""
    for stream in list(_open):
        stream.close()


def _seconds(name: str, milliseconds: Any) -> float:
    return checks.number(name, milliseconds, 1.0, 3_600_000.0, "a number of milliseconds") / 1e3


def _count(name: str, value: Any, least: int) -> int:
    return checks.integer(name, value, least, 10_000)
