"""Which accesses are ordered before which: vector clocks for barriers, and release and acquire between CTAs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpu_emulation.formats import Array
from gpu_emulation.strand import WARP

Threads = NDArray[np.int32]


@dataclass(frozen=True)
class Release:
    """Warps that made their earlier writes visible to other CTAs in one step: their numbers in the grid and what they knew."""

    step: int
    warps: Array
    clocks: Array


class Order:
    """The order of accesses in one launch.

    Steps count executed instructions, so that ``step`` is also a time.  ``clock[w, v]`` is the last step of warp v (of the same
    CTA) that is ordered before what warp w does now; a barrier joins the clocks of those that meet at it.

    Between lanes of one warp only ``bar.warp.sync`` and CTA barriers order accesses, as the PTX memory model says: that a
    warp often runs in step is no promise.  Between CTAs an access is ordered if its CTA released it afterwards (a fence, or
    an atomic with .release or .acq_rel; by the same warp, or one that had met it at a barrier) and the other's CTA then
    acquired (likewise). Which location carried the synchronisation is not looked at, so a pair on two different locations
    passes.  Inside a CTA nothing but barriers orders: flags in memory with fences do not, so such code is reported although
    it may be right.
    """

    def __init__(self, threads: int, warps: int, ctas: int) -> None:
        self.threads = threads
        self.warps = warps
        self.slot_of = np.full(ctas, -1, dtype=np.int32)
        self.releases: list[Release] = []
        self.acquires: list[tuple[int, Array]] = []
        self.clock = np.zeros((0, warps), dtype=np.int32)
        self.lane_sync = np.zeros(0, dtype=np.int32)

    def begin(self, ctas: Array) -> None:
        """Starts a batch of CTAs: nothing of what they will do is ordered yet."""
        self.slot_of[:] = -1
        self.slot_of[ctas] = np.arange(len(ctas))
        self.clock = np.full((len(ctas) * self.warps, self.warps), -1, dtype=np.int32)
        self.lane_sync = np.full(len(ctas) * self.warps * WARP, -1, dtype=np.int32)

    def _rows(self, threads: Threads) -> tuple[Array, Array]:
        """The warp's number in its CTA and in the batch."""
        warp = (threads % self.threads) // WARP
        return warp, self.slot_of[threads // self.threads] * self.warps + warp

    def __call__(self, earlier: Threads, step: Threads, present: Threads) -> NDArray[np.bool_]:
        """See :data:`gpu_emulation.shadow.Ordered`."""
        same = earlier // self.threads == present // self.threads
        result = np.zeros(len(earlier), dtype=bool)
        at = np.flatnonzero(same)
        if at.size:
            warp, row = self._rows(present[at])
            other = (earlier[at] % self.threads) // WARP
            known = self.clock[row, other]
            lane = present[at] % self.threads % WARP
            within = np.where(other == warp, self.lane_sync[row * WARP + lane], -1)
            result[at] = step[at] <= np.maximum(known, within)
        at = np.flatnonzero(~same)
        if at.size and self.acquires and self.releases:
            result[at] = step[at] <= self._across(earlier[at], present[at])
        return result

    def _across(self, earlier: Threads, present: Threads) -> Array:
        """For each pair, the last step of the earlier thread's warp that reached the present thread by release and acquire."""
        pairs = np.stack([self._warp_in_grid(earlier), self._warp_in_grid(present)], axis=1)
        unique, back = np.unique(pairs, axis=0, return_inverse=True)
        return np.array([self._reached(int(a), int(b)) for a, b in unique], dtype=np.int64)[back.ravel()]

    def _warp_in_grid(self, threads: Threads) -> Array:
        return threads // self.threads * self.warps + (threads % self.threads) // WARP

    def _reached(self, earlier: int, present: int) -> int:
        cta, warp = divmod(present, self.warps)
        known = self.clock[self.slot_of[cta] * self.warps + warp]
        acquired = -1
        for step, warps in self.acquires:
            mine = warps[warps // self.warps == cta] % self.warps
            if ((mine == warp) | (known[mine] >= step)).any():
                acquired = max(acquired, step)
        cta, warp = divmod(earlier, self.warps)
        reached = -1
        for release in self.releases:
            if release.step <= acquired:
                at = release.warps // self.warps == cta
                if (release.warps[at] == earlier).any():
                    reached = max(reached, release.step)
                elif at.any():
                    reached = max(reached, int(release.clocks[at, warp].max()))
        return reached

    def release(self, threads: Threads, step: int) -> None:
        warps, first = np.unique(self._warp_in_grid(threads), return_index=True)
        _, rows = self._rows(threads[first])
        self.releases.append(Release(step, warps, self.clock[rows].copy()))

    def acquire(self, threads: Threads, step: int) -> None:
        self.acquires.append((step, np.unique(self._warp_in_grid(threads))))

    def join(self, slots: Array, parties: Array, step: Array) -> None:
        """A barrier completes in some CTAs.

        Args:
            slots: the CTAs' numbers in the batch (k,).
            parties: bool (k, warps), who meets there.
            step: int32 (k, warps), when each arrived.
        """
        clock = self.clock.reshape(-1, self.warps, self.warps)
        known = clock[slots].copy()
        own = np.arange(self.warps)
        known[:, own, own] = np.maximum(known[:, own, own], step)
        joined = np.where(parties[:, :, None], known, -1).max(axis=1)
        clock[slots] = np.where(parties[:, :, None], joined[:, None, :], clock[slots])

    def join_lanes(self, lanes: Array, step: int) -> None:
        """``bar.warp.sync``: lanes by their number in the batch (warp row * 32 + lane)."""
        self.lane_sync[lanes] = step
