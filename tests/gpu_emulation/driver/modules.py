"""Modules, functions and launches.

PTX is emulated.  A cubin can't be: it stands for the PTX that was compiled beside it, which :meth:`Modules.know` is told.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_emulation.driver.codes import Code, Refused
from gpu_emulation.driver.devices import DEFAULT_SHARED, MAX_BLOCK, MAX_GRID, MAX_THREADS, DeviceSpec
from gpu_emulation.driver.streams import Stream, Work
from gpu_emulation.errors import InvalidModule
from gpu_emulation.memory import Memory
from gpu_emulation.module import Entry
from gpu_emulation.module import Module as Image

if TYPE_CHECKING:
    from gpu_emulation.driver.contexts import Context
    from gpu_emulation.driver.fake import FakeDriver

# The PTX version that a driver's compiler reads, by the CUDA version: the newest at most as new as the driver.
_PTX_OF_CUDA = {
    **{11000: (7, 0), 11010: (7, 1), 11020: (7, 2), 11030: (7, 3), 11040: (7, 4), 11050: (7, 5), 11060: (7, 6), 11070: (7, 7)},
    **{11080: (7, 8), 12000: (8, 0), 12010: (8, 1), 12020: (8, 2), 12030: (8, 3), 12040: (8, 4), 12050: (8, 5), 12070: (8, 6)},
    **{12080: (8, 7), 12090: (8, 8), 13000: (9, 0), 13010: (9, 1)},
}
_TEGRA = ((7, 2), (8, 7), (11, 0))  # no binary compatibility there, and none between them and others
_JIT_LOGS = {3: 4, 5: 6}  # CU_JIT_INFO_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER -> the option with its size
_END, _POINTER, _SIZE = 0, 1, 2  # CU_LAUNCH_PARAM_*
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Module:
    owned = True

    def __init__(self, driver: FakeDriver, image: Image, context: Context) -> None:
        self.image, self.context = image, context
        self.handle = driver.new_handle(self)

    def __str__(self) -> str:
        return f"module with {', '.join(self.image.entries)}"


class Function:
    def __init__(self, driver: FakeDriver, module: Module, entry: Entry) -> None:
        self.module, self.entry = module, entry
        self.dynamic_shared = max(0, DEFAULT_SHARED - entry.shared_bytes)
        self.handle = driver.new_handle(self)


@dataclass
class Launch:
    """A kernel that was asked for."""

    image: Image
    entry: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    parameters: bytes
    stream: str
    memory: Memory


def emulate(launch: Launch) -> None:
    """Runs a launch on the PTX emulator."""
    launch.image.launch(launch.entry, launch.grid, launch.block, launch.parameters, launch.memory, dynamic_shared=launch.shared)


@lru_cache(maxsize=64)
def read_ptx(text: str) -> Image:
    """The emulator's module of a PTX text; tests load the same ones again and again.

    Raises:
        Refused: it is not PTX, or not what the emulator knows.
    """
    try:
        return Image(text)
    except InvalidModule as error:
        raise Refused(Code.INVALID_PTX, f"{type(error).__name__}: {error}") from error


class Modules:
    """cuModule*, cuFunc* and cuLaunchKernel."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self._cubins: dict[str, tuple[str, str]] = {}  # SHA-256 -> (PTX, architecture)

    def know(self, cubin: bytes, ptx: str, architecture: str) -> None:
        """This cubin, compiled for ``architecture`` ("sm_80"), was made from this PTX."""
        self._cubins[hashlib.sha256(cubin).hexdigest()] = ptx, architecture

    # Images

    def _image(self, data: bytes, spec: DeviceSpec) -> Image:
        if data[:4] != b"\x7fELF":
            if b".version" not in data:
                raise Refused(Code.INVALID_IMAGE, "neither PTX nor ELF")
            image = read_ptx(data.decode("utf-8", "strict"))
            self._readable(image, Code.UNSUPPORTED_PTX_VERSION)
            number, specific = _architecture(image.target)
            device = 10 * spec.capability[0] + spec.capability[1]
            if number > device or (specific and number != device):
                raise Refused(Code.INVALID_PTX, f"PTX for {image.target} on compute capability {spec.capability}")
            return image
        known = self._cubins.get(hashlib.sha256(data).hexdigest())
        if known is None:
            raise Refused(Code.NO_BINARY_FOR_GPU, "a cubin that the fake was not told the PTX of")
        image = read_ptx(known[0])
        self._readable(image, Code.INVALID_IMAGE)
        number, specific = _architecture(known[1])
        major, minor = divmod(number, 10)
        specific = specific or not {(major, minor), spec.capability}.isdisjoint(_TEGRA)
        if major != spec.capability[0] or minor > spec.capability[1] or (specific and minor != spec.capability[1]):
            raise Refused(Code.NO_BINARY_FOR_GPU, f"a cubin for {known[1]} on compute capability {spec.capability}")
        return image

    def _readable(self, image: Image, code: Code) -> None:
        """Refuses what a newer toolkit made: PTX newer than the driver's compiler, cubins of a newer major version of CUDA."""
        newest = max((ptx for cuda, ptx in _PTX_OF_CUDA.items() if cuda <= self.driver.version), default=(0, 0))
        version = _version(image)
        made, known = (version, newest) if code == Code.UNSUPPORTED_PTX_VERSION else (version[:1], newest[:1])
        if made > known:
            raise Refused(code, f"made with PTX {image.version}, and CUDA {self.driver.version} knows {newest}")

    def _load(self, handle: int, data: bytes) -> None:
        context = self.driver.contexts.current()
        self.driver.graphs.forbid_unsafe("cuModuleLoad")
        image = self._image(data, self.driver.devices.spec(context.device))
        ctypes.c_uint64.from_address(handle).value = Module(self.driver, image, context).handle

    def cuModuleLoad(self, handle: int, file: int) -> None:
        path = Path(ctypes.string_at(file).decode())
        if not path.is_file():
            raise Refused(Code.FILE_NOT_FOUND, str(path))
        self._load(handle, path.read_bytes().rstrip(b"\0"))

    def cuModuleLoadData(self, handle: int, image: int) -> None:
        self._load(handle, _bytes_of(image))

    def cuModuleLoadDataEx(self, handle: int, image: int, count: int, options: int, values: int) -> None:
        keys = list((ctypes.c_int32 * count).from_address(options)) if count else []
        places = (ctypes.c_uint64 * max(1, count)).from_address(values or ctypes.addressof(ctypes.c_uint64()))
        given = {key: places[i] for i, key in enumerate(keys)}
        message = b""
        try:
            self._load(handle, _bytes_of(image))
        except Refused as refusal:
            message = refusal.why.encode()
            raise
        finally:
            for log, size in _JIT_LOGS.items():
                if log in given and size in given:
                    text = (message if log == 5 else b"")[: max(0, given[size] - 1)]
                    ctypes.memmove(given[log], text + b"\0", len(text) + 1)
                    places[keys.index(size)] = len(text)

    def cuModuleUnload(self, handle: int) -> None:
        self.driver.drop(handle, Module)

    def cuModuleGetFunction(self, handle: int, module: int, name: int) -> None:
        found: Module = self.driver.get(module, Module)
        entry = found.image.entries.get(ctypes.string_at(name).decode())
        if entry is None:
            raise Refused(Code.NOT_FOUND, f"{found} has no such entry")
        ctypes.c_uint64.from_address(handle).value = Function(self.driver, found, entry).handle

    # Functions

    def cuFuncGetAttribute(self, value: int, attribute: int, handle: int) -> None:
        function: Function = self.driver.get(handle, Function)
        major, minor = self.driver.devices.spec(function.module.context.device).capability
        entry, version = function.entry, _version(function.module.image)
        known = {
            0: entry.max_threads or MAX_THREADS,
            1: entry.shared_bytes,
            5: 10 * version[0] + version[1],
            6: 10 * major + minor,
        }
        known[_MAX_DYNAMIC_SHARED] = function.dynamic_shared
        if attribute not in known:
            self.driver.lacks(f"cuFuncGetAttribute({attribute})")
            raise Refused(Code.NOT_SUPPORTED, f"attribute {attribute}")
        ctypes.c_int32.from_address(value).value = known[attribute]

    def cuFuncSetAttribute(self, handle: int, attribute: int, value: int) -> None:
        function: Function = self.driver.get(handle, Function)
        limit = self.driver.devices.spec(function.module.context.device).shared - function.entry.shared_bytes
        if attribute != _MAX_DYNAMIC_SHARED:
            self.driver.lacks(f"cuFuncSetAttribute({attribute})")
            raise Refused(Code.NOT_SUPPORTED, f"attribute {attribute}")
        if not 0 <= value <= limit:
            raise Refused(Code.INVALID_VALUE, f"{value} bytes of shared memory, {limit} at most")
        function.dynamic_shared = value

    def cuFuncSetBlockShape(self, handle: int, x: int, y: int, z: int) -> None:
        """Of the oldest launch interface, which pycuda still calls before every launch; cuLaunchKernel has its own block."""
        self.driver.get(handle, Function)
        del x, y, z

    def cuFuncSetSharedSize(self, handle: int, nbytes: int) -> None:
        self.driver.get(handle, Function)
        del nbytes

    def cuFuncSetCacheConfig(self, handle: int, preference: int) -> None:
        self.driver.get(handle, Function)
        del preference

    # Launches

    def cuLaunchKernel(
        self, handle: int, gx: int, gy: int, gz: int, bx: int, by: int, bz: int, shared: int, stream: int, values: int, extra: int
    ) -> None:
        target = self.driver.streams.find(stream)
        work = self.kernel(handle, target, (gx, gy, gz), (bx, by, bz), shared, values, extra)
        self.driver.streams.submit(target, work)
        assert work.kernel is not None
        self.driver.launches.append(work.kernel[1])
        if target.capture is None:
            self.driver.counters.launches += 1

    def kernel(
        self, handle: int, stream: Stream, grid: tuple[int, int, int], block: tuple[int, int, int], shared: int, values: int,
        extra: int,
    ) -> Work:  # fmt: skip
        """A launch as a piece of work, after a check."""
        function: Function = self.driver.get(handle, Function)
        self._check(function, stream, grid, block, shared)
        parameters = _parameters(function.entry, values, extra)
        memory = self.driver.contexts.memory()
        launch = Launch(function.module.image, function.entry.name, grid, block, shared, parameters, str(stream), memory)
        words = f"{launch.entry} over {grid} blocks of {block} threads"
        return Work("kernel", words, lambda: self.driver.execute(launch), kernel=(handle, launch))

    @staticmethod
    def _check(function: Function, stream: Stream, grid: tuple[int, ...], block: tuple[int, ...], shared: int) -> None:
        if function.module.context is not stream.context:
            raise Refused(Code.INVALID_HANDLE, "function and stream belong to different contexts")
        for name, sizes, limits in (("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)):
            if any(not 1 <= size <= limit for size, limit in zip(sizes, limits, strict=True)):
                raise Refused(Code.INVALID_VALUE, f"{name} {sizes}")
        if block[0] * block[1] * block[2] > MAX_THREADS:
            raise Refused(Code.INVALID_VALUE, f"{block} are more than {MAX_THREADS} threads")
        declared = function.entry.required_block
        if declared and block != (*declared, 1, 1)[:3]:
            raise Refused(Code.INVALID_VALUE, f"block {block} of a kernel that was compiled for {declared}")
        if block[0] * block[1] * block[2] > (function.entry.max_threads or MAX_THREADS):
            raise Refused(Code.INVALID_VALUE, f"block {block} of a kernel for {function.entry.max_threads} threads")
        if shared > function.dynamic_shared:
            raise Refused(Code.INVALID_VALUE, f"{shared} bytes of dynamic shared memory, {function.dynamic_shared} allowed")


def _version(image: Image) -> tuple[int, int]:
    major, minor = image.version.split(".")
    return int(major), int(minor)


def _architecture(name: str) -> tuple[int, bool]:
    """Number of a target and whether code for it runs on nothing else: "sm_90a" -> (90, True)."""
    match = re.fullmatch(r"sm_(\d+)([af]?)", name.strip())
    if match is None:
        raise Refused(Code.INVALID_PTX, f"target {name}")
    return int(match[1]), bool(match[2])


def _bytes_of(address: int) -> bytes:
    """The image at an address: an ELF file as long as its headers say, else a text that ends with a NUL."""
    head = ctypes.string_at(address, 4)
    if head != b"\x7fELF":
        return ctypes.string_at(address)
    header = ctypes.string_at(address, 64)
    sections, (size, count) = struct.unpack_from("<Q", header, 40)[0], struct.unpack_from("<HH", header, 58)
    programs, (psize, pcount) = struct.unpack_from("<Q", header, 32)[0], struct.unpack_from("<HH", header, 54)
    end = max(sections + size * count, programs + psize * pcount, 64)
    for i in range(count):
        kind, _, _, offset, length = struct.unpack_from("<IQQQQ", ctypes.string_at(address + sections + i * size, 40), 4)
        if kind != 8:  # SHT_NOBITS takes no room in the file
            end = max(end, offset + length)
    return ctypes.string_at(address, end)


def _parameters(entry: Entry, values: int, extra: int) -> bytes:
    """The parameter buffer, from either way in which a launch can give it."""
    if values and extra:
        raise Refused(Code.INVALID_VALUE, "parameters given twice")
    if values:
        buffer = bytearray(entry.parameter_bytes)
        for i, parameter in enumerate(entry.parameters):
            place = ctypes.c_uint64.from_address(values + 8 * i).value
            buffer[parameter.offset : parameter.offset + parameter.nbytes] = ctypes.string_at(place, parameter.nbytes)
        return bytes(buffer)
    words: dict[int, int] = {}
    while extra and (key := ctypes.c_uint64.from_address(extra).value) != _END:
        words[key] = ctypes.c_uint64.from_address(extra + 8).value
        extra += 16
    if set(words) != {_POINTER, _SIZE} and entry.parameters:
        raise Refused(Code.INVALID_VALUE, "no parameters")
    nbytes = ctypes.c_uint64.from_address(words[_SIZE]).value if words else 0
    if nbytes != entry.parameter_bytes:
        raise Refused(Code.INVALID_VALUE, f"{nbytes} bytes of parameters, {entry.name} has {entry.parameter_bytes}")
    return ctypes.string_at(words[_POINTER], nbytes) if nbytes else b""
