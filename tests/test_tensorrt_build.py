"""Engines as TensorRT-RTX builds them without a GPU, for each of its targets and precisions; and the command that does it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import small_model
from PIL import Image
from test_graph import SMALL, random_weights

from advrad_fast import ModelFile
from advrad_fast.backends import cache, tensorrt_calibration
from advrad_fast.backends import tensorrt_engine as engines
from advrad_fast.backends.tensorrt_build import check_precision
from advrad_fast.cli import main
from advrad_fast.config import DetectorConfig, ImageConfig
from advrad_fast.errors import BackendUnavailableError, ConfigError
from advrad_fast.graph_precision import TYPED_PRECISIONS, TypedPrecision, quantised_tensors
from advrad_fast.training.settings import PRESETS

DEMO = Path(__file__).parent.parent / "advrad_fast" / "data" / "elpv-mono.safetensors"
REASON = "tensorrt_rtx is not installed (pip install tensorrt-rtx-cu13; x86-64 and Linux only)"
needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason=REASON)
Capture = pytest.CaptureFixture[str]


def ranges(config: DetectorConfig, weights: Any, largest: float = 4.0) -> dict[str, float]:
    image = config.image
    size = {"height": image.height, "width": image.width, "timestep": config.diffusion.timestep}
    return dict.fromkeys(quantised_tensors(config.unet, weights, **size), largest)


def possible(precision: TypedPrecision, target: str) -> bool:
    try:
        check_precision(precision, target)
    except ConfigError:
        return False
    return True


ALL = [(precision, target) for precision in TYPED_PRECISIONS for target in engines.RTX_TARGETS]
POSSIBLE = [(precision, target) for precision, target in ALL if possible(precision, target)]
IMPOSSIBLE = {("bf16", "sm_75"), ("fp8", "sm_75"), ("fp8", "sm_80"), ("fp8", "sm_86")}


def test_what_is_possible() -> None:
    assert set(ALL) - set(POSSIBLE) == IMPOSSIBLE and len(POSSIBLE) == 26


@needs_rtx
@pytest.mark.parametrize(("precision", "target"), POSSIBLE)
def test_norms_and_attention(precision: TypedPrecision, target: str) -> None:
    """A small network with all the parts that networks have, as two profiles."""
    config, weights = DetectorConfig(unet=SMALL, image=ImageConfig(height=16, width=24)), random_weights(SMALL)
    options: dict[str, Any] = {"target": target, "precision": precision, "batches": (1, 16)}
    if (precision, target) == ("fp32", "sm_75"):  # the one gap: products of fp32 matrices on Turing
        with pytest.raises(BackendUnavailableError, match=r"TensorRT-RTX .* sm_75: .*FP32 GEMM is not supported"):
            engines.build(config, weights, **options)
        return
    assert len(engines.build(config, weights, calibration=ranges(config, weights), **options)) > 100_000


@needs_rtx
@pytest.mark.parametrize(("precision", "target"), POSSIBLE)
def test_the_demos_model(precision: TypedPrecision, target: str) -> None:
    model = ModelFile.load(DEMO)
    calibration = ranges(model.config, model.weights)
    blob = engines.build(model.config, model.weights, target=target, precision=precision, batches=(1,), calibration=calibration)
    assert len(blob) > 100_000


@pytest.mark.slow
@needs_rtx
@pytest.mark.parametrize(("precision", "target"), [case for case in POSSIBLE if case != ("fp32", "sm_75")])
def test_paper_scale(precision: TypedPrecision, target: str) -> None:
    """The preset ``paper`` at 256 x 256: 8 s and 4 GB each."""
    config = DetectorConfig(unet=PRESETS["paper"].unet, image=ImageConfig(height=256, width=256))
    weights = random_weights(config.unet)
    blob = engines.build(
        config, weights, target=target, precision=precision, batches=(1, 16), calibration=ranges(config, weights)
    )
    assert len(blob) > 50_000_000


@needs_rtx
def test_an_engine_does_not_load_without_a_gpu() -> None:
    config, weights = DetectorConfig(unet=SMALL, image=ImageConfig(height=16, width=24)), random_weights(SMALL)
    (rtx,) = [library for library in engines.libraries() if library.name == "tensorrt_rtx"]
    blob = engines.build(config, weights, target="sm_89", precision="fp16", batches=(1,), library=rtx)
    code = (
        "import sys; from advrad_fast.backends import tensorrt_engine as e\n"
        "(rtx,) = [l for l in e.libraries() if l.name == 'tensorrt_rtx']\n"
        "try: e.Engine(sys.stdin.buffer.read(), rtx)\n"
        "except e.BackendUnavailableError as error: sys.stdout.write(str(error))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=blob, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"TensorRT-RTX ")


# The command


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVRAD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    small_model().save(tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    size = small_model().config.image
    (tmp_path / "good").mkdir()
    for i in range(3):
        picture = np.random.default_rng(i).integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "good" / f"{i}.png")
    return tmp_path / "good"


def compile_(*arguments: object) -> int:
    return main(["compile", *(str(argument) for argument in arguments)])


@needs_rtx
def test_compile_engines(model: Path, good: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert compile_(model, "--target", "sm_89", "--target", "sm_75", "--out", out) == 0
    said = capsys.readouterr()
    assert said.out == "" and "sm_89 fp16, batches 1: built in" in said.err and "sm_75 fp16, batches 1: built in" in said.err
    assert len(list(out.iterdir())) == 2
    for path in out.iterdir():
        assert str(path) in said.err and cache.load(out, path.stem) is not None
    assert compile_(model, "--target", "sm_89", "--out", out) == 0
    assert "was there" in capsys.readouterr().err
    # The calibration is kept beside the engines.
    assert compile_(model, "--target", "sm_89", "--precision", "int8", "--out", out) == 2
    assert "--calibration: expected good frames, which int8 needs, got None" in capsys.readouterr().err
    assert compile_(model, "--target", "sm_89", "--precision", "int8", "--calibration", good, "--out", out) == 0
    assert "calibrating on 3 of 3 frames" in capsys.readouterr().err
    loaded = ModelFile.load(model)
    assert tensorrt_calibration.load_ranges(out, loaded.config, loaded.weights)
    assert compile_(model, "--target", "sm_120", "--precision", "fp8", "--batches", 1, 8, "--cache", out) == 0
    said = capsys.readouterr()
    assert "sm_120 fp8, batches 1, 8: built in" in said.err and "calibrating" not in said.err
    assert len(list(out.iterdir())) == 5


@needs_rtx
def test_compile_twice_at_once(model: Path, tmp_path: Path) -> None:
    arguments = [
        sys.executable,
        "-m",
        "advrad_fast.cli",
        "compile",
        str(model),
        "--target",
        "sm_86",
        "--out",
        str(tmp_path / "out"),
    ]
    processes = [subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    (file,) = (tmp_path / "out").iterdir()
    assert cache.load(tmp_path / "out", file.stem) is not None


@needs_rtx
def test_compile_into_a_folder_that_cannot_be_written(model: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("")
    assert compile_(model, "--target", "sm_89", "--out", tmp_path / "file") == 2
    assert "--out: expected a folder that can be written, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "compile: expected a model file, or --kernels"),
        (
            ("M", "--target", "sm_87"),
            "TensorRT-RTX does not build for it, and TensorRT builds only for the GPU of its own machine",
        ),
        (("M", "--target", "sm_90"), "run compile there, with --target here"),
        (("M", "--target", "gfx942"), "target: expected 'here' or one of"),
        (("M", "--target", "sm_80", "--precision", "fp8"), "precision: fp8 needs a GPU of sm_89 or newer, got sm_80"),
        (("M", "--target", "sm_80", "--precision", "fp4"), "precision: expected one of ['fp32', 'fp16', 'bf16', 'int8', 'fp8']"),
        (("M", "--precision", "fp16"), "--precision: expected 'int8': the CPU's others need no preparation"),
        (("M", "--batches", "4"), "--batches: expected --target with it"),
        (("M",), "--calibration: expected good frames, which int8 needs, got None"),
        (("M", "--kernels"), "--kernels: expected neither a model nor its options"),
        (("M", "--kernels", "--out", "k"), "--kernels: expected neither a model nor its options"),
        (("--kernels", "--out", "k", "--processes", "0"), "--processes: expected an integer in [1, 256], got 0"),
    ],
)
def test_compile_refuses(model: Path, capsys: Capture, arguments: tuple[str, ...], message: str) -> None:
    if "--processes" in arguments:
        pytest.importorskip("triton")
    assert compile_(*(str(model) if argument == "M" else argument for argument in arguments)) == 2
    assert message in capsys.readouterr().err


@needs_rtx
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "sm_89", "--batches", "4", "1"), "batches: expected 1 to 16 ascending integers in [1, 4096], got (4, 1)"),
        (("--target", "sm_89", "--calibration", "x"), "--calibration: expected int8 or fp8 with it, got 'fp16'"),
    ],
)
def test_compile_engines_refuses(model: Path, capsys: Capture, arguments: tuple[str, ...], message: str) -> None:
    assert compile_(model, *arguments) == 2
    assert message in capsys.readouterr().err


def test_compile_without_the_library(model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert compile_(model, "--target", "sm_89") == 2
    assert "no library can build an engine for sm_89: TensorRT-RTX is not installed: pip install" in capsys.readouterr().err
