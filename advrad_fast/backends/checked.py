"""What a backend returned, checked before it decides about a part."""

from __future__ import annotations

import math

import numpy as np

from advrad_fast.backends import Scores
from advrad_fast.errors import InferenceError, expected
from advrad_fast.untrusted import kind


def checked_score(result: Scores, size: tuple[int, ...], want_maps: bool) -> float:
    """The one score in a backend's result, which is trusted no more than a file: a wrong one could pass a defect as good."""
    scores, maps = result.scores, result.maps
    if not isinstance(scores, np.ndarray) or scores.shape != (1,) or scores.dtype != np.float32:
        raise InferenceError(expected("scores", "a float32 array (1,)", kind(scores)))
    score = float(scores[0])
    if not math.isfinite(score):
        raise InferenceError(expected("score", "a finite number", score))
    if want_maps:
        if not isinstance(maps, np.ndarray) or maps.shape != (1, *size) or maps.dtype != np.float32:
            raise InferenceError(expected("maps", f"a float32 array {(1, *size)}", kind(maps)))
        if not float(maps.max()) == score:  # NaN in a map is its maximum
            raise InferenceError(expected("score", f"the map's maximum, {float(maps.max()):g}", score))
    return score


def float32_below(threshold: float) -> np.float32:
    """The largest float32 up to ``threshold``: float32 values are above the one exactly where they are above the other.

    Rounded to the nearest, a threshold just below the maximum could leave the mask of a DEFECT empty.
    """
    with np.errstate(over="ignore"):
        rounded = np.float32(threshold)
    return np.nextafter(rounded, np.float32(-np.inf)) if float(rounded) > threshold else rounded
