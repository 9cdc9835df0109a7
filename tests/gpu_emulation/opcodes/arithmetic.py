"""Opcodes that integers and floats share: told apart by their last modifier."""

from __future__ import annotations

from gpu_emulation.formats import TYPES
from gpu_emulation.opcodes import floating, integer
from gpu_emulation.rules import Build, Rule, Step, rule

RULES: dict[str, tuple[Rule, Rule]] = {
    "add": (integer.add_sub, floating.binary),
    "sub": (integer.add_sub, floating.binary),
    "mul": (integer.multiply, floating.binary),
    "mad": (integer.multiply_add, floating.fused),
    "div": (integer.divide, floating.divide),
    "min": (integer.extremum, floating.extremum),
    "max": (integer.extremum, floating.extremum),
    "neg": (integer.negate, floating.sign),
    "abs": (integer.negate, floating.sign),
}


@rule(*RULES)
def arithmetic(build: Build) -> Step:
    last = build.modifiers[-1] if build.modifiers else ""
    if last not in TYPES:
        raise build.unknown("no type that is known")
    step = RULES[build.opcode][TYPES[last].kind == "f"](build)
    assert callable(step)
    return step
