"""Stream capture and CUDA graphs: what may be captured, what invalidates a capture, and launches of what was captured."""

from __future__ import annotations

import ctypes
import struct
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gpu_emulation.driver.codes import Code, Refused
from gpu_emulation.driver.streams import Event, Stream, Work

if TYPE_CHECKING:
    from gpu_emulation.driver.contexts import Context
    from gpu_emulation.driver.fake import FakeDriver

GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2  # CU_STREAM_CAPTURE_MODE_*
NONE, ACTIVE, INVALIDATED = 0, 1, 2  # CU_STREAM_CAPTURE_STATUS_*
UPDATED, TOPOLOGY_CHANGED, NODE_TYPE_CHANGED = 0, 2, 3  # CU_GRAPH_EXEC_UPDATE_*
_KERNEL_NODE = struct.Struct("@Q3I3II4xQQ")  # CUDA_KERNEL_NODE_PARAMS_v1: function, grid, block, shared, kernelParams, extra


class Node:
    """One piece of captured work and what it comes after."""

    def __init__(self, driver: FakeDriver, work: Work, after: set[Node]) -> None:
        self.work, self.after = work, after
        self.handle = driver.new_handle(self)


@dataclass
class Capture:
    """One capture: where and in which thread it began, how strict it is, and what it has."""

    origin: Stream
    mode: int
    thread: int
    nodes: list[Node]
    streams: list[Stream]
    valid: bool = True
    told: list[object] = field(default_factory=list)  # memory that the program was pointed to


class Graph:
    """What a capture gave."""

    owned = True

    def __init__(self, driver: FakeDriver, nodes: list[Node], context: Context) -> None:
        self.nodes, self.context = nodes, context
        self.handle = driver.new_handle(self)

    def __str__(self) -> str:
        return f"graph of {len(self.nodes)} nodes"


class GraphExec(Graph):
    """An instantiated graph; ``works``: what was put in place of its nodes' work."""

    def __init__(self, driver: FakeDriver, nodes: list[Node], context: Context) -> None:
        super().__init__(driver, nodes, context)
        self.works: dict[Node, Work] = {}

    def __str__(self) -> str:
        return f"instantiated graph of {len(self.nodes)} nodes"


