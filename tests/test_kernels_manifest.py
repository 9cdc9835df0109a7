"""The manifest of compiled kernels is untrusted input: every field is checked, and every file's hash."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from advrad_fast.errors import KernelFileError
from advrad_fast.kernels.manifest import FILE, TARGETS, Axis, parse, read_manifest


def row(target: str = "sm_80", arch: str = "", **changes: Any) -> dict[str, Any]:
    return {
        "name": "noise", "variant": {"layout": "nchw", "channels": 3, "wide": False}, "target": target, "arch": arch or target,
        "entry": "noise_kernel", "ptx": f"{target}/x.ptx", "cubin": f"{target}/x.cubin",
        "sha256": {"ptx": hashlib.sha256(b"ptx").hexdigest(), "cubin": hashlib.sha256(b"cubin").hexdigest()}, "num_warps": 4,
        "block": [128, 1, 1], "shared": 0, "registers": 32, "spills": 0, "stack": 0,
        "arguments": [
            {"name": "images", "type": "pointer", "multiple_of": 16}, {"name": "items", "type": "i32", "multiple_of": 1},
            {"name": "draws", "type": "i64", "multiple_of": 1}, {"name": "offset", "type": "f32", "multiple_of": 1},
            {"name": "scratch", "type": "null", "multiple_of": 1},
        ],
        "grid": [{"argument": "items", "per": 64}, {"argument": "draws", "per": 4}, 1], **changes,
    }  # fmt: skip


def document(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"schema": 1, "triton": "3.9.0", "philox": 10, "kernels": list(rows or (row(),))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sm_80").mkdir()
    (tmp_path / "sm_80" / "x.ptx").write_bytes(b"ptx")
    (tmp_path / "sm_80" / "x.cubin").write_bytes(b"cubin")
    (tmp_path / FILE).write_text(json.dumps(document()))
    return tmp_path


def test_a_good_folder_is_read(folder: Path) -> None:
    manifest = read_manifest(folder)
    (kernel,) = manifest.kernels
    assert manifest.image(kernel, "ptx") == b"ptx" and manifest.image(kernel, "cubin") == b"cubin"
    assert kernel.grid == (Axis("items", 64), Axis("draws", 4), 1) and kernel.block == (128, 1, 1)
    assert kernel.grid_for({"items": 65, "draws": 4}) == (2, 1, 1)
    for values in ({"items": 65}, {"items": 0, "draws": 1}, {"items": 1, "draws": 4 * 65536}):
        with pytest.raises(KernelFileError):
            kernel.grid_for(values)
    with pytest.raises(TypeError):
        kernel.variant["channels"] = 1  # type: ignore[index]


@pytest.mark.parametrize("name", ["x.ptx", "x.cubin"])
def test_other_bytes_are_refused(folder: Path, name: str) -> None:
    manifest, file = read_manifest(folder), folder / "sm_80" / name
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(KernelFileError, match="SHA-256"):
        read_manifest(folder)
    with pytest.raises(KernelFileError, match="SHA-256"):
        manifest.image(manifest.kernels[0], "ptx" if name == "x.ptx" else "cubin")
    file.unlink()
    with pytest.raises(KernelFileError, match="cannot be read"):
        read_manifest(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"schema": 1}'])
def test_no_manifest(folder: Path, text: bytes) -> None:
    (folder / FILE).write_bytes(text)
    with pytest.raises(KernelFileError):
        read_manifest(folder)
    (folder / FILE).unlink()
    with pytest.raises(KernelFileError, match="cannot be read"):
        read_manifest(folder)


BAD: dict[str, list[object]] = {
    "name": ["noises", "", None, 1], "variant": [None, [], {"A": 1}, {"a": 1.5}, {"a": None}, {"a": "x y"}, {"a": 2**31}],
    "target": ["sm_99", "gfx942", None], "arch": ["sm_86", "sm_80b", 80], "entry": ["", "a b", "1a", "x" * 200, None],
    "ptx": ["../x.ptx", "/etc/x.ptx", "sm_80/../x.ptx", "sm_86/x.ptx", "x.ptx", "sm_80/x.cubin", "sm_80/x.ptx\n", 1],
    "cubin": ["sm_80/x.ptx", "sm_80//x.cubin", None], "num_warps": [0, 33, 4.0, True, "4"],
    "sha256": [None, {"ptx": "0" * 64}, {"ptx": "0" * 64, "cubin": "0" * 63}, {"ptx": "0" * 64, "cubin": "G" * 64}],
    "block": [[128], [128, 1, 2], [64, 1, 1], 128, [128, True, 1]], "shared": [-1, 10**6, 1.0, None],
    "registers": [0, 256, None], "spills": [-1, None], "stack": [-1, None],
    "arguments": [
        [], None, {}, [{"name": "a", "type": "pointer"}], [{"name": "a", "type": "f64", "multiple_of": 1}],
        [{"name": "A", "type": "i32", "multiple_of": 1}], [{"name": "a", "type": "i32", "multiple_of": 3}],
        [{"name": "a", "type": "f32", "multiple_of": 2}], [{"name": "a", "type": "i32", "multiple_of": 1}] * 2,
    ],
    "grid": [
        [1, 1], [0, 1, 1], [1, 65536, 1], [1, 1, True], [{"argument": "images", "per": 1}, 1, 1], [{"argument": "items"}, 1, 1],
        [{"argument": "items", "per": 0}, 1, 1], [{"argument": "nobody", "per": 1}, 1, 1],
        [{"argument": "offset", "per": 1}, 1, 1], None,
    ],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_bad_fields_are_refused(field: str, value: object) -> None:
    with pytest.raises(KernelFileError, match=rf"^kernels\[0\](\.{field}|\.block)" if field != "target" else r"^kernels\[0\]"):
        parse(document(row(**{field: value})), Path())


@pytest.mark.parametrize("field", [*document(), *row()])
def test_fields_are_neither_missing_nor_added(field: str) -> None:
    for change in (lambda d: d.pop(field), lambda d: d.update(another=1)):
        whole = copy.deepcopy(document())
        change(whole if field in whole else whole["kernels"][0])
        with pytest.raises(KernelFileError, match="unknown fields"):
            parse(whole, Path())


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"schema": True},
        {"schema": 1.0},
        {"triton": 3},
        {"triton": "x"},
        {"philox": 7},
        {"kernels": []},
        {"kernels": {}},
    ],
)
def test_bad_documents_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(KernelFileError):
        parse({**document(), **changes}, Path())


def test_twins_are_refused() -> None:
    with pytest.raises(KernelFileError, match="twice"):
        parse(document(row(), row(entry="other")), Path())


def test_what_runs_where() -> None:
    manifest = parse(document(*(row(t, t + "a" if int(t[3:]) >= 90 else t) for t in TARGETS)), Path())
    variant = dict(manifest.kernels[0].variant)
    found = {
        c: manifest.find("noise", c, **variant)
        for c in ((7, 5), (8, 0), (8, 7), (8, 8), (9, 0), (10, 0), (12, 1), (9, 5), (13, 0))
    }
    assert {c: (kernel.target, kind) for c, (kernel, kind) in found.items()} == {
        (7, 5): ("sm_75", "cubin"), (8, 0): ("sm_80", "cubin"), (8, 7): ("sm_87", "cubin"), (8, 8): ("sm_86", "cubin"),
        (9, 0): ("sm_90", "cubin"), (10, 0): ("sm_100", "cubin"), (12, 1): ("sm_121", "cubin"), (9, 5): ("sm_89", "ptx"),
        (13, 0): ("sm_89", "ptx"),
    }  # fmt: skip
    for capability, name, changes in (((7, 0), "noise", {}), ((8, 0), "rows", {}), ((8, 0), "noise", {"channels": 1})):
        with pytest.raises(KernelFileError, match="no kernel"):
            manifest.find(name, capability, **{**variant, **changes})
