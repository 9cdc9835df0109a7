"""The fused operations for CPUs (C++17, ``csrc/``); the GIL is released while they work.

Arrays are used in place and must be C-contiguous, of exactly the dtype and shape given here; inputs may be read-only and
overlap no output.  Anything else is a ``ValueError`` that names the argument.  The same call gives the same bits on every
processor and with any number of threads, and an image's result doesn't depend on its neighbours: every image has
``image_id`` 0.
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
    out: NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16],
    *,
    first_draw: int = 0,
    normals: NDArray[np.float32] | None = None,
    lattice: Lattice | None = None,
    channels_last: bool = False,
    threads: int = 1,
) -> None:
    """Fill ``out`` with the network's inputs, ``input_scale * (signal * x + noise * eps)``.

    With a lattice the noise is added to the pixels in integers instead: ``input_scale * signal * (x + z)``; see
    :func:`advrad_fast.reference.smoothing.lattice_inputs`.

    Args:
        images: uint8 (N, H, W, C), C of 1 or 3, sides up to 4096; x is this in [-1, 1].
        draws: noise draws an image, numbers first_draw and on of the stream.
        seed: in [0, 2**64).
        signal, noise, input_scale: as in :class:`advrad_fast.schedule.Coefficients`, finite.
        out: (N * draws, C, H, W), image-major, or (N * draws, H, W, C) if ``channels_last``; written.  float32, float16, or
            uint16 for the bits of bfloat16; rounded to nearest even.
        normals: float32 (draws, C, H, W), the stream's normals if they are at hand: they need not be drawn again.
        threads: at most this many work, in [1, 1024].

    Raises:
        ValueError: naming the argument.
    """

def reconstruction_error(
    images: NDArray[np.uint8] | None,
    inputs: NDArray[np.float32] | None,
    outputs: NDArray[np.float32],
    draws: int,
    input_coefficient: float,
    output_coefficient: float,
    scale_weights: tuple[float, float, float, float],
    filter_size: int,
    mu: NDArray[np.float32],
    inverse_spread: NDArray[np.float32],
    maps: NDArray[np.float32] | None,
    scores: NDArray[np.float32],
    *,
    threads: int = 1,
) -> None:
    """Algorithm 4: fill ``scores``, and ``maps`` if given, from the network's inputs and outputs.

    What the reconstruction x~ lacks of the image is ``d = x + input_coefficient * inputs + output_coefficient * outputs``; as
    x~ = skip * x_k + out * output, the coefficients are ``-skip / input_scale`` and ``-out``.  A smoothed detector is held
    against its noised image: there ``images`` is None and ``input_coefficient`` is ``(1 / signal - skip) / input_scale``.  See
    :func:`advrad_fast.schedule.error_coefficients`.

    A NaN among a score's outputs makes it NaN, and an infinity makes it NaN or infinite: a fault never gives a finite score.

    Args:
        images: uint8 (N, H, W, C), or None for none; x is this in [-1, 1].  Each has the same number of results.
        inputs: float32 of the shape of ``outputs``: the network's inputs.  None leaves them out, as where skip is 0.
        outputs: float32 (results * draws, C, H, W): the network's raw outputs.  C is 1 or 3, H and W are multiples of 8 up
            to 4096.
        draws: neighbouring outputs that share one result: their errors are averaged.
        scale_weights: of the errors at 1, 1/2, 1/4 and 1/8 of the size, 0 or above.
        filter_size: side of the mean filter, odd, in [1, 255] pixels.
        mu, inverse_spread: float32 (H, W): the normal map, and one over its spread.
        maps: float32 (results, H, W), written with the anomaly maps; None: no map is written anywhere.
        scores: float32 (results,), written with the maps' maxima.
        threads: at most this many work, in [1, 1024].

    Raises:
        ValueError: naming the argument.
    """

def votes(
    scores: NDArray[np.float32], thresholds: NDArray[np.float32], ranks: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """How many of each image's scores are above each threshold, and their order statistics.

    Args:
        scores: float32 (N, draws).
        thresholds: float32 (T,), no NaN; T may be 0.
        ranks: int64 (R,) in [0, draws), 0 for the smallest; R may be 0.

    Returns:
        counts int64 (N, T) and order statistics float32 (N, R); -1 and NaN for an image with a NaN score.

    Raises:
        ValueError: naming the argument.
    """

class Lattice:
    """Thresholds of lattice noise (:func:`advrad_fast.lattice.thresholds`), checked and indexed once."""

    def __init__(self, thresholds: NDArray[np.uint64]) -> None:
        """``thresholds``: uint64 (2 K,), sorted, below 2**60; else a ``ValueError``."""

def integers(count: int, seed: int, draw: int = 0, image_id: int = 0) -> NDArray[np.uint32]:
    """The first words of the noise stream: uint32 (count,), equal to :func:`advrad_fast.philox.integers`."""

def normals(count: int, seed: int, draw: int = 0, image_id: int = 0) -> NDArray[np.float32]:
    """The first normals of the noise stream: float32 (count,), :func:`advrad_fast.philox.normals` up to rounding."""

def lattice_noise(count: int, lattice: Lattice, seed: int, draw: int = 0, image_id: int = 0) -> NDArray[np.int32]:
    """The first values of the lattice noise: int32 (count,), equal to :func:`advrad_fast.lattice.integers`."""

def engine_kernels() -> list[str]:
    """The engine's kernels that this processor can run: ``amx``, if it has tiles for bf16, and ``portable``, the plain form."""

