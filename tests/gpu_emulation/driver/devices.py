"""The GPUs of the fake driver: what they say about themselves, and their memory."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu_emulation.driver.codes import Code, Refused
from gpu_emulation.memory import Memory

if TYPE_CHECKING:
    from gpu_emulation.driver.fake import FakeDriver


@dataclass(frozen=True)
class DeviceSpec:
    """One GPU.

    Attributes:
        name: as the driver says it.
        capability: compute capability.
        memory: bytes.
        multiprocessors: how many.
        shared: bytes of shared memory that a block may ask for, at most.
    """

    name: str = "NVIDIA A100 (fake)"
    capability: tuple[int, int] = (8, 0)
    memory: int = 2 << 30
    multiprocessors: int = 108
    shared: int = 163 << 10


T4 = DeviceSpec("Tesla T4 (fake)", (7, 5), multiprocessors=40, shared=64 << 10)
A100 = DeviceSpec()
ORIN = DeviceSpec("Orin (fake)", (8, 7), multiprocessors=16)
L4 = DeviceSpec("NVIDIA L4 (fake)", (8, 9), multiprocessors=58, shared=99 << 10)
H100 = DeviceSpec("NVIDIA H100 (fake)", (9, 0), multiprocessors=132, shared=227 << 10)
RTX5090 = DeviceSpec("NVIDIA GeForce RTX 5090 (fake)", (12, 0), multiprocessors=170, shared=99 << 10)

DEFAULT_SHARED = 48 << 10
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
MAX_THREADS = 1024


class DeviceMemory(Memory):
    """Addresses of different devices and drivers differ, so that one taken for another is a fault."""

    def __init__(self, size: int, base: int) -> None:
        super().__init__(size)
        self._next += base << 40


class Devices:
    """cuDevice*: no state but the memories."""

    def __init__(self, driver: FakeDriver, specs: Sequence[DeviceSpec], bases: Sequence[int]) -> None:
        self.driver = driver
        self.specs = tuple(specs)
        self.memories = [DeviceMemory(spec.memory, base) for spec, base in zip(specs, bases, strict=True)]

    def spec(self, device: int) -> DeviceSpec:
        if not 0 <= device < len(self.specs):
            raise Refused(Code.INVALID_DEVICE, f"device {device} of {len(self.specs)}")
        return self.specs[device]

    def cuDeviceGet(self, device: int, ordinal: int) -> None:
        self.spec(ordinal)
        ctypes.c_int32.from_address(device).value = ordinal

    def cuDeviceGetCount(self, count: int) -> None:
        ctypes.c_int32.from_address(count).value = len(self.specs)

    def cuDeviceGetName(self, text: int, size: int, device: int) -> None:
        _write_text(text, size, self.spec(device).name)

    def cuDeviceGetPCIBusId(self, text: int, size: int, device: int) -> None:
        self.spec(device)
        _write_text(text, size, f"0000:{device:02x}:00.0")

    def cuDeviceGetUuid_v2(self, uuid: int, device: int) -> None:
        ctypes.memmove(uuid, hashlib.md5(f"{self.spec(device).name} {device}".encode(), usedforsecurity=False).digest(), 16)

    def cuDeviceTotalMem_v2(self, size: int, device: int) -> None:
        ctypes.c_uint64.from_address(size).value = self.spec(device).memory

    def cuDeviceComputeCapability(self, major: int, minor: int, device: int) -> None:
        for address, value in zip((major, minor), self.spec(device).capability, strict=True):
            ctypes.c_int32.from_address(address).value = value

    def cuDeviceGetAttribute(self, value: int, attribute: int, device: int) -> None:
        spec = self.spec(device)
        known = {
            **{1: MAX_THREADS, 2: MAX_BLOCK[0], 3: MAX_BLOCK[1], 4: MAX_BLOCK[2], 5: MAX_GRID[0], 6: MAX_GRID[1], 7: MAX_GRID[2]},
            **{8: DEFAULT_SHARED, 9: 65536, 10: 32, 12: 65536, 14: 512, 15: 1, 16: spec.multiprocessors, 18: 0, 19: 1},
            **{31: 1, 32: 0, 33: device, 34: 0, 39: 2048, 40: 2, 41: 1, 50: 0, 75: spec.capability[0], 76: spec.capability[1]},
            **{81: spec.shared + 1024, 82: 65536, 97: spec.shared, 115: 1},
        }
        if attribute not in known:
            self.driver.lacks(f"cuDeviceGetAttribute({attribute})")
            raise Refused(Code.NOT_SUPPORTED, f"attribute {attribute}")
        ctypes.c_int32.from_address(value).value = known[attribute]


def _write_text(address: int, size: int, text: str) -> None:
    data = text.encode()[: size - 1] + b"\0"
    ctypes.memmove(address, data, len(data))
