"""Device and pinned host memory: who has what, and who gave it back."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpu_emulation.driver.codes import Code, Refused
from gpu_emulation.driver.streams import Work
from gpu_emulation.errors import MemoryFault, OutOfMemory

if TYPE_CHECKING:
    from gpu_emulation.driver.contexts import Context
    from gpu_emulation.driver.fake import FakeDriver

PAGE = 4096
DEVICE_MAP = 2  # CU_MEMHOSTALLOC_DEVICEMAP
HOST_MEMORY, DEVICE_MEMORY = 1, 2  # CU_MEMORYTYPE_*
#: Memory type, device pointer, device ordinal, start and size of the range.
POINTER_ATTRIBUTES: dict[int, Any] = {
    2: ctypes.c_uint32,
    3: ctypes.c_uint64,
    9: ctypes.c_int32,
    11: ctypes.c_uint64,
    12: ctypes.c_uint64,
}


@dataclass
class HostMemory:
    """Page-locked memory: the driver's own (``data`` keeps it), or a program's that was registered."""

    address: int
    nbytes: int
    flags: int
    context: Context
    data: NDArray[np.uint8] | None

    def __str__(self) -> str:
        return f"{self.nbytes} bytes of {'pinned' if self.data is not None else 'registered'} host memory"


class Allocations:
    """cuMemAlloc*, cuMemFree*, cuMemHost* and what they ask about."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self._device: dict[int, tuple[int, Context]] = {}  # address -> size
        self._host: dict[int, HostMemory] = {}
        self._freed_host: list[HostMemory] = []  # kept: an array of the program may still look at it

    def living(self) -> list[str]:
        device = [f"{size} bytes of device memory at {address:#x}" for address, (size, _) in self._device.items()]
        return device + [str(memory) for memory in self._host.values()]

    def end_of(self, context: Context) -> None:
        """What the context still owns goes with it."""
        for address in [address for address, (_, owner) in self._device.items() if owner is context]:
            del self._device[address]
            self.driver.devices.memories[context.device].free(address)
        for memory in [memory for memory in self._host.values() if memory.context is context]:
            self._release(memory)

    def pinned(self, address: int, nbytes: int) -> HostMemory | None:
        """The page-locked memory that a range lies in.

        Raises:
            Refused: the range begins in it and ends outside, or it was freed.
        """
        for memory in self._host.values():
            if memory.address <= address < memory.address + memory.nbytes:
                if address + nbytes > memory.address + memory.nbytes:
                    raise self._bug(f"{nbytes} bytes at {address:#x} run over the end of {memory}")
                return memory
        for memory in self._freed_host:
            if memory.address <= address < memory.address + memory.nbytes:
                raise self._bug(f"use after free of {memory}")
        return None

    def check(self, address: int, nbytes: int) -> None:
        """Refuses a device range that no living allocation holds."""
        try:
            self.driver.contexts.memory().read(address, 0 if nbytes == 0 else 1)
            if nbytes:
                self.driver.contexts.memory().read(address + nbytes - 1, 1)
                self._same_allocation(address, nbytes)
        except MemoryFault as fault:
            raise self._bug(str(fault)) from fault

    def _same_allocation(self, address: int, nbytes: int) -> None:
        memory = self.driver.contexts.memory()
        allocation = memory.find(address)
        if allocation is None or address + nbytes > allocation.address + allocation.nbytes:
            raise memory.fault(address, nbytes)

    def _bug(self, why: str, code: Code = Code.INVALID_VALUE) -> Refused:
        self.driver.faults.append(why)
        return Refused(code, why)

    # Device memory

    def _allocate(self, address: int, nbytes: int) -> None:
        context = self.driver.contexts.current()
        if nbytes == 0:
            raise Refused(Code.INVALID_VALUE, "0 bytes")
        try:
            place = self.driver.contexts.memory().alloc(nbytes)
        except OutOfMemory as error:
            raise Refused(Code.OUT_OF_MEMORY, str(error)) from error
        self._device[place] = nbytes, context
        self.driver.counters.allocations += 1
        ctypes.c_uint64.from_address(address).value = place

    def _free(self, address: int, context: Context) -> None:
        self.driver.devices.memories[context.device].free(address)
        del self._device[address]
        self.driver.counters.frees += 1

    def cuMemAlloc_v2(self, address: int, nbytes: int) -> None:
        self.driver.contexts.current()
        self.driver.graphs.forbid_unsafe("cuMemAlloc")
        self._allocate(address, nbytes)

    def cuMemFree_v2(self, address: int) -> None:
        """Doesn't wait for work on streams: the documentation doesn't promise that, so work that still needs it is a fault."""
        context = self.driver.contexts.current()
        self.driver.graphs.forbid_unsafe("cuMemFree")
        if address == 0:
            return
        if address not in self._device:
            why = self.driver.contexts.memory().nearest(address)
            raise self._bug(f"cuMemFree of {address:#x}, which is not allocated: {why}")
        if self._device[address][1].device != context.device:
            raise self._bug(f"cuMemFree of {address:#x} in a context of another device")
        self._free(address, context)

    def cuMemAllocAsync(self, address: int, nbytes: int, stream: int) -> None:
        found = self.driver.streams.find(stream)
        if found.capture is not None:
            self.driver.lacks("cuMemAllocAsync in a capture")
            raise Refused(Code.NOT_SUPPORTED)
        self._allocate(address, nbytes)

    def cuMemFreeAsync(self, address: int, stream: int) -> None:
        found = self.driver.streams.find(stream)
        if address not in self._device:
            raise self._bug(f"cuMemFreeAsync of {address:#x}, which is not allocated")
        self.driver.streams.submit(found, Work("free", f"free of {address:#x}", lambda: self._free(address, found.context)))

    def cuMemGetInfo_v2(self, free: int, total: int) -> None:
        memory = self.driver.contexts.memory()
        ctypes.c_uint64.from_address(free).value = memory.size_limit - memory.used
        ctypes.c_uint64.from_address(total).value = memory.size_limit

    def cuMemGetAddressRange_v2(self, base: int, size: int, address: int) -> None:
        allocation = self.driver.contexts.memory().find(address)
        if allocation is None:
            raise Refused(Code.NOT_FOUND, f"{address:#x} is in no allocation")
        if base:
            ctypes.c_uint64.from_address(base).value = allocation.address
        if size:
            ctypes.c_uint64.from_address(size).value = allocation.nbytes

    def cuPointerGetAttributes(self, count: int, attributes: int, places: int, pointer: int) -> None:
        """Of what is no memory of CUDA's it says 0 everywhere, and no error; it knows all GPUs' memory."""
        current, found = self.driver.contexts.current().device, dict[int, int]()
        for device, memory in enumerate(self.driver.devices.memories):
            allocation = memory.find(pointer)
            if allocation is not None:
                # As without access between GPUs: an address that kernels can use, for the device's own contexts.
                usable = pointer if device == current else 0
                found = {2: DEVICE_MEMORY, 3: usable, 9: device, 11: allocation.address, 12: allocation.nbytes}
        pinned = [memory for memory in self._host.values() if memory.address <= pointer < memory.address + memory.nbytes]
        for memory in pinned:
            found = {2: HOST_MEMORY, 3: pointer, 9: memory.context.device, 11: memory.address, 12: memory.nbytes}
        for i in range(count):
            attribute = ctypes.c_int32.from_address(attributes + 4 * i).value
            if attribute not in POINTER_ATTRIBUTES:
                self.driver.lacks(f"cuPointerGetAttributes({attribute})")
                raise Refused(Code.NOT_SUPPORTED, f"attribute {attribute}")
            place = ctypes.c_uint64.from_address(places + 8 * i).value
            POINTER_ATTRIBUTES[attribute].from_address(place).value = found.get(attribute, 0)

    # Pinned host memory

    def cuMemHostAlloc(self, address: int, nbytes: int, flags: int) -> None:
        context = self.driver.contexts.current()
        self.driver.graphs.forbid_unsafe("cuMemHostAlloc")
        if nbytes == 0:
            raise Refused(Code.INVALID_VALUE, "0 bytes")
        space = np.full(nbytes + PAGE, 0xFF, np.uint8)
        data = space[-space.ctypes.data % PAGE :][:nbytes]
        memory = HostMemory(data.ctypes.data, nbytes, flags, context, data)
        self._host[memory.address] = memory
        self.driver.counters.host_allocations += 1
        ctypes.c_uint64.from_address(address).value = memory.address

    def cuMemFreeHost(self, address: int) -> None:
        self.driver.contexts.current()
        self.driver.graphs.forbid_unsafe("cuMemFreeHost")
        memory = self._host.get(address)
        if memory is None or memory.data is None:
            raise self._bug(f"cuMemFreeHost of {address:#x}, which is not pinned memory")
        self._release(memory)
        self.driver.counters.host_frees += 1

    def _release(self, memory: HostMemory) -> None:
        del self._host[memory.address]
        for device in self.driver.devices.memories:
            mapped = device.find(memory.address)
            if mapped is not None and mapped.address == memory.address:
                device.unmap(memory.address)
        if memory.data is not None:
            memory.data[:] = 0xFF
            self._freed_host.append(memory)

    def cuMemHostRegister_v2(self, address: int, nbytes: int, flags: int) -> None:
        context = self.driver.contexts.current()
        self.driver.graphs.forbid_unsafe("cuMemHostRegister")
        if address in self._host:
            raise Refused(Code.HOST_MEMORY_ALREADY_REGISTERED)
        self._host[address] = HostMemory(address, nbytes, flags, context, None)
        self.driver.counters.host_allocations += 1

    def cuMemHostUnregister(self, address: int) -> None:
        self.driver.contexts.current()
        memory = self._host.get(address)
        if memory is None or memory.data is not None:
            raise Refused(Code.HOST_MEMORY_NOT_REGISTERED)
        self._release(memory)
        self.driver.counters.host_frees += 1

    def cuMemHostGetDevicePointer_v2(self, pointer: int, address: int, flags: int) -> None:
        del flags
        memory = self._host.get(address)
        if memory is None:
            raise Refused(Code.INVALID_VALUE, f"{address:#x} is not the start of pinned memory")
        device = self.driver.contexts.memory()
        if device.find(address) is None:
            device.map(address, np.ctypeslib.as_array((ctypes.c_uint8 * memory.nbytes).from_address(address)))
        ctypes.c_uint64.from_address(pointer).value = address

    def cuMemHostGetFlags(self, flags: int, address: int) -> None:
        memory = self._host.get(address)
        if memory is None:
            raise Refused(Code.INVALID_VALUE, f"{address:#x} is not the start of pinned memory")
        ctypes.c_uint32.from_address(flags).value = memory.flags | DEVICE_MAP
