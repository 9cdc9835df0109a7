"""Frames that lie on a GPU already: arrays with DLPack or ``__cuda_array_interface__`` (CuPy, PyTorch, JAX, Numba, PyCUDA).

Of uint8, (H, W), (H, W, 1) or (H, W, 3) in RGB order, in C order without gaps between pixels or rows; read-only is fine.  An
array that has both protocols is read through DLPack, which says in every library which work it has to wait for: PyTorch's
``__cuda_array_interface__`` does not.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from advrad_fast import dlpack
from advrad_fast.errors import ImageError, expected
from advrad_fast.images import check_size

_SHAPE = "(H, W), (H, W, 1) or (H, W, 3)"
_TYPES = ("|u1", "<u1", ">u1", "=u1")
_MAX_ADDRESS = 2**64 - 1


@dataclass(frozen=True)
class Pixels:
    """A frame's memory on a GPU, uint8 in C order.

    Attributes:
        address: of the first pixel.
        shape: (H, W, C); C is 1 or 3.
        stream: handle of the stream that writes it; None where there is nothing to wait for.
    """

    address: int
    shape: tuple[int, int, int]
    stream: int | None

    @property
    def nbytes(self) -> int:
        """H W C."""
        return self.shape[0] * self.shape[1] * self.shape[2]


@dataclass(frozen=True)
class GpuFrame:
    """A frame on a GPU, as :func:`find` found it.

    Attributes:
        array: what was given.
        ordinal: which GPU it says that it is on; None where it does not say (``__cuda_array_interface__``).
    """

    array: object
    ordinal: int | None

    def __str__(self) -> str:
        where = "a GPU" if self.ordinal is None else f"GPU {self.ordinal}"
        return f"{type(self.array).__module__}.{type(self.array).__name__} on {where}"

    def open(self, stream: int, ordinal: int, lent: ExitStack) -> Pixels:
        """The frame's memory, for work on a stream.

        Args:
            stream: handle of the stream that will read it; it still has to wait for ``Pixels.stream``.
            ordinal: of the stream's GPU.
            lent: gives back what was borrowed; close it, and let go of ``array``, when that work is done.

        Raises:
            ImageError: another dtype, shape or layout, another GPU, no memory, or no valid description of it.
            ImageTooLargeError: too many pixels.
        """
        if self.ordinal is None:
            return _from_interface(_interface(self.array))
        if self.ordinal != ordinal:
            raise ImageError(expected("frame", f"an array on GPU {ordinal}, where the detector is", str(self)))
        tensor = dlpack.take(self.array, stream, lent)
        if tensor.device[0] not in dlpack.ON_GPU or tensor.device[1] != ordinal:
            wanted = f"DLPack device {(dlpack.CUDA, ordinal)}, as __dlpack_device__ says"
            raise ImageError(expected("frame", wanted, tensor.device))
        if tensor.dtype != (dlpack.UINT, 8, 1):
            raise ImageError(expected("frame", "uint8, DLPack (1, 8, 1)", f"DLPack type {tensor.dtype}"))
        shape = _checked_shape(tensor.shape, tensor.strides)
        return Pixels(_checked_address(tensor.address), shape, None)


def find(frame: object) -> GpuFrame | None:
    """``frame`` as a frame on a GPU; None for anything else, which :func:`advrad_fast.images.check_frame` looks at.

    Raises:
        ImageError: it is on another device than the host or an NVIDIA GPU, or does not say properly where it is.
    """
    if isinstance(frame, np.ndarray):
        return None
    where = dlpack.device(frame)
    if where is None:
        return None if _interface(frame) is None else GpuFrame(frame, None)
    if where[0] in (dlpack.CPU, dlpack.CUDA_HOST):
        return None
    if where[0] not in dlpack.ON_GPU:
        raise ImageError(expected("frame", "an array in the host's memory or on an NVIDIA GPU", f"DLPack device {where}"))
    return GpuFrame(frame, where[1])


def _interface(array: object) -> Any:
    """What ``__cuda_array_interface__`` gives; None without one."""
    if isinstance(array, type):
        return None
    try:
        return getattr(array, "__cuda_array_interface__", None)
    except Exception as error:  # another library's code
        raise ImageError(f"frame: {type(array).__name__}.__cuda_array_interface__ failed: {error}") from error


def _from_interface(interface: Any) -> Pixels:
    def check(name: str, good: bool, wanted: str, got: object) -> None:
        if not good:
            raise ImageError(expected(f"frame: __cuda_array_interface__{name}", wanted, got))

    check("", isinstance(interface, dict), "a dict", interface)
    version, data, shape = (interface.get(key) for key in ("version", "data", "shape"))
    strides, stream, mask = (interface.get(key) for key in ("strides", "stream", "mask"))
    check("['version']", version in (2, 3) and type(version) is int, "2 or 3", version)
    check("['typestr']", interface.get("typestr") in _TYPES, "'|u1', uint8", interface.get("typestr"))
    check("['mask']", mask is None, "no mask", type(mask))
    check("['shape']", _integers(shape), "a tuple of integers", shape)
    good = strides is None or (_integers(strides) and len(strides) == len(shape))
    check("['strides']", good, "None or one a dimension", strides)
    good = isinstance(data, tuple) and len(data) == 2 and _integers(data[:1])
    check("['data']", good, "(address, read-only)", data)
    # 0 could be either default stream, and is forbidden.
    good = stream is None or (_integers((stream,)) and 1 <= stream <= _MAX_ADDRESS)
    check("['stream']", good, "None, or a stream's handle from 1 on", stream)
    checked = _checked_shape(tuple(map(int, shape)), None if strides is None else tuple(map(int, strides)))
    return Pixels(_checked_address(int(data[0])), checked, None if stream is None else int(stream))


def _integers(values: object) -> bool:
    return isinstance(values, tuple) and all(isinstance(v, int | np.integer) and not isinstance(v, bool) for v in values)


def _checked_shape(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> tuple[int, int, int]:
    """(H, W, C) of a uint8 array without gaps; strides are bytes and elements alike."""
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3)):
        raise ImageError(expected("frame", f"a GPU array of shape {_SHAPE}", f"shape {shape}"))
    check_size("frame", shape[0], shape[1])
    if strides is not None:
        wanted = [1] * len(shape)
        for i in reversed(range(len(shape) - 1)):
            wanted[i] = wanted[i + 1] * shape[i + 1]
        if any(size > 1 and got != step for size, got, step in zip(shape, strides, wanted, strict=True)):
            raise ImageError(
                expected("frame", f"a GPU array in C order without gaps, strides {tuple(wanted)}", f"strides {strides}")
                + "; make it contiguous first"
            )
    return shape[0], shape[1], shape[2] if len(shape) == 3 else 1


def _checked_address(address: int) -> int:
    if not 0 < address <= _MAX_ADDRESS:
        raise ImageError(expected("frame", "an address of GPU memory", "a null pointer" if address == 0 else hex(address)))
    return address
