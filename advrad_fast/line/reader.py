"""Reads a source in a thread of its own, notices when it hangs, opens it again, and hands its frames over in order.

A read that hangs cannot be ended from outside.  Its thread is given up: another one opens the source again, and whatever the
first may still return is thrown away.  The number of such threads is bounded; the last is waited for.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from advrad_fast.errors import AdvRADError, SourceError, SourceStalledError
from advrad_fast.line.backoff import Backoff
from advrad_fast.line.frames import IDLE, Frame, Source

_log = logging.getLogger(__name__)

MAX_FAULTS = 64  #: faults that wait to be taken; beyond it the oldest is dropped
STOPPING = 1.0  #: seconds that :meth:`Reader.stop` waits for a read to return

_END = object()


@dataclass(frozen=True, eq=False)
class Event:
    """A frame, or a fault of the source.

    Attributes:
        sequence: counts frames and faults, from 0; a gap is what was dropped.
        dropped: the size of the gap before it.
        frame: None for a fault.
        error: the fault.
        at: ``time.monotonic`` when it came.
        captured_at: the wall clock, UTC, at the same moment.
    """

    sequence: int
    dropped: int
    frame: Frame | None
    error: AdvRADError | None
    at: float
    captured_at: datetime


@dataclass(eq=False)
class _Attempt:
    """One thread that reads.  All fields are guarded by the reader's lock."""

    given_up: bool = False
    expires: float | None = None  # when the call that it is in has taken too long; None outside of one
    limit: float | None = None
    task: str = ""
    connection: Iterator[Any] | None = None
    error: BaseException | None = None  # that ended the thread


@dataclass(frozen=True)
class ReaderStatus:
    """Counts since the start.

    Attributes:
        read: frames and faults so far.
        dropped: those that were never taken.
        faults: of the source: stalls, failed reads, failed attempts to open it.
        opened: how often it was opened.
        hanging: threads that were given up and have not returned yet.
        connected: whether the last thing that came was a frame, or word that there is none yet.
    """

    read: int
    dropped: int
    faults: int
    opened: int
    hanging: int
    connected: bool


@dataclass(frozen=True)
class ReaderSettings:
    """How to read.

    Attributes:
        deadline: seconds that a read may take; None for any time.
        open_timeout: seconds that opening the source may take.
        newest: whether a frame pushes out the one that waits, or has to wait for it.
        capacity: frames that may wait, where none is pushed out.
        max_hanging: threads that may be given up at the same time.
        backoff: pauses before the source is opened again.
    """

    deadline: float | None
    open_timeout: float
    newest: bool
    capacity: int
    max_hanging: int
    backoff: Backoff = field(default_factory=Backoff)


