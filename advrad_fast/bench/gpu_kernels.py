"""The Triton kernels on a GPU at a batch that fills it: bytes a second against a copy in the same run."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from advrad_fast import _native, schedule
from advrad_fast.bench.timing import Timing, row
from advrad_fast.config import DiffusionConfig, ScoreConfig
from advrad_fast.errors import InferenceError

SIDE, CHANNELS, BATCH = 256, 3, 64
SCORES, IMAGES, THRESHOLDS = 10_000, 64, 8  # votes

#: Worst difference allowed from the C++ twin, as a share of the largest value: the inputs are fp16, the scores come from them.
BOUND = 2e-3

_COPY_BYTES = 256 * 2**20
_CALLS, _REPEATS = 10, 30  # in one CUDA graph, and how often it is timed
_CONFIG = ScoreConfig(filter_size=15)
_C = schedule.coefficients("eps", float(schedule.alpha_bar(DiffusionConfig())[100]), 0.5)
_log = logging.getLogger(__name__)


def timed(call: Callable[[], object]) -> Timing:
    """Milliseconds of a call that only launches work on the current GPU: many in one CUDA graph, by CUDA events."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and fills PyTorch's pools
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            call()
    taken = []
    for _ in range(_REPEATS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / _CALLS)
    return Timing(*(float(value) for value in np.quantile(taken[2:], (0.2, 0.5, 0.8, 0.99))))


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.ones(_COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2.0 * _COPY_BYTES / timed(lambda: target.copy_(source)).p50 * 1e3


class Work:
    """Arguments of the three operations on a device: fp16, one draw a frame."""

    def __init__(self, device: str, *, batch: int = BATCH, side: int = SIDE, scores: int = SCORES) -> None:
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (batch, side, side, CHANNELS), dtype=np.uint8)
        outputs = rng.standard_normal((batch, CHANNELS, side, side), dtype=np.float32).astype(np.float16)
        self.outputs = outputs.astype(np.float32)
        self.mu, self.inverse_spread = (rng.random((side, side), dtype=np.float32) + 0.5 for _ in range(2))
        self.votes_of = rng.standard_normal((IMAGES, scores), dtype=np.float32)
        self.thresholds = np.sort(rng.standard_normal(THRESHOLDS, dtype=np.float32))

        def there(array: NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(array.copy()).to(device)

        self._images, self._outputs, self._ids = there(self.images), there(outputs), there(np.zeros(batch, np.int32))
        self._mu, self._inverse_spread = there(self.mu), there(self.inverse_spread)
        self._votes = there(self.votes_of), there(self.thresholds), there(np.zeros(0, np.int64))
        self.inputs = torch.full_like(self._outputs, float("nan"))
        self.scores = torch.full((batch,), float("nan"), device=device)

    def noise(self) -> None:
        from advrad_fast.kernels.noise import noise

        noise(self._images, 1, 1, _C.signal, _C.noise, _C.input_scale, self.inputs, image_ids=self._ids)

    def error(self) -> None:
        from advrad_fast.kernels.reconstruction_error import reconstruction_error

        reconstruction_error(
            self._images, self._outputs, 1, *schedule.error_coefficients(_C), _CONFIG.scale_weights, _CONFIG.filter_size,
            self._mu, self._inverse_spread, None, self.scores, seed=1, signal=_C.signal, noise=_C.noise,
            input_scale=_C.input_scale, image_ids=self._ids,
        )  # fmt: skip

    def votes(self) -> torch.Tensor:
        from advrad_fast.kernels.votes import votes

        counts: torch.Tensor = votes(*self._votes)[0]
        return counts

    def check(self) -> None:
        """Raises InferenceError unless the three give what their C++ twins give."""
        inputs, scores = np.empty_like(self.outputs), np.empty(len(self.images), np.float32)
        _native.noise(self.images, 1, 1, _C.signal, _C.noise, _C.input_scale, inputs)
        _native.reconstruction_error(
            self.images, inputs, self.outputs, 1, *schedule.error_coefficients(_C), _CONFIG.scale_weights, _CONFIG.filter_size,
            self.mu, self.inverse_spread, None, scores,
        )  # fmt: skip
        counts = _native.votes(self.votes_of, self.thresholds, np.zeros(0, np.int64))[0]
        self.noise()
        self.error()
        pairs: dict[str, tuple[torch.Tensor, NDArray[Any]]]
        pairs = {"noise": (self.inputs, inputs), "reconstruction_error": (self.scores, scores), "votes": (self.votes(), counts)}
        for name, (got, wanted) in pairs.items():
            worst = float(np.abs(got.float().cpu().numpy() - wanted).max() / np.abs(wanted).max())
            if not worst <= (0.0 if name == "votes" else BOUND):
                raise InferenceError(f"{name}: differs from its C++ twin by {worst:.3g}: nothing is timed")

    def moved(self) -> dict[str, int]:
        """The least bytes that each has to move."""
        plane, frames, outputs = self.mu.nbytes, self.images.nbytes, self.outputs.nbytes // 2
        maps = plane * len(self.images)  # between the two launches: written, and read again
        return {
            "noise": frames + outputs,
            "reconstruction_error": frames + outputs + 2 * maps + 2 * plane + self.scores.nbytes,
            "votes": self.votes_of.nbytes + IMAGES * THRESHOLDS * 8,
        }


def rows(copy: float, *, device: str = "cuda") -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A row for each kernel, ``peak_share`` being its bytes a second over the copy's; none, with a warning, without Triton.

    The kernels are compiled by the installed Triton for this GPU, as those of ``advrad-fast compile --kernels`` are.

    Raises:
        InferenceError: a kernel differs from its C++ twin; nothing is timed then.
    """
    if importlib.util.find_spec("triton") is None:
        _log.warning("the kernels alone are left out: Triton is not installed")
        return
    work = Work(device)
    work.check()
    calls: dict[str, Callable[[], object]] = {"noise": work.noise, "reconstruction_error": work.error, "votes": work.votes}
    for name, amount in work.moved().items():
        timing = timed(calls[name])
        rate = amount / timing.p50 * 1e3
        shape, batch = ((SCORES, THRESHOLDS), IMAGES) if name == "votes" else ((SIDE, SIDE, CHANNELS), BATCH)
        precision = "fp32" if name == "votes" else "fp16"
        yield row(name, shape, batch, "cuda", precision, timing, peak_share=rate / copy), {"GB_s": round(rate / 1e9, 1)}
