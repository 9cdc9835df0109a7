"""The real pycuda on the fake driver: order of work on streams, events, host functions, failures on the device."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from gpu_emulation.driver import Code, FakeDriver
from gpu_emulation.driver.library import call

N = 64
HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def fill(cuda: Any, place: Any, value: int, stream: Any) -> None:
    cuda.memset_d32_async(place, value, N, stream)


@pytest.fixture
def place(cuda: Any) -> Any:
    return cuda.mem_alloc(4 * N)


@pytest.fixture
def host(cuda: Any) -> Any:
    return cuda.pagelocked_empty(N, np.uint32)


def test_work_on_a_stream_is_in_order(driver: FakeDriver, cuda: Any, place: Any, host: Any) -> None:
    stream = cuda.Stream()
    fill(cuda, place, 1, stream)
    fill(cuda, place, 2, stream)
    cuda.memcpy_dtoh_async(host, place, stream)
    fill(cuda, place, 3, stream)
    stream.synchronize()
    assert (host == 2).all()


def test_an_event_orders_two_streams(driver: FakeDriver, cuda: Any, place: Any, host: Any) -> None:
    first, second, event = cuda.Stream(), cuda.Stream(), cuda.Event()
    fill(cuda, place, 4, first)
    event.record(first)
    second.wait_for_event(event)
    cuda.memcpy_dtoh_async(host, place, second)
    second.synchronize()
    assert (host == 4).all()


def test_without_the_event_the_second_stream_is_first(driver: FakeDriver, cuda: Any, place: Any, host: Any) -> None:
    """What was forgotten shows: only the stream that is waited for runs."""
    first, second = cuda.Stream(), cuda.Stream()
    fill(cuda, place, 4, first)
    cuda.memcpy_dtoh_async(host, place, second)
    second.synchronize()
    assert (host == 0xFFFFFFFF).all()


def test_a_wait_for_an_event_is_for_its_last_record(driver: FakeDriver, cuda: Any, place: Any, host: Any) -> None:
    """What comes after the record isn't waited for."""
    first, second, event = cuda.Stream(), cuda.Stream(), cuda.Event()
    fill(cuda, place, 1, first)
    event.record(first)
    fill(cuda, place, 2, first)
    second.wait_for_event(event)
    cuda.memcpy_dtoh_async(host, place, second)
    second.synchronize()
    assert (host == 1).all()


def test_the_default_stream_waits_for_blocking_streams(driver: FakeDriver, cuda: Any, place: Any) -> None:
    stream, back = cuda.Stream(), np.zeros(N, np.uint32)
    fill(cuda, place, 9, stream)
    cuda.memcpy_dtoh(back, place)  # synchronous: on the default stream
    assert (back == 9).all()


def test_the_default_stream_does_not_wait_for_others(driver: FakeDriver, cuda: Any, place: Any) -> None:
    stream, back = cuda.Stream(1), np.zeros(N, np.uint32)  # CU_STREAM_NON_BLOCKING
    fill(cuda, place, 9, stream)
    cuda.memcpy_dtoh(back, place)
    assert (back == 0xFFFFFFFF).all()


def test_polling_comes_to_an_end(driver: FakeDriver, cuda: Any, place: Any) -> None:
    stream, event = cuda.Stream(), cuda.Event()
    assert stream.is_done() and event.query()
    fill(cuda, place, 1, stream)
    event.record(stream)
    polls = [event.query() for _ in range(4)]
    assert polls == [False, False, True, True] and stream.is_done()


def test_times_of_events(driver: FakeDriver, cuda: Any, place: Any) -> None:
    stream, start, end = cuda.Stream(), cuda.Event(), cuda.Event()
    start.record(stream)
    fill(cuda, place, 1, stream)
    end.record(stream)
    with pytest.raises(cuda.Error, match="not ready"):
        end.time_since(start)
    end.synchronize()
    assert end.time_since(start) > 0
    untimed = cuda.Event(cuda.event_flags.DISABLE_TIMING)
    untimed.record(stream).synchronize()
    with pytest.raises(cuda.LogicError, match="invalid resource handle"):
        untimed.time_since(start)


def test_synchronising_the_context_finishes_every_stream(driver: FakeDriver, cuda: Any, host: Any, place: Any) -> None:
    first, second = cuda.Stream(1), cuda.Stream(1)
    fill(cuda, place, 6, first)
    cuda.Context.synchronize()
    cuda.memcpy_dtoh_async(host, place, second)
    cuda.Context.synchronize()
    assert (host == 6).all() and driver.counters.synchronisations == 2


def test_host_functions_run_in_order_and_may_not_call_cuda(driver: FakeDriver, cuda: Any, place: Any, host: Any) -> None:
    stream, seen = cuda.Stream(), []

    @HOST_FUNCTION
    def function(data: int) -> None:
        seen.append((data, int(host[0]), call("cuStreamQuery", 0)))

    fill(cuda, place, 8, stream)
    cuda.memcpy_dtoh_async(host, place, stream)
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert call("cuLaunchHostFunc", stream.handle, address, 77) == Code.SUCCESS
    assert seen == []
    stream.synchronize()
    assert seen == [(77, 8, Code.NOT_PERMITTED)]


def test_default_streams_of_threads(driver: FakeDriver, cuda: Any, place: Any, host: Any) -> None:
    """Each thread has one, in order with itself and with the legacy default stream."""
    per_thread = 2
    assert call("cuMemsetD32Async", int(place), 5, N, per_thread) == Code.SUCCESS
    fill(cuda, place, 6, None)
    assert call("cuMemcpyDtoHAsync_v2", host.ctypes.data, int(place), host.nbytes, per_thread) == Code.SUCCESS
    assert (host == 0xFFFFFFFF).all()
    assert call("cuStreamSynchronize", per_thread) == Code.SUCCESS
    assert (host == 6).all()


def test_a_stream_of_another_context(driver: FakeDriver, cuda: Any, place: Any) -> None:
    other = cuda.Device(0).make_context()
    stream = cuda.Stream()
    other.pop()
    with pytest.raises(cuda.LogicError, match="invalid resource handle"):
        fill(cuda, place, 1, stream)
    del stream
    other.detach()


def test_a_destroyed_stream_finishes_its_work(driver: FakeDriver, cuda: Any, place: Any, host: Any) -> None:
    stream = cuda.Stream()
    fill(cuda, place, 3, stream)
    cuda.memcpy_dtoh_async(host, place, stream)
    del stream
    assert (host == 3).all()


def test_failed_work_is_reported_late_and_for_good(
    driver: FakeDriver, cuda: Any, place: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    stream = cuda.Stream()
    driver.fail_work("memset", Code.ECC_UNCORRECTABLE, on_run=2)
    fill(cuda, place, 1, stream)
    fill(cuda, place, 2, stream)  # fails, but nobody knows yet
    with pytest.raises(cuda.Error, match="ecc uncorrectable"):
        stream.synchronize()
    with pytest.raises(cuda.Error, match="ecc uncorrectable"):
        cuda.Stream()
    capfd.readouterr()
