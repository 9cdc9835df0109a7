"""Damaged and hostile model files: each is valid or refused, and quickly.  Random ones: tests/fuzz/test_fuzz_models.py."""

from __future__ import annotations

import json
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import certifiable, tiny_model, without_norm
from safetensors.numpy import save as serialise

import advrad_fast.model
from advrad_fast.errors import ModelFileError
from advrad_fast.model import ModelFile

Edit = Callable[[dict[str, Any]], None]


# Files, taken apart and put together again.


def _split(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Header without the document, document, tensor data."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["advrad_fast"]), data[8 + length :]


def _join(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("model") / "a"
    certifiable(without_norm(tiny_model()), 0.125, 0.25).save(path)
    return path.read_bytes()


def _load(tmp_path: Path, data: bytes) -> ModelFile:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    return ModelFile.load(path)


def _entry(name: str, **changes: object) -> Edit:
    return lambda header: header[name].update(changes)


def _swap(header: dict[str, Any]) -> None:
    a, b = header["mu"], header["spread"]
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]


def _shift(header: dict[str, Any]) -> None:
    """A hole of 8 bytes before, and an overlap after."""
    header["mu"]["data_offsets"] = [n + 8 for n in header["mu"]["data_offsets"]]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_entry("mu", dtype="F16"), "mu.dtype: expected F32, got 'F16'"),
        (_entry("mu", dtype=["F32"]), "mu.dtype"),
        (_entry("unet.stem.bias", dtype="BF16"), "unet.stem.bias.dtype: expected F32 or F16"),
        (_entry("unet.stem.bias", dtype="F16"), "unet.stem.bias.data_offsets: expected two, 4 bytes apart"),
        (_entry("calibration_scores", dtype="I64"), "calibration_scores.dtype"),
        (_entry("calibration_scores", shape=[0]), "calibration_scores.shape"),
        (_entry("calibration_scores", shape=[]), "calibration_scores.shape"),
        (_entry("calibration_scores", shape=[2**40]), "calibration_scores.shape"),
        (_entry("mu", shape=[16, 8]), r"mu.shape: expected \[8, 16\]"),
        (_entry("mu", shape=[8.0, 16]), "mu.shape"),
        (_entry("mu", shape=None), "mu.shape"),
        (_entry("mu", shape=[True, 16]), "mu.shape"),
        (_entry("mu", data_offsets=[0]), "mu.data_offsets"),
        (_entry("mu", data_offsets=[-512, 0]), "mu.data_offsets"),
        (_entry("mu", data_offsets=[2**63, 2**63 + 512]), "mu.data_offsets"),
        (_entry("mu", data_offsets=[0, 512]), "data_offsets: expected to begin at"),
        (_entry("mu", more=1), "mu: expected an object"),
        (_entry("smoothing.0.mu", dtype="F16"), "smoothing.0.mu.dtype: expected F32"),
        (_entry("smoothing.0.affine", dtype="F16"), "smoothing.0.affine.dtype: expected F32"),
        (_entry("smoothing.1.affine", shape=[20, 2]), r"smoothing.1.affine.shape: expected \[2, 20\]"),
        (_entry("smoothing.1.calibration_scores", shape=[2**40]), "smoothing.1.calibration_scores.shape"),
        (lambda header: header.pop("smoothing.1.spread"), r"tensors: missing \['smoothing.1.spread'\]"),
        (lambda header: header.update({"smoothing.2.mu": header["mu"]}), r"tensors: .*unknown \['smoothing.2.mu'\]"),
        (_shift, "data_offsets: expected to begin at"),
        (lambda header: header.update(mu=1), "mu: expected an object"),
        (lambda header: header.pop("mu"), r"tensors: missing \['mu'\]"),
        (lambda header: header.update(more=header["mu"]), r"tensors: .*unknown \['more'\]"),
        (lambda header: header.pop("__metadata__"), "__metadata__"),
        (lambda header: header["__metadata__"].update(format="pt"), "__metadata__"),
        (lambda header: header["__metadata__"].update(advrad_fast=1), "__metadata__"),
        (lambda header: header["__metadata__"].update(advrad_fast="[1]"), "advrad_fast: expected a JSON object"),
        (lambda header: header["__metadata__"].update(advrad_fast="\ud800"), "advrad_fast: not JSON in UTF-8"),
    ],
)
def test_damaged_headers(tmp_path: Path, saved: bytes, edit: Edit, message: str) -> None:
    header, _, body = _split(saved)
    edit(header)
    with pytest.raises(ModelFileError, match=message):
        _load(tmp_path, _join(header, body))


