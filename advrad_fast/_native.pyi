"""The fused operations for CPUs (C++17, ``csrc/``), single-threaded; the GIL is released while they work.

Arrays are used in place and must be C-contiguous, of exactly the dtype and shape given here; inputs may be read-only and
overlap no output.  Anything else is a ``ValueError`` that names the argument.  The same call gives the same bits on every
processor, and an image's result doesn't depend on its neighbours: every image has ``image_id`` 0.
"""

import numpy as np
from numpy.typing import NDArray

def noise(
    images: NDArray[np.uint8],
    draws: int,
    seed: int,
    signal: float,
    noise: float,
    input_scale: float,
    out: NDArray[np.float32],
) -> None:
    """Fill ``out`` with the network's inputs, ``input_scale * (signal * x + noise * eps)``.

    Args:
        images: uint8 (N, H, W, C), C of 1 or 3, sides up to 4096; x is this in [-1, 1].
        draws: noise draws an image, 0 .. draws - 1 of the stream.
        seed: in [0, 2**64).
        signal, noise, input_scale: as in :class:`advrad_fast.schedule.Coefficients`, finite.
        out: float32 (N * draws, C, H, W), image-major; written.

    Raises:
        ValueError: naming the argument.
    """

def reconstruction_error(
    images: NDArray[np.uint8],
    outputs: NDArray[np.float32],
    draws: int,
    seed: int,
    signal: float,
    noise: float,
    skip: float,
    out_coeff: float,
    scale_weights: tuple[float, float, float, float],
    filter_size: int,
    mu: NDArray[np.float32],
    inverse_spread: NDArray[np.float32],
    maps: NDArray[np.float32] | None,
    scores: NDArray[np.float32],
) -> None:
    """Algorithm 4: fill ``scores``, and ``maps`` if given, from the network's outputs.

    The noise of :func:`noise` is drawn again.  A NaN among an image's outputs makes its score NaN, and an infinity makes it
    NaN or infinite: a fault never gives a finite score.

    Args:
        images: uint8 (N, H, W, C), C of 1 or 3, sides multiples of 8 up to 4096.
        outputs: float32 (N * draws, C, H, W), image-major: the network's raw outputs.
        draws, seed, signal, noise: as given to :func:`noise`.
        skip, out_coeff: of the parametrisation; x~ = skip * x_k + out_coeff * output.
        scale_weights: of the errors at 1, 1/2, 1/4 and 1/8 of the size, 0 or above.
        filter_size: side of the mean filter, odd, in [1, 255] pixels.
        mu, inverse_spread: float32 (H, W): the normal map, and one over its spread.
        maps: float32 (N, H, W), written with the anomaly maps; None: no map is written anywhere.
        scores: float32 (N,), written with the maps' maxima.

    Raises:
        ValueError: naming the argument.
    """

def integers(count: int, seed: int, draw: int = 0, image_id: int = 0) -> NDArray[np.uint32]:
    """The first words of the noise stream: uint32 (count,), equal to :func:`advrad_fast.philox.integers`."""

def normals(count: int, seed: int, draw: int = 0, image_id: int = 0) -> NDArray[np.float32]:
    """The first normals of the noise stream: float32 (count,), :func:`advrad_fast.philox.normals` up to rounding."""
