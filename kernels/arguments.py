"""The arguments of kernels: numbers that follow from a detector's, and the host functions' tensors, checked.

Without Triton and PyTorch.  A tensor is one of PyTorch's, or anything with the same few attributes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from advrad_fast.errors import ConfigError, expected
from advrad_fast.lattice import LEVELS, check_sigma
from advrad_fast.philox import check_seed

MAX_SIDE = 4096
MAX_FRAMES = 65535  #: CUDA's limit on the grid's second and third axis
FLOATS = ("float16", "bfloat16", "float32")
SPAN = 128  #: columns of a program of deviation_kernel, with the filter's reach to the left and right
NARROW = 65  #: the largest filter of deviation_kernel without rows_kernel


@dataclass(frozen=True)
class Lattice:
    """The table of lattice noise on the GPU.

    Attributes:
        thresholds: int64 or uint64 (2 K,), the values of :func:`advrad_fast.lattice.thresholds` for ``sigma``.
        sigma: in [0, 1] pixel units.
    """

    thresholds: Any
    sigma: float

    @property
    def half(self) -> int:
        """K."""
        return int(self.thresholds.shape[0]) // 2

    @property
    def scale(self) -> float:
        """Standard deviation in steps of the lattice."""
        return LEVELS * check_sigma(self.sigma)


def tensor(name: str, value: Any, dtypes: tuple[str, ...], shape: tuple[int | None, ...]) -> Any:
    """``value``, a contiguous tensor of one of these dtypes and this shape (None: any length above 0), at a multiple of 16 bytes.

    Raises:
        ConfigError: it is not.
    """
    for attribute in ("shape", "dtype", "is_contiguous", "data_ptr"):
        if not hasattr(value, attribute):
            raise ConfigError(expected(name, "a tensor", value))
    got = tuple(value.shape)
    if dtype_of(value) not in dtypes:
        raise ConfigError(expected(name, f"a tensor of {' or '.join(dtypes)}", dtype_of(value)))
    if len(got) != len(shape) or any(g < 1 or (s is not None and g != s) for g, s in zip(got, shape, strict=True)):
        raise ConfigError(expected(name, f"the shape {shape}, None being any", got))
    if not value.is_contiguous():
        raise ConfigError(expected(name, "a contiguous tensor", f"strides {tuple(value.stride())}"))
    if value.data_ptr() % 16:
        raise ConfigError(expected(name, "an address that is a multiple of 16", value.data_ptr()))
    return value


def dtype_of(value: Any) -> str:
    """``float16`` for ``torch.float16``."""
    return str(value.dtype).rpartition(".")[2]


def frames(value: Any) -> tuple[int, int, int, int]:
    """(N, H, W, C) of uint8 frames, after a check; H * W is a multiple of 8."""
    n, height, width, channels = tensor("images", value, ("uint8",), (None, None, None, None)).shape
    if channels not in (1, 3) or max(height, width) > MAX_SIDE or height * width % 8 or n > MAX_FRAMES:
        wanted = f"at most {MAX_FRAMES} frames, sides of at most {MAX_SIDE} with a product that 8 divides, and 1 or 3 channels"
        raise ConfigError(expected("images", wanted, (n, height, width, channels)))
    return n, height, width, channels


def integer(name: str, value: object, low: int, high: int) -> int:
    """``value`` as an integer in [low, high], or a ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(expected(name, f"an integer in [{low}, {high}]", value))
    return value


def real(name: str, value: object, low: float = -3e38) -> float:
    """``value`` as a finite number of at least ``low``, or a ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= 3e38 or not math.isfinite(value):
        raise ConfigError(expected(name, "a finite number" + (f" of at least {low:g}" if low > -3e38 else ""), value))
    return float(value)


def stream(images: Any, seed: object, first_draw: object, draws: int, image_ids: Any | None) -> tuple[int, int, Any]:
    """(seed, first_draw, image_ids int32 (N,)) of the noise stream, checked."""
    first = integer("first_draw", first_draw, 0, 2**32 - draws)
    if image_ids is None:
        image_ids = images.new_zeros((images.shape[0],)).int()
    return check_seed(seed), first, tensor("image_ids", image_ids, ("int32",), (images.shape[0],))


def table(lattice: Lattice | None, other: Any) -> tuple[Any, int, float]:
    """(thresholds, half, scale) for a kernel; without a lattice ``other`` stands for the table, which isn't read."""
    if lattice is None:
        return other, 1, 1.0
    if not isinstance(lattice, Lattice):
        raise ConfigError(expected("lattice", "a Lattice or None", lattice))
    thresholds = tensor("lattice.thresholds", lattice.thresholds, ("int64", "uint64"), (None,))
    if thresholds.shape[0] % 2:
        raise ConfigError(expected("lattice.thresholds", "an even number", thresholds.shape[0]))
    return thresholds, lattice.half, lattice.scale


def noise_scales(signal: float, noise: float, input_scale: float, *, lattice: bool = False) -> tuple[float, float, float]:
    """``pixel_scale``, ``offset`` and ``noise_scale`` of ``noise_kernel`` for the affine map of the network's inputs."""
    return input_scale * signal * 2.0 / 255.0, -input_scale * signal, 0.0 if lattice else input_scale * noise


def error_scales(
    input_coefficient: float, output_coefficient: float, signal: float, noise: float, input_scale: float, *, lattice: bool = False
) -> tuple[float, float, float, float]:
    """``pixel_scale``, ``offset``, ``noise_scale`` and ``output_scale`` of ``errors_kernel``.

    Args:
        input_coefficient, output_coefficient: of :func:`advrad_fast.schedule.error_coefficients`, ``smoothed`` with a lattice.
        signal, noise, input_scale: of the network's inputs, :class:`advrad_fast.schedule.Coefficients`.
    """
    x = (0.0 if lattice else 1.0) + input_coefficient * input_scale * signal
    return x * 2.0 / 255.0, -x, 0.0 if lattice else input_coefficient * input_scale * noise, output_coefficient


def tiles(width: int, filter_size: int) -> int:
    """How many programs of ``deviation_kernel`` share a row."""
    margin = 0 if filter_size > NARROW else (filter_size // 2 + 3) // 4 * 4
    return -(-width // (SPAN - 2 * margin))
