"""Triton kernels that show what the device functions of kernels/philox.py give; for the interpreter's process."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from advrad_fast.kernels.philox import box_muller, lattice_value, philox4x32


@triton.jit
def _philox(c0, c1, c2, c3, key, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    m = i < n
    k = tl.load(key).to(tl.uint64)
    r0, r1, r2, r3 = philox4x32(
        tl.load(c0 + i, mask=m).to(tl.uint32), tl.load(c1 + i, mask=m).to(tl.uint32), tl.load(c2 + i, mask=m).to(tl.uint32),
        tl.load(c3 + i, mask=m).to(tl.uint32), k.to(tl.uint32), (k >> 32).to(tl.uint32),
    )  # fmt: skip
    tl.store(out + 4 * i, r0.to(tl.int32, bitcast=True), mask=m)
    tl.store(out + 4 * i + 1, r1.to(tl.int32, bitcast=True), mask=m)
    tl.store(out + 4 * i + 2, r2.to(tl.int32, bitcast=True), mask=m)
    tl.store(out + 4 * i + 3, r3.to(tl.int32, bitcast=True), mask=m)


@triton.jit
def _normals(r0, r1, first, second, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    m = i < n
    a, b = box_muller(
        tl.load(r0 + i, mask=m, other=0).to(tl.uint32, bitcast=True), tl.load(r1 + i, mask=m, other=0).to(tl.uint32, bitcast=True)
    )
    tl.store(first + i, a, mask=m)
    tl.store(second + i, b, mask=m)


@triton.jit
def _lattice(high, low, thresholds, half, scale, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    m = i < n
    h = tl.load(high + i, mask=m, other=0).to(tl.uint32, bitcast=True)
    value = lattice_value(h, tl.load(low + i, mask=m, other=0).to(tl.uint32, bitcast=True), thresholds, half, scale)
    tl.store(out + i, value, mask=m)


def _signed(words: NDArray[np.uint32]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32).copy())


def philox(counter: NDArray[np.uint32], key: int) -> NDArray[np.uint32]:
    n = len(counter)
    out = torch.zeros(4 * n, dtype=torch.int32)
    keys = torch.from_numpy(np.array([key], np.uint64).view(np.int64))
    _philox[(1,)](*(_signed(counter[:, i]) for i in range(4)), keys, out, n, BLOCK=triton.next_power_of_2(n))
    return out.numpy().view(np.uint32).reshape(n, 4)


def normals(r0: NDArray[np.uint32], r1: NDArray[np.uint32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    a, b = torch.full((len(r0),), float("nan")), torch.full((len(r0),), float("nan"))
    _normals[(1,)](_signed(r0), _signed(r1), a, b, len(r0), BLOCK=triton.next_power_of_2(len(r0)))
    return a.numpy(), b.numpy()


def lattice(u: NDArray[np.uint64], table: NDArray[np.uint64], sigma: float) -> NDArray[np.int32]:
    out = torch.zeros(len(u), dtype=torch.int32)
    high, low = (u >> np.uint64(28)).astype(np.uint32), (u << np.uint64(4)).astype(np.uint32)
    thresholds = torch.from_numpy(table.astype(np.int64))
    _lattice[(1,)](
        _signed(high), _signed(low), thresholds, len(table) // 2, 255 * sigma, out, len(u), BLOCK=triton.next_power_of_2(len(u))
    )
    return out.numpy()
