"""``inspect`` on the cpu backend against the reference backend: parity first, then the ratio of latencies in one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast.backends.cpu_network import has_int8, precisions
from advrad_fast.bench.timing import alternate, row
from advrad_fast.detector import Detector
from advrad_fast.errors import InferenceError
from advrad_fast.model import ModelFile

Frames = Mapping[str, NDArray[np.uint8]]

#: Worst difference allowed of a score, by precision of the cpu backend, as a share of the score or the threshold.
BOUNDS = {"fp32": 1e-3, "bf16": 5e-2, "int8": 0.25}
BATCHES = (1, 16)


def drawn_frames(height: int, width: int, channels: int) -> dict[str, NDArray[np.uint8]]:
    """Black, white, saturated and noise frames: uint8 (H, W, C)."""
    shape = (height, width, channels)
    rng = np.random.default_rng(0)
    return {
        "black": np.zeros(shape, np.uint8),
        "white": np.full(shape, 255, np.uint8),
        "saturated": np.where(np.indices(shape).sum(axis=0) // 32 % 2, 255, 0).astype(np.uint8),
        "noise": rng.integers(0, 256, shape, dtype=np.uint8),
    }


@dataclass(frozen=True)
class Parity:
    """How far a backend is from the reference over some frames.

    Attributes:
        score_worst, score_p99: differences of scores, as a share of the score or the threshold, whichever is larger.
        map_p999_worst: of the maps' 99.9 % quantiles, in the same units.
        flips: outcomes that differ although the score is further from the threshold than the backends are apart.
    """

    score_worst: float
    score_p99: float
    map_p999_worst: float
    flips: int


def parity(detector: Detector, reference: Detector, frames: Frames) -> Parity:
    """Compare two backends of one model."""
    scores, tails, flips = [0.0], [0.0], 0
    for frame in frames.values():
        a, b = detector.inspect(frame), reference.inspect(frame)
        if a.score is None or b.score is None or a.anomaly_map is None or b.anomaly_map is None:
            flips += a.outcome != b.outcome  # no score: the part was not found
            continue
        unit = max(abs(b.score), reference.threshold)
        scores.append(abs(a.score - b.score) / unit)
        tails.append(float(abs(np.quantile(a.anomaly_map, 0.999) - np.quantile(b.anomaly_map, 0.999))) / unit)
        flips += a.outcome != b.outcome and abs(b.score - b.threshold) > scores[-1] * unit
    return Parity(max(scores), float(np.quantile(scores, 0.99)), max(tails), int(flips))


def rows(
    name: str,
    model: ModelFile,
    frames: Frames,
    *,
    seconds: float = 5.0,
    threads: int | None = None,
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of one model on frames, each with the parity that was found and the median milliseconds of every stage.

    int8 is among them where ``advrad-fast compile`` has put it into the cache.

    Raises:
        InferenceError: a backend breaks its bound: nothing is timed then.
    """
    image = model.config.image
    shape = (image.height, image.width, image.channels)
    reference = Detector(model, backend="reference")
    checked = {**drawn_frames(*shape), **frames}
    timed = list(frames.values()) or [checked["noise"]]
    for precision in (*precisions(), *(["int8"] if has_int8(model.config, model.weights) else [])):
        detector = Detector(model, backend="cpu", precision=precision, threads=threads)
        found = parity(detector, reference, checked)
        if found.score_worst > BOUNDS[precision] or found.flips:
            raise InferenceError(f"{name}, {precision}: {found} breaks the bound {BOUNDS[precision]}: nothing is timed")
        for batch in BATCHES:
            sets = [[timed[(start + i) % len(timed)] for i in range(batch)] for start in range(len(timed))]
            turn = [0]
            stages: list[dict[str, float]] = []

            def ours(sets: Any = sets, turn: Any = turn, stages: Any = stages, detector: Detector = detector) -> None:
                turn[0] = (turn[0] + 1) % len(sets)
                results = detector.inspect_batch(sets[turn[0]])
                stages.append({k: sum(r.timings.get(k, 0.0) for r in results) for k in results[0].timings})

            def theirs(sets: Any = sets, turn: Any = turn) -> None:
                reference.inspect_batch(sets[turn[0]])

            timings = alternate({"cpu": ours, "reference": theirs}, seconds=seconds)
            medians = {k: round(float(np.median([s[k] for s in stages])), 3) for k in stages[0]}
            result = row(f"inspect {name}", shape, batch, "cpu", precision, timings["cpu"], eager=timings["reference"])
            yield result, {"parity": asdict(found), "stages_ms": medians}
