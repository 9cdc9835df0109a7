"""PTX that Triton emits, executed in the fixed order and in shuffled ones, against NumPy."""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from advrad_fast import philox
from gpu_emulation import Memory, Module, Report

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")

TARGETS = (75, 80, 90, 120)
targets = pytest.mark.parametrize("target", TARGETS)
orders = pytest.mark.parametrize("seed", [None, 1, 2])

Array = NDArray[Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels' PTX, compiled once."""
    out = tmp_path_factory.mktemp("ptx")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(out / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    script = Path(__file__).with_name("triton_kernels.py")
    command = [sys.executable, str(script), str(out), *map(str, TARGETS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def run(
    folder: Path, name: str, target: int, x: Array, out: Array | int, n: int, *, grid: int = 1, seed: int | None
) -> tuple[Array, Report]:
    """``out``: initial contents, or how many bytes nobody has written."""
    (path,) = folder.glob(f"{name}_sm{target}_shared*.ptx")
    module, memory = Module(path.read_text()), Memory()
    assert module.target.startswith(f"sm_{target}")
    ((entry_name, entry),) = module.entries.items()
    places = [memory.alloc(x.nbytes), memory.alloc(out if isinstance(out, int) else out.nbytes)]
    memory.write(places[0], x)
    if not isinstance(out, int):
        memory.write(places[1], out)
    parameters = struct.pack("<QQi4xQQ", *places, n, 0, 0)  # the last two: scratch memory, not used
    block = (entry.max_threads or 0, 1, 1)
    shared = int(path.stem.rpartition("shared")[2])
    report = module.launch(entry_name, (grid, 1, 1), block, parameters, memory, dynamic_shared=shared, order_seed=seed)
    nbytes = out if isinstance(out, int) else out.nbytes
    assert memory.written(places[1], nbytes).all()
    return np.frombuffer(memory.read(places[1], nbytes), dtype=np.uint8), report


@targets
@orders
@pytest.mark.parametrize("n", [1, 1000, 1024, 4099])
def test_copy(folder: Path, rng: np.random.Generator, target: int, seed: int | None, n: int) -> None:
    for name, kind in (("copy_f32", np.float32), ("copy_u8", np.uint8)):
        x = rng.integers(0, 256, n * np.dtype(kind).itemsize).astype(np.uint8)
        got, report = run(folder, name, target, x, x.nbytes, n, grid=-(-n // 1024), seed=seed)
        np.testing.assert_array_equal(got, x)
        assert report.loaded.unique == report.loaded.requested == report.stored.unique == x.nbytes
        assert report.bytes_moved == 2 * x.nbytes


@targets
@orders
@pytest.mark.parametrize("name", ["rows", "rows_f16"])
def test_rows(folder: Path, rng: np.random.Generator, target: int, seed: int | None, name: str) -> None:
    """Whole numbers: every order of additions gives the same."""
    x = rng.integers(-20, 20, (5, 700)).astype(np.float16 if "f16" in name else np.float32)
    got, report = run(folder, name, target, x, 40, 700, grid=5, seed=seed)
    np.testing.assert_array_equal(got.view(np.float32).reshape(5, 2), np.stack([x.sum(1, dtype=np.float32), x.max(1)], axis=1))
    assert report.barriers > 0 and report.opcodes()["shfl"] > 0


@targets
@orders
def test_pipelined(folder: Path, rng: np.random.Generator, target: int, seed: int | None) -> None:
    x = rng.integers(-100, 100, 256 * 7).astype(np.float32)
    got, report = run(folder, "pipelined", target, x, 1024, len(x), seed=seed)
    np.testing.assert_array_equal(got.view(np.float32), x.reshape(7, 256).sum(0))
    assert (report.opcodes()["cp"] > 0) == (target >= 80)
    assert report.loaded.unique == x.nbytes


@targets
@orders
def test_transpose(folder: Path, rng: np.random.Generator, target: int, seed: int | None) -> None:
    for name, kind in (("transpose_f16", np.uint16), ("transpose_u8", np.uint8)):
        x = rng.integers(0, np.iinfo(kind).max, (32, 64)).astype(kind)
        got, _ = run(folder, name, target, x, x.nbytes, 0, seed=seed)
        np.testing.assert_array_equal(got.view(kind).reshape(64, 32), x.T)


@targets
@orders
def test_random_words(folder: Path, target: int, seed: int | None) -> None:
    key = 1234567
    got, report = run(folder, "words", target, np.zeros(1, np.int32), 4 * 3072, key, grid=3, seed=seed)
    np.testing.assert_array_equal(got.view(np.uint32), philox.integers(3072, seed=key))
    assert report.loaded.requested == 0 and set(report.stored.widths) == {128}


@targets
@orders
def test_the_last_program_adds_up(folder: Path, rng: np.random.Generator, target: int, seed: int | None) -> None:
    """Parts go from program to program through memory, with the atomic's release and acquire: no race."""
    x = rng.integers(-1000, 1000, 40 * 256 - 5).astype(np.int32)
    got, _ = run(folder, "grid_sum", target, x, np.zeros(42, np.int32), len(x), grid=40, seed=seed)
    assert got.view(np.int32)[:2].tolist() == [40, x.sum()]