class Graphs:
    """cuStreamBeginCapture, cuStreamEndCapture, cuGraph*, and what other calls ask during a capture."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self.captures: list[Capture] = []
        self._local = threading.local()

    # Asked by other parts

    def record(self, stream: Stream, work: Work) -> bool:
        """Whether the stream is being captured: then the work is a node now.

        Raises:
            Refused: the capture was invalidated, or work on the default stream would wait for a stream that is captured.
        """
        if stream.capture is None:
            blocked = [c for c in self.captures if any(s.blocking and s.context is stream.context for s in c.streams)]
            if stream.legacy and blocked:
                for capture in blocked:
                    capture.valid = False
                raise Refused(Code.STREAM_CAPTURE_IMPLICIT, "the default stream would wait for a stream that is being captured")
            return False
        self._still_valid(stream.capture)
        node = Node(self.driver, work, set(stream.tail))
        stream.capture.nodes.append(node)
        stream.tail = {node}
        return True

    def mark(self, stream: Stream, event: Event) -> bool:
        """Whether the stream is being captured: then the event marks what was captured so far."""
        if stream.capture is None:
            return False
        self._still_valid(stream.capture)
        event.captured, event.recorded = (stream.capture, set(stream.tail)), None
        return True

    def join(self, stream: Stream, event: Event) -> bool:
        """Whether a wait for the event is part of a capture, which the stream then is in."""
        captured = event.captured if event.captured and event.captured[0] in self.captures else None
        if captured is None:
            if stream.capture is not None:
                self.invalidate(stream)
                raise Refused(Code.STREAM_CAPTURE_ISOLATION, "a captured stream would wait for work outside the capture")
            return False
        capture, nodes = captured
        self._still_valid(capture)
        if stream.capture not in (None, capture):
            self.invalidate(stream)
            capture.valid = False
            raise Refused(Code.STREAM_CAPTURE_MERGE, "two captures would become one")
        if stream.capture is None:
            stream.capture, stream.tail = capture, set()
            capture.streams.append(stream)
        stream.tail |= nodes
        return True

    def forbid_wait(self, on: Stream | Event | Context) -> None:
        """Refuses to let the host wait for, or ask about, what is being captured; otherwise such a call is only unsafe."""
        for capture in self.captures:
            if isinstance(on, Event):
                mine, code = on.captured is not None and on.captured[0] is capture, Code.CAPTURED_EVENT
            elif isinstance(on, Stream) and on.legacy:
                mine, code = any(s.blocking and s.context is on.context for s in capture.streams), Code.STREAM_CAPTURE_IMPLICIT
            else:
                mine, code = any(on in (s, s.context) for s in capture.streams), Code.STREAM_CAPTURE_UNSUPPORTED
            if mine:
                capture.valid = False
                raise Refused(code, "the host can't wait for what is being captured")
        self.forbid_unsafe("a wait of the host")

    def forbid_unsafe(self, what: str) -> None:
        """Refuses what a capture doesn't see, by the rules of cuThreadExchangeStreamCaptureMode."""
        here = threading.get_ident()
        mode = self._mode
        if mode == RELAXED:
            return
        offended = [c for c in self.captures if c.thread == here and c.mode != RELAXED]
        if mode == GLOBAL:
            offended += [c for c in self.captures if c.thread != here and c.mode == GLOBAL]
        for capture in offended:
            capture.valid = False
        if offended:
            raise Refused(Code.STREAM_CAPTURE_UNSUPPORTED, f"{what} during a capture")

    def invalidate(self, stream: Stream) -> None:
        if stream.capture is not None:
            stream.capture.valid = False

    @staticmethod
    def _still_valid(capture: Capture) -> None:
        if not capture.valid:
            raise Refused(Code.STREAM_CAPTURE_INVALIDATED, "the capture was invalidated before")

    @property
    def _mode(self) -> int:
        return getattr(self._local, "mode", GLOBAL)

    # Capture

    def cuStreamBeginCapture_v2(self, handle: int, mode: int) -> None:
        stream = self.driver.streams.find(handle)
        if stream.legacy:
            raise Refused(Code.STREAM_CAPTURE_UNSUPPORTED, "the default stream can't be captured")
        if stream.capture is not None or mode not in (GLOBAL, THREAD_LOCAL, RELAXED):
            raise Refused(Code.INVALID_VALUE, f"mode {mode}, or a capture in a capture")
        capture = Capture(stream, mode, threading.get_ident(), [], [stream])
        stream.capture, stream.tail = capture, set()
        self.captures.append(capture)

    def cuStreamEndCapture(self, handle: int, graph: int) -> None:
        stream = self.driver.streams.find(handle)
        capture = stream.capture
        ctypes.c_uint64.from_address(graph).value = 0
        if capture is None:
            raise Refused(Code.INVALID_VALUE, "the stream is not being captured")
        if stream is not capture.origin:
            capture.valid = False
            raise Refused(Code.STREAM_CAPTURE_UNMATCHED, "the capture began on another stream")
        if capture.mode != RELAXED and capture.thread != threading.get_ident():
            capture.valid = False
            raise Refused(Code.STREAM_CAPTURE_WRONG_THREAD, "the capture began in another thread")
        joined = _all_before(stream.tail)
        self.captures.remove(capture)
        for member in capture.streams:
            member.capture, member.tail = None, set()
        self._still_valid(capture)
        if joined != set(capture.nodes):
            raise Refused(Code.STREAM_CAPTURE_UNJOINED, "work on another stream was not joined to the first one")
        ctypes.c_uint64.from_address(graph).value = Graph(self.driver, capture.nodes, stream.context).handle

    def cuStreamIsCapturing(self, handle: int, status: int) -> None:
        capture = self.driver.streams.find(handle).capture
        state = NONE if capture is None else ACTIVE if capture.valid else INVALIDATED
        ctypes.c_int32.from_address(status).value = state

    def cuStreamGetCaptureInfo_v2(self, handle: int, status: int, number: int, graph: int, nodes: int, count: int) -> None:
        """Of the optional answers all but the graph, which is given as 0."""
        stream = self.driver.streams.find(handle)
        self.cuStreamIsCapturing(handle, status)
        tail = [node.handle for node in stream.tail]
        words = (ctypes.c_uint64 * max(1, len(tail)))(*tail)
        if stream.capture is not None:
            stream.capture.told.append(words)
        for place, value in ((number, 1), (graph, 0), (nodes, ctypes.addressof(words)), (count, len(tail))):
            if place:
                ctypes.c_uint64.from_address(place).value = value

    def cuThreadExchangeStreamCaptureMode(self, mode: int) -> None:
        place = ctypes.c_int32.from_address(mode)
        if place.value not in (GLOBAL, THREAD_LOCAL, RELAXED):
            raise Refused(Code.INVALID_VALUE, f"mode {place.value}")
        self._local.mode, place.value = place.value, self._mode

    # Graphs

    def cuGraphGetNodes(self, graph: int, nodes: int, count: int) -> None:
        found: Graph = self.driver.get(graph, Graph)
        if nodes:
            self.driver.lacks("cuGraphGetNodes for handles of nodes")
            raise Refused(Code.NOT_SUPPORTED, "only the number of nodes")
        ctypes.c_uint64.from_address(count).value = len(found.nodes)

    def cuGraphInstantiateWithFlags(self, handle: int, graph: int, flags: int) -> None:
        if flags:
            raise Refused(Code.INVALID_VALUE, f"flags {flags}")
        self.driver.contexts.current()
        source: Graph = self.driver.get(graph, Graph)
        ctypes.c_uint64.from_address(handle).value = GraphExec(self.driver, list(source.nodes), source.context).handle

    def cuGraphExecUpdate_v2(self, handle: int, graph: int, result: int) -> None:
        """The nodes of ``graph`` in place of those of the instantiated one, if both have the same shape."""
        old, new = self.driver.get(handle, GraphExec), self.driver.get(graph, Graph)
        outcome = UPDATED
        if _shape(old.nodes) != _shape(new.nodes):
            outcome = TOPOLOGY_CHANGED
        elif [node.work.kind for node in old.nodes] != [node.work.kind for node in new.nodes]:
            outcome = NODE_TYPE_CHANGED
        if result:
            ctypes.memset(result, 0, 24)  # {int result; CUgraphNode errorNode; CUgraphNode errorFromNode}
            ctypes.c_int32.from_address(result).value = outcome
        if outcome != UPDATED:
            raise Refused(Code.GRAPH_EXEC_UPDATE_FAILURE, f"{old} against {new}")
        old.nodes = list(new.nodes)
        old.works = {}

    def _kernel(self, handle: int) -> tuple[Node, int]:
        """A living kernel node, and its function."""
        node: Node = self.driver.get(handle, Node)
        if node.work.kernel is None:
            raise Refused(Code.INVALID_VALUE, f"the node is no kernel: {node.work.words}")
        return node, node.work.kernel[0]

    def cuGraphKernelNodeGetParams(self, handle: int, place: int) -> None:
        """Without the parameters' own place."""
        node, function = self._kernel(handle)
        assert node.work.kernel is not None
        launch = node.work.kernel[1]
        ctypes.memmove(place, _KERNEL_NODE.pack(function, *launch.grid, *launch.block, launch.shared, 0, 0), _KERNEL_NODE.size)

    def cuGraphExecKernelNodeSetParams(self, handle: int, node_handle: int, place: int) -> None:
        """For later launches of the instantiated graph; those before keep what they were launched with."""
        executable: GraphExec = self.driver.get(handle, GraphExec)
        node, function = self._kernel(node_handle)
        if node not in executable.nodes:
            raise Refused(Code.INVALID_VALUE, f"a node of another graph than {executable}")
        new, *sizes, values, extra = _KERNEL_NODE.unpack(ctypes.string_at(place, _KERNEL_NODE.size))
        if new != function:
            self.driver.lacks("cuGraphExecKernelNodeSetParams with another function")
            raise Refused(Code.NOT_SUPPORTED, "another function")
        grid, block, shared = tuple(sizes[:3]), tuple(sizes[3:6]), sizes[6]
        stream = executable.context.legacy
        executable.works[node] = self.driver.modules.kernel(function, stream, grid, block, shared, values, extra)

    def cuGraphUpload(self, handle: int, stream: int) -> None:
        self.driver.get(handle, GraphExec)
        self.driver.streams.find(stream)

    def cuGraphLaunch(self, handle: int, stream_handle: int) -> None:
        graph: GraphExec = self.driver.get(handle, GraphExec)
        stream = self.driver.streams.find(stream_handle)
        if stream.context is not graph.context:
            raise Refused(Code.INVALID_VALUE, f"{graph} belongs to another context")
        works = [graph.works.get(node, node.work) for node in _latest_first(graph.nodes)]
        self.driver.counters.graph_launches += 1
        self.driver.counters.launches += sum(work.kind == "kernel" for work in works)

        def prepare() -> None:
            for work in works:
                if work.prepare is not None:
                    work.prepare()

        def run() -> None:
            for work in works:
                self.driver.streams.execute(stream.context, work)

        self.driver.streams.submit(stream, Work("graph", str(graph), run, prepare))

    def cuGraphExecDestroy(self, handle: int) -> None:
        self.driver.drop(handle, GraphExec)

    def cuGraphDestroy(self, handle: int) -> None:
        graph = self.driver.drop(handle, Graph)
        for node in graph.nodes if graph is not None else ():
            self.driver.drop(node.handle, Node)


def _all_before(nodes: set[Node]) -> set[Node]:
    """The nodes, and everything that they come after."""
    found: set[Node] = set()
    rest = list(nodes)
    while rest:
        node = rest.pop()
        if node not in found:
            found.add(node)
            rest += node.after
    return found


def _shape(nodes: list[Node]) -> list[list[int]]:
    place = {node: i for i, node in enumerate(nodes)}
    return [sorted(place[before] for before in node.after) for node in nodes]


def _latest_first(nodes: list[Node]) -> list[Node]:
    """An order that the graph allows and that is far from the one it was captured in: a forgotten dependency shows."""
    done: list[Node] = []
    rest = list(nodes)
    while rest:
        node = next(node for node in reversed(rest) if node.after <= set(done))
        rest.remove(node)
        done.append(node)
    return done
