"""A set of warps that run together: their registers and where each thread stands.

Every value is an array over the strand's lanes, or of length 1 where all lanes agree.  Lanes that pad the last warp of a CTA, and
threads that have exited, are not *live*: what their registers hold is never looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpu_emulation.errors import UninitialisedRead
from gpu_emulation.formats import Array
from gpu_emulation.parser import Register

if TYPE_CHECKING:
    from gpu_emulation.machine import Batch

# None: every live lane.
Mask = NDArray[np.bool_] | None
Bools = NDArray[np.bool_]

WARP = 32


class Strand:
    """Warps that execute each instruction together where they stand at the same one.

    Attributes:
        batch: the CTAs these warps belong to.
        cta: int32 (n,), linear number of the lane's CTA in the grid.
        slot: int32 (n,), number of the lane's CTA in the batch.
        tid: int32 (n,), linear number of the thread in its CTA.
        thread: int32 (n,), linear number of the thread in the grid.
        row: int32 (n,), number of the lane's warp in the batch.
        live: bool (n,), False for padding and for threads that have exited.
        common: the instruction at which all live threads stand; None where they differ: then ``pc`` holds it for each.
        waiting: int8 (n,), the CTA barrier at which a thread waits, or -1.
        parked: bool (n,), waits for other lanes of its warp at a ``.sync`` instruction.
        executed: int64 (n,), instructions that each thread has executed.
    """

    def __init__(self, batch: Batch, slot: Array, warp: Array) -> None:
        self.batch = batch
        lane = np.arange(WARP, dtype=np.int32)
        self.slot = np.repeat(slot, WARP).astype(np.int32)
        self.tid = (warp[:, None] * WARP + lane).ravel().astype(np.int32)
        self.cta = batch.ctas[self.slot]
        self.n = len(self.slot)
        self.live: Bools = self.tid < batch.threads
        self.live_count = int(np.count_nonzero(self.live))
        self.thread = (self.cta * batch.threads + self.tid).astype(np.int32)
        self.row = (self.slot * batch.warps + self.tid // WARP).astype(np.int32)
        self.common: int | None = 0
        self.pc = np.zeros(self.n, dtype=np.int32)
        self.waiting = np.full(self.n, -1, dtype=np.int8)
        self.parked: Bools = np.zeros(self.n, dtype=bool)
        self.executed = np.zeros(self.n, dtype=np.int64)
        self.values: list[Array | None] = [None] * batch.register_count
        self.partial: dict[int, Bools] = {}  # registers that only some lanes have written
        self.junk: dict[int, int] = {}  # registers with undefined bytes: which, one bit for each byte
        self.carry: Array = np.zeros(1, dtype=np.uint64)
        self.specials: dict[str, Array] = {}
        self.local = np.full(self.n * batch.local_stride, 0xFF, dtype=np.uint8)
        self.local_valid = np.zeros(self.n * batch.local_stride, dtype=bool)
        self.copies = batch.new_copies()

    def lanes(self, mask: Mask) -> Any:
        """What indexes the lanes of a mask."""
        if mask is None:
            return slice(None) if self.live_count == self.n else np.flatnonzero(self.live)
        return np.flatnonzero(mask)

    def bools(self, mask: Mask) -> Bools:
        return self.live if mask is None else mask

    def pick(self, value: Array, lanes: Any) -> Array:
        """A register's value on some lanes: always one element for each."""
        if value.shape[0] == 1 and self.n != 1:
            count = self.n if isinstance(lanes, slice) else len(lanes)
            return np.broadcast_to(value, (count,))
        picked: Array = value[lanes]
        return picked

    def whole(self, value: Array) -> Array:
        """A value over all lanes."""
        return np.broadcast_to(value, (self.n,)) if value.shape[0] == 1 else value

    def read(self, register: Register, mask: Mask, nbytes: int = 8) -> Array:
        """Raw bits of a register, of which the lowest ``nbytes`` bytes are wanted.

        Raises:
            UninitialisedRead: a lane of the mask has not written it.
        """
        value, junk = self.loose(register, mask)
        if value is None:
            raise UninitialisedRead(f"register {register.name} is read before it is written")
        if junk & ((1 << nbytes) - 1):
            raise UninitialisedRead(f"register {register.name} is read, and some of its bytes are undefined")
        return value

    def loose(self, register: Register, mask: Mask) -> tuple[Array | None, int]:
        """A register (None: never written) and which of its bytes are undefined, for instructions that only move bytes about.

        Compilers move and permute undefined bytes that nobody looks at later.
        """
        number = register.number
        value = self.values[number]
        if value is None:
            return None, (1 << max(1, register.type.nbytes)) - 1
        if self.partial and number in self.partial:
            missing = self.bools(mask) & ~self.partial[number]
            if missing.any():
                raise UninitialisedRead(f"register {register.name} is read by {self.who(missing)}, which has not written it")
        return value, self.junk.get(number, 0) if self.junk else 0

    def write(self, register: Register, value: Array, mask: Mask, junk: int = 0) -> None:
        """Sets a register to raw bits on the lanes of the mask; ``junk``: which bytes of them are undefined."""
        number = register.number
        if junk or self.junk:
            if mask is not None and self.values[number] is not None:
                junk |= self.junk.get(number, 0)
            self.junk.pop(number, None)
            if junk:
                self.junk[number] = junk
        if mask is None:
            self.values[number] = value
            if self.partial:
                self.partial.pop(number, None)
            return
        old = self.values[number]
        if old is None:
            old = np.zeros(1, dtype=value.dtype)
            self.partial[number] = mask
        elif number in self.partial:
            self.partial[number] = self.partial[number] | mask
        self.values[number] = np.where(mask, value, old)

    def special(self, name: str, make: Callable[[Strand], Array]) -> Array:
        """A special register, made when it is first read."""
        if name not in self.specials:
            self.specials[name] = make(self)
        return self.specials[name]

    def by_warp(self, flags: Bools) -> Bools:
        """Lane flags as (warps, 32)."""
        return flags.reshape(-1, WARP)

    def who(self, flags: Bools) -> str:
        """The first thread of a mask, in words."""
        at = int(np.flatnonzero(flags)[0])
        return f"thread {int(self.tid[at])} of CTA {int(self.cta[at])}"

    def spread(self) -> None:
        """Gives every thread a position of its own, before the threads part."""
        if self.common is not None:
            self.pc[:] = self.common
            self.common = None

    def runnable(self) -> bool:
        if self.common is not None:
            return self.live_count > 0
        return bool((self.live & (self.waiting < 0) & ~self.parked).any())

    def select(self) -> tuple[int, Mask, int]:
        """The threads to run next: their instruction, which they are, and the next instruction at which others stand.

        The threads that are furthest behind go first, so that those which parted meet again.  Call it only if :meth:`runnable`.
        """
        never = 1 << 30
        if self.common is not None:
            return self.common, None, never
        ready = self.live & (self.waiting < 0) & ~self.parked
        first = int(self.pc[ready].min())
        at = self.live & (self.waiting < 0) & (self.pc == first)
        if self.parked.any():
            at = (self.by_warp(at) & (self.by_warp(at & ~self.parked)).any(axis=1, keepdims=True)).ravel()
            self.parked &= ~at
        if np.count_nonzero(at) == self.live_count:
            self.common = first
            return first, None, never
        others = self.live & ~at & (self.waiting < 0) & (self.pc > first)
        return first, at, int(self.pc[others].min()) if others.any() else never

    def leave(self, mask: Mask) -> None:
        """Threads exit."""
        gone = self.bools(mask)
        self.batch.count_exits(self.slot[gone])
        self.live = self.live & ~gone
        self.live_count = int(np.count_nonzero(self.live))
