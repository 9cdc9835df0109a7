"""Brings results to one sink: what it fails to take is counted, kept for a while and offered again, in order."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass

from advrad_fast.errors import SinkError
from advrad_fast.line.backoff import Backoff
from advrad_fast.line.results import StreamInspection
from advrad_fast.line.sinks.base import Sink

_log = logging.getLogger(__name__)

WAITING = 10_000  #: results that may wait for one sink, without their frames and maps


@dataclass(frozen=True)
class SinkStatus:
    """Counts of one sink.

    Attributes:
        name: the sink's.
        taken: results that it has taken.
        failures: attempts that failed.
        waiting: results that it has not taken and that are offered again.
        lost: results that it will not get.
    """

    name: str
    taken: int
    failures: int
    waiting: int
    lost: int


class Delivery:
    """One sink's results.  Thread-safe.

    Args:
        sink: where to.
        backoff: pauses while the sink fails, so that a slow failure is not repeated with every frame.
        waiting: how many results may wait; beyond it the oldest is lost.
    """

    def __init__(self, sink: Sink, *, backoff: Backoff | None = None, waiting: int = WAITING) -> None:
        self.sink = sink
        self._backoff = backoff or Backoff(first=0.1, cap=5.0)
        self._lock = threading.Lock()
        self._waiting: deque[StreamInspection] = deque()
        self._most = waiting
        self._taken = self._failures = self._lost = self._in_a_row = 0
        self._not_before = 0.0
        self._error: SinkError | None = None

    def deliver(self, result: StreamInspection) -> SinkError | None:
        """Offer a result, after those that wait.  An error means that this one has not been taken; never raises."""
        with self._lock:
            if not self.sink.retry:
                return self._try(result)
            paused = bool(self._waiting) and time.monotonic() < self._not_before
            if not paused and self._offer_waiting() and self._try(result) is None:
                return None
            self._keep(result)
            return self._error

    def offer_again(self) -> SinkError | None:
        """Offer what waits, unless the sink's pause is not over; the error that keeps it waiting."""
        with self._lock:
            if time.monotonic() >= self._not_before:
                self._offer_waiting()
            return self._error if self._waiting else None

    def close(self) -> SinkError | None:
        """Offer what waits a last time and close the sink; never raises."""
        with self._lock:
            self._offer_waiting()
            left = len(self._waiting)
            self._lost += left
            self._waiting.clear()
            try:
                self.sink.close()
            except Exception as error:
                return self._failed(error)
            return None if left == 0 else SinkError(f"{self.sink.name}: {left} results were not stored: {self._error}")

    @property
    def status(self) -> SinkStatus:
        """Counts."""
        return SinkStatus(self.sink.name, self._taken, self._failures, len(self._waiting), self._lost)

    def _offer_waiting(self) -> bool:
        while self._waiting:
            if self._try(self._waiting[0]) is not None:
                return False
            self._waiting.popleft()
        return True

    def _keep(self, result: StreamInspection) -> None:
        self._waiting.append(result.light())
        if len(self._waiting) > self._most:
            self._waiting.popleft()
            self._lost += 1

    def _try(self, result: StreamInspection) -> SinkError | None:
        try:
            self.sink.write(result)
        except Exception as error:
            if not self.sink.retry:
                self._lost += 1
            return self._failed(error)
        self._taken += 1
        self._in_a_row, self._error = 0, None
        return None

    def _failed(self, error: Exception) -> SinkError:
        if not isinstance(error, SinkError):
            cause = error
            error = SinkError(f"{self.sink.name}: {type(cause).__name__}: {cause}")
            error.__cause__ = cause
        _log.warning("%s", error)
        self._failures += 1
        self._in_a_row += 1
        self._not_before = time.monotonic() + self._backoff.pause(self._in_a_row)
        self._error = error
        return error
