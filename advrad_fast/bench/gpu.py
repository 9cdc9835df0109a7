"""``advrad-fast bench --gpu``: ``inspect`` on an NVIDIA GPU against PyTorch on the same GPU, and where its time goes.

Nothing is timed before the ``cuda`` backend, each PyTorch baseline and each kernel have been held against the reference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from advrad_fast import backends
from advrad_fast.bench import gpu_kernels
from advrad_fast.bench.inspection import Frames, drawn_frames, parity
from advrad_fast.bench.timing import Timing, alternate, machine, row, torch_compiled
from advrad_fast.detector import Detector
from advrad_fast.errors import BackendUnavailableError, InferenceError
from advrad_fast.image_paths import list_images
from advrad_fast.images import load_image, prepare
from advrad_fast.model import ModelFile
from advrad_fast.reference import diffusion, score
from advrad_fast.reference.unet import UNet

#: Worst difference allowed of a score from the reference's, by precision, as a share of the score or the threshold.
BOUNDS = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.25, "fp8": 0.25}
STEPS = ("copy_in", "noise", "network", "error", "copy_out")  #: of ``CudaBackend.profile``
RUNS = 200  # of a profile

_log = logging.getLogger(__name__)
_HALF = {"fp32": torch.float32, "bf16": torch.bfloat16}  # PyTorch runs int8's and fp8's network in fp16


def run(
    model: Path,
    *,
    frames: Path | None = None,
    precision: str = "auto",
    seconds: float = 4.0,
    compile_torch: bool = True,
) -> Iterator[dict[str, Any]]:
    """Measure and yield a row at a time, under the keys of :func:`advrad_fast.bench.timing.row` and ``details``.

    ``ratio_eager`` is against the faster of PyTorch eager in fp32 and in half precision, ``ratio_best_torch`` against the fastest
    PyTorch of all: these, and half precision, channels last, compiled with ``max-autotune``, which is one CUDA graph.
    PyTorch gets its frame prepared already; ``inspect`` prepares it.

    Args:
        model: a model file.
        frames: a file, folder or pattern of images that the model is for; without one only drawn frames are used.
        precision: of the engine; ``auto`` for the backend's own choice.
        seconds: for each set of contestants.
        compile_torch: False leaves compiled PyTorch out.

    Raises:
        BackendUnavailableError: there is no GPU that both the ``cuda`` backend and PyTorch can use; the message says why.
        InferenceError: the backend, a baseline or a kernel differs from the reference by more than its bound: nothing is timed.
    """
    check_usable()
    loaded = ModelFile.load(model)
    detector = Detector(loaded, backend="cuda", precision=precision)
    paths = [] if frames is None else list_images([frames])
    given = {str(path): load_image(path) for path in paths[:: max(1, len(paths) // 20)][:20]}
    copy = gpu_kernels.copy_rate()
    common = {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "copy_GB_s": round(copy / 1e9, 1),
        "versions": versions(),
    }
    rows = _inspect(model.stem, loaded, detector, given, copy, seconds, compile_torch)
    for made, details in chain(rows, gpu_kernels.rows(copy)):
        yield {**made, "machine": f"{common['gpu']}, {machine()}", "details": {**common, **details}}


def check_usable() -> None:
    """Raises BackendUnavailableError, with the reason, unless the ``cuda`` backend and PyTorch both have a GPU."""
    status = next(each for each in backends.available() if each.name == "cuda")
    reasons = [] if status.usable else [status.detail]
    if not torch.cuda.is_available():
        built = "built without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}, finds no GPU"
        reasons.append(f"PyTorch {torch.__version__}, which is measured against, is {built}")
    if reasons:
        raise BackendUnavailableError(f"bench --gpu needs an NVIDIA GPU: {'; '.join(reasons)}")


def versions() -> dict[str, str]:
    """Of what takes part, where it is installed."""
    found = {}
    for name in ("advrad-fast", "torch", "triton", "tensorrt", "tensorrt-rtx-cu13", "pycuda", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Baseline:
    """The same inspection in PyTorch: a prepared frame on the host to a score on the host.

    Its noise is PyTorch's own generator's, drawn on the device: cheaper than the stream that makes results repeatable.

    Args:
        model: the model file's contents.
        device: ``cuda``.
        dtype: of the network; everything else is in float32.
        compiled: with ``torch.compile(mode="max-autotune")`` and channels last.

    Attributes:
        usable: False if it could not be compiled.
    """

    def __init__(self, model: ModelFile, *, device: str, dtype: torch.dtype, compiled: bool = False) -> None:
        self._config, self._device, self._dtype = model.config, torch.device(device), dtype
        net = UNet(model.config.unet).eval().requires_grad_(False)
        net.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in model.weights.items()})
        layout = torch.channels_last if compiled else torch.contiguous_format
        self._net = net.to(device=device, dtype=dtype).to(memory_format=layout)  # type: ignore[call-overload]
        self._mu, self._inverse_spread = (torch.from_numpy(np.array(a)).to(device) for a in (model.mu, model.inverse_spread))
        draws = model.config.diffusion.draws
        self._timesteps = torch.full((draws,), model.config.diffusion.timestep, device=device)
        image = model.config.image
        size = (1, image.height, image.width, image.channels)
        self._frame = torch.empty(size, dtype=torch.uint8, device=device)
        self._host = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        self._shape = (draws, image.channels, image.height, image.width)
        self._layout = layout
        run: Callable[[], Any] | None = self._drawn
        if compiled:
            with torch.no_grad():
                run = torch_compiled(self._drawn, mode="max-autotune")
        self.usable = run is not None
        self._run = run or self._drawn

    def check(self, image: NDArray[np.uint8], *, seed: int) -> float:
        """The score under the repeatable stream's noise, not compiled: what this computes.  ``image``: uint8 (H, W, C)."""
        draws, *shape = self._shape
        eps = diffusion.draw_noise((shape[0], shape[1], shape[2]), seed=seed, draws=draws, image_ids=[0])
        self._take(image)
        with torch.no_grad():
            return float(self._scored(eps.to(self._device)))

    def __call__(self, image: NDArray[np.uint8]) -> float:
        """Inspect uint8 (H, W, C)."""
        self._take(image)
        with torch.no_grad():
            return float(self._run())

    def _take(self, image: NDArray[np.uint8]) -> None:
        self._host.numpy()[0] = image  # the last score was waited for: nothing reads it any more
        self._frame.copy_(self._host, non_blocking=True)

    def _drawn(self) -> torch.Tensor:
        return self._scored(torch.randn(self._shape, device=self._device))

    def _scored(self, eps: torch.Tensor) -> torch.Tensor:
        c = diffusion.coefficients_at(self._config)
        x = diffusion.noise(self._frame, eps, c).to(dtype=self._dtype, memory_format=self._layout)
        # With weights of the same type, autocast only takes care of the timestep's embedding.
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            outputs = self._net(x, self._timesteps)
        scored = score.reconstruction_error(
            self._frame, outputs.float(), eps, self._mu, self._inverse_spread, self._config.score, c
        )
        return scored[0][0]


