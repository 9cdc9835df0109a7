"""Runs one launch: CTAs in batches, warps in strands, barriers, and the order in which all of that happens.

Without an order seed all warps of a batch form one strand: they run in step where they stand at the same instruction, which is
quick.  With a seed the CTAs are shuffled into batches of random size, each warp of a CTA goes to a strand of its own (so that the
arrays stay long: one warp of every CTA), and the strands take turns of random length between barriers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gpu_emulation.access import Access, AsyncCopies, GlobalTraffic
from gpu_emulation.errors import BarrierDeadlock, EmulationError, NoProgress
from gpu_emulation.formats import Array
from gpu_emulation.memory import WIDEST, Memory
from gpu_emulation.order import Order
from gpu_emulation.parser import Instruction
from gpu_emulation.rules import Control, Step
from gpu_emulation.shadow import Shadow
from gpu_emulation.strand import WARP, Bools, Mask, Strand

BATCH_LANES = 1 << 16  # more gain nothing and leave the processor's cache
STEP_LIMIT = 20_000_000
BARRIERS = 16


@dataclass(frozen=True)
class Code:
    """An entry, ready to run."""

    instructions: Sequence[Instruction]
    steps: Sequence[Step | Control]
    register_count: int
    local_bytes: int


@dataclass
class Counts:
    """What :class:`gpu_emulation.report.Report` is made of."""

    threads: Array  # thread-level executions by instruction
    warps: Array  # warp-level issues by instruction
    per_thread: Array  # by thread of the grid
    barriers: int = 0
    traffic: GlobalTraffic = field(default_factory=GlobalTraffic)


@dataclass
class Launch:
    """What all batches of a launch share."""

    code: Code
    memory: Memory
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    parameters: Array  # padded
    parameter_bytes: int
    symbols: Mapping[str, int]
    shared_bytes: int
    dynamic_shared: int
    generator: np.random.Generator | None
    step_limit: int = STEP_LIMIT

    def __post_init__(self) -> None:
        self.ctas = int(np.prod(self.grid))
        self.threads = int(np.prod(self.block))
        self.warps = -(-self.threads // WARP)
        self.order = Order(self.threads, self.warps, self.ctas)
        count = len(self.code.instructions)
        self.counts = Counts(np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(self.ctas * self.threads, np.int64))
        self.shadows: dict[int, Shadow] = {}
        self.step = 0

    def run(self) -> Counts:
        size = max(1, BATCH_LANES // (self.warps * WARP))
        order = np.arange(self.ctas, dtype=np.int32)
        if self.generator is not None:
            order = self.generator.permutation(order)
        start = 0
        while start < self.ctas:
            count = size if self.generator is None else int(self.generator.integers(1, min(size, self.ctas) + 1))
            Batch(self, order[start : start + count]).run()
            start += count
        return self.counts


class Batch:
    """Some CTAs that run at the same time."""

    def __init__(self, launch: Launch, ctas: Array) -> None:
        self.launch = launch
        self.ctas = ctas
        self.threads: int = launch.threads
        self.warps: int = launch.warps
        self.grid, self.block = launch.grid, launch.block
        self.symbols, self.parameters = launch.symbols, launch.parameters
        self.register_count, self.local_bytes = launch.code.register_count, launch.code.local_bytes
        self.local_stride = -(-self.local_bytes // WIDEST) * WIDEST
        self.parameter_bytes = launch.parameter_bytes
        self.shared_bytes: int = launch.shared_bytes
        self.dynamic_shared: int = launch.dynamic_shared
        self.order = launch.order
        self.order.begin(ctas)
        self.access = Access(self)
        count = len(ctas)
        self.live = np.full(count, self.threads, dtype=np.int64)
        self.arrived = np.zeros((BARRIERS, count), dtype=np.int64)
        self.expected = np.zeros((BARRIERS, count), dtype=np.int64)  # 0: all threads that have not exited
        self.parties = np.zeros((BARRIERS, count, self.warps), dtype=bool)
        self.arrival = np.zeros((count, self.warps), dtype=np.int32)
        self.strands = self._strands()

    def _strands(self) -> list[Strand]:
        count, generator = len(self.ctas), self.launch.generator
        if generator is None:
            return [Strand(self, np.repeat(np.arange(count), self.warps), np.tile(np.arange(self.warps), count))]
        warps = generator.permuted(np.tile(np.arange(self.warps), (count, 1)), axis=1)
        return [Strand(self, np.arange(count), warps[:, i]) for i in range(self.warps)]

    def new_copies(self) -> AsyncCopies:
        return AsyncCopies()

    def run(self) -> None:
        generator = self.launch.generator
        while True:
            ready = [strand for strand in self.strands if strand.runnable()]
            if not ready:
                break
            if generator is None:
                self.turn(ready[0], 1 << 30)
            else:
                whole = generator.random() < 0.5
                self.turn(ready[int(generator.integers(len(ready)))], 1 << 30 if whole else int(generator.integers(1, 33)))
        if self.live.any():
            raise BarrierDeadlock(self._stuck())
        for strand in self.strands:
            real = strand.tid < self.threads
            self.launch.counts.per_thread[strand.thread[real]] = strand.executed[real]

    def _stuck(self) -> str:
        """Who waits for what, when nobody can go on."""
        slot = int(np.flatnonzero(self.live)[0])
        words = []
        for strand in self.strands:
            if (strand.parked & (strand.slot == slot)).any():
                at = int(np.flatnonzero(strand.parked & (strand.slot == slot))[0])
                line = self.launch.code.instructions[int(strand.pc[at])].line
                words.append(f"thread {int(strand.tid[at])} waits at line {line} for lanes of its warp that never come")
        for number in np.flatnonzero(self.arrived[:, slot]):
            wanted = self.expected[number, slot] or self.live[slot]
            words.append(f"{self.arrived[number, slot]} of {wanted} threads have come to barrier {number}")
        return f"CTA {int(self.ctas[slot])}: {'; '.join(words)}; {self.live[slot]} threads are alive and none can go on"

    def turn(self, strand: Strand, budget: int) -> None:
        """Runs a strand until its threads wait or exit, or ``budget`` instructions are done."""
        while budget > 0 and strand.runnable():
            first, at, stop = strand.select()
            budget -= self._straight(strand, first, at, stop, budget)

    def _straight(self, strand: Strand, first: int, at: Mask, stop: int, budget: int) -> int:
        """Runs the threads ``at`` from instruction ``first`` up to where they part, wait, or meet others at ``stop``."""
        launch, code = self.launch, self.launch.code
        active = strand.live_count if at is None else int(np.count_nonzero(at))
        here, end = first, min(first + budget, len(code.steps))
        flags = strand.bools(at)
        control: Control | None = None
        mask: Mask | _Nobody = at
        while here < end and here != stop:
            step = code.steps[here]
            instruction = code.instructions[here]
            launch.step += 1
            try:
                mask = at
                if instruction.guard is not None:
                    mask = self._guard(strand, instruction, at, active, here)
                if isinstance(step, Control):
                    control = step
                    here += 1
                    break
                if not isinstance(mask, _Nobody):
                    step(strand, mask)
            except EmulationError as error:
                error.add_note(f"line {instruction.line}: {instruction.text}")
                raise
            here += 1
        done = here - first
        launch.counts.threads[first:here] += active
        launch.counts.warps[first:here] += int(np.count_nonzero(strand.by_warp(flags).any(axis=1)))
        strand.executed[flags] += done
        if launch.step > launch.step_limit:
            raise NoProgress(f"{launch.step} steps: an endless loop?")
        self._move(strand, at, here)
        if control is not None:
            if not isinstance(mask, _Nobody):
                try:
                    self._control(strand, control, mask, here - 1)
                except EmulationError as error:
                    error.add_note(f"line {code.instructions[here - 1].line}: {code.instructions[here - 1].text}")
                    raise
        elif here >= len(code.steps):
            self._exit(strand, at)  # the end of the text is an exit
        return done

    def _guard(self, strand: Strand, instruction: Instruction, at: Mask, active: int, here: int) -> Mask | _Nobody:
        """The threads of ``at`` whose guard holds; None where that is all live ones."""
        assert instruction.guard is not None
        holds = strand.read(instruction.guard, at)
        if instruction.negated:
            holds = ~holds
        if holds.shape[0] == 1 and strand.n > 1:
            if holds[0]:
                return at
            count, mask = 0, np.zeros(strand.n, dtype=bool)
        else:
            mask = holds & strand.bools(at)
            count = int(np.count_nonzero(mask))
            if count == active:
                return at
        self.launch.counts.threads[here] -= active - count
        strand.executed[strand.bools(at) & ~mask] -= 1
        return mask if count else _NOBODY

    def _move(self, strand: Strand, at: Mask, to: int) -> None:
        if at is None:
            strand.common = to
        else:
            strand.pc[at] = to

    def _control(self, strand: Strand, control: Control, mask: Mask, here: int) -> None:
        if control.kind == "branch":
            if mask is not None:
                strand.spread()
            self._move(strand, mask, control.target)
        elif control.kind == "exit":
            if mask is not None:
                strand.spread()
            self._exit(strand, mask)
        elif control.kind == "barrier":
            self._barrier(strand, control, mask)
        else:
            self._warp(strand, control, mask, here)

    def _exit(self, strand: Strand, mask: Mask) -> None:
        slots = np.unique(strand.slot[strand.bools(mask)])
        strand.leave(mask)
        self._complete(slots)  # "as threads exit, barriers waiting on all threads are checked" (PTX ISA, exit)

    def count_exits(self, slots: Array) -> None:
        self.live -= np.bincount(slots, minlength=len(self.live))

    def _barrier(self, strand: Strand, control: Control, mask: Mask) -> None:
        assert control.source is not None
        at = strand.bools(mask)
        numbers = strand.whole(control.source(strand, mask))
        for number in np.unique(numbers[at]):
            some = at & (numbers == number)
            count = 0 if control.count is None else self._one(control.count(strand, mask), strand, some)
            self._arrive(strand, some, int(number), count, aligned=control.aligned)

    def _arrive(self, strand: Strand, at: Bools, number: int, count: int, *, aligned: bool) -> None:
        """Threads come to one barrier."""
        if aligned:
            by_warp = strand.by_warp(at)
            parted = by_warp.any(axis=1) & (strand.by_warp(strand.live & ~at)).any(axis=1)
            if parted.any():
                lanes = np.repeat(parted, WARP) & at
                raise BarrierDeadlock(
                    f"a barrier in divergent code: {strand.who(lanes)} is here, other threads of its warp are not"
                )
        if not 0 <= number < BARRIERS or count % WARP:
            raise BarrierDeadlock(f"barrier {number} with {count} threads: there are {BARRIERS}, and whole warps count")
        strand.spread()
        strand.waiting[at] = number
        slots = strand.slot[at]
        came = np.bincount(slots, minlength=len(self.ctas))
        rows = np.unique(strand.row[at])
        if count and aligned:  # the count grows by whole warps
            came = np.bincount(rows // self.warps, minlength=len(self.ctas)) * WARP
        here = came > 0
        open_already = here & (self.arrived[number] > 0) & (self.expected[number] != count)
        if open_already.any():
            raise BarrierDeadlock(f"barrier {number} is used with two thread counts at a time")
        self.arrived[number] += came
        self.expected[number][here] = count
        self.parties[number].reshape(-1)[rows] = True
        self.arrival.reshape(-1)[rows] = self.launch.step
        self._complete(np.flatnonzero(here))

    def _one(self, value: Array, strand: Strand, at: Bools) -> int:
        values = np.unique(strand.whole(value)[at])
        if len(values) != 1:
            raise BarrierDeadlock("threads come to one barrier with different thread counts")
        return int(values[0])

    def _complete(self, slots: Array) -> None:
        """Lets the threads of CTAs go on whose barrier is complete."""
        for number in np.flatnonzero(self.arrived[:, slots].any(axis=1)):
            arrived, expected = self.arrived[number, slots], self.expected[number, slots]
            wanted = np.where(expected == 0, self.live[slots], expected)
            if (arrived > wanted).any():
                raise BarrierDeadlock(f"more threads come to barrier {number} than take part in it")
            done = slots[(arrived > 0) & (arrived == wanted)]
            if not done.size:
                continue
            self.launch.counts.barriers += len(done)
            self.order.join(done, self.parties[number, done], self.arrival[done])
            self.arrived[number, done] = 0
            self.parties[number, done] = False
            freed = np.zeros(len(self.ctas), dtype=bool)
            freed[done] = True
            for strand in self.strands:
                go = freed[strand.slot] & (strand.waiting == number)
                strand.waiting[go] = -1

    def _warp(self, strand: Strand, control: Control, mask: Mask, here: int) -> None:
        """A ``.sync`` instruction of a warp: runs once all lanes that it names have come to it."""
        assert control.source is not None and control.step is not None
        at = strand.bools(mask)
        members = strand.whole(control.source(strand, mask)).astype(np.uint32)
        lane = (strand.tid % WARP).astype(np.uint32)
        named = ((members >> lane) & np.uint32(1)).astype(bool)
        if (at & ~named).any():
            raise BarrierDeadlock(f"{strand.who(at & ~named)} executes a .sync instruction whose member mask does not name it")
        grid = np.where(strand.by_warp(at), members.reshape(-1, WARP), np.uint32(0))
        wanted = np.bitwise_or.reduce(grid, axis=1)
        differs = strand.by_warp(at) & (grid != wanted[:, None])
        # Lanes with different masks at one instruction each wait for their own members.
        wanted_lane = members if differs.any() else np.repeat(wanted, WARP)
        present = np.bitwise_or.reduce(
            np.where(strand.by_warp(at), (np.uint32(1) << lane).reshape(-1, WARP), np.uint32(0)), axis=1
        )
        alive = np.bitwise_or.reduce(
            np.where(strand.by_warp(strand.live), (np.uint32(1) << lane).reshape(-1, WARP), np.uint32(0)), axis=1
        )
        missing = wanted_lane & np.repeat(alive & ~present, WARP)
        late = at & (missing != 0)
        ready = at & ~late
        if late.any():
            strand.spread()
            strand.pc[late] = here
            strand.parked |= late
        if ready.any():
            step_mask = mask if not late.any() else ready
            control.step(strand, step_mask)
            if control.synchronises:
                lanes = strand.row[ready] * WARP + strand.tid[ready] % WARP
                self.order.join_lanes(lanes, self.launch.step)


class _Nobody:
    """The guard held for no thread."""


_NOBODY = _Nobody()
