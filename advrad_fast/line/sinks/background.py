"""A sink in a thread of its own, for one that may be slow or hang: a network share, a database elsewhere."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import replace

from advrad_fast import checks
from advrad_fast.errors import ConfigError, SinkError, expected
from advrad_fast.line.results import StreamInspection
from advrad_fast.line.sinks.base import Sink
from advrad_fast.line.sinks.delivery import WAITING, Delivery, SinkStatus

_AGAIN = 0.1  # seconds after which results that wait are offered again though no new one has come
_THREADS = 3  # that closing tries, where errors of their own end them


class Background:
    """Lets the stream go on while a sink works.

    Results wait in memory, without frames and maps, for the sink to take them: what has been given out may not be stored yet.
    ``StreamStatus.sinks`` counts those that wait.

    Args:
        sink: any other one.
        waiting: results that may wait; beyond it new ones are lost, and counted.
        closing_s: seconds that closing waits for the sink; what it has not taken by then is lost, and reported.

    Raises:
        ConfigError: an argument is out of range or of the wrong type.
    """

    def __init__(self, sink: Sink, *, waiting: int = WAITING, closing_s: float = 5.0) -> None:
        if not isinstance(sink, Sink):
            raise ConfigError(expected("sink", "a sink of advrad_fast.line.sinks", type(sink)))
        self.sink, self._closing = sink, checks.number("closing_s", closing_s, 0.0, 3600.0, "a number of seconds")
        self._most = checks.integer("waiting", waiting, 1)
        self._delivery = Delivery(sink, waiting=waiting)
        self._changed = threading.Condition()
        self._queue: deque[StreamInspection] = deque()
        self._thread: threading.Thread | None = None
        self._ending = self._done = False
        self._lost = 0
        self._error: SinkError | None = None  # of the sink's last attempt
        self._at_end: SinkError | None = None

    def deliver(self, result: StreamInspection) -> SinkError | None:
        """Let a result wait for the sink.  An error: the sink is failing, or there is no room; never raises."""
        with self._changed:
            if self._ending or len(self._queue) >= self._most:
                self._lost += 1
                return SinkError(f"{self.sink.name}: {len(self._queue)} results wait for it; no room for another")
            self._queue.append(result.light())
            self._changed.notify_all()
            return self._started() or self._error

    def close(self) -> SinkError | None:
        """Wait for the sink, ``closing_s`` at most; never raises."""
        end = time.monotonic() + self._closing
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if self._thread is None and not self._queue:
            return self._delivery.close()
        for _ in range(_THREADS):
            with self._changed:
                if self._done or self._started() is not None or self._thread is None:
                    break
                thread = self._thread
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                break
        with self._changed:
            if not self._done:
                left = self.status.waiting
                self._lost += len(self._queue)
                self._queue.clear()
                return SinkError(f"{self.sink.name}: it did not take {left} results within {self._closing:g} s")
            return self._at_end

    @property
    def status(self) -> SinkStatus:
        """Counts."""
        inner = self._delivery.status
        return replace(inner, waiting=inner.waiting + len(self._queue), lost=inner.lost + self._lost)

    def _started(self) -> SinkError | None:
        """Start the thread; another where an error of its own, such as a lack of memory, ended it.  What waits is still there."""
        if self._done or (self._thread is not None and self._thread.is_alive()):
            return None
        try:
            thread = threading.Thread(target=self._work, name=f"advrad-fast {self.sink.name}", daemon=True)
            thread.start()
        except (RuntimeError, MemoryError) as error:  # of the first, "can't start new thread"
            return SinkError(f"{self.sink.name}: no thread to be had for it: {error}")
        self._thread = thread
        return None

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._ending, _AGAIN)
                result = self._queue[0] if self._queue else None
                if result is None and self._ending:
                    break
            error = self._delivery.offer_again() if result is None else self._delivery.deliver(result)
            with self._changed:
                self._error = error
                if result is not None and self._queue:
                    self._queue.popleft()
        self._at_end = self._delivery.close()
        self._done = True
