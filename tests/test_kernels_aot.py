"""Ahead-of-time builds, and the gate on what the assembler made of every kernel for every target."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from kernel_builds import gated

from advrad_fast import cli
from advrad_fast.errors import ConfigError, KernelFileError
from advrad_fast.kernels import aot, resources
from advrad_fast.kernels.manifest import FILE, TARGETS, Kernel, Manifest, read_manifest

# The best known Box-Muller took 664 instructions for a thread's 16 fp32 outputs, noise included, on sm_80; 1.3 times that.
INSTRUCTIONS_AN_ELEMENT = 1.3 * 664 / 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels") / "k"


@pytest.fixture(scope="module")
def built(folder: Path) -> Manifest:
    return aot.build(folder, wanted=gated, processes=2)


def widths(kernel: Kernel) -> tuple[set[int], set[int]]:
    """The widths in bits that a kernel's loads may have, and those that its stores must have."""
    variant = kernel.variant
    if kernel.name == "noise":  # eight pixels a channel, an image's id; lattice: thresholds
        return {64, 32}, {128}
    if kernel.name == "errors":  # outputs, four pixels a channel, an image's id; lattice: thresholds.  The score is set to 0
        return {128, 32} | ({64} if variant["noise"] == "lattice" else set()), {128, 32}
    if kernel.name == "deviation":  # the wide filter's window starts anywhere
        return {128, 32} if variant["wide"] else {128}, {128} if variant["maps"] else set()
    return {"rows": ({128}, {128}), "votes_counts": ({32}, {64}), "votes_ranks": ({32, 64}, {32})}[kernel.name]


def test_every_target_is_built(built: Manifest) -> None:
    names = {(kernel.name, kernel.target) for kernel in built.kernels}
    assert names == {(name, target) for name in aot.SOURCES for target in TARGETS}
    for kernel in built.kernels:
        assert built.image(kernel, "cubin")[:4] == b"\x7fELF"
        ptx = built.image(kernel, "ptx").decode()
        assert f".entry {kernel.entry}(" in ptx and f".target {kernel.arch}\n" in ptx
        assert ".file" not in ptx and ".loc" not in ptx


@pytest.mark.parametrize("target", TARGETS)
def test_gate(built: Manifest, target: str) -> None:
    """No spills, no stack, the widths that are meant, and registers for at least two warps on each scheduler."""
    kernels = [kernel for kernel in built.kernels if kernel.target == target]
    with ThreadPoolExecutor(2) as pool:  # the disassembler is a process of its own
        inspected = list(pool.map(lambda kernel: resources.inspect(built.image(kernel, "cubin")), kernels))
    for kernel, used in zip(kernels, inspected, strict=True):
        what = f"{kernel.name} {dict(kernel.variant)} {target}: {used}"
        assert kernel.spills == used.spills == 0 and kernel.stack == used.stack == 0, what
        assert kernel.registers == used.registers <= 192, what
        reserved = 1024 if int(target.removeprefix("sm_")) >= 90 else 0  # by the system, in every CTA
        assert kernel.shared <= 1024 and used.shared <= reserved, what
        may_load, must_store = widths(kernel)
        assert set(used.loads) <= may_load, what
        assert set(used.stores) == must_store, what
        if kernel.name in ("noise", "errors", "rows", "deviation"):
            assert 128 in used.loads or kernel.name == "noise", what
        if kernel.name == "noise" and kernel.variant["noise"] == "gaussian":
            assert used.instructions / 24 <= INSTRUCTIONS_AN_ELEMENT, what  # 8 pixels of 3 channels a thread


def test_builds_are_repeatable(built: Manifest, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled again, not taken from Triton's cache: the same bytes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    again = aot.build(tmp_path / "k", ("sm_89",), ("noise", "votes_counts"), wanted=gated)
    for kernel in again.kernels:
        assert [kernel] == [k for k in built.kernels if k.ptx == kernel.ptx]
    assert json.loads((tmp_path / "k" / FILE).read_text())["kernels"][0]["name"] == "noise"
    assert not [p for p in (tmp_path / "k").rglob("*") if p.name.startswith(".")]


def test_spills_are_seen() -> None:
    """The gate's counter on text that has what it looks for."""
    text = "\n".join(f"        /*{i:04x}*/  {line} ;" for i, line in enumerate(
        ["LDG.E.128 R4, [R2.64]", "@!P0 LDG.E.U8 R4, [R2.64]", "@P1 STL.64 [R1], R2", "LDL R2, [R1]", "STG.E.64 [R2.64], R4",
         "LDG.E.LTC128B.128 R4, [R2.64]", "EXIT", "BRA 0x10", "NOP"]))  # fmt: skip
    assert resources._INSTRUCTION.findall(text)[:4] == ["LDG.E.128", "LDG.E.U8", "STL.64", "LDL"]
    counts: Any = __import__("collections").Counter(resources._INSTRUCTION.findall(text))
    assert resources._widths(counts, "LDG") == {128: 2, 8: 1} and resources._widths(counts, "STG") == {64: 1}


@pytest.mark.parametrize("target", aot.AMD_TARGETS)
def test_amd_compiles(target: str) -> None:
    made = list(aot.build_amd((target,), wanted=gated))
    assert {name for _, name, _, _ in made} == set(aot.SOURCES)
    assert all(code[:4] == b"\x7fELF" for _, _, _, code in made)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "k"
    assert cli.main(["compile", "--out", str(out)]) == cli.FAILED
    assert "compile: expected a model file, or --kernels" in capsys.readouterr().err
    assert cli.main(["compile", "--kernels", "--out", str(out), "--target", "sm_1"]) == cli.FAILED
    assert "targets: expected" in capsys.readouterr().err and not out.exists()


@pytest.mark.slow
def test_command_line_builds_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "--kernels", "--out", str(tmp_path / "k"), "--target", "sm_89"]) == cli.OK
    manifest = read_manifest(tmp_path / "k")
    assert len(manifest.kernels) == sum(len(source.variants) for source in aot.SOURCES.values())
    assert not any(kernel.spills or kernel.stack for kernel in manifest.kernels)


def test_bad_builds_are_refused(tmp_path: Path) -> None:
    for arguments, name in (((["sm_99"],), "targets"), ((["sm_80"], ["noises"]), "kernels")):
        with pytest.raises(ConfigError, match=f"^{name}: expected"):
            aot.build(tmp_path, *arguments)
    with pytest.raises(ConfigError, match=r"^kernels: expected"):
        aot.build(tmp_path, ["sm_80"], wanted=lambda name, variant: False)
    with pytest.raises(KernelFileError, match=r"expected a cubin|cuobjdump"):
        resources.inspect(b"no ELF")


def test_the_interpreters_mode_is_refused() -> None:
    code = "from pathlib import Path; from advrad_fast.kernels import aot; aot.build(Path('/nonexistent'))"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode and "TRITON_INTERPRET is set" in run.stderr


def test_numbers_keep_their_types_in_tritons_own_launcher() -> None:
    """It makes a constant of an argument that is 1, and takes a small one for 32 bits: a seed would lose its type."""
    for name, source in aot.SOURCES.items():
        for parameter in source.function.params:
            if source.types.get(parameter.name) in ("u64", "i64"):
                assert parameter.do_not_specialize, (name, parameter.name)
                assert parameter.annotation_type == source.types[parameter.name], (name, parameter.name)
