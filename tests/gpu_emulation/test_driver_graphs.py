"""Stream capture and graphs on the fake driver: pycuda's streams, and the driver's calls that pycuda lacks."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from gpu_emulation import affine
from gpu_emulation.driver import Code, FakeDriver
from gpu_emulation.driver.graphs import ACTIVE, GLOBAL, INVALIDATED, NONE, RELAXED, THREAD_LOCAL
from gpu_emulation.driver.library import call

N = 100
HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def word(name: str, *arguments: int) -> int:
    """Calls an entry point that writes one 64-bit word to its first place, and expects success."""
    place = ctypes.c_uint64()
    code = call(name, ctypes.addressof(place), *arguments)
    assert code == Code.SUCCESS, f"{name}: {code!r}"
    return place.value


def begin(stream: Any, mode: int = THREAD_LOCAL) -> None:
    assert call("cuStreamBeginCapture_v2", stream.handle, mode) == Code.SUCCESS


def end(stream: Any) -> tuple[Code, int]:
    graph = ctypes.c_uint64(1)
    code = call("cuStreamEndCapture", stream.handle, ctypes.addressof(graph))
    assert (graph.value != 0) == (code == Code.SUCCESS)
    return code, graph.value


def status(stream: Any) -> int:
    place = ctypes.c_int32()
    assert call("cuStreamIsCapturing", stream.handle, ctypes.addressof(place)) == Code.SUCCESS
    return place.value


def instantiate(graph: int) -> int:
    executable = word("cuGraphInstantiateWithFlags", graph, 0)
    assert call("cuGraphDestroy", graph) == Code.SUCCESS
    return executable


class Affine:
    """The kernel, with memory to work on."""

    def __init__(self, cuda: Any) -> None:
        self.module = cuda.module_from_buffer(affine.PTX.encode() + b"\0")
        self.function = self.module.get_function("affine")
        self.x, self.middle, self.out = (cuda.mem_alloc(4 * N) for _ in range(3))
        self.host = cuda.pagelocked_empty(N, np.float32)

    def launch(self, stream: Any, x: Any, out: Any, a: float, b: float) -> None:
        buffer = struct.pack("@QQiffQ", int(x), int(out), N, a, b, 0)
        self.function._launch_kernel((2, 1, 1), (affine.THREADS, 1, 1), buffer, 0, stream)


@pytest.fixture
def kernel(cuda: Any) -> Iterator[Affine]:
    yield Affine(cuda)


def test_kernel_host_function_kernel(driver: FakeDriver, cuda: Any, kernel: Affine) -> None:
    """The way of a frame as one graph: a kernel, a host function where the network will be, a kernel, a copy; then again."""
    stream, seen = cuda.Stream(), []
    memory = driver.devices.memories[0]

    @HOST_FUNCTION
    def network(data: int) -> None:
        values = np.frombuffer(memory.read(int(kernel.middle), 4 * N), np.float32)
        memory.write(int(kernel.middle), values * values)
        seen.append(values[-1])

    begin(stream, GLOBAL)
    assert status(stream) == ACTIVE
    kernel.launch(stream, kernel.x, kernel.middle, 2.0, 1.0)
    assert call("cuLaunchHostFunc", stream.handle, ctypes.cast(network, ctypes.c_void_p).value, 0) == Code.SUCCESS
    kernel.launch(stream, kernel.middle, kernel.out, 1.0, -1.0)
    cuda.memcpy_dtoh_async(kernel.host, kernel.out, stream)
    code, graph = end(stream)
    assert code == Code.SUCCESS and status(stream) == NONE
    count = ctypes.c_uint64()
    assert call("cuGraphGetNodes", graph, 0, ctypes.addressof(count)) == Code.SUCCESS and count.value == 4
    executable = instantiate(graph)
    assert seen == [] and driver.counters.launches == 0  # captured, not done

    for start in (0, 1000):
        x = np.arange(start, start + N, dtype=np.float32)
        cuda.memcpy_htod_async(kernel.x, x, stream)
        assert call("cuGraphLaunch", executable, stream.handle) == Code.SUCCESS
        assert np.isnan(kernel.host).all()  # pending
        stream.synchronize()
        np.testing.assert_array_equal(kernel.host, (2 * x + 1) ** 2 - 1)
    assert (driver.counters.graph_launches, driver.counters.launches) == (2, 4)
    assert "instantiated graph of 4 nodes" in driver.leaks()
    assert call("cuGraphExecDestroy", executable) == Code.SUCCESS


def test_parameters_are_taken_at_the_capture_and_updated_by_another(driver: FakeDriver, cuda: Any, kernel: Affine) -> None:
    stream, x = cuda.Stream(), np.arange(N, dtype=np.float32)
    cuda.memcpy_htod(kernel.x, x)

    def capture(a: float, copies: int = 1) -> int:
        begin(stream)
        kernel.launch(stream, kernel.x, kernel.out, a, 0.0)
        for _ in range(copies):
            cuda.memcpy_dtoh_async(kernel.host, kernel.out, stream)
        return end(stream)[1]

    def result(executable: int) -> Any:
        assert call("cuGraphLaunch", executable, stream.handle) == Code.SUCCESS
        stream.synchronize()
        return kernel.host.copy()

    executable = instantiate(capture(2.0))
    np.testing.assert_array_equal(result(executable), 2 * x)
    other, longer = capture(3.0), capture(4.0, copies=2)
    information = (ctypes.c_uint64 * 3)()
    assert call("cuGraphExecUpdate_v2", executable, other, ctypes.addressof(information)) == Code.SUCCESS
    np.testing.assert_array_equal(result(executable), 3 * x)
    assert call("cuGraphExecUpdate_v2", executable, longer, ctypes.addressof(information)) == Code.GRAPH_EXEC_UPDATE_FAILURE
    assert information[0] == 2  # CU_GRAPH_EXEC_UPDATE_ERROR_TOPOLOGY_CHANGED
    np.testing.assert_array_equal(result(executable), 3 * x)
    for graph in (other, longer):
        assert call("cuGraphDestroy", graph) == Code.SUCCESS
    assert call("cuGraphExecDestroy", executable) == Code.SUCCESS


def test_fork_and_join(driver: FakeDriver, cuda: Any, kernel: Affine) -> None:
    """A second stream enters the capture by an event and comes back by another; a forgotten event would give other numbers."""
    first, second, fork, join = cuda.Stream(), cuda.Stream(), cuda.Event(), cuda.Event()
    cuda.memcpy_htod(kernel.x, np.full(N, 5, np.float32))
    begin(first)
    kernel.launch(first, kernel.x, kernel.middle, 2.0, 0.0)
    fork.record(first)
    second.wait_for_event(fork)
    kernel.launch(second, kernel.middle, kernel.out, 3.0, 0.0)
    join.record(second)
    first.wait_for_event(join)
    cuda.memcpy_dtoh_async(kernel.host, kernel.out, first)
    code, graph = end(first)
    assert code == Code.SUCCESS
    executable = instantiate(graph)
    assert call("cuGraphLaunch", executable, first.handle) == Code.SUCCESS
    first.synchronize()
    assert (kernel.host == 30).all()
    assert call("cuGraphExecDestroy", executable) == Code.SUCCESS


def test_what_is_not_ordered_runs_in_the_other_order(driver: FakeDriver, cuda: Any, kernel: Affine) -> None:
    """Two branches of a graph with a dependency forgotten between them: what was captured last comes first."""
    first, second, fork, join = cuda.Stream(), cuda.Stream(), cuda.Event(), cuda.Event()
    cuda.memset_d32(kernel.out, 0, N)
    begin(first)
    fork.record(first)
    second.wait_for_event(fork)
    cuda.memset_d32_async(kernel.out, 1, N, first)
    cuda.memcpy_dtoh_async(kernel.host, kernel.out, second)
    join.record(second)
    first.wait_for_event(join)
    executable = instantiate(end(first)[1])
    assert call("cuGraphLaunch", executable, first.handle) == Code.SUCCESS
    first.synchronize()
    assert (kernel.host == 0).all()
    assert call("cuGraphExecDestroy", executable) == Code.SUCCESS


def test_an_unjoined_stream(driver: FakeDriver, cuda: Any, kernel: Affine) -> None:
    first, second, fork = cuda.Stream(), cuda.Stream(), cuda.Event()
    begin(first)
    fork.record(first)
    second.wait_for_event(fork)
    cuda.memset_d32_async(kernel.out, 1, N, second)
    assert end(first) == (Code.STREAM_CAPTURE_UNJOINED, 0)


FORBIDDEN: dict[str, Callable[[Any, Any, Affine], object]] = {
    "synchronise the stream": lambda cuda, stream, kernel: stream.synchronize(),
    "synchronise the context": lambda cuda, stream, kernel: cuda.Context.synchronize(),
    "query the stream": lambda cuda, stream, kernel: stream.is_done(),
    "allocate": lambda cuda, stream, kernel: cuda.mem_alloc(16),
    "pin": lambda cuda, stream, kernel: cuda.pagelocked_empty(4, np.float32),
    "copy synchronously": lambda cuda, stream, kernel: cuda.memcpy_htod(kernel.x, np.zeros(N, np.float32)),
    "copy pageable memory": lambda cuda, stream, kernel: cuda.memcpy_htod_async(kernel.x, np.zeros(N, np.float32), stream),
    "use the default stream": lambda cuda, stream, kernel: kernel.launch(None, kernel.x, kernel.out, 1.0, 1.0),
    "load a module": lambda cuda, stream, kernel: cuda.module_from_buffer(affine.PTX.encode() + b"\0"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_a_forbidden_call_invalidates_the_capture(driver: FakeDriver, cuda: Any, kernel: Affine, what: str) -> None:
    stream = cuda.Stream()
    begin(stream)
    kernel.launch(stream, kernel.x, kernel.out, 1.0, 1.0)
    with pytest.raises(cuda.Error, match="captur"):
        FORBIDDEN[what](cuda, stream, kernel)
    assert status(stream) == INVALIDATED
    with pytest.raises(cuda.Error, match="previous error during capture"):
        kernel.launch(stream, kernel.x, kernel.out, 1.0, 1.0)
    assert end(stream) == (Code.STREAM_CAPTURE_INVALIDATED, 0)
    assert status(stream) == NONE
    stream.synchronize()  # usable again
    assert driver.counters.launches == 0


def test_waiting_for_a_captured_event(driver: FakeDriver, cuda: Any, kernel: Affine) -> None:
    stream, event = cuda.Stream(), cuda.Event()
    begin(stream)
    event.record(stream)
    with pytest.raises(cuda.Error, match="captured event"):
        event.synchronize()
    assert end(stream) == (Code.STREAM_CAPTURE_INVALIDATED, 0)


def test_waiting_for_work_outside_the_capture(driver: FakeDriver, cuda: Any, kernel: Affine) -> None:
    stream, other, event = cuda.Stream(), cuda.Stream(), cuda.Event()
    event.record(other)
    begin(stream)
    with pytest.raises(cuda.Error, match="isolation"):
        stream.wait_for_event(event)
    assert end(stream) == (Code.STREAM_CAPTURE_INVALIDATED, 0)


@pytest.mark.parametrize(("mode", "allowed"), [(GLOBAL, False), (THREAD_LOCAL, True), (RELAXED, True)])
def test_another_thread_allocates_during_a_capture(
    driver: FakeDriver, cuda: Any, kernel: Affine, mode: int, allowed: bool
) -> None:
    stream, outcome = cuda.Stream(), []

    def work() -> None:
        context = cuda.Device(0).retain_primary_context()
        context.push()
        try:
            cuda.mem_alloc(16).free()
            outcome.append(True)
        except cuda.Error:
            outcome.append(False)
        context.pop()
        context.detach()

    begin(stream, mode)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcome == [allowed]
    code, graph = end(stream)
    assert code == (Code.SUCCESS if allowed else Code.STREAM_CAPTURE_INVALIDATED)
    if graph:
        assert call("cuGraphDestroy", graph) == Code.SUCCESS


def test_a_relaxed_thread_may_allocate(driver: FakeDriver, cuda: Any, kernel: Affine) -> None:
    """cuThreadExchangeStreamCaptureMode, as libraries use it that allocate lazily."""
    stream, mode = cuda.Stream(), ctypes.c_int32(RELAXED)
    begin(stream, GLOBAL)
    assert call("cuThreadExchangeStreamCaptureMode", ctypes.addressof(mode)) == Code.SUCCESS
    cuda.mem_alloc(16).free()
    assert mode.value == GLOBAL
    assert call("cuThreadExchangeStreamCaptureMode", ctypes.addressof(mode)) == Code.SUCCESS
    code, graph = end(stream)
    assert code == Code.SUCCESS
    assert call("cuGraphDestroy", graph) == Code.SUCCESS


def test_where_a_capture_may_begin_and_end(driver: FakeDriver, cuda: Any) -> None:
    first, second = cuda.Stream(), cuda.Stream()
    assert call("cuStreamBeginCapture_v2", 0, GLOBAL) == Code.STREAM_CAPTURE_UNSUPPORTED
    assert end(first) == (Code.INVALID_VALUE, 0)
    begin(first)
    assert call("cuStreamBeginCapture_v2", first.handle, GLOBAL) == Code.INVALID_VALUE
    outcome = []
    context = cuda.Context.get_current()

    def work() -> None:
        assert call("cuCtxPushCurrent_v2", context.handle) == Code.SUCCESS
        outcome.append(end(first))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcome == [(Code.STREAM_CAPTURE_WRONG_THREAD, 0)]
    assert end(first) == (Code.STREAM_CAPTURE_INVALIDATED, 0)
    assert end(second) == (Code.INVALID_VALUE, 0)


def test_a_kernel_node_gets_other_parameters(driver: FakeDriver, cuda: Any, kernel: Affine) -> None:
    """For later launches; one that is enqueued, and the captured graph, keep theirs."""
    stream = cuda.Stream()
    cuda.memset_d32_async(kernel.x, 0, N, stream)
    begin(stream)
    kernel.launch(stream, kernel.x, kernel.out, 1.0, 1.0)
    words = [ctypes.c_uint64(9) for _ in range(5)]
    assert call("cuStreamGetCaptureInfo_v2", stream.handle, *map(ctypes.addressof, words)) == Code.SUCCESS
    assert words[0].value & 0xFFFFFFFF == ACTIVE and words[4].value == 1
    node = ctypes.c_uint64.from_address(words[3].value).value
    code, graph = end(stream)
    assert code == Code.SUCCESS
    executable = word("cuGraphInstantiateWithFlags", graph, 0)
    settings = ctypes.create_string_buffer(56)
    place = ctypes.addressof(settings)
    assert call("cuGraphKernelNodeGetParams", node, place) == Code.SUCCESS
    values = [ctypes.c_uint64(int(kernel.x)), ctypes.c_uint64(int(kernel.out)), ctypes.c_uint32(N), ctypes.c_float(1.0)]
    values += [ctypes.c_float(7.0), ctypes.c_uint64(0)]
    addresses = (ctypes.c_uint64 * len(values))(*map(ctypes.addressof, values))
    struct.pack_into("@QQ", settings, 40, ctypes.addressof(addresses), 0)
    for wanted in (1.0, 7.0):
        assert call("cuGraphLaunch", executable, stream.handle) == Code.SUCCESS
        if wanted == 1.0:
            assert call("cuGraphExecKernelNodeSetParams", executable, node, place) == Code.SUCCESS
        cuda.memcpy_dtoh_async(kernel.host, kernel.out, stream)
        stream.synchronize()
        assert (kernel.host == wanted).all()
    assert call("cuGraphExecKernelNodeSetParams", executable, executable, place) == Code.INVALID_HANDLE
    assert call("cuGraphDestroy", graph) == call("cuGraphExecDestroy", executable) == Code.SUCCESS
    assert call("cuGraphKernelNodeGetParams", node, place) == Code.INVALID_HANDLE


def test_a_failure_in_a_graph_is_reported_late(
    driver: FakeDriver, cuda: Any, kernel: Affine, capfd: pytest.CaptureFixture[str]
) -> None:
    stream = cuda.Stream()
    begin(stream)
    cuda.memset_d32_async(kernel.x, 0, N, stream)
    kernel.launch(stream, kernel.x, kernel.out, 1.0, 1.0)
    executable = instantiate(end(stream)[1])
    driver.fail_work("kernel", Code.LAUNCH_FAILED)
    assert call("cuGraphLaunch", executable, stream.handle) == Code.SUCCESS
    with pytest.raises(cuda.LaunchError, match="unspecified launch failure"):
        stream.synchronize()
    assert call("cuGraphLaunch", executable, stream.handle) == Code.LAUNCH_FAILED
    assert call("cuGraphExecDestroy", executable) == Code.SUCCESS
    capfd.readouterr()
