"""The driver's own library, for the calls that pycuda does not have."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from advrad_fast.errors import ImageError, InferenceError, expected

_SUCCESS, _INVALID_HANDLE, _CONTEXT_IS_DESTROYED = 0, 400, 709
_DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_DEVICE_MEMORY = 2  # CU_MEMORYTYPE_DEVICE


@cache
def _entry_point(name: str) -> Any:
    return getattr(ctypes.CDLL("libcuda.so.1"), name)


def call(name: str, *arguments: Any) -> None:
    """Call an entry point of libcuda; handles and addresses are ints.

    Raises:
        InferenceError: it gave an error, or this driver has no such entry point.
    """
    check(name, result(name, *arguments))


def result(name: str, *arguments: Any) -> int:
    """What an entry point of libcuda gives: 0 for success.

    Raises:
        InferenceError: this driver has no such entry point.
    """
    try:
        function = _entry_point(name)
    except (OSError, AttributeError) as error:
        raise InferenceError(f"cuda: this driver has no {name}: {error}") from error
    code: int = function(*[ctypes.c_void_p(argument) if type(argument) is int else argument for argument in arguments])
    return code


def check(name: str, code: int) -> None:
    """Raises an InferenceError unless an entry point's result is success."""
    if code != _SUCCESS:
        text = ctypes.c_char_p()
        _entry_point("cuGetErrorString")(code, ctypes.byref(text))
        raise InferenceError(f"cuda: {name} failed: {(text.value or b'an unknown error').decode()}")


class _Pointer(ctypes.Structure):
    """What is asked about a pointer, in the order of _ATTRIBUTES."""

    _fields_ = (
        ("kind", ctypes.c_uint),
        ("device_pointer", ctypes.c_uint64),
        ("ordinal", ctypes.c_int),
        ("start", ctypes.c_uint64),
        ("size", ctypes.c_size_t),
    )


# CU_POINTER_ATTRIBUTE_MEMORY_TYPE, _DEVICE_POINTER, _DEVICE_ORDINAL, _RANGE_START_ADDR, _RANGE_SIZE
_ATTRIBUTES = (ctypes.c_int * 5)(2, 3, 9, 11, 12)
_OFFSETS = tuple(getattr(_Pointer, name).offset for name, _ in _Pointer._fields_)


def check_memory(address: int, nbytes: int, ordinal: int) -> None:
    """Ask the driver whether kernels of the current context can read a range.

    What lies in another library's memory pool, given back to the pool or not, is the driver's memory still.

    Raises:
        ImageError: there is no such memory, it is too short, or it is another GPU's.
        InferenceError: the driver fails.
    """
    found = _Pointer()
    places = (ctypes.c_void_p * len(_OFFSETS))(*[ctypes.addressof(found) + offset for offset in _OFFSETS])
    call("cuPointerGetAttributes", ctypes.c_uint(len(_OFFSETS)), _ATTRIBUTES, places, address)
    if found.kind == _DEVICE_MEMORY and found.ordinal != ordinal:
        raise ImageError(expected("frame", f"memory of GPU {ordinal}, where the detector is", f"memory of GPU {found.ordinal}"))
    if found.device_pointer != address:
        raise ImageError(expected("frame", "an address of GPU memory", f"{address:#x}, which is none, or was freed"))
    if found.size and not found.start <= address <= address + nbytes <= found.start + found.size:
        left = found.start + found.size - address
        raise ImageError(expected("frame", f"{nbytes} bytes of GPU memory", f"an allocation of which {left} bytes are left"))


class Order:
    """An event, to let a stream wait for another library's.  The context is current in all calls.  Close it.

    Raises:
        InferenceError: the driver fails.
    """

    def __init__(self) -> None:
        event = ctypes.c_void_p()
        call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(_DISABLE_TIMING))
        self._event = event.value or 0

    def wait(self, stream: int, other: int) -> None:
        """Work that is enqueued on ``stream`` from now on waits for what ``other`` has now; the host waits for nothing.

        Args:
            stream, other: handles; 1 is the legacy default stream, 2 this thread's default stream.

        Raises:
            ImageError: ``other`` is no stream of this context.
            InferenceError: the driver fails.
        """
        code = result("cuEventRecord", self._event, other)
        if code in (_INVALID_HANDLE, _CONTEXT_IS_DESTROYED):
            raise ImageError(expected("frame: __cuda_array_interface__['stream']", "a stream of the detector's GPU", hex(other)))
        check("cuEventRecord", code)
        call("cuStreamWaitEvent", stream, self._event, ctypes.c_uint(0))

    def close(self) -> None:
        """Give it back.  Closing twice is fine, and a lost context takes it along."""
        event, self._event = self._event, 0
        if event:
            result("cuEventDestroy_v2", event)
