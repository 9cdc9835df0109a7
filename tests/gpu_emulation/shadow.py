"""Who touched what: the record behind the race errors, one for each block of memory and launch.

The method is that of dynamic race detectors (FastTrack, Flanagan and Freund, PLDI 2009) on CUDA's threads: for each *granule* of
memory the last writer and the last reader with the step in which they did it, and a rule that says whether an earlier access of
another thread is ordered before the present one (:class:`gpu_emulation.machine.Order`).  So a race is found from what orders the
accesses, not from what happened to come first: it is found in every order of warps.

Granules start 16 bytes wide and are halved when a narrower access comes, so that a byte is tracked where bytes are used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpu_emulation.formats import Array

Ints = NDArray[np.int64]
Threads = NDArray[np.int32]

# (earlier thread, its step, present thread) -> which earlier accesses are ordered before the present ones
Ordered = Callable[[Threads, Threads, Threads], NDArray[np.bool_]]

NOBODY = -1


@dataclass(frozen=True)
class Conflict:
    """One unordered pair: the byte offset in the block, the two threads, and what each did."""

    offset: int
    thread: int
    other: int
    what: str


class Shadow:
    """The accesses to one block of memory of ``nbytes`` bytes in one launch."""

    def __init__(self, nbytes: int) -> None:
        self.granule = 16
        count = -(-nbytes // 16)
        self.writer = np.full(count, NOBODY, dtype=np.int32)
        self.write_step = np.zeros(count, dtype=np.int32)
        self.write_strong = np.zeros(count, dtype=bool)
        self.reader = np.full(count, NOBODY, dtype=np.int32)
        self.read_step = np.zeros(count, dtype=np.int32)
        self.read_strong = np.zeros(count, dtype=bool)
        self.several = np.zeros(count, dtype=bool)  # the last reader is one of several that nothing orders

    def bytes_read(self) -> int:
        return int(np.count_nonzero(self.reader != NOBODY)) * self.granule

    def bytes_written(self) -> int:
        return int(np.count_nonzero(self.writer != NOBODY)) * self.granule

    def _refine(self, width: int) -> None:
        times = self.granule // width
        for name in ("writer", "write_step", "write_strong", "reader", "read_step", "read_strong", "several"):
            setattr(self, name, np.repeat(getattr(self, name), times))
        self.granule = width

    def cells(self, offsets: Ints, width: int) -> tuple[Array, int]:
        """The granules of accesses at byte ``offsets``, flat, and how many belong to each access."""
        if width < self.granule:
            self._refine(width)
        each = width // self.granule
        first = offsets // self.granule
        return (first if each == 1 else (first[:, None] + np.arange(each)).ravel()), each

    def unwritten(self, offsets: Ints, width: int) -> NDArray[np.bool_]:
        """Which accesses read a byte that nobody wrote in this launch."""
        cells, each = self.cells(offsets, width)
        missing: NDArray[np.bool_] = (self.writer[cells] == NOBODY).reshape(-1, each).any(axis=1)
        return missing

    def read(self, offsets: Ints, width: int, threads: Threads, step: int, ordered: Ordered, *, strong: bool) -> Conflict | None:
        """Notes reads; the first conflict with an earlier write, if there is one."""
        cells, each = self.cells(offsets, width)
        threads = np.repeat(threads, each) if each > 1 else threads
        conflict = self._with_writers(cells, threads, ordered, strong=strong)
        if conflict.size:
            return self._describe(cells, threads, int(conflict[0]), self.writer, "a read", "a write")
        before = self.reader[cells]
        if (before == NOBODY).all():
            self.several[cells] = False
        else:
            same = before == threads
            foreign = (before != NOBODY) & ~same
            several = np.zeros(len(cells), dtype=bool)
            at = np.flatnonzero(foreign)
            several[at] = ~ordered(before[at], self.read_step[cells[at]], threads[at])
            at = np.flatnonzero(same & self.several[cells])
            several[at] = ~ordered(threads[at], self.read_step[cells[at]], threads[at])
            self.several[cells] = several
        self.reader[cells] = threads
        self.read_step[cells] = step
        self.read_strong[cells] = strong
        shared = self.reader[cells] != threads  # two lanes of this very instruction
        if shared.any():
            self.several[cells[shared]] = True
        return None

    def write(
        self,
        offsets: Ints,
        width: int,
        threads: Threads,
        step: int,
        ordered: Ordered,
        *,
        strong: bool,
        unchanged: Callable[[], NDArray[np.bool_]],
    ) -> Conflict | None:
        """Notes writes; the first conflict with an earlier read or write, if there is one.

        Args:
            unchanged: which accesses write what stands there already.  Those may come after another write: compilers let several
                threads store one value that all of them hold.
        """
        cells, each = self.cells(offsets, width)
        threads = np.repeat(threads, each) if each > 1 else threads
        before = self.reader[cells]
        candidates = np.flatnonzero((before != NOBODY) & ((before != threads) | self.several[cells]))
        if strong:
            candidates = candidates[~self.read_strong[cells[candidates]]]
        if candidates.size:
            races = candidates[~ordered(before[candidates], self.read_step[cells[candidates]], threads[candidates])]
            if races.size:
                return self._describe(cells, threads, int(races[0]), self.reader, "a write", "a read")
        races = self._with_writers(cells, threads, ordered, strong=strong)
        if races.size:
            races = races[~np.repeat(unchanged(), each)[races]]
        if races.size:
            return self._describe(cells, threads, int(races[0]), self.writer, "a write", "a write")
        self.writer[cells] = threads
        self.write_step[cells] = step
        self.write_strong[cells] = strong
        return None

    def collisions(self, offsets: Ints, width: int, threads: Threads) -> Array:
        """Which accesses of the write just noted were overwritten by another thread of the same instruction (their numbers)."""
        cells, each = self.cells(offsets, width)
        return np.flatnonzero((self.writer[cells].reshape(-1, each) != threads[:, None]).any(axis=1))

    def _with_writers(self, cells: Array, threads: Threads, ordered: Ordered, *, strong: bool) -> Array:
        before = self.writer[cells]
        candidates = np.flatnonzero((before != NOBODY) & (before != threads))
        if strong and candidates.size:
            candidates = candidates[~self.write_strong[cells[candidates]]]
        if not candidates.size:
            return candidates
        return candidates[~ordered(before[candidates], self.write_step[cells[candidates]], threads[candidates])]

    def _describe(self, cells: Array, threads: Threads, at: int, others: Threads, mine: str, theirs: str) -> Conflict:
        cell = int(cells[at])
        return Conflict(cell * self.granule, int(threads[at]), int(others[cell]), f"{mine} after {theirs}")
