"""How an instruction becomes something to run: a rule for each opcode takes its modifiers, types and operands apart.

A rule must use up every modifier and operand: what is left over raises, at load.  So an instruction is either understood whole or
the module is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from gpu_emulation.errors import InvalidModule, UnknownInstruction
from gpu_emulation.formats import SIGNED, Array, Type, literal_bits, resize, type_named
from gpu_emulation.parser import (
    Address,
    Function,
    Instruction,
    Literal,
    Name,
    Not,
    Operand,
    Pair,
    Register,
    Sink,
    Variable,
    Vector,
)
from gpu_emulation.special import SPECIAL
from gpu_emulation.strand import Mask, Strand

Source = Callable[[Strand, Mask], Array]
Loose = Callable[[Strand, Mask], tuple[Array, int]]
Writer = Callable[[Strand, Array, Mask], None]
Step = Callable[[Strand, Mask], None]
Rule = Callable[["Build"], "Step | Control"]

RULES: dict[str, Rule] = {}


def rule(*opcodes: str) -> Callable[[Rule], Rule]:
    """Registers the rule of some opcodes."""

    def register(function: Rule) -> Rule:
        for opcode in opcodes:
            assert opcode not in RULES, opcode
            RULES[opcode] = function
        return function

    return register


@dataclass(frozen=True)
class Control:
    """An instruction that the scheduler itself carries out."""

    kind: str  # "branch", "exit", "barrier", "warp"
    target: int = -1
    source: Source | None = None  # barrier: its number; warp: the member mask
    count: Source | None = None  # barrier: how many threads, where that is given
    aligned: bool = True
    step: Step | None = None  # warp: what the lanes do once they have met
    synchronises: bool = False  # warp: orders the lanes' memory accesses


@dataclass
class Build:
    """One instruction being taken apart."""

    instruction: Instruction
    function: Function
    variables: dict[str, tuple[Variable, int]]  # name -> (variable, address in its space)
    modifiers: list[str] = field(default_factory=list)
    used: int = 0

    def __post_init__(self) -> None:
        self.modifiers = list(self.instruction.modifiers)

    @property
    def opcode(self) -> str:
        return self.instruction.opcode

    # Modifiers.

    def take(self, *choices: str) -> str:
        """The next modifier if it is one of ``choices``, else ""."""
        return self.modifiers.pop(0) if self.modifiers and self.modifiers[0] in choices else ""

    def take_any(self, *choices: str) -> str:
        """A modifier that may stand anywhere."""
        for choice in choices:
            if choice in self.modifiers:
                self.modifiers.remove(choice)
                return choice
        return ""

    def need(self, *choices: str) -> str:
        found = self.take(*choices)
        if not found:
            raise UnknownInstruction(f"{self.instruction.name}: expected one of .{', .'.join(choices)}")
        return found

    def type(self, *allowed: str) -> Type:
        """The next modifier as a type, one of ``allowed``."""
        if not self.modifiers:
            raise UnknownInstruction(f"{self.instruction.name}: no type")
        kind = type_named(self.modifiers.pop(0))
        if kind.name not in allowed:
            raise UnknownInstruction(f"{self.instruction.name}: no rule for .{kind.name}")
        return kind

    def unknown(self, why: str) -> UnknownInstruction:
        return UnknownInstruction(f"{self.instruction.name}: {why}")

    # Operands.

    def operand(self) -> Operand:
        if self.used >= len(self.instruction.operands):
            raise InvalidModule(f"{self.instruction.name}: too few operands")
        self.used += 1
        return self.instruction.operands[self.used - 1]

    def left(self) -> int:
        return len(self.instruction.operands) - self.used

    def end(self) -> None:
        """Everything was understood."""
        if self.modifiers:
            raise UnknownInstruction(f"{self.instruction.name}: no rule for .{', .'.join(self.modifiers)}")
        if self.left():
            raise InvalidModule(f"{self.instruction.name}: too many operands")

    def source(self, kind: Type, operand: Operand | None = None, *, wider: bool = False) -> Source:
        """Reads an operand as ``kind``; ``wider``: from a register that may be wider, of which the low bits count."""
        operand = self.operand() if operand is None else operand
        if isinstance(operand, Register):
            return self._register(operand, kind, wider=wider)
        if isinstance(operand, Literal):
            value = np.array([literal_bits(operand.text, kind)], dtype=np.uint64).astype(kind.raw).view(kind.view)
            value.flags.writeable = False
            return lambda strand, mask: value
        if isinstance(operand, Not) and kind.kind == "p":
            inner = self.source(kind, operand.of)
            return lambda strand, mask: ~inner(strand, mask)
        if isinstance(operand, Name):
            return self._name(operand.text, kind)
        raise InvalidModule(f"{self.instruction.name}: an operand that is no .{kind.name} value")

    def _register(self, register: Register, kind: Type, *, wider: bool) -> Source:
        have = register.type
        if (have.kind == "p") != (kind.kind == "p") or have.bits < kind.bits or (have.bits > kind.bits and not wider):
            raise InvalidModule(f"{self.instruction.name}: {register.name} is .{have.name}, not .{kind.name}")
        view = kind.view
        if have.bits == kind.bits:
            if kind.raw == view:
                return lambda strand, mask: strand.read(register, mask)
            return lambda strand, mask: strand.read(register, mask).view(view)
        return lambda strand, mask: resize(strand.read(register, mask, kind.nbytes), kind.bits).view(view)

    def loose(self, kind: Type, operand: Operand | None = None) -> Loose:
        """Like :meth:`source`, with which bytes are undefined, for instructions that only move bytes about."""
        operand = self.operand() if operand is None else operand
        inner = self.source(kind, operand)
        if not isinstance(operand, Register):
            return lambda strand, mask: (inner(strand, mask), 0)
        register, empty = operand, np.zeros(1, dtype=kind.raw)

        def read(strand: Strand, mask: Mask) -> tuple[Array, int]:
            value, junk = strand.loose(register, mask)
            return (empty if value is None else value), junk

        return read

    def target(self, kind: Type, operand: Operand | None = None) -> Register | None:
        """The register that a result of ``kind`` goes to; None: it is not wanted."""
        operand = self.operand() if operand is None else operand
        self.destination(kind, operand)  # checks it
        return operand if isinstance(operand, Register) else None

    def _name(self, name: str, kind: Type) -> Source:
        if name in self.variables:
            _, address = self.variables[name]
            if kind.kind not in "bus" or kind.bits < 32:
                raise InvalidModule(f"{self.instruction.name}: the address of {name} as .{kind.name}")
            if address >= 0:
                if address >> kind.bits:
                    raise InvalidModule(f"the address of {name} does not fit .{kind.name}")
                value = np.array([address], dtype=kind.raw).view(kind.view)
                return lambda strand, mask: value
            if kind.bits != 64:
                raise InvalidModule(f"the global address of {name} does not fit .{kind.name}")
            return lambda strand, mask: np.array([strand.batch.symbols[name]], dtype=np.uint64).view(kind.view)
        if name not in SPECIAL:
            raise UnknownInstruction(f"{self.instruction.name}: {name} is no register, variable or known special register")
        bits, make = SPECIAL[name]
        if bits != kind.bits:
            raise InvalidModule(f"{self.instruction.name}: {name} has {bits} bits, not those of .{kind.name}")
        return lambda strand, mask: strand.special(name, make).view(kind.view)

    def destination(self, kind: Type, operand: Operand | None = None, *, wider: bool = False) -> Writer:
        """Writes values of ``kind`` to an operand; ``wider``: to a register that may be wider (extended by zeros or the sign)."""
        operand = self.operand() if operand is None else operand
        if isinstance(operand, Sink):
            return lambda strand, value, mask: None
        if not isinstance(operand, Register):
            raise InvalidModule(f"{self.instruction.name}: the result goes to no register")
        register, have, raw, signed = operand, operand.type, operand.type.raw, kind.kind == "s"
        if (have.kind == "p") != (kind.kind == "p") or have.bits < kind.bits or (have.bits > kind.bits and not wider):
            raise InvalidModule(f"{self.instruction.name}: {register.name} is .{have.name}, not .{kind.name}")
        if have.bits == kind.bits:

            def write(strand: Strand, value: Array, mask: Mask) -> None:
                assert value.dtype.itemsize == raw.itemsize, (value.dtype, register)
                strand.write(register, value if value.dtype == raw else value.view(raw), mask)

            return write
        unsigned = kind.raw
        return lambda strand, value, mask: strand.write(register, resize(value.view(unsigned), have.bits, signed=signed), mask)

    def pair(self) -> tuple[Operand, Operand]:
        """``p|q``, or ``p`` with a sink."""
        operand = self.operand()
        return (operand.first, operand.second) if isinstance(operand, Pair) else (operand, Sink())

    def vector(self, count: int) -> list[Operand]:
        """``count`` operands, in braces if there are several."""
        operand = self.operand()
        items: list[Operand] = list(operand.items) if isinstance(operand, Vector) else [operand]
        if len(items) != count:
            raise InvalidModule(f"{self.instruction.name}: {len(items)} operands in a vector of {count}")
        return items

    def address(self, space: str) -> Source:
        """Reads an address of a space: uint64."""
        operand = self.operand()
        if not isinstance(operand, Address):
            raise InvalidModule(f"{self.instruction.name}: no address in brackets")
        offset, base = operand.offset, operand.base
        shift = np.uint64(offset & 0xFFFFFFFFFFFFFFFF)
        if isinstance(base, Name):
            if base.text not in self.variables:
                raise InvalidModule(f"{self.instruction.name}: no variable {base.text}")
            variable, _ = self.variables[base.text]
            home = "global" if variable.space == "const" else variable.space
            if home != ("global" if space == "const" else space):
                raise InvalidModule(f"{self.instruction.name}: {base.text} is a .{variable.space} variable")
            inner = self._name(base.text, type_named("b64"))
            return lambda strand, mask: inner(strand, mask) + shift
        bits = base.type.bits
        if base.type.kind not in "bus" or bits not in ((64,) if space in ("global", "const", "generic") else (32, 64)):
            raise InvalidModule(f"{self.instruction.name}: {base.name} is .{base.type.name}, no {space} address")
        if bits == 64:
            return lambda strand, mask: strand.read(base, mask) + shift
        # A 32-bit address wraps at 32 bits.
        step = np.array([offset], dtype=SIGNED[64]).astype(np.uint32)
        return lambda strand, mask: (strand.read(base, mask) + step).astype(np.uint64)
