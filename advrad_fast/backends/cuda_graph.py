"""CUDA graphs, through the driver's own library: pycuda has no calls for them.

A graph is captured from work on a stream.  Kernels whose arguments change from frame to frame are captured by
:meth:`Capture.kernel`: :meth:`Graph.update` gives their nodes the new ones, in a call each, and captures nothing again.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

from advrad_fast.backends.cuda_driver import call
from advrad_fast.errors import InferenceError
from advrad_fast.kernels.launcher import PreparedLaunch

_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile


class _KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v1, which the unversioned symbols take."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("parameters", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
    )


class Capture:
    """What is put on a stream in the body of a ``with`` becomes a graph, and is not run.

    ::

        with Capture(stream.handle) as capture:
            capture.kernel(launch)             # or any other asynchronous work on the stream
        graph = Graph(capture)

    Nothing is left of a body that fails, and the stream is usable again.

    Raises:
        InferenceError: the driver refuses.
    """

    def __init__(self, stream: int) -> None:
        self._stream = stream
        self.captured = 0
        self.nodes: list[tuple[int, PreparedLaunch]] = []

    def __enter__(self) -> Capture:
        call("cuStreamBeginCapture_v2", self._stream, ctypes.c_int(_THREAD_LOCAL))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        graph, refusal = ctypes.c_void_p(), None
        try:
            call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        except InferenceError as refused:
            refusal = refused
            with suppress(InferenceError):  # mostly it has ended all the same, and then refuses again
                call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        if (error or refusal) and graph.value:
            with suppress(InferenceError):
                call("cuGraphDestroy", graph.value)
        if error is None and refusal is not None:  # else what went wrong first is what to tell
            raise refusal
        self.captured = graph.value or 0

    def kernel(self, launch: PreparedLaunch) -> None:
        """Launch a kernel whose arguments :meth:`Graph.update` will look at again."""
        launch()
        status, number = ctypes.c_int(), ctypes.c_uint64()
        graph, nodes, count = ctypes.c_void_p(), ctypes.POINTER(ctypes.c_void_p)(), ctypes.c_size_t()
        places = [ctypes.byref(each) for each in (status, number, graph, nodes, count)]
        call("cuStreamGetCaptureInfo_v2", self._stream, *places)
        if count.value != 1:  # what comes next on the stream depends on the kernel, and on nothing else
            raise InferenceError(f"cuda: {count.value} nodes of a graph stand for one kernel")
        self.nodes.append((int(nodes[0] or 0), launch))


class Graph:
    """A graph, instantiated.  Close it.

    Raises:
        InferenceError: the driver refuses.
    """

    def __init__(self, capture: Capture) -> None:
        self._captured, self._executable = capture.captured, 0  # the captured one is kept: its nodes name this one's
        executable = ctypes.c_void_p()
        try:
            call("cuGraphInstantiateWithFlags", ctypes.byref(executable), self._captured, ctypes.c_uint64(0))
            self._executable = executable.value or 0
            self._nodes = [(node, *_settings(node, launch)) for node, launch in capture.nodes]
        except InferenceError:
            self.close()
            raise

    def update(self) -> None:
        """Give every node of :meth:`Capture.kernel` the arguments that its launch has now; for :meth:`launch` from here on.

        Raises:
            InferenceError: the driver refuses.
        """
        for node, settings, _ in self._nodes:
            call("cuGraphExecKernelNodeSetParams", self._executable, node, ctypes.byref(settings))

    def launch(self, stream: int) -> None:
        """Enqueue it on a stream.

        Raises:
            InferenceError: the driver refuses, or earlier work had failed.
        """
        call("cuGraphLaunch", self._executable, stream)

    def close(self) -> None:
        """Give it back; it must not be running.  Closing twice is fine, and a lost context takes it along."""
        for name, handle in (("cuGraphExecDestroy", self._executable), ("cuGraphDestroy", self._captured)):
            if handle:
                with suppress(InferenceError):
                    call(name, handle)
        self._executable = self._captured = 0


def _settings(node: int, launch: PreparedLaunch) -> tuple[_KernelNode, Any]:
    """A kernel's node with the launch's memory for its arguments, and what that memory is found by."""
    settings, addresses = _KernelNode(), (ctypes.c_void_p * len(launch.addresses))(*launch.addresses)
    call("cuGraphKernelNodeGetParams", node, ctypes.byref(settings))
    settings.parameters, settings.extra = ctypes.addressof(addresses), None
    return settings, addresses
