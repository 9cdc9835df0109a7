"""The real pycuda on the fake driver: device memory, pinned memory, pools, copies, and what must be found."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import numpy as np
import pytest

from gpu_emulation.driver import Code, FakeDriver
from gpu_emulation.driver.library import call

N = 1000


def test_copies_there_and_back(driver: FakeDriver, cuda: Any, rng: np.random.Generator) -> None:
    values = rng.standard_normal(N).astype(np.float32)
    first, second, back = cuda.mem_alloc(values.nbytes), cuda.mem_alloc(values.nbytes), np.zeros_like(values)
    cuda.memcpy_htod(first, values)
    cuda.memcpy_dtod(second, first, values.nbytes)
    cuda.memcpy_dtoh(back, second)
    np.testing.assert_array_equal(back, values)
    assert driver.counters.copies == {"htod": 1, "dtod": 1, "dtoh": 1}
    assert driver.counters.copied_bytes == {"htod": 4 * N, "dtod": 4 * N, "dtoh": 4 * N}
    assert (driver.counters.allocations, driver.counters.synchronisations) == (2, 2)


@pytest.mark.parametrize(("name", "value", "dtype"), [("d8", 0xAB, "u1"), ("d16", 0xABCD, "u2"), ("d32", 0xABCDEF01, "u4")])
def test_memset(driver: FakeDriver, cuda: Any, name: str, value: int, dtype: str) -> None:
    place, back = cuda.mem_alloc(64), np.zeros(64 // np.dtype(dtype).itemsize, dtype)
    getattr(cuda, f"memset_{name}")(place, value, back.size)
    cuda.memcpy_dtoh(back, place)
    assert (back == value).all()


def test_fresh_memory_is_poison(driver: FakeDriver, cuda: Any) -> None:
    back = np.zeros(4, np.float32)
    cuda.memcpy_dtoh(back, cuda.mem_alloc(16))
    assert np.isnan(back).all()
    assert np.isnan(cuda.pagelocked_empty(4, np.float32)).all()


def test_the_memory_s_size_is_a_limit(driver: FakeDriver, cuda: Any) -> None:
    driver.devices.memories[0].size_limit = 1 << 20
    free, total = cuda.mem_get_info()
    kept = cuda.mem_alloc(free - 4096)
    with pytest.raises(cuda.MemoryError):
        cuda.mem_alloc(8192)
    kept.free()
    assert cuda.mem_get_info() == (free, total)


def test_out_of_memory_on_demand(driver: FakeDriver, cuda: Any) -> None:
    """pycuda collects garbage and asks once more: one refusal alone isn't seen."""
    driver.fail("cuMemAlloc", Code.OUT_OF_MEMORY)
    cuda.mem_alloc(16).free()
    assert driver.counters.calls["cuMemAlloc_v2"] == 2
    driver.fail("cuMemAlloc", Code.OUT_OF_MEMORY, times=2)
    with pytest.raises(cuda.MemoryError):
        cuda.mem_alloc(16)


def test_leaks_are_reported(driver: FakeDriver, cuda: Any) -> None:
    kept = [cuda.mem_alloc(100), cuda.pagelocked_empty(10, np.uint8), cuda.Stream(), cuda.Event()]
    words = " ".join(driver.leaks())
    for word in ("100 bytes of device memory", "10 bytes of pinned host memory", "stream", "event", "primary context"):
        assert word in words
    kept.clear()
    assert driver.leaks() == ["primary context of device 0, retained 1 times"]


def test_use_after_free(driver: FakeDriver, cuda: Any) -> None:
    place = cuda.mem_alloc(64)
    address = int(place)
    place.free()
    with pytest.raises(cuda.LogicError, match="invalid argument"):
        cuda.memcpy_dtoh(np.zeros(16, np.float32), address)
    (fault,) = driver.take_faults()
    assert "use after free" in fault and "freed" in fault


def test_over_the_end(driver: FakeDriver, cuda: Any) -> None:
    place = cuda.mem_alloc(64)
    with pytest.raises(cuda.LogicError, match="invalid argument"):
        cuda.memcpy_htod(int(place) + 32, np.zeros(33, np.uint8))
    (fault,) = driver.take_faults()
    assert "out of bounds" in fault


