"""Random damage to what else is read: settings, kernel manifests, checkpoints, the cache: documented errors, or valid values."""

from __future__ import annotations

import dataclasses
import json
import logging
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import edit_bytes, edit_json, edit_text, fuzz
from models import small_model
from test_kernels_manifest import document, row
from test_training import SETTINGS, trainer

from advrad_fast import config
from advrad_fast.backends import cache, tensorrt_calibration
from advrad_fast.config import PoseConfig
from advrad_fast.errors import ConfigError, KernelFileError, TrainingError
from advrad_fast.kernels.manifest import FILE, read_manifest
from advrad_fast.training.settings import TrainSettings

DETECTOR = dataclasses.replace(
    config.DetectorConfig(), image=config.ImageConfig(brightness=0.5, pose=PoseConfig()), unet=config.UNetConfig(patch=4)
)
LONG = [pytest.param(1_000, id="quick"), pytest.param(100_000, id="long", marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", LONG)
def test_settings(count: int) -> None:
    """Whatever JSON comes, a configuration is valid or a ConfigError, and goes through JSON unchanged."""

    def attempt(rng: np.random.Generator) -> bool:
        given = (DETECTOR, TrainSettings())[rng.integers(2)]
        value: Any = json.loads(json.dumps(given.to_json()))
        for _ in range(rng.integers(1, 4)):
            edit_json(rng, value)
        try:
            made = type(given).from_json(value)
        except ConfigError as error:
            assert len(str(error)) < 5000
            return False
        assert type(given).from_json(json.loads(json.dumps(made.to_json()))) == made
        return True

    assert 0 < fuzz(attempt, count, seed=0) < count


@pytest.mark.parametrize("count", [LONG[0], pytest.param(20_000, id="long", marks=pytest.mark.slow)])
def test_kernel_manifests(tmp_path: Path, count: int) -> None:
    (tmp_path / "sm_80").mkdir()
    for name in ("ptx", "cubin"):
        (tmp_path / "sm_80" / f"x.{name}").write_bytes(name.encode())
    kernels = document(row(), row(variant={"channels": 1}))

    def attempt(rng: np.random.Generator) -> bool:
        value = json.loads(json.dumps(kernels))
        for _ in range(rng.integers(0, 3)):
            edit_json(rng, value)
        text = json.dumps(value).encode()
        for _ in range(rng.integers(0, 3)):
            text = edit_text(rng, text) if rng.random() < 0.5 else edit_bytes(rng, text)
        (tmp_path / FILE).write_bytes(text)
        try:
            manifest = read_manifest(tmp_path)
        except KernelFileError:
            return False
        assert all((tmp_path / kernel.ptx).resolve().is_relative_to(tmp_path.resolve()) for kernel in manifest.kernels)
        assert all(manifest.image(kernel, kind) for kernel in manifest.kernels for kind in ("ptx", "cubin"))
        return True

    assert 0 < fuzz(attempt, count, seed=0) < count


@pytest.mark.parametrize("count", [pytest.param(100, id="quick"), pytest.param(5_000, id="long", marks=pytest.mark.slow)])
def test_checkpoints(tmp_path: Path, count: int) -> None:
    """A checkpoint resumes or is a TrainingError, and what resumed can take a step."""
    trainer(tmp_path / "whole").run(progress=False, until=2)
    whole = (tmp_path / "whole").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    path, resuming = tmp_path / "checkpoint", trainer()

    def attempt(rng: np.random.Generator) -> bool:
        header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]
        if rng.random() < 0.5:
            for _ in range(rng.integers(1, 4)):
                edit_json(rng, header)
            text = json.dumps(header).encode()
            mutant = struct.pack("<Q", len(text)) + text + body
        elif rng.random() < 0.3:
            step = ["-1", "0", "1", "7", "9", "9" * 30, "9" * 5000, "1.5", "nan", ""][rng.integers(10)]
            text = json.dumps({**header, "__metadata__": {**header["__metadata__"], "step": step}}).encode()
            mutant = struct.pack("<Q", len(text)) + text + body
        else:
            mutant = edit_bytes(rng, whole, until=8 + length)
        path.write_bytes(mutant)
        resuming.optimiser.state.clear()
        try:
            resuming._resume(path)
        except TrainingError:
            return False
        assert 0 <= resuming.step <= SETTINGS.steps
        resuming._step(resuming.net)
        return True

    assert 0 < fuzz(attempt, count, seed=0, seconds=5.0) < count


@pytest.mark.parametrize("count", [pytest.param(500, id="quick"), pytest.param(20_000, id="long", marks=pytest.mark.slow)])
def test_cache_files(tmp_path: Path, count: int) -> None:
    """A damaged file of the cache is nothing at all: the very bytes that were stored come out, or none."""
    logging.getLogger("advrad_fast.backends.cache").setLevel(logging.ERROR)
    name, blob = "0" * 64, bytes(range(256)) * 8
    assert cache.store(tmp_path, name, blob)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()

    def attempt(rng: np.random.Generator) -> bool:
        mutant = edit_bytes(rng, whole, until=80)
        file.write_bytes(mutant)
        found = cache.load(tmp_path, name)
        assert found is None or (found == blob and mutant == whole)
        return found is not None

    try:
        fuzz(attempt, count, seed=0)
    finally:
        logging.getLogger("advrad_fast.backends.cache").setLevel(logging.NOTSET)


@pytest.mark.parametrize("count", [pytest.param(200, id="quick"), pytest.param(10_000, id="long", marks=pytest.mark.slow)])
def test_calibrations_in_the_cache(tmp_path: Path, count: int) -> None:
    """A calibration whose file is whole but whose contents are not: none, or a range above 0 for every name."""
    model = small_model()
    ranges = {"a": 1.0, "b": 2.5, "c": 1e-3}
    name = tensorrt_calibration._name(model.config, model.weights)
    tensorrt_calibration.store_ranges(tmp_path, model.config, model.weights, ranges)
    logging.getLogger("advrad_fast").setLevel(logging.ERROR)

    def attempt(rng: np.random.Generator) -> bool:
        value = dict(ranges)
        edit_json(rng, value)
        text = json.dumps(value).encode()
        cache.store(tmp_path, name, edit_text(rng, text) if rng.random() < 0.5 else text)
        found = tensorrt_calibration.load_ranges(tmp_path, model.config, model.weights)
        if found is None:
            return False
        assert all(isinstance(key, str) and type(value) is float and 0 < value < np.inf for key, value in found.items())
        return True

    try:
        assert 0 < fuzz(attempt, count, seed=0) < count
    finally:
        logging.getLogger("advrad_fast").setLevel(logging.NOTSET)
