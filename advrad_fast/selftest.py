"""Frames with known results: what a detector must say of them wherever it runs, whatever it computes with.

The frames are made from integers (:mod:`advrad_fast.philox`), the same everywhere, and no picture of anybody's parts.  A model
file has the score of each in fp32, and the mean of its anomaly map.  An engine that returns garbage, weights that were damaged
on the disk or in memory, a driver that computes something else: these then come out differently by more than the precision does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast import philox
from advrad_fast.config import ImageConfig
from advrad_fast.errors import SelfTestError
from advrad_fast.untrusted import number, refuse, same_names

FRAMES = 2  #: how many there are
SEED = 0  #: of the noise

#: How far a score, and a map's mean, may be off, relative to what is expected.  ``cpu`` against ``reference``, worst of the
#: demo's detector, bottle, screw and the tests' random networks: fp32 2.4e-7 and bf16 3.0e-3; bottle and screw: int8 1.9e-2.
#: Other devices add in another order: 400 times that for fp32, 4 times for bf16 and fp16, 13 times for 8 bits.
BOUNDS = {"fp32": 1e-4, "fp16": 0.012, "bf16": 0.012, "int8": 0.25, "fp8": 0.25}


@dataclass(frozen=True)
class Expected:
    """Of each of the :func:`frames`, at noise :data:`SEED`, in fp32.

    Attributes:
        scores: above 0.
        means: of the anomaly maps, above 0.
    """

    scores: tuple[float, ...]
    means: tuple[float, ...]

    def checked(self, name: str) -> Expected:
        """A validated copy; ``name`` is what messages call it.

        Raises:
            ModelFileError: they are not ``FRAMES`` finite numbers above 0 each.
        """
        return Expected(_numbers(f"{name}.scores", self.scores), _numbers(f"{name}.means", self.means))

    def document(self) -> dict[str, Any]:
        """What the model file's JSON document holds of it."""
        return {"scores": list(self.scores), "means": list(self.means)}


@dataclass(frozen=True)
class SelfTest:
    """A self-test that was passed.

    Attributes:
        precision: what the network computes in.
        deviation: the largest deviation of a score or a map's mean, relative to what was expected.
        bound: what it may be in this precision.
    """

    precision: str
    deviation: float
    bound: float


def frames(image: ImageConfig) -> NDArray[np.uint8]:
    """The frames, as a detector prepares them: uint8 (FRAMES, H, W, C): squares of 8 pixels, and squares of 32 under noise."""
    size = (image.height, image.width, image.channels)
    made = np.empty((FRAMES, *size), dtype=np.uint8)
    made[0] = _squares(size, 8, 1)
    made[1] = _squares(size, 32, 2) // 2 + _words(size, 3) % 128
    return made


def compare(expected: Expected, scores: NDArray[np.float32], maps: NDArray[np.float32], precision: str) -> SelfTest:
    """What a backend returned for :func:`frames`, against what is expected.

    Args:
        scores: (FRAMES,), of the frames without maps.
        maps: (FRAMES, H, W).

    Raises:
        SelfTestError: a number is off by more than the bound.
    """
    bound, worst = BOUNDS[precision], 0.0
    means = maps.astype(np.float64).mean(axis=(1, 2))
    found = (("score", expected.scores, scores), ("map's maximum", expected.scores, maps.max(axis=(1, 2))))
    for what, wanted, got in (*found, ("map's mean", expected.means, means)):
        for i in range(FRAMES):
            deviation = abs(float(got[i]) - wanted[i]) / wanted[i]
            if not deviation <= bound:  # NaN neither
                raise SelfTestError(
                    f"self-test: frame {i}: expected a {what} within {bound:.2%} of {wanted[i]:.6g} in {precision}, got"
                    f" {float(got[i]):.6g}: the model, the engine or the machine is damaged"
                )
            worst = max(worst, deviation)
    return SelfTest(precision, worst, bound)


def parse(name: str, value: object) -> Expected | None:
    """From an untrusted document, where None stands for a model without a self-test.

    Raises:
        ModelFileError: it is not what :meth:`Expected.document` writes.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        refuse(name, "an object or null", value)
    same_names(name, ("scores", "means"), value)
    return Expected(_numbers(f"{name}.scores", value["scores"]), _numbers(f"{name}.means", value["means"]))


def _numbers(name: str, values: object) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or len(values) != FRAMES:
        refuse(name, f"{FRAMES} numbers above 0", values)
    checked = tuple(number(name, value) for value in values)
    if min(checked) <= 1e-30:
        refuse(name, "numbers above 0", min(checked))
    return checked


def _words(size: tuple[int, ...], draw: int) -> NDArray[np.uint8]:
    return (philox.integers(math.prod(size), seed=SEED, draw=draw, block=3) >> np.uint32(24)).astype(np.uint8).reshape(size)


def _squares(size: tuple[int, int, int], edge: int, draw: int) -> NDArray[np.uint8]:
    height, width, channels = size
    small = _words((-(-height // edge), -(-width // edge), channels), draw)
    return small.repeat(edge, axis=0).repeat(edge, axis=1)[:height, :width]
