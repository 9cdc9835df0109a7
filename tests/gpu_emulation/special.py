"""Special registers: their width and their value over a strand's lanes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpu_emulation.formats import Array
from gpu_emulation.strand import WARP, Strand

Make = Callable[[Strand], Array]


def _part(linear: Array, shape: tuple[int, int, int], axis: int) -> Array:
    """A coordinate of a linear number; of length 1 where there is only one."""
    x, y, _ = shape
    if shape[axis] == 1:
        return np.zeros(1, dtype=np.uint32)
    value = (linear % x, linear // x % y, linear // (x * y))[axis]
    return value.astype(np.uint32)


def _constant(value: int, bits: int = 32) -> Array:
    return np.array([value], dtype=f"u{bits // 8}")


def _cta(axis: int) -> Make:
    def make(strand: Strand) -> Array:
        part = _part(strand.cta, strand.batch.grid, axis)
        return part[:1] if len(strand.batch.ctas) == 1 else part

    return make


def _lane(strand: Strand) -> Array:
    return (strand.tid % WARP).astype(np.uint32)


def _below(strand: Strand) -> Array:
    return (np.uint64(1) << _lane(strand).astype(np.uint64)).astype(np.uint32)


SPECIAL: dict[str, tuple[int, Make]] = {
    "%laneid": (32, _lane),
    "%warpid": (32, lambda strand: (strand.tid // WARP).astype(np.uint32)),
    "%nwarpid": (32, lambda strand: _constant(strand.batch.warps)),
    "%lanemask_eq": (32, _below),
    "%lanemask_lt": (32, lambda strand: _below(strand) - np.uint32(1)),
    "%lanemask_le": (32, lambda strand: (_below(strand) - np.uint32(1)) | _below(strand)),
    "%lanemask_gt": (32, lambda strand: ~((_below(strand) - np.uint32(1)) | _below(strand))),
    "%lanemask_ge": (32, lambda strand: ~(_below(strand) - np.uint32(1))),
    "%dynamic_smem_size": (32, lambda strand: _constant(strand.batch.dynamic_shared)),
    "%total_smem_size": (32, lambda strand: _constant(strand.batch.shared_bytes)),
    "WARP_SZ": (32, lambda strand: _constant(WARP)),
}


def _of_block(axis: int) -> Make:
    return lambda strand: _constant(strand.batch.block[axis])


def _of_grid(axis: int) -> Make:
    return lambda strand: _constant(strand.batch.grid[axis])


def _tid(axis: int) -> Make:
    return lambda strand: _part(strand.tid, strand.batch.block, axis)


for _axis, _letter in enumerate("xyz"):
    SPECIAL[f"%tid.{_letter}"] = (32, _tid(_axis))
    SPECIAL[f"%ntid.{_letter}"] = (32, _of_block(_axis))
    SPECIAL[f"%ctaid.{_letter}"] = (32, _cta(_axis))
    SPECIAL[f"%nctaid.{_letter}"] = (32, _of_grid(_axis))
