"""What the assembler made of a kernel, read from its cubin with the tools that come with Triton: no GPU, no driver."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import triton

from advrad_fast.errors import KernelFileError

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")
_PADDING = ("NOP", "BRA")  # what stands behind the last EXIT is a branch to itself and padding


@dataclass(frozen=True)
class Resources:
    """A kernel's demands.

    Attributes:
        registers, stack: of a thread; the stack in bytes.
        shared: static shared memory of a program, in bytes; from sm_90 on the system's own 1 KiB where any is used.
        spills: instructions that touch local memory.
        instructions: of the machine code, all paths together, without padding.
        loads, stores: how many instructions touch global memory, by their width in bits.
    """

    registers: int
    stack: int
    shared: int
    spills: int
    instructions: int
    loads: Mapping[int, int]
    stores: Mapping[int, int]


def inspect(cubin: bytes) -> Resources:
    """Disassemble a cubin with one kernel.

    Raises:
        KernelFileError: it is not one.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _run("cuobjdump", "-res-usage", file)
        code = _run("nvdisasm", "-c", file)
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    names = _INSTRUCTION.findall(code)
    if len(found) != 1 or "EXIT" not in names:
        raise KernelFileError("expected a cubin with one kernel, got something else")
    registers, stack, shared, local = map(int, found[0])
    while names[-1] in _PADDING:
        names.pop()
    counts = Counter(names)
    return Resources(
        registers=registers,
        stack=stack + local,
        shared=shared,
        spills=sum(n for name, n in counts.items() if name.startswith(("LDL", "STL"))),
        instructions=len(names),
        loads=_widths(counts, "LDG"),
        stores=_widths(counts, "STG"),
    )


def _widths(counts: Counter[str], opcode: str) -> dict[int, int]:
    """Global memory instructions by width: LDG.E.128 has 128 bits, LDG.E.U8 has 8, LDG.E 32."""
    widths: Counter[int] = Counter()
    for name, n in counts.items():
        parts = name.split(".")
        if parts[0] == opcode:
            (width,) = [int(p.lstrip("US")) for p in parts if re.fullmatch(r"[US]?(?:8|16)|64|128|256", p)] or [32]
            widths[width] += n
    return dict(widths)


def _run(tool: str, option: str, file: Path) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    done = subprocess.run([path, option, file], capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelFileError(f"{tool}: {done.stderr.strip() or done.returncode}")
    return done.stdout
