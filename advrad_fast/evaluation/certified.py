"""Certified AUROC of a detector on a labelled test set: one set of draws an image gives every radius."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast import certify
from advrad_fast.checks import floats
from advrad_fast.detector import Detector
from advrad_fast.errors import ConfigError, DatasetError, InferenceError, PartNotFoundError, expected
from advrad_fast.evaluation.datasets import Dataset
from advrad_fast.evaluation.evaluate import check_backend, labels_of, sample_name, worker_setup
from advrad_fast.evaluation.rows import append_line
from advrad_fast.images import load_image
from advrad_fast.spread import map_tasks
from advrad_fast.untrusted import clip

RADII = (0.05, 0.1, 0.2, 0.5)
_CURVE = 61  # radii of the curve


@dataclass(frozen=True)
class CertifiedScores:
    """Scores A(x + delta) of every test image.

    Attributes:
        labels: int64 (images,), 0 (good) or 1 (bad).
        scores: float32 (images, draws).  An image whose part was not found is certified at no threshold: good ones have the
            largest finite number, bad ones its negative.
        sigma, pixels: of the noise, and how many values an image has.
    """

    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    sigma: float
    pixels: int

    def auroc(self, radii: Sequence[float], alpha: float) -> NDArray[np.float64]:
        """The certified AUROC at each radius: float64 (r,); each image's statement has level ``alpha``."""
        return certify.certified_auroc(self.labels, self.scores, radii, sigma=self.sigma, pixels=self.pixels, alpha=alpha)

    def curve(self, alpha: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Radii from 0 to the largest that this many draws certify, and the certified AUROC at each."""
        p = float(certify.lower_bound(self.scores.shape[1], self.scores.shape[1], alpha))
        radii = np.linspace(0.0, float(certify.radius(p, self.sigma, pixels=self.pixels)), _CURVE)
        return radii, self.auroc(radii.tolist(), alpha)


def draw_scores(
    detector: Detector,
    dataset: Dataset,
    *,
    draws: int = 1000,
    sigma: float | None = None,
    seed: int = 0,
    file: Path | None = None,
    on_image: Callable[[], None] | None = None,
    ray: str | None = None,
    setup: Callable[[], Detector] | None = None,
) -> CertifiedScores:
    """Draw the scores of every test image, each with a seed of its own that ``seed`` and the image's name give.

    Args:
        draws: of every image.
        sigma: one of the model's; None for the smallest.
        on_image: called after each image.
        file: JSON lines of what has been drawn, written here as it is drawn; what it already holds is not drawn again.
        ray, setup: as for :func:`advrad_fast.evaluation.evaluate.evaluate`.

    Raises:
        DatasetError: the test set has no good or no bad images.
        ConfigError: ``file`` holds draws of another model, sigma, backend, seed or number; or as :meth:`Detector.certify`.
        SpreadError: the cluster can't be used.
    """
    labels = labels_of(dataset)
    make = worker_setup(detector, ray, setup)
    model, size = detector.model, detector.model.config.image
    if sigma is None and model.sigmas:
        sigma = model.sigmas[0]
    header = {
        "model": model.fingerprint,
        "data": dataset.name,
        "sigma": sigma,
        "draws": draws,
        "seed": seed,
        "backend": detector.backend,
    }
    kept = {} if file is None else _kept(file, header, draws)
    names = [sample_name(sample.path) for sample in dataset.test]
    found = {i: kept[name] for i, name in enumerate(names) if name in kept}
    missing = [i for i in range(len(names)) if i not in found]
    on_image = on_image or (lambda: None)
    for _ in found:
        on_image()
    tasks = (_Draws(load_image(dataset.test[i].path), draws, sigma, _seed(seed, names[i])) for i in missing)
    for index, (row, backend) in map_tasks(_draw, tasks, setup=make, ray=ray):
        check_backend(detector.backend, backend)
        found[missing[index]] = row
        if file is not None:
            scores = None if row is None else [float(score) for score in row]
            append_line(file, json.dumps({"image": names[missing[index]], "scores": scores}))
        on_image()
    limit = np.finfo(np.float32).max
    rows = []
    for i, sample in enumerate(dataset.test):
        row = found[i]
        rows.append(np.full(draws, -limit if sample.label else limit, np.float32) if row is None else row)
    return CertifiedScores(labels, np.stack(rows), float(sigma or 0.0), size.height * size.width * size.channels)


def figures(found: CertifiedScores, radii: Sequence[float], alpha: float) -> dict[str, Any]:
    """``certified_auroc``, radius to value, and how it was measured."""
    values = found.auroc(radii, alpha)
    return {
        "certified_auroc": {f"{radius:g}": float(value) for radius, value in zip(radii, values, strict=True)},
        "certified_sigma": found.sigma,
        "certified_draws": int(found.scores.shape[1]),
        "certified_alpha": alpha,
    }


@dataclass(frozen=True)
class _Draws:
    """One image to draw scores of."""

    frame: NDArray[np.uint8]
    draws: int
    sigma: float | None
    seed: int


def _draw(detector: Detector, task: _Draws) -> tuple[NDArray[np.float32] | None, str]:
    """The scores, or None where the part was not found; and which backend computed them."""
    try:
        return detector.smoothed_scores(task.frame, task.draws, sigma=task.sigma, seed=task.seed), detector.backend
    except PartNotFoundError:
        return None, detector.backend


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()[:8], "little")


def _kept(file: Path, header: dict[str, Any], draws: int) -> dict[str, NDArray[np.float32] | None]:
    """What the file holds, but for a line cut short by an interruption.  A new file gets the header."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else []
    except UnicodeError as error:
        raise ConfigError(f"{file}: not a file of draws: {clip(str(error))}") from error
    if lines:
        lines.pop()  # nothing, or a line cut short: the next line that is appended takes its place
    if not lines:
        append_line(file, json.dumps(header))
        return {}
    kept: dict[str, NDArray[np.float32] | None] = {}
    try:
        first, *rows = map(json.loads, lines)
        if first != header:
            raise ConfigError(expected(f"{file}: draws", f"those of {header}", first))
        for line in rows:
            scores = None if line["scores"] is None else floats("scores", line["scores"], DatasetError)
            with np.errstate(over="ignore"):
                kept[line["image"]] = None if scores is None else scores.astype(np.float32)
            if not isinstance(line["image"], str):
                raise DatasetError(expected("image", "a name", line["image"]))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file}: not a file of draws: {clip(str(error))}") from error
    for name, row in kept.items():
        if row is not None and (row.shape != (draws,) or not np.isfinite(row).all()):
            raise InferenceError(f"{file}: {clip(name)}: expected {draws} finite scores")
    return kept


