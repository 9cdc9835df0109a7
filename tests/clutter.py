"""Shadows and things that do not belong there, drawn into frames."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]


def shadow(frame: Frame, rng: np.random.Generator) -> Frame:
    """A soft-edged shadow, 20 to 50 % darker: over one side of a line, or a band 0.2 to 0.6 of the shorter side wide."""
    h, w = frame.shape[:2]
    y, x = np.mgrid[:h, :w].astype(float)
    side, angle = min(h, w), rng.uniform(0, 2 * math.pi)
    distance = (x - w * rng.uniform(0.2, 0.8)) * math.cos(angle) + (y - h * rng.uniform(0.2, 0.8)) * math.sin(angle)
    soft = rng.uniform(0.01, 0.06) * side
    if rng.random() < 0.5:
        distance = rng.uniform(0.1, 0.3) * side - np.abs(distance)
    depth = rng.uniform(0.2, 0.5) * 0.5 * (1.0 + np.tanh(distance / soft / 2.0))
    return _frame(frame * (1.0 - depth)[..., None])


def clutter(frame: Frame, rng: np.random.Generator, tones: tuple[int, int] = (20, 110), count: int | None = None) -> Frame:
    """One to three washers, rods and blocks of the part's tone, anywhere: on the part, touching it, or apart."""
    h, w = frame.shape[:2]
    y, x = np.mgrid[:h, :w].astype(float)
    side, out = min(h, w), frame.astype(float)
    for _ in range(int(rng.integers(1, 4)) if count is None else count):
        angle, dx, dy = rng.uniform(0, math.pi), x - rng.uniform(0.05, 0.95) * w, y - rng.uniform(0.05, 0.95) * h
        u, v = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
        kind = rng.integers(3)
        if kind == 0:
            radius = rng.uniform(0.04, 0.12) * side
            distance = np.abs(np.hypot(u, v) - 0.75 * radius) - 0.25 * radius
        else:
            long, thick = ((0.1, 0.3), (0.006, 0.02)) if kind == 1 else ((0.04, 0.12), (0.03, 0.08))
            distance = np.maximum(np.abs(u) - rng.uniform(*long) * side, np.abs(v) - rng.uniform(*thick) * side)
        cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
        out = out * (1.0 - cover) + rng.uniform(*tones) * cover
    return _frame(out)


def _frame(values: NDArray[np.float64]) -> Frame:
    frame: Frame = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return frame
