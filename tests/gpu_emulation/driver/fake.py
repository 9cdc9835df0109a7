"""The fake driver: what it stands for, what it counted, what it found, and the way of every call."""

from __future__ import annotations

import ctypes
import gc
import itertools
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from gpu_emulation.driver import library
from gpu_emulation.driver.codes import Code, Refused, Sticky, text_address
from gpu_emulation.driver.contexts import Contexts
from gpu_emulation.driver.copies import Copies
from gpu_emulation.driver.devices import Devices, DeviceSpec
from gpu_emulation.driver.entry_points import MISSING, SIGNATURES, prototype
from gpu_emulation.driver.graphs import Graphs
from gpu_emulation.driver.memory import Allocations
from gpu_emulation.driver.modules import Launch, Modules, emulate
from gpu_emulation.driver.streams import Streams

# Handles are never given out twice in a process, so that what outlives its driver is recognised.
_handles = itertools.count(0x5ADE_0000_0000, 16)
_bases = itertools.count(0)
_installed: FakeDriver | None = None
_callbacks: dict[str, Any] = {}  # by entry point; C holds their addresses

# Calls that are allowed before cuInit and when a context is lost.
_ALWAYS = ("cuInit", "cuDriverGetVersion", "cuGetErrorString", "cuGetErrorName", "cuGetProcAddress", "cuGetProcAddress_v2")


@dataclass
class Counters:
    """What happened so far.

    Attributes:
        calls: of each entry point, by its symbol.
        copies, copied_bytes: by direction: htod, dtoh, dtod, and memset.
        allocations, frees, host_allocations, host_frees: of device and of pinned memory.
        launches: kernels that were asked for, those of graphs at each graph launch.
        graph_launches: of instantiated graphs.
        synchronisations: calls that made the host wait: for a stream, an event, a context, or by copying synchronously.
    """

    calls: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    copied_bytes: Counter[str] = field(default_factory=Counter)
    allocations: int = 0
    frees: int = 0
    host_allocations: int = 0
    host_frees: int = 0
    launches: int = 0
    graph_launches: int = 0
    synchronisations: int = 0


@dataclass
class Injection:
    """An error to be given instead of doing what was asked."""

    name: str
    code: Code
    after: int
    times: int
    fired: int = 0


