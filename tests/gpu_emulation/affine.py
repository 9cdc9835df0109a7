"""A kernel small enough to be read, for tests of what carries kernels: out[i] = a * x[i] + b for i < n, and its manifest."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

THREADS = 64

PTX = """
.version 8.0
.target sm_75
.address_size 64

.visible .entry affine(
    .param .u64 .ptr .global .align 16 x,
    .param .u64 .ptr .global .align 16 out,
    .param .u32 n,
    .param .f32 a,
    .param .f32 b,
    .param .u64 scratch
)
.reqntid 64
{
    .reg .pred %p1;
    .reg .b32 %r<5>;
    .reg .f32 %f<5>;
    .reg .b64 %rd<6>;
    ld.param.u64 %rd1, [x];
    ld.param.u64 %rd2, [out];
    ld.param.u32 %r1, [n];
    ld.param.f32 %f1, [a];
    ld.param.f32 %f2, [b];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %tid.x;
    mad.lo.s32 %r4, %r2, 64, %r3;
    setp.ge.s32 %p1, %r4, %r1;
    @%p1 bra DONE;
    mul.wide.s32 %rd3, %r4, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    ld.global.f32 %f3, [%rd4];
    fma.rn.f32 %f4, %f1, %f3, %f2;
    st.global.f32 [%rd5], %f4;
DONE:
    ret;
}
"""


def ptx(target: str = "sm_75", version: str = "8.0") -> str:
    return PTX.replace("sm_75", target).replace(".version 8.0", f".version {version}")


def cubin(payload: bytes) -> bytes:
    """An ELF file with one section that holds ``payload``: what the fake driver can tell from other cubins."""
    start = 128
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, 64, 0, 64, 0, 0, 64, 1, 0)
    section = struct.pack("<IIQQQQIIQQ", 0, 1, 0, 0, start, len(payload), 0, 0, 1, 0)
    return header + section + payload


def row(folder: Path, target: str = "sm_80", version: str = "8.0", *, specific: bool = False, shared: int = 0) -> dict[str, Any]:
    """One kernel of a manifest, whose files are written into ``folder``."""
    architecture = target + "a" * specific
    text = ptx(architecture, version).encode()
    binary = cubin(architecture.encode() * 5)
    (folder / target).mkdir(exist_ok=True)
    for name, data in (("affine.ptx", text), ("affine.cubin", binary)):
        (folder / target / name).write_bytes(data)
    pointers = [{"name": name, "type": "pointer", "multiple_of": 16} for name in ("x", "out")]
    numbers = [{"name": name, "type": kind, "multiple_of": 1} for name, kind in (("n", "i32"), ("a", "f32"), ("b", "f32"))]
    return {
        "name": "noise",  # a manifest has no name for anything but the product's own kernels
        "variant": {"dtype": "fp32"},
        "target": target,
        "arch": architecture,
        "entry": "affine",
        "ptx": f"{target}/affine.ptx",
        "cubin": f"{target}/affine.cubin",
        "sha256": {"ptx": hashlib.sha256(text).hexdigest(), "cubin": hashlib.sha256(binary).hexdigest()},
        "num_warps": THREADS // 32,
        "block": [THREADS, 1, 1],
        "shared": shared,
        "registers": 10,
        "spills": 0,
        "stack": 0,
        "arguments": [*pointers, *numbers, {"name": "scratch", "type": "null", "multiple_of": 1}],
        "grid": [{"argument": "n", "per": THREADS}, 1, 1],
    }


def write_manifest(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A folder as ``advrad-fast compile --kernels`` makes it, with these kernels."""
    document = {"schema": 1, "triton": "3.9.0", "philox": 10, "kernels": list(rows)}
    (folder / "manifest.json").write_text(json.dumps(document))
    return folder
