"""How well a detector tells good parts from defective ones on a labelled test set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast.detector import Detector, Inspection
from advrad_fast.errors import DatasetError
from advrad_fast.evaluation import metrics
from advrad_fast.evaluation.datasets import Dataset, Sample, load_mask
from advrad_fast.images import load_image

#: Maps are pooled to at most this side for the pixel metrics, so that camera-size frames fit in memory.
_MAX_MAP_SIDE = 512


@dataclass(frozen=True)
class Evaluation:
    """A test set's figures, and the scores they come from.

    A part that the model can't find (ABSTAIN) is never passed as good: it counts with an infinite score.
    """

    figures: dict[str, Any]
    samples: list[Sample]
    scores: NDArray[np.float64]

    def by_defect(self) -> dict[str, tuple[int, int, float]]:
        """For each kind of defect: how many, how many found at the threshold, and its AUROC against all good parts."""
        labels = np.array([s.label for s in self.samples])
        kinds = np.array([s.defect for s in self.samples])
        rows = {}
        for kind in sorted(set(kinds[labels == 1])):
            chosen = (kinds == kind) | (labels == 0)
            bad = self.scores[kinds == kind]
            rows[str(kind)] = (
                len(bad),
                int((bad > self.figures["threshold"]).sum()),
                metrics.auroc(labels[chosen], _finite(self.scores[chosen])),
            )
        return rows


def evaluate(
    detector: Detector,
    dataset: Dataset,
    *,
    seed: int = 0,
    pixels: bool = True,
    on_sample: Callable[[Sample, Inspection], None] | None = None,
) -> Evaluation:
    """Inspect every test image and compute image AUROC, F1max and, where there are masks, pixel AUROC and AUPRO.

    Args:
        seed: of the noise.
        pixels: whether to compute the pixel figures.
        on_sample: called after each image.

    Raises:
        DatasetError: the test set has no good or no defective images.
    """
    labels = np.array([s.label for s in dataset.test], dtype=np.int64)
    if not (labels == 0).any() or not (labels == 1).any():
        raise DatasetError(
            f"{dataset.name}: the test set needs good and defective images, got {len(labels) - labels.sum()} and {labels.sum()}"
        )
    scores, maps, masks, milliseconds = [], [], [], []
    for sample in dataset.test:
        frame = load_image(sample.path)
        result = detector.inspect(frame, maps=pixels, seed=seed)
        scores.append(np.inf if result.score is None else result.score)
        milliseconds.append(result.timings["total"])
        if pixels and (sample.label == 0 or sample.mask is not None):
            shape = (frame.shape[0], frame.shape[1])
            step = -(-max(shape) // _MAX_MAP_SIDE)
            mask = np.zeros(shape, dtype=bool) if sample.mask is None else load_mask(sample.mask, shape)
            # A part that was not found has nothing marked on it.
            found = np.zeros(shape, dtype=np.float32) if result.anomaly_map is None else result.anomaly_map
            maps.append(found[::step, ::step])
            masks.append(mask[::step, ::step])
        if on_sample is not None:
            on_sample(sample, result)
    values = np.array(scores, dtype=np.float64)
    low, high = metrics.auroc_interval(labels, _finite(values))
    f1, _ = metrics.f1_max(labels, _finite(values))
    has_masks = pixels and any(m.any() for m in masks)
    figures: dict[str, Any] = {
        "data": dataset.name,
        "n_good": int((labels == 0).sum()),
        "n_bad": int((labels == 1).sum()),
        "image_auroc": metrics.auroc(labels, _finite(values)),
        "image_auroc_interval": [low, high],
        "f1_max": f1,
        "pixel_auroc": metrics.pixel_auroc(masks, maps) if has_masks else None,
        "aupro": metrics.aupro(masks, maps) if has_masks else None,
        "robust_auroc": {},
        "certified_auroc": {},
        "threshold": detector.threshold,
        "false_alarms": int((values[labels == 0] > detector.threshold).sum()),
        "defects_found": int((values[labels == 1] > detector.threshold).sum()),
        "abstained": int(np.isinf(values).sum()),
        "seed": seed,
        "backend": detector.backend,
        "p50_ms": float(np.median(milliseconds)),
    }
    return Evaluation(figures, list(dataset.test), values)


def _finite(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """For the metrics, which go by rank: infinity as a number above all scores."""
    return np.minimum(scores, np.finfo(np.float64).max)


def table(evaluation: Evaluation) -> str:
    """The figures as text, for a terminal."""
    f = evaluation.figures

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    low, high = f["image_auroc_interval"]
    lines = [
        f"{f['data']}: {f['n_good']} good, {f['n_bad']} defective; {f['backend']}, seed {f['seed']}, median {f['p50_ms']:.1f} ms",
        f"  image AUROC  {percent(f['image_auroc'])}  (95 % interval {percent(low)} .. {percent(high)})",
        f"  F1max        {percent(f['f1_max'])}",
        f"  pixel AUROC  {percent(f['pixel_auroc'])}",
        f"  AUPRO        {percent(f['aupro'])}",
        f"  at the threshold {f['threshold']:.6g}: {f['defects_found']}/{f['n_bad']} defects found, "
        f"{f['false_alarms']}/{f['n_good']} false alarms, {f['abstained']} abstained",
    ]
    for kind, (count, found, area) in evaluation.by_defect().items():
        lines.append(f"    {kind:24s} {found:3d}/{count:<3d} found, AUROC {percent(area)}")
    return "\n".join(lines)


def sample_name(path: Path) -> str:
    """The last two parts of a path: the folder says what kind of defect it is."""
    return "/".join(path.parts[-2:])