class Network:
    """A network of convolutions in bf16 with fp32 sums, planned once; immutable, and shared by threads, once it is finished.

    Tensors are numbers; tensor 0 is the input, folded: (height / patch, width / patch) with patch**2 times the channels.

    Args:
        batch, channels, height, width: of the input and output, float32 (batch, channels, height, width).
        patch: divides both sides.
        threads: that work on one run.
        kernels: one of :func:`engine_kernels`.
    """

    def __init__(self, *, batch: int, channels: int, height: int, width: int, patch: int, threads: int, kernels: str) -> None: ...
    def tensor(self, height: int, width: int, channels: int) -> int:
        """An activation for operations to write and read."""

    def convolution(
        self,
        out: int | None,
        bias: NDArray[np.float32],
        phases: list[list[tuple[int, NDArray[np.float32], int, int, int, bool]]],
        *,
        silu: bool = False,
        residual: int | None = None,
        norm: tuple[NDArray[np.float32], NDArray[np.float32], int, bool] | None = None,
    ) -> None:
        """Add ``out = silu(residual + bias + convolutions)``, each part if it is given.

        Args:
            out: None for the network's output, once, last.
            phases: one for a plain convolution, four for one whose output is twice as large: pixel (2y + i, 2x + j) comes from
                phase 2i + j.  A phase adds up sources (tensor, kernel, stride, top, left, normalised): tap (i, j) of a kernel
                (channels out, channels in, height, width) reads pixel (y * stride + top + i, x * stride + left + j), at most
                one outside, where zeros stand.
            residual: a tensor of the output's shape.
            norm: (gain, shift, groups, silu) of the GroupNorm before the normalised sources, whose channels stand side by side.
        """

    def attention(self, tensor: int, out: int, heads: int) -> None:
        """Add ``out = softmax(q k^T) v``, head by head; ``tensor`` has the channels of q, k and v, in this order."""

    def finish(self) -> None: ...
    def workspace(self) -> Workspace:
        """Memory for one run at a time."""

    def run(self, workspace: Workspace, x: NDArray[np.float32], out: NDArray[np.float32]) -> None: ...
    def profile(self, workspace: Workspace, x: NDArray[np.float32], out: NDArray[np.float32]) -> list[float]:
        """:meth:`run`, and the seconds of every operation in turn: the input's folding, then as they were added, an attention
        as two."""

    def run_noised(
        self,
        workspace: Workspace,
        image: NDArray[np.uint8],
        seed: int,
        signal: float,
        noise: float,
        input_scale: float,
        normals: NDArray[np.float32] | None,
        out: NDArray[np.float32],
        *,
        first_draw: int = 0,
    ) -> None:
        """:meth:`run` on the inputs that :func:`noise` makes of one image (1, H, W, C) and ``batch`` draws."""

class Workspace: ...
