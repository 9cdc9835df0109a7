"""The cache of engines under attack: damaged, foreign, read-only, shared.  What runs was built for this GPU, or nothing does."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import FakeTensorRT
from test_graph import random_weights

from advrad_fast.backends import cache, tensorrt_calibration
from advrad_fast.backends import tensorrt_engine as engines
from advrad_fast.backends.tensorrt_library import Toolkit
from advrad_fast.config import DetectorConfig, DiffusionConfig, ImageConfig, UNetConfig
from advrad_fast.errors import AdvRADError, BackendUnavailableError, ConfigError

UNET = UNetConfig(base_channels=4, channel_mult=(1,), norm_groups=2, patch=2)
CONFIG = DetectorConfig(unet=UNET, image=ImageConfig(height=16, width=24))
WEIGHTS = random_weights(UNET)
GPU: dict[str, Any] = {"gpu_name": "NVIDIA L4", "capability": (8, 9), "driver_version": "13000"}
RANGES = dict.fromkeys(
    tensorrt_calibration.quantised_tensors(UNET, WEIGHTS, height=16, width=24, timestep=CONFIG.diffusion.timestep), 4.0
)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toolkit, "_loaded", {})
    monkeypatch.setattr(engines, "_unstored", type(engines._unstored)())
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorRT]:
    version = {"tensorrt": "11.4.0.106", "tensorrt_rtx": "1.7.1.116"}[request.param]
    yield FakeTensorRT(request.param, version).install(monkeypatch)


def load(folder: Path | None, **changes: Any) -> engines.Engine:
    options: dict[str, Any] = {"config": CONFIG, "weights": WEIGHTS, "precision": "fp16", "batches": (1,), **GPU, **changes}
    return engines.load_or_build(options.pop("config"), options.pop("weights"), folder=folder, **options)


def builds(fake: FakeTensorRT) -> int:
    return len(fake.named("build_serialized_network"))


def test_a_hit_builds_nothing(fake: FakeTensorRT, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(tmp_path / "new")
    assert "fp16 engine for " in caplog.text and "not in the cache" in caplog.text
    assert len(list((tmp_path / "new").iterdir())) == 1
    load(tmp_path / "new")
    assert builds(fake) == 1


def test_the_key_has_all_that_matters(fake: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(tmp_path)
    changed = {**WEIGHTS, "head.bias": WEIGHTS["head.bias"] + np.float32(1.0)}
    later = dataclasses.replace(CONFIG, diffusion=DiffusionConfig(timestep=101))
    wider = dataclasses.replace(CONFIG, image=ImageConfig(height=16, width=32))
    same_network = dataclasses.replace(CONFIG, diffusion=dataclasses.replace(CONFIG.diffusion, draws=3))
    for changes in ({"weights": changed}, {"config": later}, {"config": wider}, {"precision": "fp32"}, {"batches": (1, 4)}):
        before = builds(fake)
        load(tmp_path, **changes)
        assert builds(fake) == before + 1
        load(tmp_path, **changes)
        assert builds(fake) == before + 1
    load(tmp_path, config=same_network)
    assert builds(fake) == 6
    # TensorRT measures kernels on one GPU under one driver; TensorRT-RTX builds for an architecture.
    rtx = fake.name == "tensorrt_rtx"
    for number, changes in enumerate(({"gpu_name": "NVIDIA L40S"}, {"driver_version": "13010"}, {"capability": (8, 6)}), 1):
        load(tmp_path, **changes)
        assert builds(fake) == 6 + ((1 if number == 3 else 0) if rtx else number)
    before = builds(fake)
    for name in ("GRAPH_VERSION", "TYPED_GRAPH_VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(engines, name, 99)
            load(tmp_path)
        before += 1
        assert builds(fake) == before


def test_another_version_of_the_library(fake: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(tmp_path)
    newer = FakeTensorRT(fake.name, "11.5.0" if fake.name == "tensorrt" else "1.8.0").install(monkeypatch)
    monkeypatch.setattr(Toolkit, "_loaded", {})
    load(tmp_path)
    assert builds(newer) == 1 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "flipped hash", "text", "another's name", "older format"])
def test_damage_is_seen_and_repaired(fake: FakeTensorRT, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    load(tmp_path, batches=(4,))
    (other,) = tmp_path.iterdir()
    load(tmp_path)
    (file,) = set(tmp_path.iterdir()) - {other}
    good = file.read_bytes()
    flipped, spoilt = bytearray(good), bytearray(good)
    flipped[-1] ^= 1
    spoilt[40] ^= 1
    bad = {
        "truncated": good[:-1],
        "empty": b"",
        "flipped": bytes(flipped),
        "flipped hash": bytes(spoilt),
        "text": b"hello",
        "another's name": other.read_bytes(),
        "older format": good.replace(b"network 2\n", b"network 1\n"),
    }[damage]
    file.write_bytes(bad)
    fake.calls.clear()
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path).batches == (1,)
    assert "damaged" in caplog.text and builds(fake) == 1
    assert len(fake.named("deserialize_cuda_engine")) == 1  # of the new one alone
    assert file.read_bytes() == good


def test_every_flipped_byte_is_seen(fake: FakeTensorRT, tmp_path: Path) -> None:
    load(tmp_path)
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    for i in range(len(good)):
        flipped = bytearray(good)
        flipped[i] ^= 0x10
        file.write_bytes(flipped)
        assert cache.load(tmp_path, file.stem) is None
    for end in range(len(good)):
        file.write_bytes(good[:end])
        assert cache.load(tmp_path, file.stem) is None


def test_a_whole_engine_that_is_refused(fake: FakeTensorRT, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(tmp_path)
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    cache.store(tmp_path, file.stem, b"engine 9.9.9 1,3,16,24")
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path).batches == (1,)
    assert "is refused; building it again" in caplog.text and "of another version" in caplog.text
    assert builds(fake) == 2 and file.read_bytes() == good
    fake.fail = "deserialize_cuda_engine"  # what was just built, too: there is no point in building it a third time
    (tmp_path / file.name).unlink()
    with pytest.raises(BackendUnavailableError, match=r"cuda: no engine: .* does not load the engine: .*it is broken"):
        load(tmp_path)
    assert builds(fake) == 3


def test_a_folder_that_cannot_be_written(
    fake: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Then a process keeps what it built."""

    def refuse(path: Path, data: bytes) -> None:
        raise PermissionError(30, "Read-only file system", str(path))

    monkeypatch.setattr(cache, "write_atomically", refuse)
    for _ in range(2):
        load(tmp_path)
    assert builds(fake) == 1 and not list(tmp_path.iterdir())
    for batch in range(2, 9):
        load(tmp_path, batches=(batch,))
    assert len(engines._unstored) == 4  # not without end
    load(tmp_path / "x", batches=(8,))
    assert builds(fake) == 8
    load(None, batches=(8,))
    assert builds(fake) == 8


