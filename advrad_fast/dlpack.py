"""DLPack: arrays of other libraries, without those libraries.

An array says where it is (``__dlpack_device__``), and hands out a capsule that describes its memory (``__dlpack__``).  Memory of
the host is read by NumPy.  A capsule of a GPU's memory is read here: ``DLManagedTensor`` and, since DLPack 1.0,
``DLManagedTensorVersioned`` of dlpack.h.
"""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast.errors import ImageError, expected

# DLDeviceType
CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
ON_GPU = (CUDA, CUDA_MANAGED)
UINT = 1  #: DLDataTypeCode of unsigned integers

_VERSION = (1, 0)  # the newest that is read; minor versions only add flags and types
_MAX_DIMENSIONS = 64


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


# A capsule's name, the name that says that its memory has a new owner, and what is in it.
_KINDS: tuple[tuple[bytes, bytes, type[ctypes.Structure]], ...] = (
    (b"dltensor_versioned", b"used_dltensor_versioned", _ManagedVersioned),
    (b"dltensor", b"used_dltensor", _Managed),
)

_object, _name = ctypes.py_object, ctypes.c_char_p
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, _object, _name)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, _object, _name)(("PyCapsule_GetPointer", ctypes.pythonapi))
_rename = ctypes.PYFUNCTYPE(ctypes.c_int, _object, _name)(("PyCapsule_SetName", ctypes.pythonapi))
_delete = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)  # holds the interpreter's lock: a producer may count references


@dataclass(frozen=True)
class Tensor:
    """What a capsule says.

    Attributes:
        device: (DLDeviceType, ordinal).
        address: of the first element; 0 for none.
        dtype: (DLDataTypeCode, bits, lanes).
        shape: elements.
        strides: elements; None for C order without gaps.
    """

    device: tuple[int, int]
    address: int
    dtype: tuple[int, int, int]
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None


def device(array: object) -> tuple[int, int] | None:
    """(DLDeviceType, ordinal) of an array's memory; None for what is no array of DLPack.

    Raises:
        ImageError: it says something else.
    """
    try:
        ask = getattr(array, "__dlpack_device__", None)
        if ask is None or isinstance(array, type):
            return None
        kind, ordinal = ask()
        return int(kind), int(ordinal)
    except Exception as error:  # another library's code
        raise ImageError(f"frame: {type(array).__name__}.__dlpack_device__() failed: {error}") from error


def host_array(array: object) -> NDArray[np.generic]:
    """An array in the host's memory as NumPy's, which shares that memory and keeps it alive.

    Raises:
        ImageError: it cannot be handed over, or NumPy has no such type.
    """
    try:
        return np.from_dlpack(array)  # type: ignore[arg-type]
    except Exception as error:  # another library's code
        raise ImageError(f"frame: {type(array).__name__} cannot be read through DLPack: {error}") from error


def take(array: object, stream: int, lent: ExitStack) -> Tensor:
    """An array's description; its memory is safe to read for work on ``stream`` until ``lent`` is closed.

    Args:
        array: with ``__dlpack__``.
        stream: a CUDA stream's handle, which is made to wait for the array's own.
        lent: gives the memory back; close it when the work is done.

    Raises:
        ImageError: it cannot be handed over, or is no capsule of DLPack 0.x or 1.x.
    """
    name = f"{type(array).__name__}.__dlpack__()"
    capsule = _export(array, stream, name)
    found = next((kind for kind in _KINDS if _is_valid(capsule, kind[0])), None)
    if found is None:
        raise ImageError(expected(f"frame: {name}", "a capsule named dltensor or dltensor_versioned", capsule))
    label, used, kind = found
    managed: Any = kind.from_address(_pointer(capsule, label))
    _rename(capsule, used)
    if managed.deleter:
        lent.callback(_delete(managed.deleter), ctypes.addressof(managed))
    if kind is _ManagedVersioned and managed.major != _VERSION[0]:  # of which nothing but the deleter may be used
        raise ImageError(expected(f"frame: {name}", "DLPack 1", f"version {managed.major}.{managed.minor}"))
    return _described(managed.tensor, name)


def _export(array: Any, stream: int, name: str) -> object:
    try:
        try:
            return array.__dlpack__(stream=stream, max_version=_VERSION)
        except TypeError:  # from before DLPack 1.0
            return array.__dlpack__(stream=stream)
    except Exception as error:  # another library's code
        raise ImageError(f"frame: {name} failed: {error}") from error


def _described(tensor: _Tensor, name: str) -> Tensor:
    if not 0 <= tensor.ndim <= _MAX_DIMENSIONS or (tensor.ndim and not tensor.shape):
        raise ImageError(expected(f"frame: {name}", f"0 to {_MAX_DIMENSIONS} dimensions with a shape", tensor.ndim))
    return Tensor(
        device=(tensor.device_type, tensor.device_id),
        address=tensor.data + tensor.byte_offset if tensor.data else 0,
        dtype=(tensor.code, tensor.bits, tensor.lanes),
        shape=tuple(tensor.shape[: tensor.ndim]),
        strides=tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None,
    )
