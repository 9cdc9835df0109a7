"""Detection and segmentation metrics, exact: every distinct score is a threshold, ties count as ties (NumPy, SciPy).

As everywhere in this package, a score strictly above the threshold is a defect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from advrad_fast.checks import array, finite, floats, share
from advrad_fast.errors import ConfigError, DatasetError, expected

Masks = Sequence[NDArray[np.bool_]] | NDArray[np.bool_]
Maps = Sequence[NDArray[np.floating]] | NDArray[np.floating]


class RocCurve(NamedTuple):
    """Points of the curve, from (0, 0) to (1, 1): float64 (k,) each; ``thresholds`` falls, and ends at -inf."""

    fpr: NDArray[np.float64]
    tpr: NDArray[np.float64]
    thresholds: NDArray[np.float64]


def auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """The area under the ROC curve: P[bad scores above good] + P[tie] / 2 (Mann-Whitney), in [0, 1].

    Args:
        labels: (n,) of 0 (good) and 1 (bad).
        scores: (n,), finite.

    Raises:
        DatasetError: a class is missing, a label is not 0 or 1, a score is not finite, or the lengths differ.
    """
    good, bad = _split(labels, scores)
    return _mann_whitney(good, bad)


def auroc_interval(labels: ArrayLike, scores: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """A confidence interval for :func:`auroc` over the draw of the images.

    DeLong's variance (DeLong et al. 1988) on the logit scale, which keeps it in [0, 1].  Where all bad images score above
    all good ones that variance is 0: there the interval is Clopper and Pearson's for min(n_good, n_bad) disjoint pairs, all
    in order, which is exact and wide.

    Args:
        level: in (0, 1).

    Raises:
        DatasetError: as :func:`auroc`, and if a class has fewer than two images.
        ConfigError: ``level`` is not in (0, 1).
    """
    from scipy.special import expit, logit, ndtri

    level = share("level", level)
    good, bad = _split(labels, scores)
    if min(good.size, bad.size) < 2:
        raise DatasetError(expected("labels", "at least 2 images of each class", (good.size, bad.size)))
    area = _mann_whitney(good, bad)
    tail = (1.0 - level) / 2.0
    if area in (0.0, 1.0):
        worst = tail ** (1.0 / min(good.size, bad.size))
        return (worst, 1.0) if area == 1.0 else (0.0, 1.0 - worst)
    variance = _placements(good, bad).var(ddof=1) / bad.size + _placements(bad, good).var(ddof=1) / good.size
    reach = -ndtri(tail) * math.sqrt(variance) / (area * (1.0 - area))
    low, high = expit(logit(area) + np.array([-reach, reach]))
    return float(low), float(high)


def roc_curve(labels: ArrayLike, scores: ArrayLike) -> RocCurve:
    """False and true positive rates of ``score > threshold`` at every distinct score, and below all of them.

    Raises:
        DatasetError: as :func:`auroc`.
    """
    good, bad = _split(labels, scores)
    values = np.unique(np.concatenate([good, bad]))
    thresholds = np.concatenate([values[::-1], [-np.inf]])
    return RocCurve(_above(good, thresholds) / good.size, _above(bad, thresholds) / bad.size, thresholds)


def f1_max(labels: ArrayLike, scores: ArrayLike) -> tuple[float, float]:
    """The largest F1 over all thresholds, and the largest finite threshold that attains it.

    It is chosen on the labels it is measured on: an upper bound for what a threshold set beforehand gets.

    Raises:
        DatasetError: as :func:`auroc`.
    """
    good, bad = _split(labels, scores)
    values = np.unique(np.concatenate([good, bad]))
    thresholds = np.concatenate([values[::-1], [np.nextafter(values[0], -np.inf)]])
    hits, alarms = _above(bad, thresholds), _above(good, thresholds)
    f1 = 2.0 * hits / (hits + alarms + bad.size)
    best = int(np.argmax(f1))
    return float(f1[best]), float(thresholds[best])


def pixel_auroc(masks: Masks, maps: Maps) -> float:
    """:func:`auroc` over all pixels of all images, exact.

    The good pixels are sorted once, in place, in the maps' dtype; the bad ones, which are few, are looked up in them.  100
    float32 maps of 256 x 256 take about 30 MB on top of the maps (:func:`aupro`: about 150 MB).

    Args:
        masks: n arrays bool (H, W); True is defect.
        maps: n arrays (H, W) of the same sizes, finite.

    Raises:
        DatasetError: nothing but good, or nothing but bad, pixels; sizes or types differ; a value is not finite.
    """
    pairs = _pairs(masks, maps)
    good = np.concatenate([values[~mask] for mask, values in pairs])
    bad = np.concatenate([values[mask] for mask, values in pairs])
    if not good.size or not bad.size:
        raise DatasetError(expected("masks", "good and bad pixels", f"{good.size} good, {bad.size} bad"))
    good.sort()
    bad.sort()
    return _mann_whitney(good, bad)


def aupro(masks: Masks, maps: Maps, limit: float = 0.3) -> float:
    """The area under the per-region-overlap curve up to a false positive rate, over that rate; in [0, 1], exact.

    Bergmann et al. (IJCV 2021, 10.1007/s11263-020-01400-4, section 5.2): at each threshold, the share of every defect region
    (8-connected component of a mask) that is above it, averaged over regions, against the share of good pixels, over all
    images, that is above it; trapezoids between distinct values, interpolated at ``limit``.

    Args:
        masks, maps: as :func:`pixel_auroc`.
        limit: the largest false positive rate, in (0, 1].

    Raises:
        DatasetError: as :func:`pixel_auroc`.
        ConfigError: ``limit`` is not in (0, 1].
    """
    from scipy.ndimage import label

    limit = finite("limit", limit)
    if not 0.0 < limit <= 1.0:
        raise ConfigError(expected("limit", "a number in (0, 1]", limit))
    pairs = _pairs(masks, maps)
    values, shares, regions = [], [], 0
    for mask, scores in pairs:
        components, count = label(mask, structure=np.ones((3, 3)))
        inside = components[mask]
        values.append(scores[mask])
        shares.append(1.0 / np.bincount(inside, minlength=count + 1)[inside])  # a pixel's share of its region
        regions += count
    good = np.concatenate([scores[~mask] for mask, scores in pairs])
    if not regions or not good.size:
        raise DatasetError(expected("masks", "defect regions and good pixels", f"{regions} regions, {good.size} good pixels"))
    bad = np.concatenate(values)
    order = np.argsort(bad)
    bad = bad[order]
    below = np.concatenate([[0.0], np.cumsum(np.concatenate(shares)[order])]) / regions

    # The false positive rate moves at distinct values of good pixels only, so those are all the trapezoids there are.
    good.sort()
    crossing = good[good.size - max(1, math.ceil(limit * good.size))]  # here the rate gets to the limit
    top = good[np.searchsorted(good, crossing, side="left") :]
    first = np.flatnonzero(np.concatenate([[True], top[1:] != top[:-1]]))
    fpr_above = (top.size - np.append(first[1:], top.size)) / good.size  # above each distinct value ...
    fpr_from = (top.size - first) / good.size  # ... and from it upwards
    pro_above = below[-1] - below[np.searchsorted(bad, top[first], side="right")]
    pro_from = below[-1] - below[np.searchsorted(bad, top[first], side="left")]
    width = fpr_from - fpr_above
    part = np.clip((limit - fpr_above) / width, 0.0, 1.0)  # 1 below the limit, 0 beyond it, a fraction across it
    area = np.sum(part * width * (pro_above + 0.5 * part * (pro_from - pro_above)))
    return float(np.clip(area / limit, 0.0, 1.0))


def _mann_whitney(good: NDArray[np.floating], bad: NDArray[np.floating]) -> float:
    """P[bad > good] + P[bad == good] / 2; both sorted.  The counts are integers: exact but for the last division."""
    twice = int(np.searchsorted(good, bad, side="left").sum()) + int(np.searchsorted(good, bad, side="right").sum())
    return twice / (2 * good.size * bad.size)


def _placements(others: NDArray[np.float64], own: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each of ``own``, the share of ``others`` (sorted) below it, ties half."""
    twice = np.searchsorted(others, own, side="left") + np.searchsorted(others, own, side="right")
    return np.asarray(twice / (2.0 * others.size))


