"""The real pycuda on the fake driver: library, devices, contexts, threads, errors on demand."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest

from gpu_emulation.driver import A100, ORIN, T4, Code, FakeDriver, library
from gpu_emulation.driver.entry_points import NOT_SUPPORTED, SIGNATURES


@pytest.fixture
def pycuda_driver(fake_library: None) -> Any:
    import pycuda.driver

    return pycuda.driver


def test_every_entry_point_is_exported(fake_library: None) -> None:
    lib = library.load()
    for name in (*SIGNATURES, *NOT_SUPPORTED):
        assert hasattr(lib, name), name
    assert not set(SIGNATURES) & set(NOT_SUPPORTED)


def test_pycuda_uses_the_fake(fake_library: None) -> None:
    """By its soname: a second dlopen by name gives the library that was loaded from its path."""
    by_name = ctypes.CDLL("libcuda.so.1")
    assert by_name._handle == library.load()._handle
    assert hasattr(by_name, "advrad_fake_register")


def test_without_a_driver_every_call_is_refused(fake_library: None, pycuda_driver: Any) -> None:
    with pytest.raises(pycuda_driver.Error):
        pycuda_driver.Device.count()


def test_devices(make_driver: Callable[..., FakeDriver], pycuda_driver: Any) -> None:
    make_driver((A100, T4, ORIN), version=12080)
    pycuda_driver.init()
    assert pycuda_driver.get_driver_version() == 12080
    assert pycuda_driver.Device.count() == 3
    for i, spec in enumerate((A100, T4, ORIN)):
        device = pycuda_driver.Device(i)
        assert (device.name(), device.compute_capability(), device.total_memory()) == (spec.name, spec.capability, spec.memory)
        assert device.get_attribute(pycuda_driver.device_attribute.MULTIPROCESSOR_COUNT) == spec.multiprocessors
        assert device.max_threads_per_block == 1024
        assert device.pci_bus_id().startswith("0000:")
    with pytest.raises(pycuda_driver.LogicError, match="invalid device ordinal"):
        pycuda_driver.Device(3)


def test_no_device(make_driver: Callable[..., FakeDriver], pycuda_driver: Any) -> None:
    make_driver(())
    with pytest.raises(pycuda_driver.RuntimeError, match="no CUDA-capable device"):
        pycuda_driver.init()


def test_before_init(driver: FakeDriver, pycuda_driver: Any) -> None:
    assert pycuda_driver.get_driver_version() == 13000  # allowed
    with pytest.raises(pycuda_driver.Error, match="initialization error"):
        pycuda_driver.Device(0)


def test_work_without_a_context(driver: FakeDriver, pycuda_driver: Any) -> None:
    pycuda_driver.init()
    with pytest.raises(pycuda_driver.LogicError, match="invalid device context"):
        pycuda_driver.mem_alloc(16)


def test_the_primary_context_is_shared_and_counted(driver: FakeDriver, cuda: Any) -> None:
    again = cuda.Device(0).retain_primary_context()
    assert again.handle == cuda.Context.get_current().handle
    assert driver.contexts.retained() == ["primary context of device 0, retained 2 times"]
    again.detach()
    assert driver.contexts.retained() == ["primary context of device 0, retained 1 times"]


def test_pycuda_detaches_a_primary_context_only_when_told(driver: FakeDriver, cuda: Any) -> None:
    """Left to its destructor it calls cuCtxDetach, and the context stays retained: why the launcher detaches by itself."""
    context = cuda.Device(0).retain_primary_context()
    del context
    gc.collect()
    assert driver.contexts.retained() == ["primary context of device 0, retained 2 times"]
    assert driver.refusals[-1].startswith("cuCtxDetach: CUDA_ERROR_INVALID_CONTEXT")
    assert library.call("cuDevicePrimaryCtxRelease_v2", 0) == Code.SUCCESS


def test_a_context_of_one_s_own(driver: FakeDriver, pycuda_driver: Any) -> None:
    pycuda_driver.init()
    context = pycuda_driver.Device(0).make_context()
    kept = pycuda_driver.mem_alloc(64)
    assert driver.leaks() == ["64 bytes of device memory at " + hex(int(kept)), "context of device 0"]
    context.pop()
    context.detach()
    assert driver.leaks() == []  # what is in a context goes with it


def test_contexts_on_two_threads(driver: FakeDriver, cuda: Any) -> None:
    """Each thread has its own stack; both have the same primary context, and what was made in it serves both."""
    allocation = cuda.mem_alloc(4)
    cuda.memset_d32(allocation, 7, 1)
    seen: dict[str, Any] = {}

    def work() -> None:
        try:
            cuda.mem_alloc(4)
        except cuda.LogicError as error:
            seen["without"] = str(error)
        context = cuda.Device(0).retain_primary_context()
        context.push()
        value = bytearray(4)
        cuda.memcpy_dtoh(value, int(allocation))
        seen["value"] = value
        context.pop()
        context.detach()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "invalid device context" in seen["without"]
    assert seen["value"] == bytearray([7, 0, 0, 0])
    assert cuda.Context.get_device() == cuda.Device(0)  # this thread's is still current


def test_a_call_that_the_fake_lacks_is_loud(driver: FakeDriver, cuda: Any) -> None:
    with pytest.raises(cuda.LogicError, match="not supported"):
        cuda.Context.get_cache_config()
    assert driver.not_supported == ["cuCtxGetCacheConfig"]
    assert driver.take_faults() == ["cuCtxGetCacheConfig is not supported by the fake driver"]


def test_errors_on_demand(driver: FakeDriver, cuda: Any) -> None:
    driver.fail("cuEventCreate", Code.UNKNOWN, on_call=3)
    events = [cuda.Event(), cuda.Event()]
    with pytest.raises(cuda.Error, match="unknown error"):
        cuda.Event()
    events.append(cuda.Event())
    assert len(events) == 3


def test_an_error_that_never_came_is_reported(driver: FakeDriver, cuda: Any) -> None:
    driver.fail("cuMemAlloc", Code.OUT_OF_MEMORY)
    driver.fail_work("kernel", Code.LAUNCH_FAILED)
    assert driver.unused_injections() == ["cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY", "kernel: CUDA_ERROR_LAUNCH_FAILED"]
    driver._injections.clear()
    driver._work_failures.clear()


def test_a_bug_of_the_fake_is_a_fault(driver: FakeDriver, cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: int) -> Code:
        raise ZeroDivisionError

    monkeypatch.setitem(driver.handlers, "cuEventCreate", broken)
    with pytest.raises(cuda.Error, match="unknown error"):
        cuda.Event()
    (fault,) = driver.take_faults()
    assert "ZeroDivisionError" in fault


@pytest.mark.parametrize(
    ("symbol", "found"), [("cuMemAlloc", "cuMemAlloc_v2"), ("cuInit", "cuInit"), ("cuCtxCreate", "cuCtxCreate_v4")]
)
def test_get_proc_address(driver: FakeDriver, symbol: str, found: str) -> None:
    name, address, status = ctypes.create_string_buffer(symbol.encode()), ctypes.c_uint64(), ctypes.c_int32(9)
    arguments = ctypes.addressof(name), ctypes.addressof(address), 13000, 0, ctypes.addressof(status)
    assert library.call("cuGetProcAddress_v2", *arguments) == Code.SUCCESS
    assert address.value == ctypes.cast(getattr(library.load(), found), ctypes.c_void_p).value
    assert status.value == 0


def test_get_proc_address_of_an_unknown_symbol(driver: FakeDriver) -> None:
    name, address, status = ctypes.create_string_buffer(b"cuMagic"), ctypes.c_uint64(5), ctypes.c_int32(9)
    arguments = ctypes.addressof(name), ctypes.addressof(address), 13000, 0, ctypes.addressof(status)
    assert library.call("cuGetProcAddress_v2", *arguments) == Code.NOT_FOUND
    assert (address.value, status.value) == (0, 1)
    assert driver.take_faults() == ["cuMagic is not supported by the fake driver"]


def test_names_of_errors(driver: FakeDriver) -> None:
    text = ctypes.c_char_p()
    for code in Code:
        assert library.call("cuGetErrorName", code, ctypes.addressof(text)) == Code.SUCCESS
        assert text.value == code.symbol.encode()
    assert library.call("cuGetErrorString", 12345, ctypes.addressof(text)) == Code.INVALID_VALUE
    assert text.value is None
