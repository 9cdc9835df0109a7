"""Contexts: primary ones, shared and counted, and a stack of current ones for every thread."""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING

from gpu_emulation.driver.codes import Code, Refused, Sticky
from gpu_emulation.driver.streams import Stream
from gpu_emulation.memory import Memory

if TYPE_CHECKING:
    from gpu_emulation.driver.fake import FakeDriver


class Context:
    """One context.

    Attributes:
        device: its ordinal.
        users: how often a primary context is retained, -1 for one from cuCtxCreate.
        lost: the failure of its work, after which it only gives that error.
        legacy: the default stream.
    """

    def __init__(self, driver: FakeDriver, device: int, users: int) -> None:
        self.device, self.users = device, users
        self.alive = True
        self.lost: Sticky | None = None
        self.handle = driver.new_handle(self)
        self.legacy = Stream(driver, self, blocking=True, legacy=True)
        self.streams: list[Stream] = []


class Contexts:
    """cuCtx* and cuDevicePrimaryCtx*."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self._primary: dict[int, Context] = {}
        self._made: list[Context] = []
        self._local = threading.local()

    @property
    def stack(self) -> list[Context]:
        """The calling thread's."""
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        stack: list[Context] = self._local.stack
        return stack

    def current(self) -> Context:
        """The calling thread's context, fit for use.

        Raises:
            Refused: there is none, or it was destroyed.
            Sticky: its work failed.
        """
        if not self.stack:
            raise Refused(Code.INVALID_CONTEXT, "no context is current on this thread")
        context = self.stack[-1]
        if not context.alive:
            raise Refused(Code.CONTEXT_IS_DESTROYED, "the current context was destroyed or released")
        if context.lost is not None:
            raise context.lost
        return context

    def memory(self) -> Memory:
        """The memory of the current context's device."""
        return self.driver.devices.memories[self.current().device]

    def retained(self) -> list[str]:
        """Contexts that nobody released."""
        primary = [f"primary context of device {d}, retained {c.users} times" for d, c in self._primary.items() if c.users]
        return primary + [f"context of device {context.device}" for context in self._made if context.alive]

    def _end(self, context: Context) -> None:
        context.alive = False
        self.driver.memory.end_of(context)
        for stream in context.streams:
            stream.queue.clear()

    # Primary contexts

    def cuDevicePrimaryCtxRetain(self, handle: int, device: int) -> None:
        self.driver.devices.spec(device)
        context = self._primary.get(device)
        if context is None:
            context = self._primary[device] = Context(self.driver, device, 0)
        if context.users == 0:  # the handle stays, the context begins anew
            context.alive, context.lost = True, None
        context.users += 1
        ctypes.c_uint64.from_address(handle).value = context.handle

    def cuDevicePrimaryCtxRelease_v2(self, device: int) -> None:
        self.driver.devices.spec(device)
        context = self._primary.get(device)
        if context is None or context.users == 0:
            raise Refused(Code.INVALID_CONTEXT, "the primary context is not retained")
        context.users -= 1
        if context.users == 0:
            self._end(context)

    def cuDevicePrimaryCtxGetState(self, device: int, flags: int, active: int) -> None:
        self.driver.devices.spec(device)
        context = self._primary.get(device)
        ctypes.c_uint32.from_address(flags).value = 0
        ctypes.c_int32.from_address(active).value = int(context is not None and context.alive)

    # Contexts of one's own

    def cuCtxCreate_v2(self, handle: int, flags: int, device: int) -> None:
        del flags
        self.driver.devices.spec(device)
        context = Context(self.driver, device, -1)
        self._made.append(context)
        self.stack.append(context)
        ctypes.c_uint64.from_address(handle).value = context.handle

    def cuCtxCreate_v4(self, handle: int, parameters: int, flags: int, device: int) -> None:
        del parameters
        self.cuCtxCreate_v2(handle, flags, device)

    def cuCtxDestroy_v2(self, handle: int) -> None:
        context = self.driver.get(handle, Context)
        if context.users >= 0:
            raise Refused(Code.INVALID_CONTEXT, "a primary context is released, not destroyed")
        if self.stack and self.stack[-1] is context:
            self.stack.pop()
        self._end(context)

    def cuCtxDetach(self, handle: int) -> None:
        self.cuCtxDestroy_v2(handle)

    # The stack

    def cuCtxPushCurrent_v2(self, handle: int) -> None:
        self.stack.append(self.driver.get(handle, Context))

    def cuCtxPopCurrent_v2(self, handle: int) -> None:
        if not self.stack:
            raise Refused(Code.INVALID_CONTEXT, "no context is current on this thread")
        context = self.stack.pop()
        if handle:
            ctypes.c_uint64.from_address(handle).value = context.handle

    def cuCtxSetCurrent(self, handle: int) -> None:
        context = self.driver.get(handle, Context) if handle else None
        if self.stack:
            self.stack.pop()
        if context is not None:
            self.stack.append(context)

    def cuCtxGetCurrent(self, handle: int) -> None:
        ctypes.c_uint64.from_address(handle).value = self.stack[-1].handle if self.stack else 0

    def cuCtxGetDevice(self, device: int) -> None:
        ctypes.c_int32.from_address(device).value = self.current().device

    def cuCtxGetApiVersion(self, handle: int, version: int) -> None:
        if handle:
            self.driver.get(handle, Context)
        ctypes.c_uint32.from_address(version).value = self.driver.version

    def cuCtxSynchronize(self) -> None:
        context = self.current()
        self.driver.graphs.forbid_wait(context)
        self.driver.counters.synchronisations += 1
        self.driver.streams.finish_context(context)
