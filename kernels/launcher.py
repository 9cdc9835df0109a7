"""Launches compiled kernels through pycuda: no torch, no Triton, and on the way of a frame no allocation and no waiting.

::

    with open_gpu() as gpu:                              # the device's primary context, current on this thread
        kernels = Kernels(Path("k"), gpu)                # a folder that ``advrad-fast compile --kernels`` made
        noise = kernels.load("noise", channels=3, ...)   # the cubin for this GPU, or PTX that the driver compiles
        noise(stream, images=frame, out=out, ...)        # asynchronous; the grid follows from the arguments
        launch = noise.prepare(stream, images=frame, out=out, ...)
        launch()                                         # the same again, arguments checked and packed already
        launch.set(seed=7)                               # and with another seed

Arguments go by name and are held against the manifest.  A pointer is what knows its device address: a pycuda allocation, anything
with ``__cuda_array_interface__`` or ``data_ptr`` (a torch tensor), or the address itself as an int.  That the memory is large
enough, and alive until the kernel has run, is the caller's part, as is waiting: a launch only enqueues.

A GPU that is open belongs to the thread that opened it; another thread opens it again, and both share the primary context, its
memory and its kernels.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any

from advrad_fast.errors import BackendUnavailableError, ConfigError, InferenceError, KernelFileError, expected
from advrad_fast.kernels.manifest import Argument, Axis, Kernel, Kind, Manifest, read_manifest

_FORMATS = {"pointer": "Q", "null": "0Q8x", "i32": "i", "i64": "q", "u64": "Q", "f32": "f"}
_RANGES = {"pointer": (1, 2**64 - 1), "i32": (-(2**31), 2**31 - 1), "i64": (-(2**63), 2**63 - 1), "u64": (0, 2**64 - 1)}
_MAX_GRID = (2**31 - 1, 65535, 65535)
_MAX_FP32 = (2 - 2**-23) * 2.0**127
_DEFAULT_SHARED = 48 << 10  # what a kernel may ask for without saying so beforehand


class Gpu:
    """One GPU's primary context, as :func:`open_gpu` gives it; in a ``with`` it is current on this thread, and closed at the end.

    Attributes:
        ordinal: which GPU.
        name: as the driver calls it.
        capability: (major, minor) compute capability.
        driver_version: the newest CUDA that the driver supports, as 13000 for 13.0.
    """

    def __init__(self, cuda: Any, ordinal: int) -> None:
        self.cuda, self.ordinal = cuda, ordinal
        device = cuda.Device(ordinal)
        self.name: str = device.name()
        self.capability: tuple[int, int] = device.compute_capability()
        self.driver_version: int = cuda.get_driver_version()
        self._context: Any = device.retain_primary_context()
        self._entered = 0

    def __enter__(self) -> Gpu:
        self.push()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.pop()
        self.close()

    def push(self) -> None:
        """Make the context current on this thread, until :meth:`pop`.

        Raises:
            InferenceError: the driver refuses.
        """
        if self._context is None:
            raise InferenceError(f"{self.name} was closed")
        try:
            self._context.push()
        except self.cuda.Error as error:
            raise InferenceError(f"{self.name}: its context cannot be made current: {error}") from error
        self._entered += 1

    def pop(self) -> None:
        """Undo one :meth:`push`."""
        if self._entered:
            self._entered -= 1
            self._context.pop()

    def close(self) -> None:
        """Release the primary context, on any thread; the last one who does frees everything in it.  Closing twice is fine."""
        while self._entered:
            self.pop()
        if self._context is not None:
            # Left to its destructor, pycuda would detach a primary context as if it had made it, which the driver refuses.
            # While it is current pycuda releases it on any thread, but leaves it on this thread's stack of contexts, under the
            # one that was current before.
            context, self._context = self._context, None
            before = self.cuda.Context.get_current()
            context.push()
            context.detach()
            library, top = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
            library.cuCtxPopCurrent_v2(ctypes.byref(top))
            if before is not None:
                library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
                library.cuCtxPushCurrent_v2(top)


def open_gpu(ordinal: int = 0) -> Gpu:
    """Open a GPU by its ordinal.

    Raises:
        BackendUnavailableError: pycuda or the driver is missing or unusable, or there is no such GPU.
        ConfigError: ``ordinal`` is not an integer from 0.
    """
    if type(ordinal) is not int or ordinal < 0:
        raise ConfigError(expected("ordinal", "an integer from 0", ordinal))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pycuda warns of a driver that is older than it, and then raises as well
            cuda = importlib.import_module("pycuda.driver")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == "pycuda"
        reason = "pycuda is not installed" if missing else f"pycuda cannot be loaded: {error}"
        raise BackendUnavailableError(f"GPU {ordinal}: {reason}") from error
    try:
        cuda.init()
        count = cuda.Device.count()
        if ordinal >= count:
            raise BackendUnavailableError(f"GPU {ordinal}: there are {count} GPUs here")
        return Gpu(cuda, ordinal)
    except cuda.Error as error:
        raise BackendUnavailableError(f"GPU {ordinal}: the NVIDIA driver says: {error}") from error


def candidates(
    manifest: Manifest, name: str, capability: tuple[int, int], **variant: str | int | bool
) -> list[tuple[Kernel, Kind]]:
    """What may be loaded for a kernel on a GPU of this compute capability, best first.

    The first is what :meth:`Manifest.find` gives: the cubin for this GPU, or one of its major version, else the newest PTX that
    isn't newer than the GPU.  PTX follows, newest first, for a driver that doesn't take the cubin.  PTX for "sm_90a" and the
    like is for exactly that GPU.

    Raises:
        KernelFileError: there is nothing.
    """
    first = manifest.find(name, capability, **variant)
    device = 10 * capability[0] + capability[1]
    rest = []
    for kernel in manifest.kernels:
        number = int(kernel.target.removeprefix("sm_"))
        if kernel.name == name and dict(kernel.variant) == variant and number <= device and (kernel.portable or number == device):
            rest.append((number, kernel))
    rest.sort(key=lambda pair: pair[0], reverse=True)
    return [first, *((kernel, "ptx") for _, kernel in rest if (kernel, "ptx") != first)]


class Kernels:
    """The kernels of a folder on one GPU.

    Args:
        folder: with a manifest, or a manifest that was read.
        gpu: current on this thread.

    Raises:
        KernelFileError: the folder is damaged.
    """

    def __init__(self, folder: Path | Manifest, gpu: Gpu) -> None:
        self.manifest = folder if isinstance(folder, Manifest) else read_manifest(folder)
        self.gpu = gpu
        self._loaded: dict[object, LoadedKernel] = {}

    def load(self, name: str, **variant: str | int | bool) -> LoadedKernel:
        """A kernel, loaded into the GPU on the first call.  Do it before frames come: loading allocates and may compile.

        Args:
            name, variant: as in the manifest.

        Raises:
            BackendUnavailableError: no image is for this GPU, or the driver takes none of them; the message says what each needs.
            KernelFileError: an image is not what was compiled.
            InferenceError: the GPU has no memory for it.
        """
        key = name, tuple(sorted(variant.items()))
        if key not in self._loaded:
            self._loaded[key] = self._load(name, variant)
        return self._loaded[key]

    def _load(self, name: str, variant: Mapping[str, str | int | bool]) -> LoadedKernel:
        gpu, cuda = self.gpu, self.gpu.cuda
        try:
            images = candidates(self.manifest, name, gpu.capability, **variant)
        except KernelFileError as error:
            known = [kernel for kernel in self.manifest.kernels if kernel.name == name and dict(kernel.variant) == variant]
            if not known:
                raise
            targets = ", ".join(kernel.arch for kernel in known)
            raise BackendUnavailableError(
                f"{_describe(gpu)}: the kernel {name} was compiled for {targets}, for nothing older"
            ) from error
        refusals = []
        for kernel, kind in images:
            image = self.manifest.image(kernel, kind)
            try:
                module = cuda.module_from_buffer(image + b"\0")  # PTX is a C string to the driver
                function = module.get_function(kernel.entry)
                if kernel.shared > _DEFAULT_SHARED:
                    function.set_attribute(cuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.shared)
            except cuda.MemoryError as error:
                raise InferenceError(f"{_describe(gpu)}: no memory to load the kernel {name}: {error}") from error
            except cuda.Error as error:
                refusals.append(f"\n  {kernel.arch} {kind}{_needs(kind, image)}: {error}")
                continue
            return LoadedKernel(cuda, kernel, kind, module, function)
        raise BackendUnavailableError(f"{_describe(gpu)}: the driver takes no image of the kernel {name}:{''.join(refusals)}")


def _describe(gpu: Gpu) -> str:
    version = gpu.driver_version
    return (
        f"{gpu.name} (compute capability {gpu.capability[0]}.{gpu.capability[1]}, "
        f"driver for CUDA {version // 1000}.{version % 1000 // 10})"
    )


def _needs(kind: Kind, image: bytes) -> str:
    version = re.search(rb"^\.version (\d+\.\d+)", image, re.MULTILINE) if kind == "ptx" else None
    return f" (needs a driver that reads PTX {version[1].decode()})" if version else ""


class LoadedKernel:
    """A kernel on a GPU: call it with a stream and its arguments by name, or :meth:`prepare` a launch to be repeated.

    Attributes:
        kernel: its entry in the manifest.
        kind: whether the cubin or the PTX was loaded.
        offsets: where each argument, null pointers too, stands in the packed buffer.
    """

    def __init__(self, cuda: Any, kernel: Kernel, kind: Kind, module: Any, function: Any) -> None:
        self.kernel, self.kind = kernel, kind
        self._error, self._stream, self._module = cuda.Error, cuda.Stream, module
        self._launch: Callable[..., None] = function._launch_kernel
        given = [argument for argument in kernel.arguments if argument.type != "null"]
        self._names = {argument.name for argument in given}
        self._checks = [(argument.name, *_plain(argument), _check(argument)) for argument in given]
        self._pack = struct.Struct("@" + "".join(_FORMATS[argument.type] for argument in kernel.arguments)).pack
        formats = [_FORMATS[argument.type] for argument in kernel.arguments]
        # "0Q" aligns the end of what stands before to it; of a null pointer's format only that is wanted.
        ends = ["@" + "".join(formats[:i]) + f"0{kind.strip('08x')}" for i, kind in enumerate(formats)]
        self.offsets = tuple(struct.calcsize(end) for end in ends)
        followed = {axis.argument for axis in kernel.grid if isinstance(axis, Axis)}
        checks = {name: check for name, *_, check in self._checks if name not in followed}
        self._spots = {
            argument.name: (struct.Struct(f"@{kind}").pack_into, offset, checks[argument.name])
            for argument, offset, kind in zip(kernel.arguments, self.offsets, formats, strict=True)
            if argument.name in checks
        }
        places = {argument.name: place for place, argument in enumerate(given)}
        self._axes = [(places[axis.argument], axis.per) if isinstance(axis, Axis) else axis for axis in kernel.grid]

    def __call__(self, stream: Any, /, **arguments: Any) -> None:
        """Enqueue the kernel on a stream.

        Args:
            stream: a pycuda Stream; None for the default one.
            arguments: every argument of the manifest but its null pointers, by name.

        Raises:
            ConfigError: an argument is missing, unknown, out of range, misaligned or no device pointer.
            InferenceError: the driver refuses the launch, or earlier work on the GPU had failed.
        """
        grid, buffer = self._packed(stream, arguments)
        self._enqueue(grid, buffer, stream)

    def prepare(self, stream: Any, /, **arguments: Any) -> PreparedLaunch:
        """A launch with its arguments checked and packed now; it costs least, and holds no memory alive."""
        grid, buffer = self._packed(stream, arguments)
        return PreparedLaunch(self, grid, buffer, stream)

    def _packed(self, stream: Any, arguments: dict[str, Any]) -> tuple[tuple[int, ...], bytes]:
        if arguments.keys() != self._names:
            unknown, missing = sorted(arguments.keys() - self._names), sorted(self._names - arguments.keys())
            raise ConfigError(f"{self.kernel.name}: unknown arguments {unknown}, missing arguments {missing}")
        if stream is not None and not isinstance(stream, self._stream):
            raise ConfigError(expected(f"{self.kernel.name}: stream", "a pycuda Stream or None", stream))
        values = []
        for name, kind, low, high, bits, check in self._checks:
            value = arguments[name]
            # What is right at first sight, which is nearly always so, costs no call.
            found = type(value)
            plain = found is kind and low <= value <= high and (bits == 0 or not value & bits)
            values.append(value if plain else check(value))
        grid = tuple([axis if isinstance(axis, int) else -(-values[axis[0]] // axis[1]) for axis in self._axes])
        for size, limit in zip(grid, _MAX_GRID, strict=True):
            if not 0 < size <= limit:
                raise ConfigError(expected(f"{self.kernel.name}: grid", f"1 to {limit} programs", size))
        return grid, self._pack(*values)

    def _put(self, buffer: Any, name: str, value: Any) -> None:
        if name not in self._spots:
            raise ConfigError(expected(f"{self.kernel.name}: argument to change", f"one of {sorted(self._spots)}", name))
        pack_into, offset, check = self._spots[name]
        pack_into(buffer, offset, check(value))

    def _enqueue(self, grid: tuple[int, ...], buffer: Any, stream: Any) -> None:
        try:
            self._launch(grid, self.kernel.block, buffer, self.kernel.shared, stream)
        except self._error as error:
            raise InferenceError(f"{self.kernel.name}: {error}") from error


class PreparedLaunch:
    """A launch that is ready: calling it enqueues the kernel."""

    __slots__ = ("_buffer", "_grid", "_kernel", "_stream", "addresses")

    #: Where each argument stands in this process's memory, null pointers too: what a node of a CUDA graph is given.
    addresses: tuple[int, ...]

    def __init__(self, kernel: LoadedKernel, grid: tuple[int, ...], buffer: bytes, stream: Any) -> None:
        self._kernel, self._grid, self._stream = kernel, grid, stream
        self._buffer = ctypes.create_string_buffer(buffer, len(buffer))
        start = ctypes.addressof(self._buffer)
        self.addresses = tuple(start + offset for offset in kernel.offsets)

    def set(self, **arguments: Any) -> None:
        """Change some arguments, of those that the grid does not follow from; what is enqueued already keeps its own.

        Raises:
            ConfigError: as for a launch.
        """
        for name, value in arguments.items():
            self._kernel._put(self._buffer, name, value)

    def __call__(self) -> None:
        """Enqueue the kernel.

        Raises:
            InferenceError: the driver refuses the launch, or earlier work on the GPU had failed.
        """
        self._kernel._enqueue(self._grid, self._buffer, self._stream)


def _plain(argument: Argument) -> tuple[type, float, float, int]:
    """The values that need no second look: their type, the least, the largest, and the bits that none may have."""
    if argument.type == "f32":
        return float, -_MAX_FP32, _MAX_FP32, 0
    low, high = _RANGES[argument.type]
    return int, low, high, argument.multiple_of - 1


def _check(argument: Argument) -> Callable[[Any], Any]:
    """What turns any other value into the number that is packed, or refuses it."""
    name, multiple = argument.name, argument.multiple_of
    if argument.type == "f32":
        return lambda value: _float(name, value)
    low, high = _RANGES[argument.type]
    pointer = argument.type == "pointer"
    wanted = "a device address" if pointer else f"an integer in [{low}, {high}]"

    def check(value: Any) -> int:
        number = _address(name, value) if pointer else _integer(name, value)
        if not low <= number <= high or number % multiple:
            got = hex(number) if pointer else number
            raise ConfigError(expected(name, wanted + (f" that is a multiple of {multiple}" if multiple > 1 else ""), got))
        return number

    return check


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigError(expected(name, "an integer", value))
    return int(value)


def _float(name: str, value: Any) -> float:
    number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    if not (abs(number) <= _MAX_FP32 or abs(number) == math.inf):
        raise ConfigError(expected(name, "a number of fp32", value))
    return number


def _address(name: str, value: Any) -> int:
    """The device address of what has one; memory of the host has none, however much it looks like a number."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is not None:
        return int(interface["data"][0])
    if hasattr(value, "data_ptr") and getattr(getattr(value, "device", None), "type", "cuda") == "cuda":
        return int(value.data_ptr())
    host = isinstance(value, bool) or hasattr(value, "__array_interface__") or hasattr(value, "data_ptr")
    if host or not hasattr(value, "__index__"):
        raise ConfigError(expected(name, "a device pointer", value))
    return int(value.__index__())