def test_a_damaged_file_in_a_read_only_folder(fake: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(tmp_path)
    (file,) = tmp_path.iterdir()
    cache.store(tmp_path, file.stem, b"engine 9.9.9 1,3,16,24")

    def refuse(path: Path, data: bytes) -> None:
        raise PermissionError(30, "Read-only file system", str(path))

    monkeypatch.setattr(cache, "write_atomically", refuse)
    for _ in range(3):
        assert load(tmp_path).batches == (1,)
    assert builds(fake) == 2


def test_an_engine_brought_from_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``compile --target`` on a machine without a GPU, its folder carried to the GPU's."""
    there = FakeTensorRT("tensorrt_rtx", "1.7.1.116").install(monkeypatch)
    compiled = engines.compile_engine(CONFIG, WEIGHTS, target="sm_89", precision="fp16", batches=(1,), folder=tmp_path)
    assert compiled.stored and not compiled.cached and builds(there) == 1
    load(tmp_path)
    assert builds(there) == 1
    with pytest.raises(BackendUnavailableError, match=r"TensorRT-RTX 1\.7\.1\.116 does not build for sm_90"):
        load(tmp_path, capability=(9, 0))


def test_tensorrt_before_rtx_and_rtx_where_tensorrt_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = FakeTensorRT("tensorrt", "10.3.0").install(monkeypatch)
    second = FakeTensorRT("tensorrt_rtx", "1.7.1.116").install(monkeypatch)
    assert load(tmp_path).library.name == "tensorrt"
    first.fail = "build_serialized_network"
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path, batches=(2,)).library.name == "tensorrt_rtx"
    assert "TensorRT 10.3.0 cannot build an engine for here: [build_serialized_network] Error Code 1" in caplog.text
    second.fail = "build_serialized_network"
    with pytest.raises(
        BackendUnavailableError, match=r"cuda: no engine: TensorRT 10\.3.*it is broken; TensorRT-RTX 1\.7.*broken"
    ):
        load(tmp_path, batches=(3,))


