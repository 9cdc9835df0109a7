"""DLPack: capsules of real libraries, and frames in the host's memory that are no NumPy arrays."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from device_arrays import Exported, Interface
from numpy.typing import NDArray

from advrad_fast import dlpack
from advrad_fast.errors import ImageError
from advrad_fast.images import check_frame

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


class Plain:
    """An array handed on by its library's own capsule, which is not asked for any stream: it is in the host's memory."""

    def __init__(self, array: Any, *, versioned: bool) -> None:
        self.array, self.versioned = array, versioned

    def __dlpack__(self, *, stream: Any, max_version: Any = None) -> Any:
        return self.array.__dlpack__(**({"max_version": max_version} if self.versioned else {}))


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_capsules_of_real_libraries(library: Any, versioned: bool) -> None:
    source = PIXELS.copy()
    with ExitStack() as lent:
        tensor = dlpack.take(Plain(library(source)[1:, ::2], versioned=versioned), 0, lent)
        assert tensor.device[0] == dlpack.CPU and tensor.dtype == (dlpack.UINT, 8, 1)
        assert tensor.shape == (5, 4, 3) and tensor.strides == (24, 6, 1)
        assert tensor.address == source.ctypes.data + 24
    with ExitStack() as lent:
        assert dlpack.take(Plain(library(source.astype(np.float32)), versioned=versioned), 0, lent).dtype == (2, 32, 1)


@pytest.mark.parametrize("label", [b"dltensor", b"dltensor_versioned"])
def test_memory_is_given_back_once(label: bytes) -> None:
    array = Exported(PIXELS.ctypes.data, PIXELS.shape, label=label, offset=3)
    with ExitStack() as lent:
        tensor = dlpack.take(array, 77, lent)
        assert (tensor.address, tensor.strides) == (PIXELS.ctypes.data + 3, None)
        assert array.streams[-1] == 77 and array.deleted == 0
    assert array.deleted == 1
    with ExitStack() as lent:
        dlpack.take(Exported(PIXELS.ctypes.data, PIXELS.shape, label=label, delete=None), 77, lent)  # a static array


def test_another_major_version() -> None:
    array = Exported(1, (2, 2), major=2)
    with ExitStack() as lent, pytest.raises(ImageError, match=r"expected DLPack 1, got 'version 2.0'"):
        dlpack.take(array, 1, lent)
    assert array.deleted == 1


@pytest.mark.parametrize(
    "frame",
    [
        torch.from_numpy(PIXELS),
        torch.from_numpy(np.asfortranarray(PIXELS)),
        Exported(PIXELS.ctypes.data, PIXELS.shape, device=(dlpack.CPU, 0)),
        Exported(PIXELS.ctypes.data, PIXELS.shape, device=(dlpack.CUDA_HOST, 0)),
    ],
)
def test_frames_in_the_hosts_memory(frame: Any) -> None:
    np.testing.assert_array_equal(check_frame(frame), PIXELS)


def test_the_contract_is_that_of_numpy_arrays() -> None:
    grey: NDArray[np.uint16] = PIXELS[:, :, 0].astype(np.uint16) * 257
    np.testing.assert_array_equal(check_frame(torch.from_numpy(grey)), PIXELS[:, :, :1])
    with pytest.raises(ImageError, match="values in"):
        check_frame(torch.full((4, 4), 2.0))
    for tensor in (torch.zeros(4, 4, dtype=torch.bfloat16), torch.zeros(4, 4, requires_grad=True)):
        with pytest.raises(ImageError, match="Tensor cannot be read through DLPack: "):
            check_frame(tensor)


class Liar:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __dlpack_device__(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize("answer", [RuntimeError("lost"), None, (1,), ("cpu", 0)])
def test_what_does_not_say_where_it_is(answer: Any) -> None:
    with pytest.raises(ImageError, match=r"Liar.__dlpack_device__\(\) failed"):
        check_frame(Liar(answer))


def test_what_is_not_in_the_hosts_memory() -> None:
    with pytest.raises(ImageError, match=r"expected an array in the host's memory, got .*Exported.* on DLPack device \(2, 0\)"):
        check_frame(Exported(4096, (8, 8)))
    for other in (torch.Tensor, Interface(4096, (8, 8)), Interface):
        with pytest.raises(ImageError, match="frame: expected a uint8, uint16 or float"):
            check_frame(other)