def test_double_free(driver: FakeDriver, cuda: Any, capfd: pytest.CaptureFixture[str]) -> None:
    place = cuda.mem_alloc(64)
    assert call("cuMemFree_v2", int(place)) == Code.SUCCESS
    place.free()
    assert "clean-up operation failed" in capfd.readouterr().err
    (fault,) = driver.take_faults()
    assert "which is not allocated" in fault and "freed" in fault


def test_freed_while_work_needs_it(driver: FakeDriver, cuda: Any) -> None:
    """Freeing is no wait: the copy that comes later finds nothing there, and the context is lost."""
    stream, host = cuda.Stream(), cuda.pagelocked_empty(16, np.float32)
    place = cuda.mem_alloc(64)
    cuda.memcpy_dtoh_async(host, place, stream)
    place.free()
    with pytest.raises(cuda.LogicError, match="illegal memory access"):
        stream.synchronize()
    with pytest.raises(cuda.Error, match="illegal memory access"):
        cuda.mem_alloc(64)
    (fault,) = driver.take_faults()
    assert "use after free" in fault


def test_pinned_memory_freed_while_work_needs_it(driver: FakeDriver, cuda: Any) -> None:
    stream, place, host = cuda.Stream(), cuda.mem_alloc(64), cuda.pagelocked_empty(16, np.float32)
    cuda.memset_d32(place, 0, 16)
    cuda.memcpy_dtoh_async(host, place, stream)
    host.base.free()
    with pytest.raises(cuda.Error, match="illegal memory access"):
        stream.synchronize()
    (fault,) = driver.take_faults()
    assert "use after free of 64 bytes of pinned host memory" in fault


def test_a_missing_synchronisation_shows_poison(driver: FakeDriver, cuda: Any) -> None:
    stream, place, host = cuda.Stream(), cuda.mem_alloc(4 * N), cuda.pagelocked_empty(N, np.float32)
    cuda.memset_d32_async(place, 0, N, stream)
    cuda.memcpy_dtoh_async(host, place, stream)
    assert np.isnan(host).all()  # nobody has waited
    stream.synchronize()
    assert (host == 0).all()


def test_a_source_changed_before_its_copy(driver: FakeDriver, cuda: Any) -> None:
    """The staging buffer's next content, written before the last one was read: a fault, and the copy has the wrong data."""
    stream, place, host = cuda.Stream(), cuda.mem_alloc(64), cuda.pagelocked_empty(16, np.float32)
    host[:] = 1
    cuda.memcpy_htod_async(place, host, stream)
    host[:] = 2
    stream.synchronize()
    assert driver.take_faults() == ["copy of 64 bytes from the host: the source was changed between the call and the copy"]


def test_pageable_memory_is_staged(driver: FakeDriver, cuda: Any) -> None:
    """An asynchronous copy of ordinary memory takes what it was at the call; one to ordinary memory waits."""
    stream, place, host = cuda.Stream(), cuda.mem_alloc(64), np.ones(16, np.float32)
    cuda.memcpy_htod_async(place, host, stream)
    host[:] = 2
    back = np.zeros(16, np.float32)
    before = driver.counters.synchronisations
    cuda.memcpy_dtoh_async(back, place, stream)
    assert (back == 1).all()
    assert driver.counters.synchronisations == before + 1


def test_without_deferring_work_is_done_at_once(make_driver: Any, fake_library: None) -> None:
    driver = make_driver(deferred=False)
    import pycuda.driver as cuda

    cuda.init()
    context = cuda.Device(0).retain_primary_context()
    context.push()
    stream, place, host = cuda.Stream(), cuda.mem_alloc(64), cuda.pagelocked_empty(16, np.float32)
    cuda.memset_d32_async(place, 0, 16, stream)
    cuda.memcpy_dtoh_async(host, place, stream)
    assert (host == 0).all() and stream.is_done()
    del stream, place, host
    gc.collect()
    context.pop()
    context.detach()
    assert driver.counters.synchronisations == 0


def test_registered_host_memory(driver: FakeDriver, cuda: Any) -> None:
    """By the driver's call: pycuda's register_host_memory sets an array's base twice, which NumPy refuses."""
    stream, place, plain = cuda.Stream(), cuda.mem_alloc(64), np.zeros(16, np.float32)
    assert call("cuMemHostRegister_v2", plain.ctypes.data, plain.nbytes, 0) == Code.SUCCESS
    assert call("cuMemHostRegister_v2", plain.ctypes.data, plain.nbytes, 0) == Code.HOST_MEMORY_ALREADY_REGISTERED
    assert "64 bytes of registered host memory" in driver.leaks()
    cuda.memset_d32_async(place, 0x3F800000, 16, stream)
    cuda.memcpy_dtoh_async(plain, place, stream)
    assert np.isnan(plain).all()
    stream.synchronize()
    assert (plain == 1).all()
    assert call("cuMemHostUnregister", plain.ctypes.data) == Code.SUCCESS
    assert call("cuMemHostUnregister", plain.ctypes.data) == Code.HOST_MEMORY_NOT_REGISTERED