def test_no_library(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailableError, match=r"cuda: TensorRT is not installed: .*; TensorRT-RTX is not installed"):
        load(tmp_path)


# Calibration


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_calibrated_engines(fake: FakeTensorRT, tmp_path: Path, precision: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BackendUnavailableError, match=f"no calibration of this model in .*--precision {precision} --calibration"):
        load(tmp_path, precision=precision)
    assert tensorrt_calibration.store_ranges(tmp_path, CONFIG, WEIGHTS, RANGES)
    assert tensorrt_calibration.load_ranges(tmp_path, CONFIG, WEIGHTS) == RANGES
    for _ in range(2):
        load(tmp_path, precision=precision)
    assert builds(fake) == 1
    tensorrt_calibration.store_ranges(tmp_path, CONFIG, WEIGHTS, {**RANGES, next(iter(RANGES)): 5.0})
    load(tmp_path, precision=precision)  # calibrated again: built again
    assert builds(fake) == 2
    changed = {**WEIGHTS, "head.bias": WEIGHTS["head.bias"] + np.float32(1.0)}
    with pytest.raises(BackendUnavailableError, match="no calibration of this model"):
        load(tmp_path, weights=changed, precision=precision)
    for path in tmp_path.iterdir():
        if path.stat().st_size > 200 and b"{" in path.read_bytes():
            path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING), pytest.raises(BackendUnavailableError, match="no calibration of this model"):
        load(tmp_path, precision=precision)
    assert "damaged" in caplog.text


def test_refusals(fake: FakeTensorRT, tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {"precision": "fp64"},
        {"precision": "fp8", "capability": (8, 6)},
        {"precision": "bf16", "capability": (7, 5)},
        {"batches": ()},
    ]
    for changes in wrong:
        with pytest.raises(ConfigError):
            load(tmp_path, **changes)
    with pytest.raises(AdvRADError, match=r"stem\.bias"):
        load(tmp_path, weights={name: array for name, array in WEIGHTS.items() if name != "stem.bias"})
    assert builds(fake) == 0


# Processes


def test_two_processes_at_once(tmp_path: Path) -> None:
    """Both have an engine, and one good file is left."""
    code = f"""
import sys, pytest
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_tensorrt_cache as t
with pytest.MonkeyPatch.context() as patch:
    fake = t.FakeTensorRT("tensorrt", "11.4.0.106").install(patch)
    for batch in range(1, 9):
        assert t.load(t.Path({str(tmp_path)!r}), batches=(batch,)).batches == (batch,)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    files = sorted(tmp_path.iterdir())
    assert len(files) == 8  # and no temporary one
    assert all(cache.load(tmp_path, file.stem) is not None for file in files)
