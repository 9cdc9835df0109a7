"""Laying an elongated part level, thick end left, before anything looks at it.

A part that lies at any angle makes a normal map over positions meaningless.  Where the normals show one elongated
part on a plain background, :func:`fit_pose` measures a rule (:class:`advrad_fast.config.PoseConfig`) and
:func:`align` applies it: threshold against the background, largest component, principal axis, crop.  Where what it finds is not
beyond doubt the part, :mod:`advrad_fast.template` looks for the part's outline; a part that is not found, or that could be in two
places, is a PartNotFoundError.

Coordinates are ``(x, y)`` with pixel centres at integers.  An ``Affine`` maps the output's to the source's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from advrad_fast import template
from advrad_fast.checks import integer
from advrad_fast.config import MAX_SIDE, PoseConfig
from advrad_fast.errors import ConfigError, ImageError, PartNotFoundError, expected

#: (2, 3) float64: ``source_xy = affine[:, :2] @ output_xy + affine[:, 2]``.
Affine: TypeAlias = NDArray[np.float64]

_WORK_SIDE = 256  # the silhouette is measured on the frame reduced to at least this shorter side
_BLOCKS = 32  # blocks along the shorter side in which a component holds together
_MIN_PIXELS = 16  # of the reduced frame
_END = 0.25  # the share of the length that counts as an end when the two are compared
_TAIL = 0.001  # the share of the area beyond each end of the extent: a stray pixel moves nothing
_MIN_IMAGES = 3
_SCAN_IMAGES = 64  # frames on which thresholds are compared
_RATIOS = tuple(round(0.6 + 0.1 * i, 1) for i in range(13))  # thresholds compared, over Otsu's
_MIN_CONTRAST = 4.0  # grey levels
_MIN_ELONGATION = 2.0  # length over mean width; a square has 1
_MIN_END_RATIO = 1.1  # thick end over thin end
_MAX_SCATTER = 0.5  # (largest - smallest) / median, of length and area over the normals
_MIN_SEPARATION = 0.6  # Otsu: between-class variance over total variance
_MAX_BUSY_BORDER = 0.05  # share of border pixels that stand out from the background
_MAX_SECOND = 0.2  # area of the second largest component over the largest's
_MIN_FIT = 0.85  # the least worth of a part, over the least of the normals
_LEAST_FIT = 0.2  # of every normal, for the outline to be used
_TRUSTED = 0.1  # share of the normals whose silhouettes are worth too little to be the part and nothing else beyond doubt
_RIVAL = 0.92  # worth over the best's from which another pose leaves the part's place open
_MAX_ASPECT = 8  # longer strips are not searched, which would take memory in proportion
_MAX_OUTSIDE = 0.02  # share of the part beyond the frame's edge


class _Part(NamedTuple):
    """A silhouette in source pixels: its centre, the unit vector from thick to thin end, its measures."""

    centre: NDArray[np.float64]
    axis: NDArray[np.float64]
    length: float
    width: float  # twice the largest distance from the axis
    area: float
    side: float  # the frame's shorter side
    end_ratio: float
    touches_border: bool
    second_area: float
    points: NDArray[np.float64]  # (2, n) along and across the axis, from the centre


def fit_pose(images: Sequence[NDArray[np.uint8]]) -> PoseConfig:
    """Measure the pose rule on good parts.

    Args:
        images: at least 3 uint8 (H, W, C) frames, C = 1 or 3, each with the whole part in view.

    Raises:
        ConfigError: when not every frame shows one elongated part, with a thick and a thin end, on a plain
            background; says which frame and why.
        ImageError: an image is not uint8 (H, W, 1 or 3).
    """
    if not isinstance(images, Sequence | np.ndarray) or getattr(images, "ndim", 1) == 0:
        raise ImageError(expected("images", "a sequence of frames", type(images)))
    if len(images) < _MIN_IMAGES:
        raise ConfigError(expected("images", f"at least {_MIN_IMAGES} good frames to fit a pose rule", len(images)))
    works = [_work(image, f"images[{i}]") for i, image in enumerate(images)]
    signed = [_background(grey) - grey for grey, _ in works]
    otsu = [_otsu(np.abs(s)) for s in signed]
    for i, (_, separation) in enumerate(otsu):
        if separation < _MIN_SEPARATION:
            raise _no_pose(i, f"nothing stands out from the background (separation {separation:.2f}, needs {_MIN_SEPARATION})")
    middle = float(np.median([t for t, _ in otsu]))
    dark = sum(int(np.count_nonzero(s >= middle)) for s in signed)
    light = sum(int(np.count_nonzero(s <= -middle)) for s in signed)
    dark_part = dark >= light
    contrasts = signed if dark_part else [-s for s in signed]
    factors = [factor for _, factor in works]
    threshold = _steadiest_threshold(contrasts, factors, middle)
    if threshold < _MIN_CONTRAST:
        raise ConfigError(f"pose: the part stands out from its background by {threshold:.0f} of 255 grey levels only")

    lengths, areas, widths, profiles, poses = [], [], [], [], []
    for i, (contrast, factor) in enumerate(zip(contrasts, factors, strict=True)):
        busy = float(np.mean(np.abs(_border(contrast)) >= threshold))
        if busy > _MAX_BUSY_BORDER:
            raise _no_pose(i, f"the background is not plain: {busy:.0%} of the frame's border stands out")
        try:
            part = _find(contrast, threshold, factor)
        except PartNotFoundError as error:
            raise _no_pose(i, str(error)) from None
        if part.touches_border:
            raise _no_pose(i, "the part is cut off by the frame's edge")
        if part.second_area > _MAX_SECOND * part.area:
            raise _no_pose(i, "more than one part is in view")
        elongation = part.length**2 / part.area
        if elongation < _MIN_ELONGATION:
            raise _no_pose(i, f"the part is not elongated: {elongation:.1f} times as long as wide, needs {_MIN_ELONGATION}")
        if part.end_ratio < _MIN_END_RATIO:
            raise _no_pose(i, f"the ends are alike: one is {part.end_ratio:.2f} times as thick, needs {_MIN_END_RATIO}")
        side = float(min(images[i].shape[:2]))
        lengths.append(part.length / side)
        areas.append(part.area / side**2)
        widths.append(part.width / side)
        along, across = part.points / factor
        profiles.append(template.measure_profile(along, across, part.length / factor) * factor / side)
        poses.append(_pose_of(part, factor))
    for name, values in (("length", lengths), ("area", areas)):
        scatter = (max(values) - min(values)) / float(np.median(values))
        if scatter > _MAX_SCATTER:
            raise ConfigError(
                f"pose: the part's {name} differs by {scatter:.0%} between normals, at most {_MAX_SCATTER:.0%} is allowed"
            )
    rule = PoseConfig(
        dark_part=dark_part,
        min_contrast=round(threshold / 255.0, 4),
        length=round(float(np.median(lengths)), 4),
        # Wide: a broken or bent part is a defect to be scored, not a frame to be refused.
        min_length=round(0.5 * min(lengths), 4),
        max_length=round(1.5 * max(lengths), 4),
        min_area=round(0.4 * min(areas), 5),
        max_area=round(2.0 * max(areas), 5),
        crop_length=round(1.08 * max(lengths), 4),
        crop_width=round(1.2 * max(widths), 4),
        profile=tuple(np.median(profiles, axis=0).ravel().round(4).tolist()),
    )
    fits = [
        template.worth(template.local_contrast(grey, rule), rule, *pose) for (grey, _), pose in zip(works, poses, strict=True)
    ]
    if min(fits) < _LEAST_FIT:  # parts too unlike one another for one outline to tell them from clutter
        return dataclasses.replace(rule, profile=())
    plain = [template.worth(_clipped(c, rule), rule, *pose) for c, pose in zip(contrasts, poses, strict=True)]
    return dataclasses.replace(
        rule,
        min_fit=round(_MIN_FIT * min(fits), 4),
        trusted_fit=round(max(0.0, float(np.quantile(plain, _TRUSTED))), 4),
    )


def align(image: NDArray[np.uint8], rule: PoseConfig, height: int, width: int) -> tuple[NDArray[np.uint8], Affine]:
    """Lay the part level, thick end left, in the middle of a (height, width) image.

    The scale is the rule's, not the part's, and equal in both directions: the window holds at least
    ``crop_length`` x ``crop_width``.  What lies outside the frame gets the background's level.

    Args:
        image: uint8 (H, W, C), C = 1 or 3.
        rule: from :func:`fit_pose`.
        height, width: of the result, pixels, in [1, 4096].

    Returns:
        The uint8 (height, width, C) image and the affine from its pixels to the frame's.

    Raises:
        PartNotFoundError: nothing stands out that has the part's size, or its outline where other things are in view; the outline
            fits in two places; or the part is cut off by the frame's edge.
        ImageError: ``image`` is not uint8 (H, W, 1 or 3).
        ConfigError: ``height`` or ``width`` is out of range.
    """
    from PIL import Image

    height, width = integer("height", height, 1, MAX_SIDE), integer("width", width, 1, MAX_SIDE)
    centre, direction = _locate(image, rule)
    side = float(min(image.shape[:2]))
    step = side * max(rule.crop_length / width, rule.crop_width / height)  # source pixels an output pixel
    axis = step * direction
    linear = np.array([[axis[0], -axis[1]], [axis[1], axis[0]]])
    affine = np.column_stack([linear, centre - linear @ [(width - 1) / 2, (height - 1) / 2]])

    source = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    factor = max(1, math.floor(step))
    if factor > 1:  # Image.transform does not antialias
        source = source.reduce(factor)
    reduced = affine / factor
    reduced[:, 2] += 0.5 / factor - 0.5
    fill = tuple(round(_background(image[:, :, c])) for c in range(image.shape[2]))
    out = source.transform(
        (width, height),
        Image.Transform.AFFINE,
        _pillow(reduced),
        Image.Resampling.BICUBIC,
        fillcolor=fill if len(fill) > 1 else fill[0],
    )
    return np.array(out, dtype=np.uint8).reshape(height, width, image.shape[2]), affine


def _locate(image: NDArray[np.uint8], rule: PoseConfig) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The part's centre in pixels of the image, and the unit vector from its thick to its thin end.

    The largest silhouette where it is the part and nothing else; else what fits the outline best, if one place does.
    """
    grey, factor = _work(image, "image")
    contrast = _background(grey) - grey
    contrast = contrast if rule.dark_part else -contrast
    part, why = None, PartNotFoundError("pose: nothing has the part's outline")
    try:
        part = _find(contrast, rule.min_contrast * 255.0, factor)
        side = float(min(image.shape[:2]))
        _within("length", part.length / side, rule.min_length, rule.max_length)
        _within("area", part.area / side**2, rule.min_area, rule.max_area)
        if part.touches_border:
            raise PartNotFoundError("pose: the part is cut off by the frame's edge")
    except PartNotFoundError as error:
        part, why = None, error
    if not rule.profile or max(grey.shape) > _MAX_ASPECT * min(grey.shape):
        if part is None:
            raise why
        return part.centre, part.axis
    alone = part is not None and part.second_area <= _MAX_SECOND * part.area
    if part is not None and alone:
        worth = template.worth(_clipped(contrast, rule), rule, *_pose_of(part, factor))
        if worth >= rule.trusted_fit:
            return part.centre, part.axis
    poses = template.search(template.local_contrast(grey, rule), rule)
    best, length = poses[0], rule.length * min(grey.shape)
    if best.worth < rule.min_fit:
        plain = float(np.mean(np.abs(_border(contrast)) >= rule.min_contrast * 255.0)) <= _MAX_BUSY_BORDER
        if part is not None and alone and plain:
            return part.centre, part.axis  # alone before its background: a part, if a badly broken one
        raise why
    rivals = [p for p in poses[1:] if p.worth >= max(rule.min_fit, _RIVAL * best.worth) and not template.same(p, best, length)]
    if rivals:
        raise PartNotFoundError(
            f"pose: the part's outline fits in two places or ways: {best.worth:.2f} and {rivals[0].worth:.2f}"
        )
    if template.outside(rule, grey.shape, best) > _MAX_OUTSIDE:
        raise PartNotFoundError("pose: the part is cut off by the frame's edge")
    centre = np.array([best.x + 0.5, best.y + 0.5]) * factor - 0.5
    return centre, np.array([math.cos(best.angle), math.sin(best.angle)])


