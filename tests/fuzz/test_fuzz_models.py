"""Random damage to model files: each is refused with a ModelFileError, or valid; quickly, and in little memory."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import edit_bytes, edit_json, edit_text, fuzz
from models import assert_equal, certifiable, tiny_model, without_norm

from advrad_fast.errors import ModelFileError
from advrad_fast.graph import expected_tensors
from advrad_fast.model import ModelFile

_LENGTHS = [0, 1, 2, 2**20, 2**20 + 1, 2**40, 2**63, 2**64 - 1]
_FLOATS = [struct.pack("<f", float("nan")), struct.pack("<d", float("inf")), b"\xff" * 8, struct.pack("<f", -np.inf), bytes(8)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    path, files = tmp_path_factory.mktemp("bases") / "base", []
    models = (tiny_model(), tiny_model(False, True), certifiable(without_norm(tiny_model()), 0.125, 0.25))
    for model, half in zip(models, (False, True, False), strict=True):
        model.save(path, half=half)
        files.append(path.read_bytes())
    return files


def mutate(rng: np.random.Generator, data: bytes) -> bytes:
    """One to three mutations of the header, the document, the text of both, the length, the numbers or any bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    document, body = json.loads(header["__metadata__"]["advrad_fast"]), data[8 + length :]
    kind = rng.integers(8)
    if kind <= 2:
        for _ in range(rng.integers(1, 4)):
            edit_json(rng, header if kind == 0 else document)
        if kind > 0:
            inner = json.dumps(document)
            if rng.random() < 0.2:
                inner = edit_text(rng, inner.encode()).decode(errors="surrogateescape")
            header["__metadata__"]["advrad_fast"] = inner
        text = json.dumps(header).encode()
        if kind == 2:
            text = edit_text(rng, text)
        return struct.pack("<Q", len(text)) + text + body
    if kind == 3:
        near = int(rng.choice([length - 1, length + 1, length + 8, len(data), len(data) - 8]))
        return struct.pack("<Q", near if rng.random() < 0.5 else _LENGTHS[rng.integers(len(_LENGTHS))]) + data[8:]
    if kind == 4:
        at = int(rng.integers(len(body) // 4)) * 4
        value = _FLOATS[rng.integers(len(_FLOATS))]
        return data[: 8 + length] + body[:at] + value + body[at + len(value) :]
    for _ in range(rng.integers(1, 4)):
        data = edit_bytes(rng, data, until=8 + length)
    return data


def run(tmp_path: Path, bases: list[bytes], count: int, seed: int) -> int:
    def attempt(rng: np.random.Generator) -> bool:
        mutant = mutate(rng, bases[rng.integers(len(bases))])
        try:
            model = ModelFile._read(io.BytesIO(mutant), len(mutant))  # load() adds the opening, which is slow, and the path
        except ModelFileError as error:
            assert len(str(error)) < 1000
            return False
        assert {n: w.shape for n, w in model.weights.items()} == expected_tensors(model.config.unet)
        assert all(np.isfinite(w).all() for w in [*model.weights.values(), model.mu, model.inverse_spread])
        assert np.isfinite(model.threshold)
        if rng.random() < 0.1:
            model.save(tmp_path / "again")
            assert_equal(model, ModelFile.load(tmp_path / "again"))
        return True

    return fuzz(attempt, count, seed=seed)


def test_model_files(tmp_path: Path, bases: list[bytes]) -> None:
    valid = run(tmp_path, bases, 2_000, seed=0)
    assert 50 < valid < 1_500  # the mutants are neither all broken nor all harmless


@pytest.mark.slow
def test_model_files_long(tmp_path: Path, bases: list[bytes]) -> None:
    run(tmp_path, bases, 100_000, seed=1)
