"""A thread's way through the pipeline on an NVIDIA GPU: noise kernel, TensorRT engine, reconstruction_error kernels.

Its memory is allocated once.  The whole way, with the copies at both ends, is one CUDA graph for each kind of frame; where the
driver or TensorRT does not take it, the same is launched piece by piece.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast.backends.base import Array
from advrad_fast.backends.cuda_driver import Order, check_memory
from advrad_fast.backends.cuda_graph import Capture, Graph
from advrad_fast.backends.cuda_session import Session, current, layout
from advrad_fast.errors import BackendUnavailableError, ConfigError, InferenceError
from advrad_fast.gpu_frames import GpuFrame, Pixels
from advrad_fast.kernels.launcher import PreparedLaunch, open_gpu

STEPS = ("copy_in", "noise", "network", "error", "copy_out")

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no waiting for other libraries' default stream
_ALIGNMENT = 16  # bytes, of a frame: kernels read it in pieces so long
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_log = logging.getLogger(__name__)


class Lane:
    """A stream with an execution context and memory of its own.  Used by one thread at a time, which holds :attr:`lock`.

    Args:
        session: what lanes share.
        graphs: whether CUDA graphs are used.

    Attributes:
        closed: whether it was given back.

    Raises:
        InferenceError: out of memory, or another error of the driver or of TensorRT.
        BackendUnavailableError: the kernels are of another version.
    """

    def __init__(self, session: Session, *, graphs: bool = True) -> None:
        self.session, self.lock, self.closed = session, threading.RLock(), False
        self._use_graphs = graphs
        self._graphs: dict[tuple[bool, bool], Graph | None] = {}
        self._given: dict[tuple[bool, bool], tuple[int, int, int]] = {}  # what each graph's kernels have of _current
        self._memory: Any = None
        self._stream: Any = None
        self._execution: Any = None
        self._order: Order | None = None
        self._launches: dict[str, PreparedLaunch] = {}
        self.gpu = open_gpu(session.where.ordinal)
        try:
            with current(self.gpu):
                self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        session, plan, cuda = self.session, self.session.plan, self.gpu.cuda
        image, engine = plan.config.image, session.engine
        plane = image.height * image.width
        self._execution = engine.execution(plan.batch)
        self._stream = cuda.Stream(_NON_BLOCKING)
        sizes = {
            "images": plane * image.channels,
            "out": plane * image.channels * plan.batch * _BYTES[engine.input_dtype],
            "outputs": plane * image.channels * plan.batch * _BYTES[engine.output_dtype],
            "errors": 4 * plane * plan.results,
        }
        if plan.wide:
            sizes["sums"] = sizes["errors"]
        # A map and its score are neighbours, so that one copy brings both: H * W is a multiple of 64.
        self._plane = plane if "maps" in session.kernels else 0
        if self._plane:
            sizes["maps"] = 4 * plane
        sizes["scores"] = 4 * plan.results
        places, total = layout(sizes)
        self._memory = cuda.mem_alloc(total)
        at = {name: int(self._memory) + place for name, place in places.items()} | session.addresses
        self._at = at
        self._execution.set_addresses(at["out"], at["outputs"])
        self.frame: NDArray[np.uint8] = cuda.pagelocked_empty((image.height, image.width, image.channels), np.uint8)
        self.frame[:] = 0
        self._host: Array = cuda.pagelocked_empty(self._plane + plan.results, np.float32)
        filtered = at | {"errors": at["sums"]} if plan.wide else at
        pointers = {"noise": at, "errors": at, "rows": at, "deviation": {"maps": at["errors"], **filtered}, "maps": filtered}
        try:
            for name, kernel in session.kernels.items():
                wanted = {argument.name for argument in kernel.kernel.arguments if argument.type == "pointer"}
                found = {key: value for key, value in pointers[name].items() if key in wanted}
                self._launches[name] = kernel.prepare(self._stream, **session.numbers[name], **found)
        except ConfigError as error:
            raise BackendUnavailableError(
                f"cuda: the compiled GPU kernels in {session.where.kernels} are of another version: {error}; compile them again:"
                " advrad-fast compile --kernels"
            ) from error
        self._current = (at["images"], 0, 0)
        for _ in self._steps(False, True, _launch):  # once outside of a capture, which TensorRT wants first
            continue
        self._stream.synchronize()

    def submit(self, seed: int, first_draw: int = 0, *, maps: bool, upload: bool = True, images: int | None = None) -> None:
        """Enqueue a frame; the context is current.

        Args:
            seed, first_draw: of the noise.
            maps: also compute the map.
            upload: copy :attr:`frame` to the GPU first.
            images: the frame's address on the GPU (:meth:`placed`), where it is not the lane's own.

        Raises:
            InferenceError: TensorRT or the driver failed.
        """
        now = (self._at["images"] if images is None else images, seed, first_draw)
        if now != self._current:
            for name in ("noise", "errors"):
                self._launches[name].set(images=now[0], seed=seed, first_draw=first_draw)
            self._current = now
        key = (maps, upload)
        if key not in self._graphs:
            self._graphs[key] = self._captured(maps, upload)
            self._given[key] = now
        graph = self._graphs[key]
        if graph is None:
            for _ in self._steps(maps, upload, _launch):
                continue
            return
        if self._given[key] != now:
            graph.update()
            self._given[key] = now
        graph.launch(self._stream.handle)

    def take(self, frame: GpuFrame, lent: ExitStack) -> Pixels:
        """A frame on this GPU, ready for what is enqueued from now on; the context is current.

        Args:
            lent: gives back what was borrowed; close it when that work is done.

        Raises:
            ImageError: it is no such frame.
            InferenceError: the driver failed.
        """
        ordinal = self.session.where.ordinal
        pixels = frame.open(self._stream.handle, ordinal, lent)
        check_memory(pixels.address, pixels.nbytes, ordinal)
        if pixels.stream is not None:
            if self._order is None:
                self._order = Order()
            self._order.wait(self._stream.handle, pixels.stream)
        return pixels

    def placed(self, pixels: Pixels) -> int:
        """Where kernels read a frame of the network's size: where it is, or in the lane's memory if that is misaligned."""
        if pixels.address % _ALIGNMENT == 0:
            return pixels.address
        self.gpu.cuda.memcpy_dtod_async(self._at["images"], pixels.address, pixels.nbytes, self._stream)
        return self._at["images"]

    def download(self, pixels: Pixels) -> NDArray[np.uint8]:
        """uint8 (H, W, C), a frame's copy on the host."""
        image = np.empty(pixels.shape, np.uint8)
        self.gpu.cuda.memcpy_dtoh_async(image, pixels.address, self._stream)
        self.wait()
        return image

    def wait(self) -> None:
        """Until the frame is done: the one time that the host waits.

        Raises:
            InferenceError: something that was enqueued failed.
        """
        self._stream.synchronize()

    @property
    def scores(self) -> Array:
        """float32 (results,), the lane's own memory: of the frame that was waited for."""
        return self._host[self._plane :]

    @property
    def map(self) -> Array:
        """float32 (H, W), the lane's own memory."""
        image = self.session.plan.config.image
        return self._host[: self._plane].reshape(image.height, image.width)

    def profile(self, seed: int, *, maps: bool, runs: int) -> dict[str, NDArray[np.float64]]:
        """Milliseconds of each of STEPS in ``runs`` runs of :attr:`frame`, launched piece by piece, with events between them."""
        cuda, taken = self.gpu.cuda, {step: np.zeros(runs) for step in STEPS}
        marks = [cuda.Event() for _ in range(len(STEPS) + 1)]
        for name in ("noise", "errors"):
            self._launches[name].set(images=self._at["images"], seed=seed, first_draw=0)
        self._current = (self._at["images"], seed, 0)
        for run in range(runs):
            marks[0].record(self._stream)
            for mark, _ in zip(marks[1:], self._steps(maps, True, _launch), strict=True):
                mark.record(self._stream)
            self._stream.synchronize()
            for i, step in enumerate(STEPS):
                taken[step][run] = marks[i + 1].time_since(marks[i])
        return taken

    def _steps(self, maps: bool, upload: bool, kernel: Callable[[PreparedLaunch], None]) -> Iterator[str]:
        """Enqueue a frame, giving each of STEPS when it is enqueued; ``kernel`` launches those whose arguments change."""
        cuda, stream, launches = self.gpu.cuda, self._stream, self._launches
        if upload:
            cuda.memcpy_htod_async(self._at["images"], self.frame, stream)
        yield "copy_in"
        kernel(launches["noise"])
        yield "noise"
        self._execution.enqueue(stream.handle)
        yield "network"
        kernel(launches["errors"])
        if "rows" in launches:
            launches["rows"]()
        launches["maps" if maps else "deviation"]()
        yield "error"
        if maps:
            cuda.memcpy_dtoh_async(self._host, self._at["maps"], stream)
        else:
            cuda.memcpy_dtoh_async(self.scores, self._at["scores"], stream)
        yield "copy_out"

    def _captured(self, maps: bool, upload: bool) -> Graph | None:
        if not self._use_graphs:
            return None
        try:
            with current(self.gpu), Capture(self._stream.handle) as capture:
                for _ in self._steps(maps, upload, capture.kernel):
                    continue
            return Graph(capture)
        except InferenceError as error:
            _log.warning("cuda: no CUDA graph, every kernel is launched on its own: %s", error)
            return None

    def close(self) -> None:
        """Give everything back, once what is enqueued is done.  Closing twice is fine."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            with suppress(InferenceError), current(self.gpu):
                if self._stream is not None:
                    with suppress(self.gpu.cuda.Error):
                        self._stream.synchronize()
                for graph in self._graphs.values():
                    if graph is not None:
                        graph.close()
                self._graphs, self._launches, self._execution, self._stream = {}, {}, None, None
                if self._order is not None:
                    self._order.close()
                pinned = [
                    array.base for array in (self.__dict__.pop(name, None) for name in ("frame", "_host")) if array is not None
                ]
                for memory in (self._memory, *pinned):
                    if memory is not None:
                        with suppress(self.gpu.cuda.Error):
                            memory.free()
                self._memory = None
            with suppress(self.gpu.cuda.Error):
                self.gpu.close()


def _launch(launch: PreparedLaunch) -> None:
    launch()
