"""How well a detector tells good parts from defective ones on a labelled test set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast.detector import Detector, Inspection
from advrad_fast.errors import ConfigError, DatasetError, SpreadError, expected
from advrad_fast.evaluation import metrics
from advrad_fast.evaluation.datasets import Dataset, Sample, load_mask
from advrad_fast.images import load_image
from advrad_fast.spread import map_tasks

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
    ray: str | None = None,
    setup: Callable[[], Detector] | None = None,
) -> Evaluation:
    """Inspect every test image and compute image AUROC, F1max and, where there are masks, pixel AUROC and AUPRO.

    Args:
        seed: of the noise.
        pixels: whether to compute the pixel figures.
        on_sample: called after each image, with its inspection but for the maps; in the dataset's order, unless with ``ray``.
        ray: the address of a Ray cluster to spread the images over (:mod:`advrad_fast.spread`).
        setup: makes the same detector in a worker; needed with ``ray``.

    Raises:
        DatasetError: the test set has no good or no defective images.
        SpreadError: the cluster can't be used.
    """
    labels = labels_of(dataset)
    make = worker_setup(detector, ray, setup)
    masks: list[NDArray[np.bool_] | None] = []

    def tasks() -> Iterator[_Task]:
        for sample in dataset.test:
            frame = load_image(sample.path)
            shape = (frame.shape[0], frame.shape[1])
            mask = None
            if pixels and (sample.label == 0 or sample.mask is not None):
                mask = _thin(np.zeros(shape, dtype=bool) if sample.mask is None else load_mask(sample.mask, shape))
            masks.append(mask)
            yield _Task(frame, seed, maps=pixels, keep=mask is not None)

    found: dict[int, tuple[Inspection, NDArray[np.float32] | None]] = {}
    for index, measured in map_tasks(_measure, tasks(), setup=make, ray=ray):
        check_backend(detector, measured[0].backend)
        found[index] = measured
        if on_sample is not None:
            on_sample(dataset.test[index], measured[0])
    inspections = [found[index][0] for index in range(len(found))]
    scores = [np.inf if result.score is None else result.score for result in inspections]
    milliseconds = [result.timings["total"] for result in inspections]
    pairs = [(mask, found[index][1]) for index, mask in enumerate(masks)]
    kept_masks = [mask for mask, values in pairs if mask is not None and values is not None]
    maps = [values for mask, values in pairs if mask is not None and values is not None]
    values = np.array(scores, dtype=np.float64)
    low, high = metrics.auroc_interval(labels, _finite(values))
    f1, _ = metrics.f1_max(labels, _finite(values))
    has_masks = any(mask.any() for mask in kept_masks)
    figures: dict[str, Any] = {
        "data": dataset.name,
        "n_good": int((labels == 0).sum()),
        "n_bad": int((labels == 1).sum()),
        "image_auroc": metrics.auroc(labels, _finite(values)),
        "image_auroc_interval": [low, high],
        "f1_max": f1,
        "pixel_auroc": metrics.pixel_auroc(kept_masks, maps) if has_masks else None,
        "aupro": metrics.aupro(kept_masks, maps) if has_masks else None,
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


def worker_setup(detector: Detector, ray: str | None, setup: Callable[[], Detector] | None) -> Callable[[], Detector]:
    """What makes the detector where the work is done: here, ``detector`` itself.

    Raises:
        ConfigError: ``ray`` is given, and no ``setup``.
    """
    if ray is None:
        return lambda: detector
    if setup is None:
        raise ConfigError(expected("setup", "a function that makes the detector in a worker, as ray is given", setup))
    return setup


def check_backend(detector: Detector, backend: str) -> None:
    """Figures are of one backend.

    Raises:
        SpreadError: a worker's was another.
    """
    if backend != detector.backend:
        raise SpreadError(
            f"a worker ran {backend}, where {detector.backend} runs here; name the backend and its precision, so that all run one"
        )


@dataclass(frozen=True)
class _Task:
    """One image to inspect: whether with its map, and whether the map is wanted back."""

    frame: NDArray[np.uint8]
    seed: int
    maps: bool
    keep: bool


def _measure(detector: Detector, task: _Task) -> tuple[Inspection, NDArray[np.float32] | None]:
    """The inspection without its maps, which are large, and with timings that travel; and the map, thinned out."""
    result = detector.inspect(task.frame, maps=task.maps, seed=task.seed)
    values = None
    if task.keep:
        # A part that was not found has nothing marked on it.
        nothing = np.zeros(task.frame.shape[:2], dtype=np.float32)
        values = _thin(nothing if result.anomaly_map is None else result.anomaly_map)
    return replace(result, anomaly_map=None, mask=None, timings=dict(result.timings)), values


def _thin(array: NDArray[Any]) -> NDArray[Any]:
    """Every second, third ... row and column: as few as keep both sides within the limit."""
    step = -(-max(array.shape) // _MAX_MAP_SIDE)
    return array if step == 1 else array[::step, ::step].copy()


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


def labels_of(dataset: Dataset) -> NDArray[np.int64]:
    """The test images' labels, 0 (good) and 1 (bad): int64 (images,).

    Raises:
        DatasetError: the test set has no good or no bad images.
    """
    labels = np.array([s.label for s in dataset.test], dtype=np.int64)
    if not (labels == 0).any() or not (labels == 1).any():
        raise DatasetError(
            f"{dataset.name}: the test set needs good and defective images, got {len(labels) - labels.sum()} and {labels.sum()}"
        )
    return labels


def sample_name(path: Path) -> str:
    """The last two parts of a path: the folder says what kind of defect it is."""
    return "/".join(path.parts[-2:])
