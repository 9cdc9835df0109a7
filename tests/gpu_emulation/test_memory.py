"""The address space by itself, as a driver uses it."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from gpu_emulation import Memory, MemoryFault, Module, OutOfMemory
from gpu_emulation.snippets import kernel


def test_allocations_lie_apart_and_hold_poison() -> None:
    memory = Memory()
    a, b = memory.alloc(1), memory.alloc(1000)
    assert a % 256 == b % 256 == 0 and a > 2**32 and b - a > 256
    assert memory.read(b, 1000) == b"\xff" * 1000
    assert np.isnan(np.frombuffer(memory.read(b, 1000), dtype=np.float32)).all()
    assert not memory.written(b, 1000).any()
    with pytest.raises(ValueError, match="0 bytes"):
        memory.alloc(0)


def test_bytes_come_back() -> None:
    memory = Memory()
    a = memory.alloc(16)
    memory.write(a + 3, bytearray(b"abc"))
    memory.write(a + 8, np.arange(2, dtype=np.float32))
    assert memory.read(a + 2, 5) == b"\xffabc\xff"
    assert memory.written(a, 16).tolist() == [False] * 3 + [True] * 3 + [False] * 2 + [True] * 8
    memory.fill(a, b"\x01\x02", 4)
    assert memory.read(a, 9) == b"\x01\x02" * 4 + b"\0"
    assert memory.read(a + 99999, 0) == b""


@pytest.mark.parametrize(("start", "nbytes"), [(0, 17), (16, 1), (-1, 1), (15, 2)])
def test_host_accesses_are_checked(start: int, nbytes: int) -> None:
    memory = Memory()
    a = memory.alloc(16)
    with pytest.raises(MemoryFault, match="16 bytes at"):
        memory.read(a + start, nbytes)
    with pytest.raises(MemoryFault):
        memory.write(a + start, bytes(nbytes))


def test_copies_keep_what_is_unwritten() -> None:
    memory = Memory()
    a, b = memory.alloc(8), memory.alloc(8)
    memory.write(a, b"1234")
    memory.write(b, b"abcdefgh")
    memory.copy(b + 1, a + 2, 4)
    assert memory.read(b, 8) == b"a34\xff\xfffgh"
    assert memory.written(b, 8).tolist() == [True, True, True, False, False, True, True, True]


def test_the_limit_counts_what_lives() -> None:
    memory = Memory(size_limit=100)
    a = memory.alloc(60)
    with pytest.raises(OutOfMemory, match="60 of 100"):
        memory.alloc(41)
    memory.free(a)
    assert memory.used == 0 and memory.alloc(100) != a


@pytest.mark.parametrize("offset", [0, 4, 20])
def test_mapped_host_memory_is_shared(offset: int) -> None:
    """At any address, as host allocations lie."""

    host, memory = np.zeros(256, dtype=np.uint8), Memory()
    view = host[:128]
    address = 0x5555_0000_0000 + offset
    memory.map(address, view)
    body = "mul.wide.u32 %rd9, %r3, 4;\nadd.u64 %rd9, %rd9, %rd0;\nst.global.u32 [%rd9], %r3;"
    module = Module(kernel(body))
    module.launch("k", (1, 1, 1), (32, 1, 1), struct.pack("<QQ", address, address), memory)
    np.testing.assert_array_equal(view.view(np.uint32), np.arange(32, dtype=np.uint32))
    with pytest.raises(ValueError, match="overlap"):
        memory.map(address - 8, host)
    with pytest.raises(MemoryFault, match="not allocated"):
        memory.free(address)
    memory.unmap(address)
    with pytest.raises(MemoryFault, match="use after free"):
        memory.read(address, 4)
    with pytest.raises(MemoryFault, match="not mapped"):
        memory.unmap(address)
