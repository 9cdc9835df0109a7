"""TensorRT replaced at its one call, and nowhere else: ONNX Runtime runs the engine's graph between the same device buffers."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import DataType, FakeTensorRT
from gpu_emulation.driver import FakeDriver
from gpu_emulation.driver.streams import Work

from advrad_fast.backends.tensorrt_library import Toolkit
from advrad_fast.kernels.manifest import Manifest

TYPES = {"fp32": (DataType.FLOAT, np.float32), "fp16": (DataType.HALF, np.float16)}


class EmulatedEngine:
    """TensorRT 10 on a fake driver.

    Args:
    Attributes:
        trt: the library, for errors on demand.
        broken: what the network returns in place of its output, until None again.
    """

    def __init__(self, driver: FakeDriver, patch: pytest.MonkeyPatch) -> None:
        self.driver, self.broken = driver, None
        self._sessions: dict[bytes, Any] = {}
        patch.setattr(Toolkit, "_loaded", {})
        patch.setitem(sys.modules, "tensorrt_rtx", None)
        self.trt = FakeTensorRT("tensorrt", "10.3.0").install(patch)
        self.trt.execute = self._enqueue
        self.use("fp32")

    def use(self, precision: str) -> None:
        """What the engines' input and output are in, from here on."""
        self.trt.dtype, self._type = TYPES[precision]

    def _session(self, model: bytes) -> Any:
        import onnxruntime

        if model not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1  # the same bits every time
            self._sessions[model] = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return self._sessions[model]

    def _enqueue(self, model: bytes, shape: tuple[int, ...], addresses: dict[str, int], stream: int) -> None:
        driver, session = self.driver, self._session(model)
        memory = driver.contexts.memory()

        def run() -> None:
            nbytes = int(np.prod(shape)) * np.dtype(self._type).itemsize
            x = np.frombuffer(memory.read(addresses["x"], nbytes), self._type).reshape(shape)
            (output,) = session.run(None, {"x": x})
            assert output.dtype == self._type and output.shape == shape
            if self.broken is not None:
                output[...] = self.broken
            memory.write(addresses["output"], output)

        driver.streams.submit(driver.streams.find(stream), Work("kernel", "the network", run))


def teach(driver: FakeDriver, manifest: Manifest) -> None:
    """Tells the driver what the compiled kernels do."""
    for kernel in manifest.kernels:
        driver.modules.know(manifest.image(kernel, "cubin"), manifest.image(kernel, "ptx").decode(), kernel.arch)
