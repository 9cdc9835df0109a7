"""Streams and events: queues of work, and when it is done.

With ``deferred`` work is done as late as the API allows: when the host waits for it, and then only what the wait depends on.  A
program that forgets a wait therefore sees what nobody has written yet.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu_emulation.driver.codes import Code, Refused, Sticky
from gpu_emulation.errors import EmulationError, MemoryFault, Misaligned

if TYPE_CHECKING:
    from gpu_emulation.driver.contexts import Context
    from gpu_emulation.driver.fake import FakeDriver
    from gpu_emulation.driver.graphs import Capture, Node
    from gpu_emulation.driver.modules import Launch

NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING
LEGACY, PER_THREAD = 1, 2  # handles of the default streams, beside 0


@dataclass
class Work:
    """A piece of work on a stream.

    Attributes:
        kind: kernel, htod, dtoh, dtod, memset, host, free, graph, record or wait.
        words: what it is, for messages.
        run: does it.
        prepare: called when it is enqueued, for a graph's at every launch.
        waits: (stream, sequence number) of work that must be done before.
        sequence: its number, over all streams.
        kernel: of a kernel, the function's handle and the launch.
    """

    kind: str
    words: str
    run: Callable[[], None]
    prepare: Callable[[], None] | None = None
    waits: tuple[tuple[Stream, int], ...] = ()
    sequence: int = 0
    kernel: tuple[int, Launch] | None = None


class Stream:
    """A queue of work of one context; ``blocking``: it and the legacy default stream wait for each other."""

    def __init__(self, driver: FakeDriver, context: Context, *, blocking: bool, legacy: bool = False) -> None:
        self.context, self.blocking, self.legacy = context, blocking, legacy
        self.owned = not legacy
        self.queue: deque[Work] = deque()
        self.last = 0  # sequence number of the newest work
        self.capture: Capture | None = None
        self.tail: set[Node] = set()  # in a capture: what the next node comes after
        self.handle = driver.new_handle(self)

    def __str__(self) -> str:
        return "the default stream" if self.legacy else f"stream {self.handle:#x}"


class Event:
    """A mark in a stream; ``captured``: the capture and the nodes that it marks, if it was last recorded in one."""

    owned = True

    def __init__(self, driver: FakeDriver, context: Context, *, timing: bool) -> None:
        self.context, self.timing = context, timing
        self.recorded: tuple[Stream, int] | None = None
        self.time: float | None = None
        self.captured: tuple[Capture, set[Node]] | None = None
        self.handle = driver.new_handle(self)

    def __str__(self) -> str:
        return f"event {self.handle:#x}"


class Streams:
    """cuStream*, cuEvent* and cuLaunchHostFunc."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self.host_functions = 0  # how many ran
        self._numbers = itertools.count(1)
        self._per_thread: dict[tuple[int, int], Stream] = {}

    def find(self, handle: int) -> Stream:
        """The stream of a handle, 0 for the default one, in a context that is fit for use."""
        context = self.driver.contexts.current()
        if handle in (0, LEGACY):
            return context.legacy
        if handle == PER_THREAD:
            return self._of_this_thread(context)
        stream: Stream = self.driver.get(handle, Stream)
        if stream.context is not context:
            raise Refused(Code.INVALID_HANDLE, f"{stream} belongs to another context than the current one")
        return stream

    def _of_this_thread(self, context: Context) -> Stream:
        """Its default stream, where it asks for one of its own: one that blocks."""
        key = threading.get_ident(), context.handle
        if key not in self._per_thread:
            stream = self._per_thread[key] = Stream(self.driver, context, blocking=True)
            stream.owned = False
            context.streams.append(stream)
        return self._per_thread[key]

    def submit(self, stream: Stream, work: Work) -> None:
        """Enqueues work, or records it where the stream is being captured."""
        graphs = self.driver.graphs
        if graphs.record(stream, work):
            return
        context = stream.context
        if stream.blocking:
            others = context.streams if stream.legacy else [context.legacy]
            work.waits += tuple((other, other.last) for other in others if other.blocking and other.last)
        work.sequence = stream.last = next(self._numbers)
        stream.queue.append(work)
        if work.prepare is not None and self.driver.deferred:
            work.prepare()
        if not self.driver.deferred:
            self._finish_quietly(stream)

    def finish(self, stream: Stream, upto: int | None = None) -> None:
        """Does a stream's work, to a sequence number inclusive, and what it waits for.

        Raises:
            Sticky: some of it failed; the context is lost.
        """
        while stream.queue and (upto is None or stream.queue[0].sequence <= upto):
            work = stream.queue[0]
            for other, number in work.waits:
                self.finish(other, number)
            if not stream.queue or stream.queue[0] is not work:
                continue  # done meanwhile, by way of a wait
            stream.queue.popleft()
            self.execute(stream.context, work)

    def finish_context(self, context: Context) -> None:
        for stream in (context.legacy, *context.streams):
            self.finish(stream)

    def execute(self, context: Context, work: Work) -> None:
        """Does one piece of work; what fails is a fault, and the context is lost.

        Raises:
            Sticky: it failed.
        """
        try:
            self.driver.before_work(work.kind)
            work.run()
        except Sticky as lost:
            self._lose(context, lost)
        except EmulationError as error:
            self.driver.faults.append(
                f"{work.words}: {type(error).__name__}: {error} {' '.join(getattr(error, '__notes__', ()))}"
            )
            codes = {MemoryFault: Code.ILLEGAL_ADDRESS, Misaligned: Code.MISALIGNED_ADDRESS}
            self._lose(context, Sticky(codes.get(type(error), Code.LAUNCH_FAILED), str(error)))

    def _lose(self, context: Context, lost: Sticky) -> None:
        if context.lost is None:
            context.lost = lost
        for stream in (context.legacy, *context.streams):
            stream.queue.clear()
        raise context.lost

    def _finish_quietly(self, stream: Stream) -> None:
        with suppress(Sticky):  # as on a GPU: a later call says so
            self.finish(stream)

    @contextmanager
    def _as_host_function(self) -> Iterator[None]:
        self.driver.in_host_function = True
        try:
            yield
        finally:
            self.driver.in_host_function = False
            self.host_functions += 1

    # Streams

    def cuStreamCreate(self, handle: int, flags: int) -> None:
        context = self.driver.contexts.current()
        if flags & ~NON_BLOCKING:
            raise Refused(Code.INVALID_VALUE, f"flags {flags}")
        stream = Stream(self.driver, context, blocking=not flags & NON_BLOCKING)
        context.streams.append(stream)
        ctypes.c_uint64.from_address(handle).value = stream.handle

    def cuStreamCreateWithPriority(self, handle: int, flags: int, priority: int) -> None:
        del priority
        self.cuStreamCreate(handle, flags)

    def cuStreamDestroy_v2(self, handle: int) -> None:
        stream = self.driver.drop(handle, Stream)
        if stream is not None and stream.queue:  # it goes when its work is done
            self._finish_quietly(stream)
        if stream is not None and stream in stream.context.streams:
            stream.context.streams.remove(stream)

    def cuStreamSynchronize(self, handle: int) -> None:
        stream = self.find(handle)
        self.driver.graphs.forbid_wait(stream)
        self.driver.counters.synchronisations += 1
        if stream.legacy:
            for other in stream.context.streams:
                if other.blocking:
                    self.finish(other)
        self.finish(stream)

    def cuStreamQuery(self, handle: int) -> Code:
        stream = self.find(handle)
        self.driver.graphs.forbid_wait(stream)
        return self._query(stream, None)

    def _query(self, stream: Stream, upto: int | None) -> Code:
        """Not ready, and a little later more ready: one piece of work is done by every query, so that polling comes to an end."""
        pending = [work for work in stream.queue if upto is None or work.sequence <= upto]
        if not pending:
            return Code.SUCCESS
        self.finish(stream, pending[0].sequence)
        return Code.NOT_READY

    def cuStreamWaitEvent(self, handle: int, event_handle: int, flags: int) -> None:
        del flags
        stream = self.find(handle)
        event: Event = self.driver.get(event_handle, Event)
        if self.driver.graphs.join(stream, event) or event.recorded is None:
            return
        self.submit(stream, Work("wait", f"wait for {event}", lambda: None, waits=(event.recorded,)))

    def cuLaunchHostFunc(self, handle: int, function: int, data: int) -> None:
        stream = self.find(handle)
        call = ctypes.CFUNCTYPE(None, ctypes.c_uint64)(function)

        def run() -> None:
            with self._as_host_function():
                call(data)

        self.submit(stream, Work("host", "a host function", run))

    # Events

    def cuEventCreate(self, handle: int, flags: int) -> None:
        event = Event(self.driver, self.driver.contexts.current(), timing=not flags & DISABLE_TIMING)
        ctypes.c_uint64.from_address(handle).value = event.handle

    def cuEventDestroy_v2(self, handle: int) -> None:
        self.driver.drop(handle, Event)

    def cuEventRecord(self, handle: int, stream_handle: int) -> None:
        event, stream = self.driver.get(handle, Event), self.find(stream_handle)
        if event.context is not stream.context:
            raise Refused(Code.INVALID_HANDLE, f"{event} and {stream} belong to different contexts")
        if self.driver.graphs.mark(stream, event):
            return
        event.time = None

        def run() -> None:
            event.time = time.perf_counter()

        work = Work("record", f"record of {event}", run)
        self.submit(stream, work)
        event.recorded, event.captured = (stream, work.sequence), None

    def cuEventSynchronize(self, handle: int) -> None:
        event = self._for_the_host(handle)
        self.driver.counters.synchronisations += 1
        if event.recorded is not None:
            self.finish(*event.recorded)

    def cuEventQuery(self, handle: int) -> Code:
        event = self._for_the_host(handle)
        return Code.SUCCESS if event.recorded is None else self._query(*event.recorded)

    def _for_the_host(self, handle: int) -> Event:
        self.driver.contexts.current()
        event: Event = self.driver.get(handle, Event)
        self.driver.graphs.forbid_wait(event)
        return event

    def cuEventElapsedTime(self, milliseconds: int, start: int, end: int) -> Code:
        first, second = self._for_the_host(start), self._for_the_host(end)
        if not (first.timing and second.timing and first.recorded and second.recorded):
            raise Refused(Code.INVALID_HANDLE, "an event was not recorded, or not for timing")
        if first.time is None or second.time is None:
            return Code.NOT_READY
        ctypes.c_float.from_address(milliseconds).value = 1000 * (second.time - first.time)
        return Code.SUCCESS

    def cuEventElapsedTime_v2(self, milliseconds: int, start: int, end: int) -> Code:
        return self.cuEventElapsedTime(milliseconds, start, end)
