"""evaluation/metrics.py against brute force: every threshold, every pair, every region."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from advrad_fast.errors import ConfigError, DatasetError
from advrad_fast.evaluation.metrics import aupro, auroc, auroc_interval, f1_max, pixel_auroc, roc_curve

labelled = st.lists(
    st.tuples(st.integers(0, 1), st.one_of(st.integers(0, 5), st.floats(-1e3, 1e3))), min_size=2, max_size=40
).filter(lambda rows: len({label for label, _ in rows}) == 2)


def _arrays(rows: list[tuple[int, float]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    return np.array([label for label, _ in rows]), np.array([score for _, score in rows], dtype=np.float64)


@given(labelled)
def test_auroc_counts_pairs(rows: list[tuple[int, float]]) -> None:
    labels, scores = _arrays(rows)
    pairs = [(b > g) + 0.5 * (b == g) for b, g in itertools.product(scores[labels == 1], scores[labels == 0])]
    assert auroc(labels, scores) == pytest.approx(np.mean(pairs), abs=1e-12)


@given(labelled)
def test_roc_curve(rows: list[tuple[int, float]]) -> None:
    """Its points are the rates of ``score > threshold``; its trapezoids are the AUROC."""
    labels, scores = _arrays(rows)
    fpr, tpr, thresholds = roc_curve(labels, scores)
    for f, t, threshold in zip(fpr, tpr, thresholds, strict=True):
        assert f == np.mean(scores[labels == 0] > threshold)
        assert t == np.mean(scores[labels == 1] > threshold)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(thresholds) < 0).all()
    area = np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2)
    assert area == pytest.approx(auroc(labels, scores), abs=1e-12)


@given(labelled)
def test_f1_max(rows: list[tuple[int, float]]) -> None:
    labels, scores = _arrays(rows)

    def f1(threshold: float) -> float:
        flagged = scores > threshold
        hits = int((flagged & (labels == 1)).sum())
        return 2 * hits / (int(flagged.sum()) + int(labels.sum()))

    best, threshold = f1_max(labels, scores)
    assert np.isfinite(threshold)
    assert best == pytest.approx(f1(threshold), abs=1e-12)
    assert best == pytest.approx(max(f1(t) for t in [-np.inf, *scores]), abs=1e-12)


def test_auroc_by_hand() -> None:
    assert auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == 0.75
    assert auroc([False, True], [1.0, 1.0]) == 0.5
    assert auroc([0, 1], [0, 1]) == 1.0


@pytest.mark.parametrize("metric", [auroc, roc_curve, f1_max, auroc_interval])
@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 0], [1.0, 2.0], "good and bad"),
        ([1, 1], [1.0, 2.0], "good and bad"),
        ([], [], "good and bad"),
        ([0, 2], [1.0, 2.0], "0 \\(good\\) or 1"),
        ([0, 1], [1.0, np.nan], "finite"),
        ([0, 1], [1.0, np.inf], "finite"),
        ([0, 1], [1.0], "\\(n,\\)"),
        ([[0, 1]], [[1.0, 2.0]], "\\(n,\\)"),
    ],
)
def test_bad_input(metric: Callable[..., object], labels: list[int], scores: list[float], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        metric(labels, scores)


def test_interval_is_delongs() -> None:
    """The variance against DeLong's double sums; the interval by its formula."""
    rng = np.random.default_rng(0)
    good, bad = np.round(rng.normal(0, 1, 30), 1), np.round(rng.normal(1, 1, 20), 1)
    kernel = (bad[:, None] > good) + 0.5 * (bad[:, None] == good)
    area, v10, v01 = kernel.mean(), kernel.mean(axis=1), kernel.mean(axis=0)
    variance = np.sum((v10 - area) ** 2) / (19 * 20) + np.sum((v01 - area) ** 2) / (29 * 30)
    reach = 1.959963984540054 * np.sqrt(variance) / (area * (1 - area))
    wanted = [1 / (1 + np.exp(-(np.log(area / (1 - area)) + s * reach))) for s in (-1, 1)]
    labels, scores = np.repeat([0, 1], [30, 20]), np.concatenate([good, bad])
    assert auroc_interval(labels, scores) == pytest.approx(wanted, rel=1e-9)


def test_interval_coverage() -> None:
    """Normals one standard deviation apart: the area is Phi(1 / sqrt 2); 95 % intervals cover it 93 to 98 times in 100."""
    rng, truth, hits = np.random.default_rng(4), 0.7602499389065233, 0
    labels = np.repeat([0, 1], [40, 40])
    for _ in range(1000):
        low, high = auroc_interval(labels, rng.normal(labels, 1.0))
        hits += low <= truth <= high
    assert 930 <= hits <= 980


def test_interval_of_perfect_separation_is_not_a_point() -> None:
    low, high = auroc_interval([0] * 20 + [1] * 60, np.arange(80.0))
    assert (low, high) == pytest.approx((0.025 ** (1 / 20), 1.0), rel=1e-12)
    low, high = auroc_interval([1] * 20 + [0] * 60, np.arange(80.0))
    assert (low, high) == pytest.approx((0.0, 1 - 0.025 ** (1 / 20)), rel=1e-12)