def test_mapped_host_memory(driver: FakeDriver, cuda: Any) -> None:
    """The device sees pinned memory that was asked for as mapped."""
    host = cuda.pagelocked_empty(16, np.float32, mem_flags=cuda.host_alloc_flags.DEVICEMAP)
    host[:] = 3
    place = cuda.mem_alloc(64)
    cuda.memcpy_dtod(place, host.base.get_device_pointer(), 64)
    back = np.zeros(16, np.float32)
    cuda.memcpy_dtoh(back, place)
    assert (back == 3).all()


def test_address_range(driver: FakeDriver, cuda: Any) -> None:
    place = cuda.mem_alloc(100)
    assert cuda.mem_get_address_range(int(place) + 40) == (int(place), 100)


def test_device_memory_pool(driver: FakeDriver, cuda: Any) -> None:
    from pycuda.tools import DeviceMemoryPool

    pool = DeviceMemoryPool()
    first = pool.allocate(1 << 16)
    address = int(first)
    first.free()
    again = pool.allocate(1 << 16)
    assert int(again) == address and driver.counters.allocations == 1
    again.free()
    assert (pool.active_blocks, pool.held_blocks) == (0, 1)
    pool.stop_holding()
    assert driver.counters.frees == 1


def test_pinned_memory_pool(driver: FakeDriver, cuda: Any) -> None:
    from pycuda.tools import PageLockedMemoryPool

    pool = PageLockedMemoryPool()
    for _ in range(3):
        buffer = pool.allocate((64, 4), np.float32)
        buffer[:] = 1
        del buffer
    assert driver.counters.host_allocations == 1
    pool.stop_holding()


def test_stream_ordered_memory(driver: FakeDriver, cuda: Any) -> None:
    """cuMemAllocAsync and cuMemFreeAsync, which pycuda doesn't know: the free comes after the work before it."""
    stream, host, place = cuda.Stream(), cuda.pagelocked_empty(4, np.uint32), ctypes.c_uint64()
    assert call("cuMemAllocAsync", ctypes.addressof(place), 16, stream.handle) == Code.SUCCESS
    cuda.memset_d32_async(place.value, 5, 4, stream)
    cuda.memcpy_dtoh_async(host, place.value, stream)
    assert call("cuMemFreeAsync", place.value, stream.handle) == Code.SUCCESS
    assert driver.counters.frees == 0
    stream.synchronize()
    assert (host == 5).all() and driver.counters.frees == 1


def asked(pointer: int) -> tuple[int, ...]:
    """Memory type, device pointer, ordinal, start and size of the range."""
    places = [ctypes.c_uint64() for _ in range(5)]
    addresses, names = (ctypes.c_void_p * 5)(*map(ctypes.addressof, places)), (ctypes.c_int * 5)(2, 3, 9, 11, 12)
    assert call("cuPointerGetAttributes", 5, ctypes.addressof(names), ctypes.addressof(addresses), pointer) == Code.SUCCESS
    return tuple(place.value for place in places)


def test_what_a_pointer_is(driver: FakeDriver, cuda: Any) -> None:
    memory, pinned = cuda.mem_alloc(256), cuda.pagelocked_empty(100, np.uint8)
    start, host = int(memory), pinned.ctypes.data
    assert asked(start + 16) == (2, start + 16, 0, start, 256)
    assert asked(host + 4) == (1, host + 4, 0, host, 100)
    memory.free()
    assert asked(start) == asked(4096) == (0, 0, 0, 0, 0)


def test_unknown_attributes_of_a_pointer(driver: FakeDriver, cuda: Any) -> None:
    name = ctypes.c_int(1)  # CU_POINTER_ATTRIBUTE_CONTEXT
    assert call("cuPointerGetAttributes", 1, ctypes.addressof(name), 0, 4096) == Code.NOT_SUPPORTED
    assert driver.take_faults() == ["cuPointerGetAttributes(1) is not supported by the fake driver"]