def test_tensors_may_stand_in_any_order(tmp_path: Path, saved: bytes) -> None:
    header, _, body = _split(saved)
    a, b = _load(tmp_path, saved), None
    _swap(header)
    b = _load(tmp_path, _join(header, body))
    assert b.spread is not None
    np.testing.assert_array_equal(a.mu, b.spread)


def _nested(**changes: object) -> Edit:
    def edit(document: dict[str, Any]) -> None:
        for path, value in changes.items():
            *parents, last = path.split("__")
            target = document
            for parent in parents:
                target = target[parent]
            target[last] = value

    return edit


WIDE = {"base_channels": 4096, "channel_mult": [1], "norm_groups": 32, "num_res_blocks": 8}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_nested(schema=5), "schema: expected 1 to 4 .*later.* got 5"),
        (_nested(schema=0), "schema"),
        (_nested(schema=1), "advrad_fast: missing .*unknown .*'smoothing', 'tiling'"),
        (_nested(schema=2), "advrad_fast: missing .*unknown .*'tiling'"),
        (_nested(schema=3), "advrad_fast: missing .*unknown .*'self_test'"),
        (_nested(schema=True), "schema"),
        (_nested(more=1), "advrad_fast: missing .*unknown .*'more'"),
        (lambda document: document.pop("threshold"), r"advrad_fast: missing \['threshold'\]"),
        (_nested(threshold="1"), "threshold"),
        (_nested(threshold=None), "threshold"),
        (_nested(false_alarm_rate=2), "false_alarm_rate"),
        (_nested(provenance=[]), "provenance"),
        (_nested(provenance={"a": {}}), "provenance"),
        (_nested(config=1), "config: expected an object"),
        (_nested(config__image__height=16), r"mu.shape: expected \[16, 16\]"),
        (_nested(config__image__height=9), "height: expected a multiple of 8"),
        (_nested(config__image__pose__length="a"), "config.image.pose.length"),
        (_nested(config__unet__prediction=[]), "config.unet.prediction"),
        (_nested(config__unet__base_channels=4), "unet.*shape"),
        (_nested(config__score__spread=False), r"tensors: missing \[\], unknown \['spread'\]"),
        (lambda document: document.pop("smoothing"), r"advrad_fast: missing \['smoothing'\]"),
        (_nested(smoothing={}), "smoothing: expected a list of at most 8"),
        (_nested(smoothing=[]), "tensors: .*unknown .*smoothing.0.affine"),
        (_nested(smoothing=[{}] * 9), "smoothing: expected a list of at most 8"),
        (_nested(smoothing=[1, 2]), r"smoothing\[0\]: expected an object"),
        (lambda document: document["smoothing"].append(document["smoothing"][0]), r"tensors: missing .*smoothing.2.affine"),
        (lambda document: document["smoothing"].reverse(), "smoothing: expected sigmas in rising order"),
        (lambda document: document["smoothing"][1].pop("draws"), r"smoothing\[1\]: missing \['draws'\]"),
        (lambda document: document["smoothing"][1].update(more=1), r"smoothing\[1\]: missing \[\], unknown \['more'\]"),
        (lambda document: document["smoothing"][1].update(radius=0.1), r"smoothing\[1\]: missing \['alpha'\]"),
        (lambda document: document["smoothing"][1].update(radius=[], alpha=0.1), r"smoothing\[1\].radius: expected"),
        (lambda document: document["smoothing"][1].update(sigma="1"), r"smoothing\[1\].sigma: expected a sigma within"),
        (lambda document: document["smoothing"][1].update(sigma=1e308), r"smoothing\[1\].sigma: expected a sigma within"),
        (lambda document: document["smoothing"][1].update(draws=2.0), r"smoothing\[1\].draws: expected an odd integer"),
        (lambda document: document["smoothing"][1].update(score=[]), r"smoothing\[1\].score: expected an object"),
        (lambda document: document["smoothing"][1]["score"].update(spread=False), "tensors: .*unknown .*smoothing.1.spread"),
        (lambda document: document["smoothing"][1]["score"].update(filter_size=2), r"smoothing\[1\].score: .*odd"),
        (_nested(config__unet__norm_groups=1), "tensors: missing .*norm"),
        (lambda document: document["config"]["unet"].update(WIDE), "config.unet: expected a network of at most"),
    ],
)
def test_damaged_documents(tmp_path: Path, saved: bytes, edit: Edit, message: str) -> None:
    header, document, body = _split(saved)
    edit(document)
    header["__metadata__"]["advrad_fast"] = json.dumps(document)
    with pytest.raises(ModelFileError, match=message):
        _load(tmp_path, _join(header, body))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "header length"),
        (b"{}", "__metadata__"),
        (b"[]", "header: expected a JSON object"),
        (b"{'a': 1}", "header: not JSON"),
        (b'{"a": 1, "a": 1}', "header: duplicate key 'a'"),
        (b'{"a": NaN}', "header: expected finite numbers, got NaN"),
        (b'{"a": -Infinity}', "header: expected finite numbers"),
        (b'{"a": 1e999}', "header: expected finite numbers"),
        (b'{"a": ' + b"9" * 5000 + b"}", "header: expected integers of at most 64 bits"),
        (b"\xff\xfe{\x00}\x00", "header: not JSON in UTF-8"),
        (b"\xef\xbb\xbf{}", "header: not JSON in UTF-8"),
        (b"[" * 500_000, "header: expected JSON nested at most 8"),
        (b'{"a":' * 100_000, "header: expected JSON nested at most 8"),
        (b'{"\\"[": ' + b"[" * 100_000, "header: expected JSON nested at most 8"),
        (b'"' + b'\\"' * 400_000, "header: not JSON"),
        (b'{"a' + b"[" * 100_000 + b'": 1}', "__metadata__"),
        (b" " * (1 << 21), "header length: expected 2 to 1048576"),
    ],
)
def test_hostile_json(tmp_path: Path, text: bytes, message: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ModelFileError, match=message) as info:
        _load(tmp_path, _join(text, bytes(64)))
    assert time.perf_counter() - started < 5
    assert len(str(info.value)) < 1000