class Reader:
    """The events of one source.  :meth:`get` may be called by several threads; each event goes to one of them."""

    def __init__(self, source: Source, settings: ReaderSettings) -> None:
        self._source, self._settings = source, settings
        # Reentrant (as by default), so that a signal handler may call stop() whatever its thread is doing.
        self._changed = threading.Condition()
        self._events: deque[tuple[int, Frame | None, AdvRADError | None, float, datetime]] = deque()
        self._attempt: _Attempt | None = None
        self._threads: dict[_Attempt, threading.Thread] = {}
        self._stopped = self._ended = self._connected = False
        self._sequence, self._taken, self._last = 0, 0, -1
        self._faults = self._failures = self._opened = 0
        # No limit that a thread sets while get() waits is shorter.
        self._glance = min(settings.open_timeout, settings.deadline or settings.open_timeout)
        self._process = os.getpid()

    def start(self) -> None:
        """Start to read; once.

        Raises:
            SourceError: this is a forked child: the threads that read stayed behind.
        """
        self._check_process()
        with self._changed:
            if self._attempt is None and not self._stopped:
                self._begin_attempt(0.0)

    def get(self) -> Event | None:
        """The next event; waits for it.  None once the source has ended and all is taken, or after :meth:`stop`.

        Raises:
            SourceError: as for :meth:`start`.
        """
        self._check_process()
        with self._changed:
            while not self._stopped:
                if self._events:
                    return self._take()
                attempt = self._attempt
                if self._ended or attempt is None:
                    return None
                wait = self._glance
                if not self._threads[attempt].is_alive():  # however it ended: nothing more would come
                    self._replace(attempt)
                    continue
                if attempt.expires is not None:
                    left = attempt.expires - time.monotonic()
                    if left <= 0.0:
                        self._stall(attempt)
                        continue
                    wait = min(left, wait)
                self._changed.wait(wait)
            return None

    def stop(self) -> None:
        """Take no further frames; what waits is dropped.  Safe in a signal handler, and from any thread."""
        self._stopped = True
        if self.is_forked:  # the lock may be held for ever
            return
        with self._changed:
            self._connected = False
            self._events.clear()
            self._changed.notify_all()

    def join(self) -> None:
        """Wait for the threads to end, ``STOPPING`` seconds at most: one may hang."""
        end = time.monotonic() + STOPPING
        for thread in [] if self.is_forked else list(self._threads.values()):
            if thread is not threading.current_thread() and thread.is_alive():
                thread.join(max(0.0, end - time.monotonic()))

    @property
    def status(self) -> ReaderStatus:
        """Counts.

        Raises:
            SourceError: as for :meth:`start`.
        """
        self._check_process()
        with self._changed:
            return ReaderStatus(
                read=self._sequence,
                dropped=self._sequence - self._taken - len(self._events),
                faults=self._faults,
                opened=self._opened,
                hanging=self._hanging(),
                connected=self._connected and not self._ended,
            )

    @property
    def is_forked(self) -> bool:
        """Whether this is a child of the process that made the reader."""
        return os.getpid() != self._process

    def _check_process(self) -> None:
        if self.is_forked:
            raise SourceError(f"{self._source.name}: a stream does not survive a fork: make it in the process that uses it")

    # What follows is called with the lock held.

    def _take(self) -> Event:
        sequence, frame, error, at, captured_at = self._events.popleft()
        dropped, self._last = sequence - self._last - 1, sequence
        self._taken += 1
        if self._waiting() <= self._settings.capacity // 2:
            self._changed.notify_all()
        return Event(sequence, dropped, frame, error, at, captured_at)

    def _waiting(self) -> int:
        return sum(event[1] is not None for event in self._events)

    def _add(self, frame: Frame | None, error: AdvRADError | None, lost: int = 0) -> None:
        sequence = self._sequence + lost
        self._sequence = sequence + 1
        self._events.append((sequence, frame, error, time.monotonic(), datetime.now(UTC)))
        self._changed.notify_all()

    def _fault(self, error: AdvRADError) -> float:
        """Report it, and return the pause before the next attempt."""
        _log.warning("%s", error)
        self._faults += 1
        self._failures += 1
        self._connected = False
        waiting = [event for event in self._events if event[1] is None]
        if len(waiting) >= MAX_FAULTS:
            self._events.remove(waiting[0])
        self._add(None, error)
        return self._settings.backoff.pause(self._failures)

    def _stall(self, attempt: _Attempt) -> None:
        pause = self._fault(
            SourceStalledError(f"{self._source.name}: {attempt.task} did not return within {1e3 * (attempt.limit or 0.0):.0f} ms")
        )
        if self._source.restartable and self._hanging() < self._settings.max_hanging:
            attempt.given_up = True
            self._begin_attempt(pause)
        else:
            attempt.expires = time.monotonic() + max(pause, attempt.limit or 0.0)

    def _replace(self, attempt: _Attempt) -> None:
        """Go on in another thread: the attempt's was ended by an error outside of the source, such as a lack of memory."""
        cause = attempt.error
        error = SourceError(f"{self._source.name}: reading it failed: {type(cause).__name__}: {cause}")
        error.__cause__ = cause
        # A source that cannot be opened twice goes on where it stands.
        self._begin_attempt(self._fault(error), None if self._source.restartable else attempt.connection)

    def _hanging(self) -> int:
        return sum(attempt.given_up and thread.is_alive() for attempt, thread in self._threads.items())

    def _begin_attempt(self, pause: float, connection: Iterator[Any] | None = None) -> None:
        self._threads = {given_up: thread for given_up, thread in self._threads.items() if thread.is_alive()}
        attempt = self._attempt = _Attempt(connection=connection)
        # A daemon: the interpreter's exit does not wait for a read that hangs.
        thread = threading.Thread(
            target=self._run, args=(attempt, pause), name=f"advrad-fast reading {self._source.name}", daemon=True
        )
        self._threads[attempt] = thread
        thread.start()

    # What follows runs in an attempt's thread.

    def _run(self, attempt: _Attempt, pause: float) -> None:
        try:
            self._read(attempt, pause)
        except BaseException as error:
            attempt.error = error
        if attempt.error is None or self._source.restartable:  # else the next thread goes on with it
            _close(attempt.connection)
        with self._changed:
            self._changed.notify_all()

    def _read(self, attempt: _Attempt, pause: float) -> None:
        while self._sleep(attempt, pause):
            pause = 0.0
            try:
                if attempt.connection is None:
                    with self._limited(attempt, "opening it", self._settings.open_timeout):
                        attempt.connection = self._source.open()
                    with self._changed:
                        if self._is_over(attempt):
                            return
                        self._opened += 1
                with self._limited(attempt, "a read", self._settings.deadline):
                    item = next(attempt.connection, _END)
            except BaseException as error:  # also SystemExit: a thread that ended unseen would leave the stream waiting
                with self._changed:
                    if self._is_over(attempt):
                        return
                    if not isinstance(error, AdvRADError):
                        message = f"{self._source.name}: {type(error).__name__}: {error}"
                        error, cause = SourceError(message), error
                        error.__cause__ = cause
                    pause = self._fault(error)
                if self._source.restartable:
                    with self._limited(attempt, "closing it", self._settings.open_timeout):
                        _close(attempt.connection)
                    attempt.connection = None
                continue
            if not self._put(attempt, item):
                return

    def _limited(self, attempt: _Attempt, task: str, limit: float | None) -> _Limit:
        return _Limit(self._changed, attempt, task, limit)

    def _sleep(self, attempt: _Attempt, pause: float) -> bool:
        """Whether to go on after the pause."""
        end = time.monotonic() + pause
        with self._changed:
            while not self._is_over(attempt):
                left = end - time.monotonic()
                if left <= 0.0:
                    return True
                self._changed.wait(left)
            return False

    def _put(self, attempt: _Attempt, item: Any) -> bool:
        """Hand over what was read; whether to go on reading."""
        settings = self._settings
        with self._changed:
            if self._is_over(attempt):
                return False
            if item is _END:
                self._ended = True
                self._changed.notify_all()
                return False
            self._connected, self._failures = True, 0
            if item is IDLE:
                return True
            frame = item if isinstance(item, Frame) else Frame(item)
            if settings.newest:
                for event in [event for event in self._events if event[1] is not None]:
                    self._events.remove(event)
            elif self._waiting() >= settings.capacity:
                # Until half are taken: to wake a thread beside an engine that has every core costs more than what it then does.
                while self._waiting() > settings.capacity // 2:
                    self._changed.wait()
                    if self._is_over(attempt):
                        return False
            self._add(frame, None, frame.lost)
            return True

    def _is_over(self, attempt: _Attempt) -> bool:
        return self._stopped or attempt.given_up


class _Limit:
    """Around a call that may hang: says since when."""

    def __init__(self, lock: threading.Condition, attempt: _Attempt, task: str, limit: float | None) -> None:
        self._lock, self._attempt, self._task, self._limit = lock, attempt, task, limit

    def __enter__(self) -> None:
        with self._lock:
            self._attempt.task, self._attempt.limit = self._task, self._limit
            self._attempt.expires = None if self._limit is None else time.monotonic() + self._limit

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._attempt.expires = None


def _close(connection: Iterator[Any] | None) -> None:
    try:
        close = getattr(connection, "close", None)
        if close is not None:
            close()
    except Exception as error:
        _log.warning("closing a source failed: %s", error)