def test_interval_refuses() -> None:
    with pytest.raises(DatasetError, match="at least 2"):
        auroc_interval([0, 0, 1], [1.0, 2.0, 3.0])
    with pytest.raises(ConfigError, match="level"):
        auroc_interval([0, 0, 1, 1], [1.0, 2.0, 3.0, 4.0], level=1.0)


def _segmentation(
    seed: int, n: int = 3, size: tuple[int, int] = (12, 15), levels: int = 0
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Random blobs and maps that see them weakly; ``levels`` > 0 rounds the maps, so that values tie."""
    rng = np.random.default_rng(seed)
    masks = rng.random((n, *size)) < 0.12
    masks[0] = False  # a good image
    maps = rng.random((n, *size)) + 0.7 * masks
    if levels:
        maps = np.round(maps * levels) / levels
    return masks, maps.astype(np.float32)


@pytest.mark.parametrize("levels", [0, 4])
@pytest.mark.parametrize("seed", range(5))
def test_pixel_auroc(seed: int, levels: int) -> None:
    masks, maps = _segmentation(seed, levels=levels)
    assert pixel_auroc(masks, maps) == auroc(masks.ravel(), maps.ravel())
    assert pixel_auroc(list(masks), list(maps)) == pixel_auroc(masks, maps)


def _regions(mask: NDArray[np.bool_]) -> list[list[tuple[int, int]]]:
    """8-connected components by flood fill."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    while left:
        region = [left.pop()]
        for y, x in region:  # grows while it is walked
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            region.extend(near)
        regions.append(region)
    return regions


def _aupro_by_definition(masks: NDArray[np.bool_], maps: NDArray[np.float32], limit: float) -> float:
    """Every threshold, every region, one at a time; then trapezoids cut at the limit."""
    curve = []
    for threshold in [np.inf, *sorted(set(maps.ravel().tolist()), reverse=True)]:
        overlaps = [np.mean([maps[i][p] >= threshold for p in region]) for i in range(len(maps)) for region in _regions(masks[i])]
        curve.append((float(np.mean(maps[~masks] >= threshold)), float(np.mean(overlaps))))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        area += (end - x0) * (y0 + y0 + (y1 - y0) * (end - x0) / (x1 - x0)) / 2
    return area / limit


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("levels", [0, 4])
@pytest.mark.parametrize("seed", range(3))
def test_aupro(seed: int, levels: int, limit: float) -> None:
    masks, maps = _segmentation(seed, levels=levels)
    assert aupro(masks, maps, limit) == pytest.approx(_aupro_by_definition(masks, maps, limit), abs=1e-12)


def test_aupro_extremes() -> None:
    masks = np.zeros((1, 8, 8), dtype=np.bool_)
    masks[0, 2:4, 2:4] = True
    assert aupro(masks, masks.astype(np.float32)) == 1.0
    assert aupro(masks, 1.0 - masks.astype(np.float32)) == 0.0
    # All values equal: one diagonal, of which the part up to 0.3 has the mean height 0.15.
    assert aupro(masks, np.zeros((1, 8, 8), dtype=np.float32)) == pytest.approx(0.15)


def test_aupro_joins_diagonal_neighbours_and_weighs_regions_alike() -> None:
    """Two diagonal pixels are one region: found, at no false alarm, it is half the score beside a large one that is missed."""
    masks = np.zeros((1, 16, 16), dtype=np.bool_)
    masks[0, 0, 0] = masks[0, 1, 1] = True
    masks[0, 6:12, 6:12] = True
    maps = np.full((1, 16, 16), 0.5)
    maps[0, 0, 0] = maps[0, 1, 1] = 1.0
    maps[0, 6:12, 6:12] = 0.0
    assert aupro(masks, maps) == pytest.approx(0.5)


@pytest.mark.parametrize("metric", [pixel_auroc, aupro])
def test_sizes_may_differ_between_images(metric: Callable[..., float]) -> None:
    a, b = _segmentation(1, size=(8, 8)), _segmentation(2, size=(5, 9))
    assert 0.0 < metric([*a[0], *b[0]], [*a[1], *b[1]]) < 1.0


@pytest.mark.parametrize("metric", [pixel_auroc, aupro])
def test_bad_pixels(metric: Callable[..., float]) -> None:
    masks, maps = _segmentation(0)
    broken = maps.copy()
    broken[1, 2, 3] = np.nan
    for bad_masks, bad_maps, message in [
        (masks, maps[:2], "as many"),
        (masks[:0], maps[:0], "as many"),
        (masks, maps[:, :-1], "maps\\[0\\]"),
        (masks.astype(np.uint8), maps, "masks\\[0\\]"),
        (masks, (maps * 255).astype(np.uint8), "maps\\[0\\]"),
        (masks, broken, "maps\\[1\\]: expected finite"),
        (np.zeros_like(masks), maps, "good"),
        (np.ones_like(masks), maps, "good"),
    ]:
        with pytest.raises(DatasetError, match=message):
            metric(bad_masks, bad_maps)


@pytest.mark.parametrize("limit", [0.0, -1.0, 1.1, np.nan])
def test_bad_limit(limit: float) -> None:
    with pytest.raises(ConfigError, match="limit"):
        aupro(*_segmentation(0), limit)


def test_inputs_are_left_alone() -> None:
    masks, maps = _segmentation(0)
    before = maps.copy()
    pixel_auroc(masks, maps)
    aupro(masks, maps)
    np.testing.assert_array_equal(maps, before)
