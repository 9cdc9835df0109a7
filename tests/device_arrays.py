"""Arrays of other libraries, as far as the detector sees them: their two protocols over memory that a test has."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from advrad_fast import dlpack

DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(("PyCapsule_New", ctypes.pythonapi))


class Interface:
    """``__cuda_array_interface__``: of version 3, unless changed; None leaves a key out."""

    def __init__(self, memory: Any, shape: Any, **changes: Any) -> None:
        self.memory = memory
        keys = {"shape": shape, "typestr": "|u1", "data": (int(memory), True), "version": 3, **changes}
        self.__cuda_array_interface__ = {key: value for key, value in keys.items() if value is not None}


class Exported:
    """DLPack.

    Args:
        address, shape: of the memory.
        device: DLPack's.
        dtype: DLPack's type.
        strides: elements; None for none.
        offset: of the first element, bytes.
        label: the capsule's name; the library is one from before DLPack 1.0 where that is not versioned.
        major: of the version.
        export: called with the stream that it is for.
        delete: called when the memory is given back.

    Attributes:
        streams: that it was asked for.
        deleted: how often the memory was given back.
    """

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        *,
        device: tuple[int, int] = (dlpack.CUDA, 0),
        dtype: tuple[int, int, int] = (dlpack.UINT, 8, 1),
        strides: tuple[int, ...] | None = None,
        offset: int = 0,
        label: bytes = b"dltensor_versioned",
        major: int = 1,
        export: Callable[[Any], None] = lambda stream: None,
        delete: Callable[[], None] | None = lambda: None,
    ) -> None:
        self.device, self.dtype, self.label, self.major, self._export = device, dtype, label, major, export
        self.streams: list[Any] = []
        self.deleted = 0
        self._kept: list[Any] = []
        self._address, self._offset, self._shape, self._strides, self._delete = address, offset, shape, strides, delete
        if label == b"dltensor":
            self.__class__ = Old

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: Any = None, max_version: tuple[int, int] | None = None, **others: Any) -> Any:
        self.streams.append(stream)
        self._export(stream)
        versioned = self.label == b"dltensor_versioned"
        managed: Any = dlpack._ManagedVersioned() if versioned else dlpack._Managed()
        if versioned:
            assert max_version is not None and max_version >= (1, 0)
            managed.major, managed.flags = self.major, 1  # read-only
        tensor = managed.tensor
        tensor.data, tensor.byte_offset, tensor.ndim = self._address, self._offset, len(self._shape)
        tensor.device_type, tensor.device_id = self.device
        tensor.code, tensor.bits, tensor.lanes = self.dtype
        shape = (ctypes.c_int64 * len(self._shape))(*self._shape)
        tensor.shape = ctypes.cast(shape, type(tensor.shape))
        if self._strides is not None:
            strides = (ctypes.c_int64 * len(self._strides))(*self._strides)
            tensor.strides = ctypes.cast(strides, type(tensor.strides))
            self._kept.append(strides)
        if self._delete is not None:
            deleter = DELETER(self._deleted)
            managed.deleter = ctypes.cast(deleter, ctypes.c_void_p).value
            self._kept.append(deleter)
        self._kept += [managed, shape]
        return _new(ctypes.addressof(managed), self.label, None)

    def _deleted(self, managed: int) -> None:
        assert managed in [ctypes.addressof(kept) for kept in self._kept]
        self.deleted += 1
        if self._delete is not None:
            self._delete()


class Old(Exported):
    """A library that does not know of versions."""

    def __dlpack__(self, *, stream: Any = None) -> Any:  # type: ignore[override]
        return super().__dlpack__(stream=stream)
