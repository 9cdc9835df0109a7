"""A PTX module: its entries, its variables, and launching."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

import gpu_emulation.opcodes  # noqa: F401  # registers the rules
from gpu_emulation.errors import EmulationError, InvalidLaunch, InvalidModule, UnknownInstruction
from gpu_emulation.machine import STEP_LIMIT, Code, Launch
from gpu_emulation.memory import Memory
from gpu_emulation.parser import Address, Function, Name, Operand, Parameter, Variable, Vector, parse
from gpu_emulation.report import Report, Traffic
from gpu_emulation.rules import RULES, Build, Control, Step

MAX_BLOCK = (1024, 1024, 64)
MAX_THREADS = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_SHARED = 227 * 1024  # the most that any target has
_modules = itertools.count()


@dataclass(frozen=True)
class Entry:
    """A kernel.

    Attributes:
        name: as in the text.
        parameters: in order, with their place in the packed buffer.
        parameter_bytes: size of that buffer.
        shared_bytes: static shared memory.
        max_threads: threads a block may have (.maxntid, .reqntid), or None.
        required_block: .reqntid as written, or None.
    """

    name: str
    parameters: tuple[Parameter, ...]
    parameter_bytes: int
    shared_bytes: int
    max_threads: int | None
    required_block: tuple[int, ...] | None


class Module:
    """A PTX module; every instruction in it is understood, or loading raises.

    Raises:
        InvalidModule, UnknownInstruction: with the line.
    """

    def __init__(self, ptx_text: str) -> None:
        parsed = parse(ptx_text)
        self.version = parsed.version
        self.target = parsed.target
        self._variables = parsed.variables
        self._number = next(_modules)
        self._entries: dict[str, Entry] = {}
        self._codes: dict[str, Code] = {}
        self._functions = parsed.functions
        for name, function in parsed.functions.items():
            self._entries[name], self._codes[name] = _compile(function, parsed.variables)

    @property
    def entries(self) -> Mapping[str, Entry]:
        return MappingProxyType(self._entries)

    def launch(
        self,
        entry_name: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        parameters: bytes,
        memory: Memory,
        *,
        dynamic_shared: int = 0,
        order_seed: int | None = None,
        step_limit: int = STEP_LIMIT,
    ) -> Report:
        """Executes a kernel over a grid.

        Args:
            entry_name: which entry.
            grid, block: CTAs, and threads in each, along x, y and z.
            parameters: the packed buffer, as :attr:`Entry.parameters` lays it out.
            memory: where global addresses point.
            dynamic_shared: bytes of shared memory beyond the static ones.
            order_seed: shuffles CTAs, warps between barriers and the turns of atomics; None: one fixed, quick order.
            step_limit: after so many steps (one step: one instruction of all warps that run together) the launch is given up.

        Raises:
            EmulationError: whatever went wrong, with a note of where; memory then holds what was written until then.
        """
        entry = self._check(entry_name, grid, block, parameters, dynamic_shared)
        code = self._codes[entry_name]
        static = -(-entry.shared_bytes // 16) * 16 if dynamic_shared else entry.shared_bytes
        launch = Launch(
            code=code,
            memory=memory,
            grid=grid,
            block=block,
            parameters=np.frombuffer(parameters.ljust(-(-len(parameters) // 16) * 16, b"\0"), dtype=np.uint8),
            parameter_bytes=len(parameters),
            symbols=self._symbols(memory),
            shared_bytes=static + dynamic_shared,
            dynamic_shared=dynamic_shared,
            generator=None if order_seed is None else np.random.default_rng(order_seed),
            step_limit=step_limit,
        )
        try:
            with np.errstate(all="ignore"):
                counts = launch.run()
        except EmulationError as error:
            error.add_note(f"in entry {entry_name}")
            raise
        names = [instruction.name for instruction in code.instructions]
        instructions: Counter[str] = Counter()
        warps: Counter[str] = Counter()
        for name, thread_count, warp_count in zip(names, counts.threads.tolist(), counts.warps.tolist(), strict=True):
            if warp_count:
                instructions[name] += thread_count
                warps[name] += warp_count
        shadows = launch.shadows.values()
        read, written = sum(shadow.bytes_read() for shadow in shadows), sum(shadow.bytes_written() for shadow in shadows)

        def traffic(widths: Counter[int], unique: int) -> Traffic:
            return Traffic({8 * width: count for width, count in sorted(widths.items())}, unique)

        of = counts.traffic
        return Report(
            instructions=instructions,
            warp_instructions=warps,
            thread_totals=counts.per_thread.reshape(launch.ctas, launch.threads),
            loaded=traffic(of.loads, read),
            stored=traffic(of.stores, written),
            atomics=traffic(of.atomics, 0),
            shared_loaded=traffic(of.shared_loads, 0),
            shared_stored=traffic(of.shared_stores, 0),
            barriers=counts.barriers,
        )

    def _check(
        self, name: str, grid: tuple[int, int, int], block: tuple[int, int, int], parameters: bytes, dynamic_shared: int
    ) -> Entry:
        if name not in self._entries:
            raise InvalidLaunch(f"no entry {name}; there are {', '.join(sorted(self._entries)) or 'none'}")
        entry = self._entries[name]
        if len(grid) != 3 or len(block) != 3 or min(*grid, *block) < 1:
            raise InvalidLaunch(f"grid {grid} and block {block}: three numbers each, none below 1")
        if any(size > limit for size, limit in zip((*grid, *block), (*MAX_GRID, *MAX_BLOCK), strict=True)):
            raise InvalidLaunch(f"grid {grid} and block {block}: the limits are {MAX_GRID} and {MAX_BLOCK}")
        threads = int(np.prod(block))
        if threads > min(MAX_THREADS, entry.max_threads or MAX_THREADS):
            raise InvalidLaunch(f"{threads} threads in a block: {name} allows {entry.max_threads or MAX_THREADS}")
        if entry.required_block is not None and block != (*entry.required_block, 1, 1)[:3]:
            raise InvalidLaunch(f"block {block}: {name} requires {entry.required_block}")
        if int(np.prod(grid)) * threads >= 2**31:
            raise InvalidLaunch(f"{int(np.prod(grid))} CTAs of {threads} threads: more than 2**31 threads are not tracked")
        if len(parameters) != entry.parameter_bytes:
            raise InvalidLaunch(f"{len(parameters)} bytes of parameters: {name} takes {entry.parameter_bytes}")
        if dynamic_shared < 0 or entry.shared_bytes + dynamic_shared > MAX_SHARED:
            raise InvalidLaunch(f"{entry.shared_bytes} + {dynamic_shared} bytes of shared memory: there are {MAX_SHARED}")
        return entry

    def _symbols(self, memory: Memory) -> dict[str, int]:
        """Device addresses of the module's variables, which come into a memory with the first launch on it."""
        if self._number not in memory.symbols:
            places = {}
            for name, variable in self._variables.items():
                if variable.space in ("global", "const") and variable.nbytes:
                    places[name] = memory.alloc(variable.nbytes)
                    memory.write(places[name], variable.data or bytes(variable.nbytes))  # without a value they are zero
            memory.symbols[self._number] = places
        return memory.symbols[self._number]