class FakeDriver:
    """A CUDA driver and its GPUs, for the time of a ``with`` block.

    Args:
        devices: the GPUs; none of them is a machine with a driver and without a GPU.
        version: what cuDriverGetVersion says, as 13000 for CUDA 13.0.
        deferred: work on a stream waits until something makes the host wait for it, as late as the API allows; host memory that a
            pending copy will fill reads as 0xFF bytes (NaN, -1) until then.  False: work is done as soon as it is enqueued.
        execute: runs a kernel; the PTX emulator unless a test has its own.

    Attributes:
        counters: see :class:`Counters`.
        launches: every kernel that was asked for, in order.
        faults: what a correct program doesn't do or what went wrong on the device, in words; a test fixture asserts that there
            are none.  :meth:`take_faults` empties it.
        refusals: every call that was refused, as "cuName: CUDA_ERROR_X: why".
        not_supported: names of calls that this fake lacks.
    """

    def __init__(
        self,
        devices: Sequence[DeviceSpec] = (DeviceSpec(),),
        *,
        version: int = 13000,
        deferred: bool = True,
        execute: Callable[[Launch], None] = emulate,
    ) -> None:
        self.version, self.deferred, self.execute = version, deferred, execute
        self.counters = Counters()
        self.launches: list[Launch] = []
        self.faults: list[str] = []
        self.refusals: list[str] = []
        self.not_supported: list[str] = []
        self.initialised = False
        self.first_handle = next(_handles)
        self._objects: dict[int, Any] = {}
        self._injections: list[Injection] = []
        self._work_failures: list[Injection] = []
        self._lock = threading.RLock()
        self._thread = threading.local()
        self.devices = Devices(self, devices, [next(_bases) for _ in devices])
        self.contexts = Contexts(self)
        self.memory = Allocations(self)
        self.copies = Copies(self)
        self.streams = Streams(self)
        self.modules = Modules(self)
        self.graphs = Graphs(self)
        parts = (self, self.devices, self.contexts, self.memory, self.copies, self.streams, self.modules, self.graphs)
        self.handlers: dict[str, Callable[..., Code | None]] = {}
        for name in SIGNATURES:
            found = [getattr(part, name) for part in parts if hasattr(part, name)]
            assert len(found) == 1, f"{name} is answered by {len(found)} parts"
            self.handlers[name] = found[0]

    # The life of a driver

    def __enter__(self) -> FakeDriver:
        global _installed
        assert _installed is None, "another fake driver is in place"
        _installed = self
        _connect(library.load())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _installed
        self.leaks()  # collects garbage where something is left: pycuda's objects free what they own when they die
        _disconnect(library.load())
        _installed = None

    def leaks(self) -> list[str]:
        """What was made and not given back, in words: memory, streams, events, modules, graphs, contexts.

        The end of a context gives back what is in it: ask before that, too.
        """
        found = self._living()
        if found:  # perhaps only garbage; a collection takes long where much is imported
            gc.collect()
            found = self._living()
        return found

    def _living(self) -> list[str]:
        living = [str(item) for item in self._objects.values() if getattr(item, "owned", False) and item.context.alive]
        return living + self.memory.living() + self.contexts.retained()

    def take_faults(self) -> list[str]:
        """The faults so far, which are thereby dealt with."""
        faults, self.faults = self.faults, []
        return faults

    def unused_injections(self) -> list[str]:
        """Errors asked for by :meth:`fail` and :meth:`fail_work` that never came."""
        return [f"{i.name}: {i.code.symbol}" for i in (*self._injections, *self._work_failures) if not i.fired]

    # Errors on demand

    def fail(self, name: str, code: Code, *, on_call: int = 1, times: int = 1) -> None:
        """Give ``code`` for the ``on_call``-th call of an entry point from now on, and for the ``times`` - 1 after it.

        ``name`` is the symbol, or the symbol without its version: "cuMemAlloc" stands for cuMemAlloc_v2.
        """
        assert any(symbol in (name, f"{name}_v2", f"{name}_v4") for symbol in SIGNATURES), name
        self._injections.append(Injection(name, code, on_call - 1, times))

    def fail_work(self, kind: str, code: Code, *, on_run: int = 1) -> None:
        """Let the ``on_run``-th piece of work of a kind (kernel, htod, dtoh, dtod, memset, host) fail on the device.

        The call that enqueues it succeeds; a later one reports the failure, and the context is lost, as on a GPU.
        """
        self._work_failures.append(Injection(kind, code, on_run - 1, 1))

    def _injected(self, name: str) -> Code | None:
        for injection in self._injections:
            if name in (injection.name, f"{injection.name}_v2", f"{injection.name}_v4") and injection.fired < injection.times:
                if injection.after == 0:
                    injection.fired += 1
                    return injection.code
                injection.after -= 1
        return None

    def before_work(self, kind: str) -> None:
        """Called as a piece of work starts on the device.

        Raises:
            Sticky: it was told to fail.
        """
        for injection in self._work_failures:
            if injection.name == kind and not injection.fired:
                if injection.after == 0:
                    injection.fired += 1
                    raise Sticky(injection.code, f"{kind}, as the test asked")
                injection.after -= 1

    # The way of a call

    def call(self, name: str, arguments: tuple[int, ...]) -> int:
        with self._lock:
            self.counters.calls[name] += 1
            try:
                if self.in_host_function:
                    raise Refused(Code.NOT_PERMITTED, "called from a host function on a stream")
                injected = self._injected(name)
                if injected is not None:
                    return injected
                if name not in _ALWAYS and not self.initialised:
                    raise Refused(Code.NOT_INITIALIZED, "before cuInit")
                return self.handlers[name](*arguments) or Code.SUCCESS
            except Refused as refusal:
                self.refusals.append(f"{name}: {refusal}")
                return refusal.code
            except Sticky as lost:
                return lost.code
            except Exception:
                self.faults.append(f"{name} broke the fake driver:\n{traceback.format_exc()}")
                return Code.UNKNOWN

    def missing(self, name: str) -> int:
        with self._lock:
            self.counters.calls[name] += 1
            self.lacks(name)
            return Code.NOT_SUPPORTED

    def lacks(self, what: str) -> None:
        self.not_supported.append(what)
        self.faults.append(f"{what} is not supported by the fake driver")

    @property
    def in_host_function(self) -> bool:
        return getattr(self._thread, "host_function", False)

    @in_host_function.setter
    def in_host_function(self, value: bool) -> None:
        self._thread.host_function = value

    # Handles

    def new_handle(self, item: Any) -> int:
        handle = next(_handles)
        self._objects[handle] = item
        return handle

    def get(self, handle: int, kind: type) -> Any:
        item = self._objects.get(handle)
        if not isinstance(item, kind):
            raise Refused(Code.INVALID_HANDLE, f"{handle:#x} is no living {kind.__name__}")
        return item

    def drop(self, handle: int, kind: type) -> Any | None:
        """Forgets a handle; None for one of an earlier driver, whose owner has outlived it."""
        if handle not in self._objects and handle < self.first_handle:
            return None
        item = self.get(handle, kind)
        del self._objects[handle]
        return item

    # Calls that belong to no part

    def cuInit(self, flags: int) -> None:
        if not self.devices.specs:
            raise Refused(Code.NO_DEVICE)
        if flags:
            raise Refused(Code.INVALID_VALUE, "flags must be 0")
        self.initialised = True

    def cuDriverGetVersion(self, version: int) -> None:
        write_int(version, self.version)

    def cuGetErrorString(self, code: int, text: int) -> None:
        self._text(code, text, name=False)

    def cuGetErrorName(self, code: int, text: int) -> None:
        self._text(code, text, name=True)

    @staticmethod
    def _text(code: int, text: int, *, name: bool) -> None:
        if code not in {int(c) for c in Code}:
            write_word(text, 0)
            raise Refused(Code.INVALID_VALUE, f"no error has the number {code}")
        write_word(text, text_address(Code(code), name=name))

    def cuGetProcAddress(self, symbol: int, function: int, version: int, flags: int) -> None:
        self.cuGetProcAddress_v2(symbol, function, version, flags, 0)

    def cuGetProcAddress_v2(self, symbol: int, function: int, version: int, flags: int, status: int) -> None:
        del version, flags
        name = ctypes.string_at(symbol).decode()
        known = [s for s in SIGNATURES if s == name or s.rpartition("_v")[0] == name]
        if status:
            write_int(status, 0 if known else 1)
        if not known:
            write_word(function, 0)
            self.lacks(name)
            raise Refused(Code.NOT_FOUND, name)
        newest = max(known, key=lambda s: int(s.rpartition("_v")[2]) if s != name else 1)
        write_word(function, ctypes.cast(getattr(library.load(), newest), ctypes.c_void_p).value or 0)


