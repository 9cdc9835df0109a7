"""Loads, stores, atomics and asynchronous copies of a batch, with every check that they pass.

An access is checked for alignment, for bounds, for bytes that nobody has written, and for races (:mod:`gpu_emulation.shadow`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_emulation.errors import EmulationError, GlobalRace, MemoryFault, Misaligned, SharedRace, UninitialisedRead
from gpu_emulation.formats import UNSIGNED, Array
from gpu_emulation.memory import POISON, WIDEST, Allocation
from gpu_emulation.shadow import Conflict, Shadow
from gpu_emulation.strand import Mask, Strand

if TYPE_CHECKING:
    from gpu_emulation.machine import Batch

# (what stands there, operands) -> what shall stand there
Update = Callable[[Array, list[Array]], Array]


@dataclass
class GlobalTraffic:
    """Accesses to global memory by width in bytes, one for each thread that made one."""

    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    atomics: Counter[int] = field(default_factory=Counter)
    shared_loads: Counter[int] = field(default_factory=Counter)
    shared_stores: Counter[int] = field(default_factory=Counter)


@dataclass
class AsyncCopy:
    """One cp.async of some lanes, not yet waited for: the bytes stand ready, shared memory still holds poison."""

    lanes: Array
    group: Array
    offsets: Array
    data: Array


@dataclass
class AsyncCopies:
    """The copies that a strand has begun; ``committed``: groups that each lane has closed."""

    pending: list[AsyncCopy] = field(default_factory=list)
    committed: Array | None = None


def take(data: Array, offsets: Array, width: int, count: int) -> Array:
    """``count`` words of ``width // count`` bytes at each byte offset: (n, count)."""
    word = UNSIGNED[width // count * 8]
    if not (offsets % width).any():
        rows: Array = data[: len(data) // width * width].view(word).reshape(-1, count)[offsets // width]
        return rows
    return data[offsets[:, None] + np.arange(width)].view(word)  # host memory that starts anywhere


def put(data: Array, offsets: Array, width: int, words: Array) -> None:
    """Writes rows of words (n, count) at byte offsets."""
    if not (offsets % width).any():
        data[: len(data) // width * width].view(words.dtype).reshape(-1, words.shape[1])[offsets // width] = words
    else:
        data[offsets[:, None] + np.arange(width)] = np.ascontiguousarray(words).view(np.uint8)


@dataclass(frozen=True)
class Place:
    """Where some lanes' accesses land: bytes, which of them were written, who touched them, and for which lanes."""

    space: str
    data: Array
    valid: Array | None  # None: all are
    shadow: Shadow | None
    which: Any  # of the lanes of the access
    offsets: Array
    shadow_offsets: Array
    base: int  # address of data[0], for messages


class Access:
    """The memory of a batch, as its instructions see it."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.launch = batch.launch
        self.traffic = batch.launch.counts.traffic
        self.stride = -(-batch.shared_bytes // WIDEST) * WIDEST
        self.shared = np.full(self.stride * len(batch.ctas), POISON, dtype=np.uint8)
        self.shared_shadow = Shadow(len(self.shared))

    # Where an access lands.

    def _places(self, strand: Strand, space: str, addresses: Array, width: int, lanes: Any) -> list[Place]:
        odd = addresses % np.uint64(width) != 0
        if odd.any():
            raise Misaligned(f"{width} bytes at {space} address {int(addresses[odd][0]):#x}")
        if space == "shared":
            self._bounds(addresses, width, self.batch.shared_bytes, space)
            offsets = addresses.astype(np.int64) + strand.slot[lanes].astype(np.int64) * self.stride
            return [Place(space, self.shared, None, self.shared_shadow, slice(None), offsets, offsets, 0)]
        if space == "local":
            size = self.batch.local_bytes
            self._bounds(addresses, width, size, space)
            lane = np.arange(strand.n)[lanes]
            offsets = addresses.astype(np.int64) + lane * self.batch.local_stride
            return [Place(space, strand.local, strand.local_valid.view(np.uint8), None, slice(None), offsets, offsets, 0)]
        if space == "param":
            self._bounds(addresses, width, self.batch.parameter_bytes, space)
            offsets = addresses.astype(np.int64)
            return [Place(space, self.batch.parameters, None, None, slice(None), offsets, offsets, 0)]
        found = []
        for allocation, which, offsets in self.launch.memory.split(addresses, width):
            shift = allocation.address % 16
            found.append(
                Place(
                    "global",
                    allocation.data,
                    None if allocation.is_written() else allocation.valid,
                    self._shadow(allocation),
                    which,
                    offsets,
                    offsets + shift,
                    allocation.address,
                )
            )
        return found

    def _bounds(self, addresses: Array, width: int, size: int, space: str) -> None:
        outside = addresses > np.uint64(max(size - width, 0)) if size >= width else np.ones(len(addresses), bool)
        if outside.any():
            address = int(addresses[outside][0])
            raise MemoryFault(
                "out of bounds", address=address, nbytes=width, space=space, nearest=f"{size} bytes of {space} memory"
            )

    def outside(self, offset: int, width: int) -> MemoryFault:
        """The error of a parameter access that no parameter holds."""
        size = self.batch.parameter_bytes
        return MemoryFault("out of bounds", address=offset, nbytes=width, space="param", nearest=f"{size} bytes of parameters")

    def _shadow(self, allocation: Allocation) -> Shadow:
        shadows = self.launch.shadows
        if allocation.address not in shadows:
            shadows[allocation.address] = Shadow(allocation.nbytes + allocation.address % 16)
        return shadows[allocation.address]

    # Errors.

    def _thread(self, thread: int) -> str:
        cta, tid = divmod(thread, self.batch.threads)
        return f"thread {tid} of CTA {cta}"

    def _race(self, place: Place, conflict: Conflict) -> EmulationError:
        kind = SharedRace if place.space == "shared" else GlobalRace
        offset = conflict.offset % self.stride if place.space == "shared" else conflict.offset - place.base % 16
        pair = f"{self._thread(conflict.thread)} and {self._thread(conflict.other)}"
        return kind(f"{conflict.what} with nothing between them: {pair} at {place.space} address {place.base + offset:#x}")

    # Accesses.

    def load(
        self,
        strand: Strand,
        space: str,
        address: Array,
        width: int,
        count: int,
        mask: Mask,
        *,
        strong: bool,
        coherent: bool = True,
    ) -> list[Array]:
        """Loads ``count`` words of ``width // count`` bytes for each lane of the mask: for each word an array over all lanes."""
        lanes = strand.lanes(mask)
        addresses = strand.pick(address, lanes)
        if space == "global":
            self.traffic.loads[width] += len(addresses)
        elif space == "shared":
            self.traffic.shared_loads[width] += len(addresses)
        rows = self._load(strand, space, addresses, width, count, lanes, strong=strong, coherent=coherent)
        if isinstance(lanes, slice):
            return [np.ascontiguousarray(rows[:, i]) for i in range(count)]
        results = []
        for i in range(count):
            result = np.zeros(strand.n, dtype=rows.dtype)
            result[lanes] = rows[:, i]
            results.append(result)
        return results

    def _load(
        self, strand: Strand, space: str, addresses: Array, width: int, count: int, lanes: Any, *, strong: bool, coherent: bool
    ) -> Array:
        threads = strand.thread[lanes]
        rows: Array | None = None
        for place in self._places(strand, space, addresses, width, lanes):
            self._check_written(place, width, threads)
            if place.shadow is not None:
                if not coherent and not place.shadow.unwritten(place.shadow_offsets, width).all():
                    raise GlobalRace("a load by .nc of bytes that this launch writes: their old or new value, nobody knows")
                conflict = place.shadow.read(
                    place.shadow_offsets, width, threads[place.which], self.launch.step, self.batch.order, strong=strong
                )
                if conflict is not None:
                    raise self._race(place, conflict)
            part = take(place.data, place.offsets, width, count)
            if len(part) == len(addresses):
                return part
            if rows is None:
                rows = np.zeros((len(addresses), count), dtype=part.dtype)
            rows[place.which] = part
        assert rows is not None
        return rows

    def _check_written(self, place: Place, width: int, threads: Array) -> None:
        if place.space == "shared":
            missing = self.shared_shadow.unwritten(place.shadow_offsets, width)
        elif place.valid is not None:
            missing = (take(place.valid, place.offsets, width, width) == 0).any(axis=1)
        else:
            return
        if missing.any():
            at = int(np.flatnonzero(missing)[0])
            offset = int(place.offsets[at]) % (self.stride if place.space == "shared" else 1 << 62)
            who = self._thread(int(threads[place.which][at]))
            raise UninitialisedRead(f"{who} reads {width} bytes at {place.space} address {place.base + offset:#x}: never written")

    def store(
        self, strand: Strand, space: str, address: Array, width: int, words: list[Array], mask: Mask, *, strong: bool
    ) -> None:
        """Stores one word from each array of ``words`` side by side for each lane of the mask."""
        lanes = strand.lanes(mask)
        addresses = strand.pick(address, lanes)
        if space == "global":
            self.traffic.stores[width] += len(addresses)
        elif space == "shared":
            self.traffic.shared_stores[width] += len(addresses)
        rows = np.stack([strand.pick(word, lanes) for word in words], axis=1)
        self._store(strand, space, addresses, width, rows, lanes, strong=strong)

    def _store(self, strand: Strand, space: str, addresses: Array, width: int, rows: Array, lanes: Any, *, strong: bool) -> None:
        threads = strand.thread[lanes]
        count = rows.shape[1]
        for place in self._places(strand, space, addresses, width, lanes):
            mine = rows[place.which]
            if place.shadow is not None:
                self._note_write(place, width, threads[place.which], mine, strong=strong)
            put(place.data, place.offsets, width, mine)
            if place.valid is not None:
                put(place.valid, place.offsets, width, np.ones((len(mine), width), dtype=np.uint8))
            if place.shadow is not None and not strong:
                again = place.shadow.collisions(place.shadow_offsets, width, threads[place.which])
                if again.size:  # equal values do no harm
                    again = again[(take(place.data, place.offsets[again], width, count) != mine[again]).any(axis=1)]
                if again.size:
                    thread = int(threads[place.which][again[0]])
                    offset = int(place.shadow_offsets[again[0]])
                    cells, _ = place.shadow.cells(place.shadow_offsets[again[:1]], width)
                    others = place.shadow.writer[cells]
                    other = int(others[others != thread][0])
                    raise self._race(place, Conflict(offset, thread, other, "a write beside a write"))

    def _note_write(self, place: Place, width: int, threads: Array, rows: Array, *, strong: bool) -> None:
        assert place.shadow is not None

        def unchanged() -> Array:
            same: Array = (take(place.data, place.offsets, width, rows.shape[1]) == rows).all(axis=1)
            return same

        conflict = place.shadow.write(
            place.shadow_offsets,
            width,
            threads,
            self.launch.step,
            self.batch.order,
            strong=strong,
            unchanged=unchanged,
        )
        if conflict is not None:
            raise self._race(place, conflict)

    def atomic(
        self, strand: Strand, space: str, address: Array, width: int, update: Update, operands: list[list[Array]], mask: Mask
    ) -> list[Array]:
        """Reads, updates and writes back, one lane after the other where they share an address.

        Args:
            operands: for each operand, one array a word.

        Returns:
            What stood there before: one array over the strand's lanes for each word.
        """
        lanes = strand.lanes(mask)
        addresses = strand.pick(address, lanes)
        if space == "global":
            self.traffic.atomics[width] += len(addresses)
        rows = [np.stack([strand.pick(word, lanes) for word in words], axis=1) for words in operands]
        count = rows[0].shape[1]
        old = np.zeros((len(addresses), count), dtype=UNSIGNED[width // count * 8])
        threads = strand.thread[lanes]
        for place in self._places(strand, space, addresses, width, lanes):
            self._check_written(place, width, threads)
            assert place.shadow is not None
            self._note_write(place, width, threads[place.which], rows[0][place.which], strong=True)
            here = np.arange(len(addresses))[place.which]
            for turn in self._turns(place.offsets):
                before = take(place.data, place.offsets[turn], width, count)
                after = update(before.ravel(), [row[here[turn]].ravel() for row in rows]).reshape(-1, count)
                put(place.data, place.offsets[turn], width, after.view(before.dtype))
                old[here[turn]] = before
        results = []
        for i in range(count):
            result = np.zeros(strand.n, dtype=old.dtype)
            result[lanes] = old[:, i]
            results.append(result)
        return results

    def _turns(self, offsets: Array) -> list[Array]:
        """Numbers of the accesses in turns, no address twice in a turn; the seed shuffles who comes first."""
        generator = self.launch.generator
        order = np.arange(len(offsets)) if generator is None else generator.permutation(len(offsets))
        order = order[np.argsort(offsets[order], kind="stable")]
        ranked = offsets[order]
        first = np.r_[True, ranked[1:] != ranked[:-1]]
        start = np.maximum.accumulate(np.where(first, np.arange(len(ranked)), 0))
        rank = np.arange(len(ranked)) - start
        by_rank = np.argsort(rank, kind="stable")
        return np.split(order[by_rank], np.cumsum(np.bincount(rank))[:-1])

    # Asynchronous copies.

    def copy_async(self, strand: Strand, shared: Array, source: Array, width: int, size: Array, mask: Mask) -> None:
        """cp.async: the global bytes are read now and reach shared memory when they are waited for; until then it is poison."""
        lanes = strand.lanes(mask)
        where, sizes = strand.pick(shared, lanes), strand.pick(size, lanes)
        data = np.zeros((len(where), width), dtype=np.uint8)
        number = np.arange(strand.n)[lanes]
        for length in np.unique(sizes):
            if int(length) > width:
                raise MemoryFault(
                    "cp.async of more bytes than its size", address=int(where[0]), nbytes=int(length), space="shared"
                )
            if length:
                some = sizes == length
                addresses = strand.pick(source, lanes)[some]
                self.traffic.loads[int(length)] += len(addresses)
                part = self._load(strand, "global", addresses, int(length), 1, number[some], strong=False, coherent=True)
                data[some, : int(length)] = np.ascontiguousarray(part).view(np.uint8)
        poison = np.full((len(where), width), POISON, dtype=np.uint8)
        self._store(strand, "shared", where, width, poison, number, strong=False)
        copies = strand.copies
        if copies.committed is None:
            copies.committed = np.zeros(strand.n, dtype=np.int64)
        copies.pending.append(AsyncCopy(number, copies.committed[number], where, data))

    def commit(self, strand: Strand, mask: Mask) -> None:
        if strand.copies.committed is None:
            strand.copies.committed = np.zeros(strand.n, dtype=np.int64)
        strand.copies.committed[strand.bools(mask)] += 1

    def wait(self, strand: Strand, newest: int, mask: Mask) -> None:
        """Completes all groups but the ``newest``; -1: also copies in no group."""
        copies = strand.copies
        if copies.committed is None:
            return
        left = []
        for copy in copies.pending:
            due = strand.bools(mask)[copy.lanes] & (copy.group < copies.committed[copy.lanes] - newest)
            if due.any():
                width = copy.data.shape[1]
                self.traffic.shared_stores[width] += int(due.sum())
                self._store(strand, "shared", copy.offsets[due], width, copy.data[due], copy.lanes[due], strong=False)
            if not due.all():
                keep = ~due
                left.append(AsyncCopy(copy.lanes[keep], copy.group[keep], copy.offsets[keep], copy.data[keep]))
        copies.pending = left
