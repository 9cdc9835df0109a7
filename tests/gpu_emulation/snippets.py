"""Hand-written PTX for the tests: one instruction over arrays of operands, or a body with named pointers."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_emulation.formats import TYPES
from gpu_emulation.memory import Memory
from gpu_emulation.module import Module
from gpu_emulation.report import Report

Array = NDArray[Any]

HEAD = ".version 8.8\n.target sm_80\n.address_size 64\n"


def kernel(body: str, *, pointers: Sequence[str] = ("in", "out"), outside: str = "", directives: str = "") -> str:
    """A module with one entry ``k``; %rd0, %rd1, ... hold the pointers, %r0 is the thread's number in the grid."""
    parameters = ",\n".join(f"  .param .u64 k_{name}" for name in pointers)
    loads = "\n".join(f"  ld.param.u64 %rd{i}, [k_{name}];" for i, name in enumerate(pointers))
    return f"""{HEAD}{outside}
.visible .entry k(
{parameters}
)
{directives}
{{
  .reg .pred %p<16>;
  .reg .b16 %h<16>;
  .reg .b32 %r<64>;
  .reg .f32 %f<16>;
  .reg .f64 %d<16>;
  .reg .b64 %rd<32>;
{loads}
  mov.u32 %r1, %ctaid.x;
  mov.u32 %r2, %ntid.x;
  mov.u32 %r3, %tid.x;
  mad.lo.u32 %r0, %r1, %r2, %r3;
{body}
  ret;
}}
"""


def launch(
    text: str,
    arrays: Sequence[Array | int],
    *,
    grid: int = 1,
    block: int = 32,
    dynamic_shared: int = 0,
    seed: int | None = None,
) -> tuple[list[Array], Report]:
    """Runs ``k``: each array is copied to the device and back; an integer n is n unwritten bytes."""
    memory = Memory()
    addresses = []
    for array in arrays:
        if isinstance(array, int):
            addresses.append(memory.alloc(array))
        else:
            addresses.append(memory.alloc(array.nbytes))
            memory.write(addresses[-1], array.tobytes())
    parameters = struct.pack(f"<{len(addresses)}Q", *addresses)
    report = Module(text).launch(
        "k", (grid, 1, 1), (block, 1, 1), parameters, memory, dynamic_shared=dynamic_shared, order_seed=seed
    )
    results = []
    for array, address in zip(arrays, addresses, strict=True):
        if isinstance(array, int):
            results.append(np.frombuffer(memory.read(address, array), dtype=np.uint8))
        else:
            results.append(np.frombuffer(memory.read(address, array.nbytes), dtype=array.dtype).reshape(array.shape))
    return results, report


def apply(instruction: str, result: str, operands: Sequence[tuple[str, Array]]) -> Array:
    """One instruction on arrays of equal length: raw bits of the results.

    Args:
        instruction: with $d for the result and $0, $1, ... for the operands.
        result: its type ("pred" comes back as uint32 0 or 1).
        operands: type and raw bits of each.
    """
    count = len(operands[0][1])
    lines, pointers, arrays = [], [], []
    for i, (kind, values) in enumerate(operands):
        bits = TYPES[kind].bits
        size = bits // 8
        register = {8: "h", 16: "h", 32: "r", 64: "rd"}[bits] + str(10 + i)
        instruction = instruction.replace(f"${i}", f"%{register}")
        lines.append(f"mad.wide.u32 %rd9, %r0, {size}, %rd{i};\nld.global.b{bits} %{register}, [%rd9];")
        pointers.append(f"a{i}")
        arrays.append(np.ascontiguousarray(values).view(f"u{size}"))
    out_bits = 32 if result == "pred" else TYPES[result].bits
    size = out_bits // 8
    out = {8: "h", 16: "h", 32: "r", 64: "rd"}[out_bits] + "9"
    out = "rd8" if out == "rd9" else out
    lines.append(instruction.replace("$d", "%p1" if result == "pred" else f"%{out}"))
    if result == "pred":
        lines.append(f"selp.u32 %{out}, 1, 0, %p1;")
    lines.append(f"mad.wide.u32 %rd9, %r0, {size}, %rd{len(operands)};\nst.global.b{out_bits} [%rd9], %{out};")
    body = f"setp.ge.u32 %p0, %r0, {count};\n@%p0 ret;\n" + "\n".join(lines)
    block = min(1024, -(-count // 32) * 32)
    text = kernel(body, pointers=[*pointers, "out"])
    results, _ = launch(text, [*arrays, np.zeros(count, dtype=f"u{size}")], grid=-(-count // block), block=block)
    return results[-1]
