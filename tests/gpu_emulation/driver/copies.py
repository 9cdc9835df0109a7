"""Copies and fills, at once or on a stream."""

from __future__ import annotations

import ctypes
import struct
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from gpu_emulation.driver.codes import Code, Refused, Sticky
from gpu_emulation.driver.streams import Stream, Work

if TYPE_CHECKING:
    from gpu_emulation.driver.fake import FakeDriver

POISON = 0xFF


class Copies:
    """cuMemcpy* and cuMemset*."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver

    # The work

    def _htod(self, target: int, source: int, nbytes: int) -> Work:
        memory = self.driver.contexts.memory()
        pinned = self.driver.memory.pinned(source, nbytes)
        self.driver.memory.check(target, nbytes)
        # Pageable memory is staged before the call returns; pinned memory is read when the copy's turn comes.
        staged = None if pinned else ctypes.string_at(source, nbytes)
        words = f"copy of {nbytes} bytes from the host"
        seen: dict[str, int] = {}

        def prepare() -> None:
            if pinned:
                seen.update(sum=zlib.crc32(ctypes.string_at(source, nbytes)), functions=self.driver.streams.host_functions)

        def run() -> None:
            data = staged if staged is not None else self._still_pinned(source, nbytes, words)
            self._count("htod", nbytes)
            if seen and seen["functions"] == self.driver.streams.host_functions and zlib.crc32(data) != seen["sum"]:
                self.driver.faults.append(f"{words}: the source was changed between the call and the copy")
            memory.write(target, data)

        return Work("htod", words, run, prepare)

    def _dtoh(self, target: int, source: int, nbytes: int) -> Work:
        memory = self.driver.contexts.memory()
        self.driver.memory.check(source, nbytes)
        words = f"copy of {nbytes} bytes to the host"

        def run() -> None:
            self._still_pinned(target, nbytes, words)
            self._count("dtoh", nbytes)
            ctypes.memmove(target, memory.read(source, nbytes), nbytes)

        return Work("dtoh", words, run, lambda: self._poison(target, nbytes))

    def _dtod(self, target: int, source: int, nbytes: int) -> Work:
        memory = self.driver.contexts.memory()
        self.driver.memory.check(source, nbytes)
        self.driver.memory.check(target, nbytes)

        def run() -> None:
            self._count("dtod", nbytes)
            memory.copy(target, source, nbytes)

        return Work("dtod", f"copy of {nbytes} bytes on the device", run)

    def _memset(self, target: int, pattern: bytes, count: int) -> Work:
        memory = self.driver.contexts.memory()
        self.driver.memory.check(target, len(pattern) * count)
        if target % len(pattern):
            raise Refused(Code.INVALID_VALUE, f"{target:#x} is no multiple of {len(pattern)}")

        def run() -> None:
            self._count("memset", len(pattern) * count)
            memory.fill(target, pattern, count)

        return Work("memset", f"fill of {len(pattern) * count} bytes", run)

    @staticmethod
    def _poison(target: int, nbytes: int) -> None:
        ctypes.memset(target, POISON, nbytes)

    def _still_pinned(self, address: int, nbytes: int, words: str) -> bytes:
        try:
            self.driver.memory.pinned(address, nbytes)
        except Refused as refusal:
            raise Sticky(Code.ILLEGAL_ADDRESS, f"{words}: {refusal.why}") from refusal
        return ctypes.string_at(address, nbytes)

    def _count(self, kind: str, nbytes: int) -> None:
        self.driver.counters.copies[kind] += 1
        self.driver.counters.copied_bytes[kind] += nbytes

    # When it is done

    def _now(self, make: Callable[[], Work]) -> None:
        """On the default stream, and the host waits."""
        streams = self.driver.streams
        stream = streams.find(0)
        self.driver.graphs.forbid_wait(stream)
        self.driver.counters.synchronisations += 1
        streams.submit(stream, make())
        streams.finish(stream)
        if stream.context.lost is not None:
            raise stream.context.lost

    def _on(self, handle: int, make: Callable[[], Work]) -> Stream:
        stream = self.driver.streams.find(handle)
        self.driver.streams.submit(stream, make())
        return stream

    def _pageable(self, handle: int, address: int, nbytes: int) -> bool:
        """Whether host memory isn't pinned; in a capture that is refused, more strictly than the driver does."""
        pageable = self.driver.memory.pinned(address, nbytes) is None
        if pageable and self.driver.streams.find(handle).capture is not None:
            self.driver.graphs.invalidate(self.driver.streams.find(handle))
            raise Refused(Code.STREAM_CAPTURE_UNSUPPORTED, "a copy of pageable memory in a capture")
        return pageable

    # Calls

    def cuMemcpyHtoD_v2(self, target: int, source: int, nbytes: int) -> None:
        self._now(lambda: self._htod(target, source, nbytes))

    def cuMemcpyDtoH_v2(self, target: int, source: int, nbytes: int) -> None:
        self._now(lambda: self._dtoh(target, source, nbytes))

    def cuMemcpyDtoD_v2(self, target: int, source: int, nbytes: int) -> None:
        self._on(0, lambda: self._dtod(target, source, nbytes))

    def cuMemcpyHtoDAsync_v2(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._pageable(stream, source, nbytes)
        self._on(stream, lambda: self._htod(target, source, nbytes))

    def cuMemcpyDtoHAsync_v2(self, target: int, source: int, nbytes: int, stream: int) -> None:
        pageable = self._pageable(stream, target, nbytes)
        found = self._on(stream, lambda: self._dtoh(target, source, nbytes))
        if pageable:  # then the call waits
            self.driver.counters.synchronisations += 1
            self.driver.streams.finish(found)

    def cuMemcpyDtoDAsync_v2(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._on(stream, lambda: self._dtod(target, source, nbytes))

    def cuMemsetD8_v2(self, target: int, value: int, count: int) -> None:
        self.cuMemsetD8Async(target, value, count, 0)

    def cuMemsetD16_v2(self, target: int, value: int, count: int) -> None:
        self.cuMemsetD16Async(target, value, count, 0)

    def cuMemsetD32_v2(self, target: int, value: int, count: int) -> None:
        self.cuMemsetD32Async(target, value, count, 0)

    def cuMemsetD8Async(self, target: int, value: int, count: int, stream: int) -> None:
        self._on(stream, lambda: self._memset(target, struct.pack("<B", value), count))

    def cuMemsetD16Async(self, target: int, value: int, count: int, stream: int) -> None:
        self._on(stream, lambda: self._memset(target, struct.pack("<H", value), count))

    def cuMemsetD32Async(self, target: int, value: int, count: int, stream: int) -> None:
        self._on(stream, lambda: self._memset(target, struct.pack("<I", value), count))
