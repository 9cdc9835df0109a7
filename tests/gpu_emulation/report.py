"""What a launch did, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Traffic:
    """One direction of one memory.

    Attributes:
        widths: accesses by width in bits, one for each thread that made one (128: a 16-byte vector access).
        unique: distinct bytes touched in the launch.
    """

    widths: Mapping[int, int]
    unique: int

    @property
    def requested(self) -> int:
        """Bytes asked for by all threads together."""
        return sum(bits // 8 * count for bits, count in self.widths.items())

    @property
    def accesses(self) -> int:
        return sum(self.widths.values())


@dataclass(frozen=True)
class Report:
    """One launch.

    Attributes:
        instructions: executions by instruction ("fma.rn.f32"), one for each thread for which the guard held.
        warp_instructions: issues by instruction, one for each warp of which some thread was there, whatever the guard.
        thread_totals: int64 (CTAs, threads), instructions that each thread executed.
        loaded, stored, atomics: global memory; ``atomics.unique`` is counted in ``stored``, not again.
        shared_loaded, shared_stored: shared memory; ``unique`` is not counted there (0).
        barriers: CTA barriers completed, summed over CTAs.
    """

    instructions: Counter[str]
    warp_instructions: Counter[str]
    thread_totals: NDArray[np.int64]
    loaded: Traffic
    stored: Traffic
    atomics: Traffic
    shared_loaded: Traffic
    shared_stored: Traffic
    barriers: int

    def opcodes(self) -> Counter[str]:
        """``instructions`` without modifiers: "ld", "fma"."""
        result: Counter[str] = Counter()
        for name, count in self.instructions.items():
            result[name.split(".")[0]] += count
        return result

    @property
    def bytes_moved(self) -> int:
        """Distinct global bytes read plus distinct bytes written: what a memory behind a perfect cache has to move."""
        return self.loaded.unique + self.stored.unique
