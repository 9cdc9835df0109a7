"""PTX that nvcc made of nvcc/kernels.cu, with known results.

The .ptx files beside it are what ``nvcc -ptx -arch=compute_75 kernels.cu -o kernels_sm75.ptx`` (and 90 likewise) of CUDA 13.0
wrote; where that nvcc is installed a test writes them again and compares.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpu_emulation import Memory, Module, Report

HERE = Path(__file__).parent / "nvcc"
TARGETS = (75, 90)
ORDERS = [None, 1, 2, 3]

Array = NDArray[Any]


@cache
def module(target: int) -> Module:
    return Module((HERE / f"kernels_sm{target}.ptx").read_text())


def run(
    target: int,
    name: str,
    arguments: Sequence[Array | int | float],
    *,
    grid: int = 1,
    block: int = 128,
    shared: int = 0,
    seed: int | None = None,
) -> tuple[list[Array], Report]:
    """Arrays are copied there and back; the others are passed as they are: a Python int or float is 4 bytes."""
    memory, entry = Memory(), module(target).entries[name]
    buffer = bytearray(entry.parameter_bytes)
    places = []
    for argument, parameter in zip(arguments, entry.parameters, strict=True):
        if isinstance(argument, np.ndarray):
            places.append(memory.alloc(argument.nbytes))
            memory.write(places[-1], argument.tobytes())
            struct.pack_into("<Q", buffer, parameter.offset, places[-1])
        else:
            struct.pack_into("<f" if isinstance(argument, float) else "<i", buffer, parameter.offset, argument)
    report = module(target).launch(
        name, (grid, 1, 1), (block, 1, 1), bytes(buffer), memory, dynamic_shared=shared, order_seed=seed
    )
    arrays = [argument for argument in arguments if isinstance(argument, np.ndarray)]
    back = [
        np.frombuffer(memory.read(place, a.nbytes), dtype=a.dtype).reshape(a.shape)
        for a, place in zip(arrays, places, strict=True)
    ]
    return back, report


targets = pytest.mark.parametrize("target", TARGETS)
orders = pytest.mark.parametrize("seed", ORDERS)


@targets
@orders
def test_axpy(rng: np.random.Generator, target: int, seed: int | None) -> None:
    """y = fma(a, x, y), rounded once: float64 is exact enough but for ties, of which there are none here."""
    n = 1000
    x, y = rng.standard_normal((2, n)).astype(np.float32)
    (_, got), report = run(target, "axpy", [2.5, x, y, n], grid=8, seed=seed)
    np.testing.assert_array_equal(got, (np.float64(2.5) * x + y).astype(np.float32))
    assert report.loaded.unique == report.loaded.requested == 8 * n
    assert report.stored.unique == report.stored.requested == 4 * n
    assert report.bytes_moved == 12 * n
    assert report.instructions["fma.rn.f32"] == n
    assert report.opcodes()["st"] == n
    totals = report.thread_totals
    assert totals.shape == (8, 128) and totals.sum() == sum(report.instructions.values())
    assert totals.reshape(-1)[:n].min() > totals.reshape(-1)[n:].max()  # the rest only compares and leaves


@targets
@orders
def test_sum_over_the_grid(rng: np.random.Generator, target: int, seed: int | None) -> None:
    """Whole numbers: every order gives the same sum."""
    x = rng.integers(-1000, 1000, 5000).astype(np.float32)
    arguments: list[Array | int | float] = [x, np.zeros(7, np.float32), np.zeros(1, np.uint32), np.zeros(1, np.float32), len(x)]
    (_, partial, counter, out), report = run(target, "sum", arguments, grid=7, block=96, seed=seed)
    assert out[0] == x.sum() == partial.sum() and counter[0] == 7
    assert report.barriers == 14 and report.atomics.accesses == 7


@targets
@orders
def test_histogram(rng: np.random.Generator, target: int, seed: int | None) -> None:
    x = rng.integers(0, 256, 1500).astype(np.uint8)
    x[:100] = 7
    (_, bins), _ = run(target, "histogram", [x, np.zeros(256, np.uint32), len(x)], grid=3, block=64, shared=1024, seed=seed)
    np.testing.assert_array_equal(bins, np.bincount(x, minlength=256))


@targets
def test_halves(target: int) -> None:
    x = np.arange(0, 1 << 16, 7, dtype=np.uint16).view(np.float16)
    (_, h, b), _ = run(target, "halves", [x, np.zeros_like(x), np.zeros(len(x), np.uint16), len(x)], grid=80)
    with np.errstate(all="ignore"):
        exact = x.astype(np.float64) ** 2 + 0.25  # exact: 22 bits and a quarter
        fused = exact.astype(np.float16)
        tripled = (x.astype(np.float32) * np.float32(3)).view(np.uint32)
    nan = np.isnan(x)
    np.testing.assert_array_equal(h[~nan], fused[~nan])
    assert np.isnan(h[nan]).all() and (b[nan] == 0x7FFF).all()
    rounded = (tripled + 0x7FFF + (tripled >> 16 & 1)) >> 16  # to nearest, ties to even
    np.testing.assert_array_equal(b[~nan], rounded[~nan].astype(np.uint16))


@targets
def test_integers(rng: np.random.Generator, target: int) -> None:
    x = np.concatenate([rng.integers(1, 1 << 32, 200, dtype=np.uint64), [1, 2**31, 2**32 - 1]]).astype(np.uint32)
    (_, out), _ = run(target, "integers", [x, np.zeros((len(x), 8), np.int64), len(x)], grid=2)
    for i, row in enumerate(out.tolist()):
        a, b = int(x[i]), int(x[(i + 1) % len(x)])
        wide = a * (b - (1 << 32) if b >> 31 else b)
        wide = (wide + (1 << 63)) % (1 << 64) - (1 << 63)
        quotient, rest = divmod(abs(wide), 1000003)[0], abs(wide) % 97
        both = (b << 32 | a).to_bytes(8, "little")
        assert row == [
            quotient if wide >= 0 else -quotient,
            rest if wide >= 0 else -rest,
            a * b >> 32,
            ((b << 32 | a) << (a & 31)) >> 32 & 0xFFFFFFFF,
            a.bit_count() + 100 * (32 - b.bit_length()) + 10000 * ((a & -a).bit_length()),
            int.from_bytes(bytes([both[5], both[7], both[1], both[3]]), "little"),
            int(f"{a:032b}"[::-1], 2),
            (wide * wide) >> 64,
        ]


@targets
def test_functions(rng: np.random.Generator, target: int) -> None:
    """CUDA promises 2 ulp for sinf, 2 for expf and 1 for logf; the last, two roundings and a square root, has none above 2."""
    x = np.concatenate([rng.standard_normal(500) * 100, rng.standard_normal(200) * 1e8, [0.0, 1e-40, 105615.0]]).astype(
        np.float32
    )
    (_, out), report = run(target, "functions", [x, np.zeros((len(x), 4), np.float32), len(x)], grid=6)
    v, size = x.astype(np.float64), np.abs(x)
    exponent, argument = (size * np.float32(1e-3)).astype(np.float64), (size + np.float32(1)).astype(np.float64)
    exact = np.stack([np.sin(v), np.exp(-exponent), np.log(argument), np.sqrt(np.abs(v)) / (v * v + 3)], axis=1)
    error = np.abs(out - exact) / np.spacing(np.maximum(np.abs(exact), 2.0**-126).astype(np.float32))
    worst = error.max(axis=0)
    assert (worst <= [2, 2, 1, 2]).all(), worst
    assert report.opcodes()["ld"] > len(x) + 5 * 200  # the slow path of sinf ran: loads from its table


@targets
@orders
def test_lanes_that_part_and_meet(target: int, seed: int | None) -> None:
    def steps(value: int) -> int:
        return 0 if value == 1 else 1 + steps(3 * value + 1 if value % 2 else value // 2)

    x = np.arange(1, 301, dtype=np.uint32)
    (_, got), report = run(target, "collatz", [x, np.zeros_like(x), len(x)], grid=5, block=64, seed=seed)
    assert got.tolist() == [steps(int(value)) for value in x]
    assert sum(report.warp_instructions.values()) * 32 > sum(report.instructions.values())


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("target", [75, pytest.param(90, marks=pytest.mark.slow)])
def test_the_files_are_what_nvcc_writes(tmp_path: Path, target: int) -> None:
    command = ["nvcc", "-ptx", f"-arch=compute_{target}", str(HERE / "kernels.cu"), "-o", str(tmp_path / "new.ptx")]
    kept = (HERE / f"kernels_sm{target}.ptx").read_text()
    release = re.search(r"release ([\d.]+)", kept)
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    if release is None or f"release {release[1]}" not in version:
        pytest.skip("another release of nvcc")
    subprocess.run(command, check=True, capture_output=True)

    def code(text: str) -> str:
        return re.sub(r"//[^\n]*", "", text)

    assert code((tmp_path / "new.ptx").read_text()) == code(kept)