def curve_svg(radii: NDArray[np.float64], values: NDArray[np.float64], title: str) -> str:
    """The certified AUROC against the radius, as an SVG of its own."""
    width, height, left, top, right, bottom = 640, 400, 60, 40, 20, 50
    reach = float(radii[-1]) or 1.0

    def x(radius: float) -> float:
        return left + (width - left - right) * radius / reach

    def y(value: float) -> float:
        return top + (height - top - bottom) * (1.0 - value)

    step = 10.0 ** math.floor(math.log10(reach / 2.0))
    step *= next(m for m in (1, 2, 5, 10) if reach / (m * step) <= 8)
    parts = []
    for i in range(6):
        value = i / 5
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{100 * value:.0f}</text>')
    for i in range(int(reach / step + 1e-9) + 1):
        at = x(i * step)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y(0):.1f}" y2="{y(0) + 5:.1f}" stroke="#444"/>')
        parts.append(f'<text x="{at:.1f}" y="{y(0) + 20:.1f}" text-anchor="middle">{i * step:g}</text>')
    # Steps to the left: at a radius between two that were computed, the next one's value holds.
    path = f"M{x(float(radii[0])):.1f},{y(float(values[0])):.1f}"
    for radius, value in zip(radii[1:].tolist(), values[1:].tolist(), strict=True):
        path += f"V{y(value):.1f}H{x(radius):.1f}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13"'
        ' fill="#222">'
        f'<rect width="{width}" height="{height}" fill="#fff"/><text x="{left}" y="24" font-size="15">{escape(title)}</text>'
        f"{''.join(parts)}"
        f'<path d="{path}" fill="none" stroke="#0b62a4" stroke-width="2"/>'
        f'<text x="{(left + width - right) / 2}" y="{height - 10}" text-anchor="middle">l2 radius, pixels in [0, 1]</text>'
        f'<text transform="translate(16,{(top + height - bottom) / 2}) rotate(-90)" text-anchor="middle">'
        "certified AUROC, %</text></svg>\n"
    )