def test_many_keys_and_a_late_duplicate_take_linear_time(tmp_path: Path) -> None:
    text = "{" + ",".join(f'"{i}":1' for i in range(80_000)) + ',"79999":2}'
    with pytest.raises(ModelFileError, match="duplicate key '79999'"):
        _load(tmp_path, _join(text.encode(), b""))


@pytest.mark.parametrize("size", [0, 7, 8, 9, 100])
def test_short_files(tmp_path: Path, saved: bytes, size: int) -> None:
    with pytest.raises(ModelFileError):
        _load(tmp_path, saved[:size])


def test_size_must_match(tmp_path: Path, saved: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelFileError, match="data: expected"):
        _load(tmp_path, saved[:-1])
    with pytest.raises(ModelFileError, match="data: expected"):
        _load(tmp_path, saved + b"x")
    monkeypatch.setattr(advrad_fast.model, "MAX_FILE_BYTES", len(saved) - 1)
    with pytest.raises(ModelFileError, match="file size"):
        _load(tmp_path, saved)


def test_values_that_are_not_finite(tmp_path: Path, saved: bytes) -> None:
    header, _, body = _split(saved)
    names = ("mu", "spread", "unet.stem.weight", "calibration_scores", "smoothing.0.affine", "smoothing.1.calibration_scores")
    for name in names:
        begin, said = header[name]["data_offsets"][0], name.removeprefix("unet.").split(".", 2)[-1]
        for value in (
            b"\xff" * 8,
            struct.pack("<d" if "scores" in name else "<2f", *[np.inf, 0][: 1 if "scores" in name else 2]),
        ):
            with pytest.raises(ModelFileError, match=f"{said}: expected finite"):
                _load(tmp_path, _join(header, body[:begin] + value + body[begin + 8 :]))


def test_half_weights_beyond_range_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="__metadata__"):
        _load(tmp_path, serialise({"a": np.zeros(3, np.float32)}))
    with pytest.raises(ModelFileError):
        _load(tmp_path, pickle.dumps({"a": 1}))
