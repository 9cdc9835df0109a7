"""TensorRT replaced at its one call on a real GPU: PyTorch runs the network on the caller's stream, between the same buffers.

For GPUs that have no TensorRT.  All else is as it is with one: driver, streams, CUDA graphs, kernels, memory.
"""

from __future__ import annotations

import hashlib
import sys
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from fake_tensorrt import DataType, FakeTensorRT

from advrad_fast.backends import tensorrt_build, tensorrt_engine
from advrad_fast.backends.tensorrt_library import Toolkit
from advrad_fast.reference.unet import UNet

# By precision: what the graph's input and output are in, for TensorRT, for NumPy's interface and for PyTorch.
TYPES = {
    "fp32": (DataType.FLOAT, "<f4", torch.float32),
    "fp16": (DataType.HALF, "<f2", torch.float16),
    "bf16": (DataType.BF16, "<i2", torch.bfloat16),
}


NETWORKS: dict[str, tuple[Any, ...]] = {}  # by the graph's digest; engines may outlive their detectors in the package's memory


class _Memory:
    """Memory on the GPU, as PyTorch takes it."""

    def __init__(self, address: int, shape: tuple[int, ...], typestr: str) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": shape, "typestr": typestr, "version": 3}


class TorchEngine:
    """TensorRT 10, as far as the package sees.

    Args:
        patch: takes it away again.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, as it does for TensorRT here
        patch.setattr(Toolkit, "_loaded", {})
        patch.setattr(tensorrt_engine, "_unstored", OrderedDict())  # no other test's engines
        patch.setitem(sys.modules, "tensorrt_rtx", None)
        self.trt = FakeTensorRT("tensorrt", "10.3.0").install(patch)
        self.trt.execute = self._enqueue
        self._pool = torch.cuda.MemPool()  # what a CUDA graph of the backend's reads and writes, empty_cache() leaves alone
        patch.setattr(tensorrt_build, "build_typed_graph", self._noted)
        self._build = build_typed_graph

    def _noted(self, config: Any, weights: Any, **settings: Any) -> Any:
        """The graph, noted with what PyTorch makes the same network from."""
        model = self._build(config, weights, **settings)
        dtype, typestr, torch_dtype = TYPES[settings["precision"]]
        self.trt.dtype = dtype
        network = UNet(config).eval().requires_grad_(False)
        network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
        layout = torch.contiguous_format if dtype is DataType.FLOAT else torch.channels_last
        network = network.to(device="cuda", dtype=torch_dtype).to(memory_format=layout)  # type: ignore[call-overload]
        timestep = torch.full((1,), settings["timestep"], device="cuda")
        NETWORKS[hashlib.sha256(model.SerializeToString()).hexdigest()] = (network, typestr, torch_dtype, timestep)
        return model

    def _enqueue(self, model: bytes, shape: tuple[int, ...], addresses: dict[str, int], stream: int) -> None:
        network, typestr, dtype, timestep = NETWORKS[hashlib.sha256(model).hexdigest()]
        half = dtype != torch.float32
        pool, there = torch.cuda.use_mem_pool(self._pool), torch.cuda.stream(torch.cuda.ExternalStream(stream))
        with pool, there, torch.no_grad(), torch.autocast("cuda", dtype, enabled=half):
            memory = (torch.as_tensor(_Memory(addresses[name], shape, typestr), device="cuda") for name in ("x", "output"))
            x, output = (each.view(dtype) for each in memory)
            output.copy_(network(x, timestep.expand(len(x))))


build_typed_graph = tensorrt_build.build_typed_graph