def baselines(model: ModelFile, precision: str, *, device: str, compile_torch: bool) -> dict[str, Baseline]:
    """PyTorch's contestants by name."""
    half = _HALF.get(precision, torch.float16)
    found = {"eager fp32": Baseline(model, device=device, dtype=torch.float32)}
    if half != torch.float32:
        found[f"eager {str(half).removeprefix('torch.')}"] = Baseline(model, device=device, dtype=half)
    if compile_torch:
        compiled = Baseline(model, device=device, dtype=half, compiled=True)
        if compiled.usable:
            found["compiled"] = compiled
    return found


def check_baselines(
    made: Mapping[str, Baseline], reference: Detector, image: NDArray[np.uint8], precision: str
) -> dict[str, float]:
    """How far each is from the reference on a prepared frame, as a share of the score or the threshold.

    One in half precision that is further off than its precision allows (PyTorch's fp16 may overflow) is left out, with a warning.

    Raises:
        InferenceError: PyTorch in fp32 is.
    """
    wanted = float(reference._backend.score(image[None], seed=0, want_maps=False).scores[0])
    found = {}
    for name, baseline in made.items():
        bound = BOUNDS["fp32"] if name == "eager fp32" else BOUNDS["bf16" if precision == "bf16" else "fp16"]
        off = abs(baseline.check(image, seed=0) - wanted) / max(abs(wanted), reference.threshold)
        message = f"PyTorch, {name}: {off:.3g} from the reference, more than {bound}"
        if off <= bound:
            found[name] = off
        elif name == "eager fp32":
            raise InferenceError(f"{message}: nothing is timed")
        else:
            _log.warning("%s: left out", message)
    return found


