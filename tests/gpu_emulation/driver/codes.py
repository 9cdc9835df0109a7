"""Results of driver calls: numbers, names and the driver's own sentences (as cuda.h of CUDA 13 has them)."""

from __future__ import annotations

import ctypes
from enum import IntEnum


class Code(IntEnum):
    """CUresult, as far as the fake gives or injects it."""

    SUCCESS = 0
    INVALID_VALUE = 1
    OUT_OF_MEMORY = 2
    NOT_INITIALIZED = 3
    DEINITIALIZED = 4
    STUB_LIBRARY = 34
    NO_DEVICE = 100
    INVALID_DEVICE = 101
    INVALID_IMAGE = 200
    INVALID_CONTEXT = 201
    NO_BINARY_FOR_GPU = 209
    ECC_UNCORRECTABLE = 214
    INVALID_PTX = 218
    UNSUPPORTED_PTX_VERSION = 222
    FILE_NOT_FOUND = 301
    INVALID_HANDLE = 400
    NOT_FOUND = 500
    NOT_READY = 600
    ILLEGAL_ADDRESS = 700
    LAUNCH_OUT_OF_RESOURCES = 701
    LAUNCH_TIMEOUT = 702
    CONTEXT_IS_DESTROYED = 709
    HOST_MEMORY_ALREADY_REGISTERED = 712
    HOST_MEMORY_NOT_REGISTERED = 713
    MISALIGNED_ADDRESS = 716
    LAUNCH_FAILED = 719
    NOT_PERMITTED = 800
    NOT_SUPPORTED = 801
    SYSTEM_DRIVER_MISMATCH = 803
    STREAM_CAPTURE_UNSUPPORTED = 900
    STREAM_CAPTURE_INVALIDATED = 901
    STREAM_CAPTURE_MERGE = 902
    STREAM_CAPTURE_UNMATCHED = 903
    STREAM_CAPTURE_UNJOINED = 904
    STREAM_CAPTURE_ISOLATION = 905
    STREAM_CAPTURE_IMPLICIT = 906
    CAPTURED_EVENT = 907
    STREAM_CAPTURE_WRONG_THREAD = 908
    GRAPH_EXEC_UPDATE_FAILURE = 910
    UNKNOWN = 999

    @property
    def symbol(self) -> str:
        return "CUDA_SUCCESS" if self is Code.SUCCESS else f"CUDA_ERROR_{self.name}"


class Sticky(Exception):
    """Work on the device failed: its context is lost, and every later call says so."""

    def __init__(self, code: Code, why: str) -> None:
        super().__init__(f"{code.symbol}: {why}")
        self.code, self.why = code, why


class Refused(Exception):
    """A call that the driver refuses; the reason is kept for the test that wonders."""

    def __init__(self, code: Code, why: str = "") -> None:
        super().__init__(f"{code.symbol}: {why}")
        self.code, self.why = code, why


_SENTENCES = {
    Code.SUCCESS: "no error",
    Code.INVALID_VALUE: "invalid argument",
    Code.OUT_OF_MEMORY: "out of memory",
    Code.NOT_INITIALIZED: "initialization error",
    Code.DEINITIALIZED: "driver shutting down",
    Code.NO_DEVICE: "no CUDA-capable device is detected",
    Code.INVALID_DEVICE: "invalid device ordinal",
    Code.INVALID_IMAGE: "device kernel image is invalid",
    Code.INVALID_CONTEXT: "invalid device context",
    Code.NO_BINARY_FOR_GPU: "no kernel image is available for execution on the device",
    Code.INVALID_PTX: "a PTX JIT compilation failed",
    Code.UNSUPPORTED_PTX_VERSION: "the provided PTX was compiled with an unsupported toolchain.",
    Code.INVALID_HANDLE: "invalid resource handle",
    Code.NOT_FOUND: "named symbol not found",
    Code.NOT_READY: "device not ready",
    Code.ILLEGAL_ADDRESS: "an illegal memory access was encountered",
    Code.LAUNCH_OUT_OF_RESOURCES: "too many resources requested for launch",
    Code.LAUNCH_FAILED: "unspecified launch failure",
    Code.NOT_PERMITTED: "operation not permitted",
    Code.NOT_SUPPORTED: "operation not supported",
    Code.STREAM_CAPTURE_UNSUPPORTED: "operation not permitted when stream is capturing",
    Code.STREAM_CAPTURE_INVALIDATED: "operation failed due to a previous error during capture",
    Code.UNKNOWN: "unknown error",
}

# The driver hands out addresses that live for ever.
_STRINGS: dict[tuple[Code, bool], ctypes.Array[ctypes.c_char]] = {}


def text_address(code: Code, *, name: bool) -> int:
    """Where a code's name, or its sentence, stands in memory for good."""
    words = code.symbol if name else _SENTENCES.get(code, code.name.lower().replace("_", " "))
    return ctypes.addressof(_STRINGS.setdefault((code, name), ctypes.create_string_buffer(words.encode())))
