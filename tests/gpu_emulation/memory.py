"""The device's memory: one flat 64-bit address space of separate allocations.

Addresses start above 2**32 and are never given out twice, so that an address cut to 32 bits, an access past the end and a use
after free are all faults.  Fresh memory is filled with 0xFF, a NaN in every floating type, and known byte by byte to be
unwritten.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_emulation.errors import MemoryFault, OutOfMemory

Bytes = NDArray[np.uint8]

POISON = 0xFF
ALIGNMENT = 256
GUARD = 4096
FIRST_ADDRESS = 0x7_0000_0000
WIDEST = 32  # bytes of the widest access; allocations are padded to it, so that they can be viewed at every width


class Allocation:
    """One range of addresses.

    Attributes:
        address, nbytes: the range.
        data: uint8, at least ``nbytes`` long.
        valid: uint8 as long as ``data``, 1 for bytes that were written; None where all are (host memory).
    """

    def __init__(self, address: int, nbytes: int, data: Bytes, valid: Bytes | None) -> None:
        self.address = address
        self.nbytes = nbytes
        self.data = data
        self.valid = valid
        self._all_valid = valid is None

    def __str__(self) -> str:
        return f"{self.nbytes} bytes at {self.address:#x}"

    def is_written(self) -> bool:
        """Whether every byte was written.  Memory never becomes unwritten, so a yes is kept."""
        if not self._all_valid:
            assert self.valid is not None
            self._all_valid = bool(self.valid[: self.nbytes].all())
        return self._all_valid


class Memory:
    """A flat device address space.

    Args:
        size_limit: bytes that may be allocated at one time.
    """

    def __init__(self, size_limit: int = 8 << 30) -> None:
        self.size_limit = size_limit
        self.used = 0
        self.symbols: dict[int, dict[str, int]] = {}  # module variables, by the module's number
        self._next = FIRST_ADDRESS
        self._living: dict[int, Allocation] = {}
        self._order: list[int] = []  # addresses of the living, sorted
        self._freed: dict[int, int] = {}  # address -> size
        self._mapped: set[int] = set()

    def alloc(self, nbytes: int) -> int:
        """A new allocation of ``nbytes`` > 0 bytes: its address, a multiple of 256.

        Raises:
            OutOfMemory: more than ``size_limit`` bytes would be in use.
        """
        if nbytes <= 0:
            raise ValueError(f"an allocation of {nbytes} bytes")
        if self.used + nbytes > self.size_limit:
            raise OutOfMemory(f"{nbytes} bytes asked for, {self.used} of {self.size_limit} in use")
        padded = -(-nbytes // WIDEST) * WIDEST
        address = self._next
        self._next += -(-nbytes // ALIGNMENT) * ALIGNMENT + GUARD
        data = np.full(padded, POISON, dtype=np.uint8)
        self._add(Allocation(address, nbytes, data, np.zeros(padded, dtype=np.uint8)))
        self.used += nbytes
        return address

    def free(self, address: int) -> None:
        """Frees an allocation by its first address.

        Raises:
            MemoryFault: a second free, or an address that ``alloc`` has not returned.
        """
        if address not in self._living or address in self._mapped:
            reason = "double free" if address in self._freed else "free of what was not allocated"
            raise MemoryFault(reason, address=address, nbytes=0, nearest=self.nearest(address))
        self.used -= self._living[address].nbytes
        self._freed[address] = self._living[address].nbytes
        self._drop(address)

    def map(self, address: int, data: NDArray[np.uint8]) -> None:
        """Makes host memory visible at ``address`` until it is unmapped.

        Args:
            data: contiguous uint8 (n,), shared, not copied.
        """
        if data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous or not data.size:
            raise ValueError("mapped memory is a contiguous, one-dimensional, non-empty uint8 array")
        here = self.find(address)
        if here is not None or any(address <= other < address + data.size for other in self._order):
            raise ValueError(f"{data.size} bytes at {address:#x} overlap an allocation")
        self._add(Allocation(address, data.size, data, None))
        self._mapped.add(address)

    def unmap(self, address: int) -> None:
        """Ends a mapping by its first address."""
        if address not in self._mapped:
            raise MemoryFault("unmap of what is not mapped", address=address, nbytes=0, nearest=self.nearest(address))
        self._mapped.remove(address)
        self._freed[address] = self._living[address].nbytes
        self._drop(address)

    def write(self, address: int, data: bytes | bytearray | memoryview | NDArray[Any]) -> None:
        """Copies host bytes to the device."""
        source = np.frombuffer(data, dtype=np.uint8)
        if source.size:
            allocation, start = self._range(address, source.size)
            allocation.data[start : start + source.size] = source
            if allocation.valid is not None:
                allocation.valid[start : start + source.size] = 1

    def read(self, address: int, nbytes: int) -> bytes:
        """Copies device bytes to the host.  Bytes that nobody wrote read as 0xFF; see :meth:`written`."""
        if nbytes == 0:
            return b""
        allocation, start = self._range(address, nbytes)
        return allocation.data[start : start + nbytes].tobytes()

    def written(self, address: int, nbytes: int) -> NDArray[np.bool_]:
        """Which bytes of a range somebody has written: bool (nbytes,)."""
        allocation, start = self._range(address, nbytes)
        if allocation.valid is None:
            return np.ones(nbytes, dtype=bool)
        return allocation.valid[start : start + nbytes].astype(bool)

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        """Device to device; unwritten bytes stay unwritten."""
        if nbytes == 0:
            return
        valid = self.written(source, nbytes)
        data = self.read(source, nbytes)
        self.write(destination, data)
        allocation, start = self._range(destination, nbytes)
        if allocation.valid is not None and not valid.all():
            allocation.valid[start : start + nbytes] = valid
            allocation._all_valid = False

    def fill(self, address: int, pattern: bytes, count: int) -> None:
        """Writes ``pattern`` (1, 2 or 4 bytes for the driver's memset calls) ``count`` times."""
        self.write(address, pattern * count)

    def find(self, address: int) -> Allocation | None:
        """The living allocation that ``address`` lies in."""
        at = bisect_right(self._order, address) - 1
        if at < 0:
            return None
        allocation = self._living[self._order[at]]
        return allocation if address < allocation.address + allocation.nbytes else None

    def nearest(self, address: int) -> str:
        """The freed or living allocation next to an address, in words."""
        for start, nbytes in self._freed.items():
            if start <= address < start + nbytes:
                return f"{nbytes} bytes at {start:#x}, freed"
        ranges = list(self._living.values())
        if not ranges:
            return ""
        best = min(ranges, key=lambda item: max(item.address - address, address - (item.address + item.nbytes - 1)))
        distance = address - best.address
        side = f"{distance - best.nbytes} bytes past its end" if distance >= 0 else f"{-distance} bytes before it"
        return f"{best}, {side}" if not 0 <= distance < best.nbytes else str(best)

    def split(self, addresses: NDArray[np.uint64], nbytes: int) -> Iterator[tuple[Allocation, Any, NDArray[np.int64]]]:
        """Where a vector of accesses lands: (allocation, which of the accesses, their offsets in it) for each allocation.

        Args:
            addresses: uint64 (n,), n > 0.
            nbytes: width of each access.

        Raises:
            MemoryFault: an access that no living allocation holds whole.
        """
        rest = np.arange(len(addresses))
        while rest.size:
            first = int(addresses[rest[0]])
            allocation = self.find(first)
            if allocation is None or first + nbytes > allocation.address + allocation.nbytes:
                raise self.fault(first, nbytes)
            offsets = addresses[rest] - np.uint64(allocation.address)  # wraps below the allocation: then it is out of range too
            inside = (
                offsets <= np.uint64(allocation.nbytes - nbytes) if allocation.nbytes >= nbytes else np.zeros(len(rest), bool)
            )
            if inside.all():
                yield allocation, slice(None) if rest.size == len(addresses) else rest, offsets.astype(np.int64)
                return
            yield allocation, rest[inside], offsets[inside].astype(np.int64)
            rest = rest[~inside]

    def fault(self, address: int, nbytes: int) -> MemoryFault:
        nearest = self.nearest(address)
        reason = "use after free" if nearest.endswith("freed") else "out of bounds"
        return MemoryFault(reason, address=address, nbytes=nbytes, nearest=nearest)

    def _range(self, address: int, nbytes: int) -> tuple[Allocation, int]:
        allocation = self.find(address)
        if allocation is None or address + nbytes > allocation.address + allocation.nbytes:
            raise self.fault(address, nbytes)
        return allocation, address - allocation.address

    def _add(self, allocation: Allocation) -> None:
        self._living[allocation.address] = allocation
        self._order.insert(bisect_right(self._order, allocation.address), allocation.address)

    def _drop(self, address: int) -> None:
        del self._living[address]
        self._order.remove(address)