def _inspect(
    name: str,
    model: ModelFile,
    detector: Detector,
    frames: Frames,
    copy: float,
    seconds: float,
    compile_torch: bool,
    device: str = "cuda",
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of ``inspect``, score only and with the map, each with its steps."""
    image = model.config.image
    shape = (image.height, image.width, image.channels)
    reference, backend = Detector(model, backend="reference"), detector._backend
    checked = {**drawn_frames(*shape), **frames}
    found = parity(detector, reference, checked)
    bound = BOUNDS[backend.precision]
    if not found.score_worst <= bound or found.flips:
        raise InferenceError(f"{name}, {backend.precision}: {found} breaks the bound {bound}: nothing is timed")
    timed = list(frames.values()) or [checked["noise"]]
    prepared = prepare(timed[0], image).image
    made = baselines(model, backend.precision, device=device, compile_torch=compile_torch)
    off = check_baselines(made, reference, prepared, backend.precision)
    for maps in (False, True):
        turn, taken = [0], list[Mapping[str, float]]()

        def ours(maps: bool = maps, turn: list[int] = turn, taken: list[Mapping[str, float]] = taken) -> None:
            turn[0] = (turn[0] + 1) % len(timed)
            taken.append(detector.inspect(timed[turn[0]], maps=maps).timings)

        calls: dict[str, Callable[[], object]] = {"cuda": ours}
        if not maps:  # the baselines give a score and no map
            calls |= {key: lambda baseline=made[key]: baseline(prepared) for key in off}  # type: ignore[misc]
        timings = alternate(calls, seconds=seconds)
        profile = backend.profile(prepared, want_maps=maps, runs=RUNS)  # type: ignore[attr-defined]
        details = {
            "parity": asdict(found),
            "baselines_parity": off,
            "baselines_ms": {key: asdict(timing) for key, timing in timings.items() if key != "cuda"},
            **steps(profile, timings["cuda"], taken, model, backend.precision, copy, maps),
        }
        eager, best = fastest(timings, "eager"), fastest(timings, "")
        title = f"inspect {name}{' with map' if maps else ''}"
        yield row(title, shape, 1, "cuda", backend.precision, timings["cuda"], eager=eager, best_torch=best), details


def fastest(timings: Mapping[str, Timing], kind: str) -> Timing | None:
    """Of PyTorch's contestants whose name begins so, the one with the least median; None without one."""
    found = [timing for name, timing in timings.items() if name != "cuda" and name.startswith(kind)]
    return min(found, key=lambda timing: timing.p50, default=None)


def steps(
    profile: Mapping[str, NDArray[np.float64]],
    inspect: Timing,
    taken: list[Mapping[str, float]],
    model: ModelFile,
    precision: str,
    copy: float,
    maps: bool,
) -> dict[str, Any]:
    """Where the time goes: medians of the GPU's steps, their shares, the host's part, and the two kernels' rates.

    ``host_ms`` is what of the median ``inspect`` the GPU's steps do not account for.  They were launched one by one, with events
    between them, and take longer so than in one CUDA graph: the host's part is rather understated.  ``python_ms`` is the median
    time in ``inspect`` outside of the backend, and does not depend on events.
    """
    medians = {name: float(np.median(profile[name])) for name in STEPS}
    total = sum(medians.values())
    image, draws = model.config.image, model.config.diffusion.draws
    plane, size = image.height * image.width, 4 if precision == "fp32" else 2
    frame, outputs = plane * image.channels, draws * plane * image.channels * size
    moved = {"noise": frame + outputs, "error": frame + outputs + 4 * plane * (5 if maps else 4)}
    shares = {name: round(value / total, 4) for name, value in medians.items()}
    return {
        "steps_ms": {name: round(value, 5) for name, value in medians.items()},
        "steps_share": {**shares, "copies": round((medians["copy_in"] + medians["copy_out"]) / total, 4)},
        "host_ms": round(max(0.0, inspect.p50 - total), 5),
        "python_ms": round(float(np.median([t["total"] - t["device"] for t in taken])), 5),
        "kernels_GB_s": {name: round(amount / medians[name] / 1e6, 1) for name, amount in moved.items()},
        "kernels_share_of_copy": {name: round(amount / medians[name] * 1e3 / copy, 4) for name, amount in moved.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows and where the time goes, as text for a terminal."""
    from advrad_fast import bench

    lines = [f"{rows[0]['machine']}; commit {rows[0]['commit']}; copy {rows[0]['details']['copy_GB_s']} GB/s", bench.table(rows)]
    for made in rows:
        shares = made["details"].get("steps_share")
        if shares:
            text = ", ".join(f"{name} {100 * shares[name]:.1f} %" for name in ("noise", "network", "error", "copies"))
            lines.append(
                f"{made['name']}: p99 {made['p99_ms']:.3f} ms; on the GPU {text}; host {made['details']['host_ms']:.3f} ms"
            )
    return "\n".join(lines)