def _place(variables: Mapping[str, Variable], space: str) -> tuple[dict[str, tuple[Variable, int]], int]:
    """Addresses of a space's variables, one after the other, and where they end; arrays without a size come last."""
    places, end = {}, 0
    for name, variable in sorted(variables.items(), key=lambda item: item[1].nbytes == 0):
        if variable.space == space:
            align = max(variable.align, 16) if variable.nbytes == 0 else variable.align
            start = -(-end // align) * align
            places[name] = (variable, start)
            if variable.nbytes:
                end = start + variable.nbytes
    return places, end


def _names(operand: Operand) -> Iterator[str]:
    """The variables and labels in an operand."""
    if isinstance(operand, Name):
        yield operand.text
    elif isinstance(operand, Address) and isinstance(operand.base, Name):
        yield operand.base.text
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from _names(item)


def _compile(function: Function, module_variables: Mapping[str, Variable]) -> tuple[Entry, Code]:
    """An entry's rules, applied to each of its instructions."""
    names = {name for instruction in function.instructions for operand in instruction.operands for name in _names(operand)}
    used = {name: item for name, item in {**module_variables, **function.variables}.items() if name in names}
    shared, shared_bytes = _place(used, "shared")
    local, local_bytes = _place(function.variables, "local")
    variables = {name: (item, -1) for name, item in module_variables.items() if item.space in ("global", "const")}
    variables |= shared | local
    for parameter in function.parameters:
        variables[parameter.name] = (
            Variable(parameter.name, "param", parameter.nbytes, parameter.align, None),
            parameter.offset,
        )
    steps: list[Step | Control] = []
    for instruction in function.instructions:
        where = f"line {instruction.line}: {instruction.text}"
        if instruction.opcode not in RULES:
            raise UnknownInstruction(f"unknown opcode {instruction.opcode}; {where}")
        build = Build(instruction, function, variables)
        try:
            step = RULES[instruction.opcode](build)
            build.end()
        except InvalidModule as error:
            raise type(error)(f"{error}; {where}") from None
        steps.append(step)
    last = function.parameters[-1] if function.parameters else None
    entry = Entry(
        name=function.name,
        parameters=tuple(function.parameters),
        parameter_bytes=last.offset + last.nbytes if last else 0,
        shared_bytes=shared_bytes,
        max_threads=function.max_threads,
        required_block=function.required_block,
    )
    return entry, Code(function.instructions, steps, len(function.registers), local_bytes)