def write_word(address: int, value: int) -> None:
    ctypes.c_uint64.from_address(address).value = value


def write_int(address: int, value: int) -> None:
    ctypes.c_int32.from_address(address).value = value


def _connect(lib: ctypes.CDLL) -> None:
    """Points every entry point at the driver in place."""
    if not _callbacks:
        for name in SIGNATURES:
            _callbacks[name] = prototype(name)(_answer(name))
        _callbacks["missing"] = MISSING(_missing)
    for name in SIGNATURES:
        assert lib.advrad_fake_register(name.encode(), _callbacks[name]) == 1
    lib.advrad_fake_missing(_callbacks["missing"])


def _disconnect(lib: ctypes.CDLL) -> None:
    """Lets every entry point say that CUDA is deinitialised, in C: also when Python is gone and pycuda's objects die."""
    for name in SIGNATURES:
        lib.advrad_fake_register(name.encode(), None)
    lib.advrad_fake_missing(None)


def _answer(name: str) -> Callable[..., int]:
    def function(*arguments: int) -> int:
        driver = _installed
        return Code.DEINITIALIZED if driver is None else driver.call(name, arguments)

    return function


def _missing(name: bytes) -> int:
    driver = _installed
    return Code.DEINITIALIZED if driver is None else driver.missing(name.decode())


def launch_into_nothing(active: bool) -> None:
    """Let cuLaunchKernel return at once, in C, or not: to time what stands before it."""
    lib = library.load()
    pointer = lib.advrad_fake_nothing() if active else _callbacks["cuLaunchKernel"]
    assert lib.advrad_fake_register(b"cuLaunchKernel", pointer) == 1