def _above(sorted_scores: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.intp]:
    return sorted_scores.size - np.searchsorted(sorted_scores, thresholds, side="right")


def _split(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The scores of the good and of the bad, each sorted."""
    marks, values = array("labels", labels, DatasetError), floats("scores", scores, DatasetError)
    if marks.ndim != 1 or marks.shape != values.shape:
        raise DatasetError(expected("labels and scores", "(n,) both", (marks.shape, values.shape)))
    if not np.isin(marks, (0, 1)).all():
        raise DatasetError(expected("labels", "0 (good) or 1 (bad)", np.unique(marks)[:8].tolist()))
    if not np.isfinite(values).all():
        raise DatasetError(expected("scores", "finite values", float(values[~np.isfinite(values)][0])))
    bad = marks == 1
    if bad.all() or not bad.any():
        raise DatasetError(expected("labels", "good and bad images", f"{bad.size - bad.sum()} good, {bad.sum()} bad"))
    return np.sort(values[~bad]), np.sort(values[bad])


def _pairs(masks: Masks, maps: Maps) -> list[tuple[NDArray[np.bool_], NDArray[np.floating]]]:
    for name, given in (("masks", masks), ("maps", maps)):
        if not isinstance(given, Sequence | np.ndarray) or getattr(given, "ndim", 1) == 0 or isinstance(given, str | bytes):
            raise DatasetError(expected(name, "a sequence of arrays", type(given)))
    if len(masks) != len(maps) or len(masks) == 0:
        raise DatasetError(expected("masks and maps", "as many of one as of the other, at least 1", (len(masks), len(maps))))
    pairs = []
    for i, (mask, values) in enumerate(zip(masks, maps, strict=True)):
        mask, values = array(f"masks[{i}]", mask, DatasetError), array(f"maps[{i}]", values, DatasetError)
        if mask.dtype != np.bool_ or mask.ndim != 2:
            raise DatasetError(expected(f"masks[{i}]", "bool (H, W)", f"{mask.dtype} {mask.shape}"))
        if not np.issubdtype(values.dtype, np.floating) or values.shape != mask.shape:
            raise DatasetError(expected(f"maps[{i}]", f"floating point {mask.shape}", f"{values.dtype} {values.shape}"))
        if not np.isfinite(values).all():
            raise DatasetError(expected(f"maps[{i}]", "finite values", f"{np.count_nonzero(~np.isfinite(values))} that are not"))
        pairs.append((mask, values))
    return pairs
