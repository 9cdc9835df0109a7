"""The engine's network against PyTorch's, and the share of the machine's peak that it reaches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from advrad_fast.backends.cpu_network import Request, compile_network, precisions
from advrad_fast.bench.peaks import Peaks
from advrad_fast.bench.timing import alternate, row, torch_compiled
from advrad_fast.config import DetectorConfig
from advrad_fast.errors import InferenceError
from advrad_fast.graph import build_graph
from advrad_fast.reference.unet import UNet

#: Largest error allowed of the network's output, relative L2, by precision.
PARITY = {"fp32": 1e-4, "bf16": 3e-2}


def flops(config: DetectorConfig, weights: Mapping[str, NDArray[np.float32]], batch: int) -> float:
    """Of the convolutions and matrix products of the engine's graph: two for each multiplication."""
    import onnx

    image = config.image
    graph = onnx.shape_inference.infer_shapes(
        build_graph(config.unet, weights, height=image.height, width=image.width, batch=batch, timestep=0)
    ).graph
    shapes = {i.name: tuple(i.dims) for i in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    total = 0.0
    for node in graph.node:
        if node.op_type == "Conv":
            total += 2.0 * np.prod(shapes[node.output[0]]) * np.prod(shapes[node.input[1]][1:])
        elif node.op_type == "ConvTranspose":
            total += 2.0 * np.prod(shapes[node.input[0]]) * np.prod(shapes[node.input[1]][1:])
        elif node.op_type == "MatMul":
            total += 2.0 * np.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    return float(total)


def rows(
    name: str,
    config: DetectorConfig,
    weights: Mapping[str, NDArray[np.float32]],
    peaks: Peaks,
    *,
    batches: tuple[int, ...] = (1, 8),
    seconds: float = 6.0,
    threads: int | None = None,
    compile_torch: bool = True,
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of one network at each batch and precision of the ``cpu`` backend, each with its FLOPs and PyTorch's times.

    The PyTorch contestants are eager fp32 and the best of channels-last bf16, eager and compiled.

    Raises:
        InferenceError: an engine's output differs from PyTorch's by more than :data:`PARITY`; nothing is timed then.
    """
    image = config.image
    net = UNet(config.unet).eval().requires_grad_(False)
    net.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in weights.items()})
    half = copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for batch in batches:
        shape = (batch, config.unet.in_channels, image.height, image.width)
        x = torch.from_numpy(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
        timesteps = torch.full((batch,), config.diffusion.timestep)
        engines: dict[str, Request] = {}
        for precision in precisions():
            engine = compile_network(config, weights, precision=precision, batch=batch, threads=threads)
            engines[precision] = engine.request()
            if engine.name == "native":
                engines["openvino bf16"] = compile_network(
                    config, weights, precision=precision, engine="openvino", batch=batch, threads=threads
                ).request()
        for request in engines.values():
            request.x[:] = x.numpy()
        with torch.inference_mode():
            wanted = net(x, timesteps).numpy()
            for kind, request in engines.items():
                error = float(np.linalg.norm(request.infer() - wanted) / np.linalg.norm(wanted))
                bound = PARITY[kind.split()[-1]]
                if not error <= bound:
                    raise InferenceError(f"{name}, {kind}: relative error {error:.3g} is over {bound}")
            timings = alternate(
                {**{p: r.infer for p, r in engines.items()}, **_torch(net, half, x, timesteps, compile_torch)}, seconds=seconds
            )
        best = min((t for key, t in timings.items() if key.startswith("torch")), key=lambda t: t.p50)
        work = flops(config, weights, batch)
        for precision in precisions():
            timing = timings[precision]
            share = work / (timing.p50 / 1e3) / getattr(peaks, precision)
            size = (image.height, image.width, image.channels)
            result = row(
                f"network {name}",
                size,
                batch,
                "cpu",
                precision,
                timing,
                eager=timings["eager"],
                best_torch=best,
                peak_share=share,
            )
            others = {key: round(t.p50, 3) for key, t in timings.items() if key not in precisions()}
            yield result, {"GFLOP": round(work / 1e9, 3), "others_p50_ms": others}


def _torch(
    net: UNet, half: UNet, x: torch.Tensor, timesteps: torch.Tensor, compile_torch: bool
) -> dict[str, Callable[[], object]]:
    last = x.contiguous(memory_format=torch.channels_last)

    def bf16(model: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def call() -> object:
            with torch.autocast("cpu", torch.bfloat16):
                return model(last, timesteps)

        return call

    contestants: dict[str, Callable[[], object]] = {"eager": lambda: net(x, timesteps), "torch bf16": bf16(half)}
    if compile_torch:
        with torch.autocast("cpu", torch.bfloat16):
            compiled = torch_compiled(half, last, timesteps)
        if compiled is not None:
            contestants["torch bf16 compiled"] = bf16(compiled)
    return contestants