def _pose_of(part: _Part, factor: int) -> tuple[float, float, float]:
    """x, y, angle of a silhouette in pixels of the reduced frame."""
    x, y = (part.centre + 0.5) / factor - 0.5
    return float(x), float(y), math.atan2(part.axis[1], part.axis[0])


def _clipped(contrast: NDArray[np.float32], rule: PoseConfig) -> NDArray[np.float32]:
    clipped: NDArray[np.float32] = np.clip(contrast / np.float32(255.0 * rule.min_contrast), 0.0, 1.0)
    return clipped


def warp_back(values: NDArray[np.float32], affine: Affine, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Put an aligned map back in its frame: bilinear, zero outside the window.

    Args:
        values: float32 (h, w), in the coordinates of :func:`align`'s result.
        affine: from :func:`align`.
        shape: (H, W) of the frame.

    Returns:
        float32 (H, W).
    """
    from PIL import Image

    inverse = np.linalg.inv(affine[:, :2])
    back = np.column_stack([inverse, -inverse @ affine[:, 2]])
    source = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    out = source.transform((shape[1], shape[0]), Image.Transform.AFFINE, _pillow(back), Image.Resampling.BILINEAR)
    return np.array(out, dtype=np.float32)


def _pillow(affine: Affine) -> tuple[float, ...]:
    """Pillow's coefficients, which count from pixel corners."""
    shift = affine[:, 2] + 0.5 - 0.5 * affine[:, :2].sum(axis=1)
    return tuple(float(v) for v in np.column_stack([affine[:, :2], shift]).ravel())


def _steadiest_threshold(contrasts: Sequence[NDArray[np.float32]], factors: Sequence[int], middle: float) -> float:
    """The threshold around Otsu's at which length and area scatter least.

    Shadows widen a silhouette below it and highlights eat it above; both vary with the part's place in the frame.
    """
    every = max(1, len(contrasts) // _SCAN_IMAGES)
    scatter: dict[float, float] = {}
    for ratio in _RATIOS:
        try:
            parts = [_find(c, ratio * middle, f) for c, f in zip(contrasts[::every], factors[::every], strict=True)]
        except PartNotFoundError:
            continue
        measures = np.array([(p.length / p.side, p.area / p.side**2) for p in parts])
        scatter[ratio] = float((measures.std(axis=0) / measures.mean(axis=0)).sum())
    if not scatter:
        return middle
    limit = 1.25 * min(scatter.values()) + 0.005
    return middle * min((r for r, s in scatter.items() if s <= limit), key=lambda r: abs(r - 1.0))


def _no_pose(index: int, why: str) -> ConfigError:
    return ConfigError(
        f"pose: images[{index}] does not show one elongated part on a plain background: {why.removeprefix('pose: ')}"
    )


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise PartNotFoundError(
            f"pose: the {name} of what was found is {value:.4g} of the frame's side, the part's is {low:g} to {high:g}"
        )


def _work(image: NDArray[np.uint8], name: str) -> tuple[NDArray[np.float32], int]:
    """The frame in grey (float32 (h, w), 0 to 255), reduced by the integer factor that is returned with it."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        got = (image.dtype, image.shape) if isinstance(image, np.ndarray) else type(image)
        raise ImageError(expected(name, "a uint8 (H, W, 1 or 3) array", got))
    if min(image.shape[:2]) < 8:
        raise ImageError(expected(name, "at least 8 x 8 pixels to find a part in", image.shape))
    from PIL import Image

    grey = Image.fromarray(image[:, :, 0]) if image.shape[2] == 1 else Image.fromarray(image).convert("L")
    factor = max(1, min(image.shape[:2]) // _WORK_SIDE)
    if factor > 1:
        # Cut to whole blocks, so that every reduced pixel stands for as many.
        h, w = (n // factor * factor for n in image.shape[:2])
        grey = grey.reduce(factor, box=(0, 0, w, h))
    return np.asarray(grey, dtype=np.float32), factor


def _border(grey: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]])


def _background(grey: NDArray[Any]) -> float:
    """The median grey level of the frame's border pixels."""
    return float(np.median(_border(grey)))


def _otsu(values: NDArray[np.float32]) -> tuple[float, float]:
    """Otsu's threshold of values in [0, 255] and the share of their variance that it explains."""
    counts = np.bincount(values.astype(np.uint8).ravel(), minlength=256).astype(np.float64)
    levels = np.arange(256.0)
    below, moment = np.cumsum(counts), np.cumsum(counts * levels)
    total, mean = below[-1], moment[-1] / below[-1]
    variance = float((counts * (levels - mean) ** 2).sum() / total)
    inside = (below > 0) & (below < total)
    between = np.where(inside, (mean * below - moment) ** 2 / np.where(inside, below * (total - below), 1.0), 0.0)
    # Between two far classes the criterion is flat: its middle, not its first point, is the threshold.
    best = float(np.mean(np.flatnonzero(between >= between.max() * (1 - 1e-9)))) + 1.0
    return best, 0.0 if variance == 0.0 else float(between.max() / variance)


def _find(contrast: NDArray[np.float32], threshold: float, factor: int) -> _Part:
    """The largest component of ``contrast >= threshold``, holes filled, measured in source pixels."""
    from scipy import ndimage

    mask = contrast >= threshold
    h, w = mask.shape
    # Components of blocks, not of pixels: a bright scratch across the part must not cut it in two.
    block = max(1, min(h, w) // _BLOCKS)
    coarse = np.pad(mask, ((0, -h % block), (0, -w % block)))
    coarse = coarse.reshape(coarse.shape[0] // block, block, -1, block).sum(axis=(1, 3), dtype=np.int64)
    labels, count = ndimage.label(coarse > 0, structure=np.ones((3, 3)))
    if count == 0:
        raise PartNotFoundError("pose: nothing stands out from the background")
    sizes = np.bincount(labels.ravel(), weights=coarse.ravel())[1:]
    index = int(np.argmax(sizes))
    if sizes[index] < _MIN_PIXELS:
        raise PartNotFoundError(f"pose: the largest thing that stands out has {sizes[index] * factor**2:.0f} pixels")
    second = float(np.partition(sizes, -2)[-2]) if count > 1 else 0.0
    rows, cols = (slice(s.start * block, s.stop * block) for s in ndimage.find_objects(labels, max_label=index + 1)[index])
    chosen = labels[rows.start // block : rows.stop // block, cols.start // block : cols.stop // block] == index + 1
    part = mask[rows, cols]
    part = part & chosen.repeat(block, axis=0).repeat(block, axis=1)[: part.shape[0], : part.shape[1]]
    edges = ((rows.start == 0, part[0]), (rows.stop >= h, part[-1]), (cols.start == 0, part[:, 0]), (cols.stop >= w, part[:, -1]))
    touches = any(at_edge and bool(line.any()) for at_edge, line in edges)

    # Holes are what can't be reached from the one-pixel frame padded around the component.
    outside, _ = ndimage.label(np.pad(~part, 1, constant_values=True))
    silhouette = (outside != outside[0, 0])[1:-1, 1:-1]
    y, x = np.nonzero(silhouette)
    points = np.stack([x + float(cols.start), y + float(rows.start)])
    mean = points.mean(axis=1)
    offsets = points - mean[:, None]
    _, vectors = np.linalg.eigh(offsets @ offsets.T)
    axis = vectors[:, 1]

    along = axis @ offsets
    low, high = np.quantile(along, [_TAIL, 1.0 - _TAIL])
    low, high = low - 0.5, high + 0.5  # from pixel centres to edges
    end = _END * (high - low)
    left, right = int(np.count_nonzero(along < low + end)), int(np.count_nonzero(along > high - end))
    middle = (low + high) / 2.0
    if right > left:
        axis = -axis
        middle = -middle
    across = axis[0] * offsets[1] - axis[1] * offsets[0]
    return _Part(
        centre=(mean + middle * axis + 0.5) * factor - 0.5,
        axis=axis,
        length=float(high - low) * factor,
        width=2.0 * float(np.abs(across).max() + 0.5) * factor,
        area=float(along.size) * factor**2,
        side=float(min(h, w) * factor),
        end_ratio=max(left, right) / max(1, min(left, right)),
        touches_border=touches,
        second_area=second * factor**2,
        points=np.stack([axis @ offsets - middle, across]) * factor,
    )
