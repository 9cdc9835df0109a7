"""model.py: what is saved comes back, and a file is valid or refused, whatever is in it."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import assert_equal, certifiable, tiny_model, without_norm
from models import smoothing as make_smoothing
from safetensors.numpy import load_file

from advrad_fast.calibrate import conformal_threshold
from advrad_fast.config import DetectorConfig, ScoreConfig
from advrad_fast.errors import CalibrationError, ModelFileError
from advrad_fast.model import ModelFile, round_to_half
from advrad_fast.smoothing import folded


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("spread", [False, True])
def test_round_trip(tmp_path: Path, spread: bool, half: bool) -> None:
    model, path = tiny_model(spread, half), tmp_path / "a.safetensors"
    model.save(path, half=half)
    loaded = ModelFile.load(str(path))
    assert_equal(model, loaded)
    for array in [*loaded.weights.values(), loaded.mu, loaded.inverse_spread]:
        assert array.dtype == np.float32
        assert not array.flags.writeable
    assert loaded.calibration_scores.dtype == np.float64
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("model", [tiny_model(), without_norm(tiny_model(True, True))], ids=["group norm", "no norm"])
def test_round_trip_of_what_it_certifies_with(tmp_path: Path, model: ModelFile) -> None:
    assert model.sigmas == ()
    plain = dataclasses.replace(make_smoothing(model.config, 0.5), spread=None, score=ScoreConfig(filter_size=3))
    both = dataclasses.replace(model, smoothing=(make_smoothing(model.config, 0.125), plain))
    both.save(tmp_path / "a", half=not model.config.unet.norm_groups)
    loaded = ModelFile.load(tmp_path / "a")
    assert loaded.sigmas == (0.125, 0.5)
    assert_equal(both, loaded)
    assert loaded.fingerprint != model.fingerprint
    assert [s.score for s in loaded.smoothing] == [s.score for s in both.smoothing]
    np.testing.assert_array_equal(loaded.smoothing[1].inverse_spread, np.ones((8, 16)))
    config = loaded.smoothing[0].config(loaded.config)
    assert (config.diffusion.timestep, config.diffusion.draws) == (73, 1)
    assert config.score == loaded.smoothing[0].score and config.image == loaded.config.image


def test_weights_at_a_sigma_differ_by_a_factor_and_a_bias_a_channel() -> None:
    model = certifiable(without_norm(tiny_model()), 0.25)
    (smoothing,), affine = model.smoothing, model.smoothing[0].affine
    assert affine is not None
    weights = smoothing.weights(model.config.unet, model.weights)
    assert list(weights) == list(model.weights)
    names = list(folded(model.config.unet))
    assert len(names) == 10 and sum(folded(model.config.unet).values()) == affine.shape[1]
    at = names.index("middle1.block.conv2") * 2  # two channels everywhere
    kernel = model.weights["middle1.block.conv2.weight"][1] * affine[0, at + 1]
    np.testing.assert_array_equal(weights["middle1.block.conv2.weight"][1], kernel)
    np.testing.assert_array_equal(weights["middle1.block.conv2.bias"], affine[1, at : at + 2])
    changed = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    assert {n for n in weights if not np.array_equal(weights[n], model.weights[n])} == changed
    same = certifiable(tiny_model(), 0.25)
    weights = same.smoothing[0].weights(same.config.unet, same.weights)
    assert all(weights[name] is array for name, array in same.weights.items())


def test_older_schemas_are_still_read(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "a"
    model.save(path)
    data = path.read_bytes()
    text = data[8 : 8 + int.from_bytes(data[:8], "little")]
    third = text.replace(rb", \"self_test\": null", b"").replace(rb"\"schema\": 4", rb"\"schema\": 3")
    second = third.replace(rb", \"tiling\": null", b"").replace(rb"\"schema\": 3", rb"\"schema\": 2")
    first = second.replace(rb", \"smoothing\": []", b"").replace(rb"\"schema\": 2", rb"\"schema\": 1")
    assert len(first) < len(second) < len(third) < len(text)
    for old in (first, second, third):
        path.write_bytes(len(old).to_bytes(8, "little") + old + data[8 + len(text) :])
        assert_equal(ModelFile.load(path), model)


def test_half_is_half_the_size_and_never_changes_a_weight(tmp_path: Path) -> None:
    model, path = tiny_model(True, True), tmp_path / "a"
    model.save(path)
    full = path.stat().st_size
    model.save(path, half=True)
    assert full - path.stat().st_size >= 2 * sum(w.size for w in model.weights.values())
    with pytest.raises(ModelFileError, match="round_to_half"):
        tiny_model().save(path, half=True)
    assert_equal(ModelFile.load(path), model)
    with pytest.raises(ModelFileError, match=r"weights\.w: .*65504"):
        round_to_half({"w": np.array([7e4], dtype=np.float32)})


def test_other_tools_read_it(tmp_path: Path) -> None:
    model = tiny_model()
    model.save(tmp_path / "a")
    tensors = load_file(tmp_path / "a")
    assert set(tensors) == {"mu", "spread", "calibration_scores"} | {f"unet.{name}" for name in model.weights}
    np.testing.assert_array_equal(tensors["mu"], model.mu)


def test_saving_is_deterministic_and_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = tiny_model(), tmp_path / "a"
    model.save(path)
    before = path.read_bytes()
    ModelFile.load(path).save(path)
    assert path.read_bytes() == before

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ModelFileError, match="cannot be written: disk full"):
        model.with_threshold(9.0).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("path", ["nowhere/a.safetensors", "a\0b"])
def test_unwritable_and_missing(tmp_path: Path, path: str) -> None:
    with pytest.raises(ModelFileError, match="cannot be written"):
        tiny_model().save(tmp_path / path)
    with pytest.raises(ModelFileError, match="cannot be read") as info:
        ModelFile.load(tmp_path / path)
    assert isinstance(info.value.__cause__, OSError | ValueError)


@pytest.mark.skipif(os.name != "posix", reason="POSIX files")
def test_not_a_regular_file(tmp_path: Path) -> None:
    """A pipe is refused and not waited for."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ModelFileError, match="a regular file"):
            ModelFile.load(path)


def test_thresholds() -> None:
    model = tiny_model()
    other = model.with_false_alarm_rate(0.5)
    assert (other.threshold, other.false_alarm_rate) == (conformal_threshold(model.calibration_scores, 0.5), 0.5)
    assert other.fingerprint == model.fingerprint
    with pytest.raises(CalibrationError, match="at least 99"):
        model.with_false_alarm_rate(0.01)
    assert model.with_threshold(2).threshold == 2.0
    assert model.with_threshold(np.float32(0.5)).threshold == 0.5  # type: ignore[arg-type]
    assert model.with_threshold(2.0).false_alarm_rate == model.false_alarm_rate
    assert model.with_threshold(2.0, 0.3).false_alarm_rate == 0.3
    with pytest.raises(ModelFileError, match="threshold: expected a finite number"):
        model.with_threshold(float("nan"))
    several = certifiable(model, 0.125, 0.25).with_false_alarm_rate(0.5)
    for smoothing in several.smoothing:
        assert (smoothing.threshold, smoothing.false_alarm_rate) == (conformal_threshold(smoothing.calibration_scores, 0.5), 0.5)


def test_inverse_spread() -> None:
    model = tiny_model()
    assert model.spread is not None
    np.testing.assert_array_equal(model.inverse_spread, 1 / model.spread)
    np.testing.assert_array_equal(tiny_model(False).inverse_spread, np.ones((8, 16), dtype=np.float32))


def test_fingerprint_sees_every_number() -> None:
    base = tiny_model()
    prints = {base.fingerprint, tiny_model(False).fingerprint}
    weights = dict(base.weights)
    name = next(iter(weights))
    weights[name] = weights[name] + np.float32(1.0)
    prints |= {tiny_model(weights=weights).fingerprint, tiny_model(mu=base.mu + np.float32(1.0)).fingerprint}
    prints |= {tiny_model(calibration_scores=base.calibration_scores + 1.0).fingerprint}
    assert len(prints) == 5


def test_equal_configurations_have_one_fingerprint(tmp_path: Path) -> None:
    """Integers where the fields are floats: equal in Python, not in JSON."""
    base = tiny_model(False)
    image = base.config.image
    models = []
    for one in (1, 1.0, np.float64(1.0)):
        config = DetectorConfig(base.config.unet, base.config.diffusion, ScoreConfig(scale_weights=(one, one, 0, 0)), image)
        models.append(tiny_model(False, config=config))
    models[0].save(tmp_path / "a")
    models.append(ModelFile.load(tmp_path / "a"))
    assert len({m.fingerprint for m in models}) == 1


def test_arrays_of_the_caller_stay_writable() -> None:
    mu = np.zeros((16, 8), dtype=np.float32).T
    model = tiny_model(mu=mu)
    assert mu.flags.writeable
    assert model.mu.flags.c_contiguous
    widened = tiny_model(calibration_scores=np.array([0.1, 0.2], dtype=np.float32))
    assert widened.calibration_scores.tolist() == [float(np.float32(0.1)), float(np.float32(0.2))]


def test_pickle_and_deepcopy_of_the_object() -> None:
    """Worker processes get it; files are never pickles."""
    model = tiny_model()
    assert_equal(model, copy.deepcopy(model))
    assert_equal(model, pickle.loads(pickle.dumps(model)))  # noqa: S301


def _with(name: str, value: object) -> dict[str, Any]:
    return {**tiny_model().weights, name: value}


NAN = np.full((8, 16), np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {}}, "config: expected a DetectorConfig"),
        ({"weights": []}, "weights: expected a dict"),
        ({"weights": {}}, "weights: missing .*down.0.block.conv1.weight"),
        ({"weights": _with("extra", np.zeros(1))}, r"weights: missing \[\], unknown \['extra'\]"),
        (
            {"weights": _with("stem.bias", np.zeros(2))},
            r"weights.stem.bias: expected a float32 array \(2,\), got 'float64 \(2,\)'",
        ),
        ({"weights": _with("stem.bias", np.zeros(3, np.float32))}, r"weights.stem.bias: .*got 'float32 \(3,\)'"),
        ({"weights": _with("stem.bias", [0.0, 0.0])}, "weights.stem.bias: .*got 'list'"),
        (
            {"weights": _with("stem.bias", np.array([0, np.inf], np.float32))},
            "weights.stem.bias: expected finite values, got '1 that",
        ),
        ({"mu": np.zeros((16, 8), np.float32)}, r"mu: expected a float32 array \(8, 16\)"),
        ({"mu": NAN}, "mu: expected finite"),
        ({"spread": None}, "spread: expected a map"),
        ({"spread": NAN}, "spread: expected finite"),
        ({"spread": np.zeros((8, 16), np.float32)}, "spread: expected values >="),
        ({"spread": np.full((8, 16), 1e-40, np.float32)}, "spread: expected values >="),
        ({"calibration_scores": [1.0]}, "calibration_scores: .*got 'list'"),
        ({"calibration_scores": np.array([1, 2])}, "calibration_scores: .*int64"),
        ({"calibration_scores": np.zeros((1, 1))}, "calibration_scores: "),
        ({"calibration_scores": np.zeros(0)}, "calibration_scores: expected 1 to"),
        ({"calibration_scores": np.array([1.0, 0.5])}, "calibration_scores: .*rising"),
        ({"calibration_scores": np.array([1.0, np.nan])}, "calibration_scores: expected finite"),
        ({"false_alarm_rate": 0.0}, "false_alarm_rate"),
        ({"false_alarm_rate": 1.0}, "false_alarm_rate"),
        ({"false_alarm_rate": True}, "false_alarm_rate"),
        ({"threshold": np.inf}, "threshold"),
        ({"threshold": 10**400}, "threshold"),
        ({"threshold": "1"}, "threshold"),
        ({"provenance": {1: 2}}, "provenance: expected a dict"),
        ({"provenance": {"a": [1]}}, r"provenance\['a'\]"),
        ({"provenance": {"a": np.nan}}, r"provenance\['a'\]"),
        ({"provenance": {"a": 2**63}}, r"provenance\['a'\]"),
        ({"provenance": {"a": "x" * 70_000}}, "provenance: expected at most 65536"),
    ],
)
def test_inconsistent_fields(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        tiny_model(**changes)


def test_a_spread_that_the_configuration_does_not_use() -> None:
    with pytest.raises(ModelFileError, match="spread: expected None"):
        tiny_model(False, spread=tiny_model().spread)


SIZE = (8, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": {}}, r"smoothing\[0\].score: expected a ScoreConfig"),
        ({"draws": 4}, r"smoothing\[0\].draws: expected an odd integer"),
        ({"draws": True}, "draws"),
        ({"draws": 0}, "draws"),
        ({"draws": 2**16 + 1}, "draws"),
        ({"mu": np.zeros((16, 8), np.float32)}, r"smoothing\[0\].mu: expected a float32 array \(8, 16\)"),
        ({"spread": None}, r"smoothing\[0\].spread: expected a map"),
        ({"spread": np.zeros(SIZE, np.float32)}, r"smoothing\[0\].spread: expected values >="),
        ({"score": ScoreConfig()}, r"smoothing\[0\].spread: expected None"),
        ({"calibration_scores": np.array([1.0, 0.5])}, r"smoothing\[0\].calibration_scores: .*rising"),
        ({"false_alarm_rate": 1.0}, r"smoothing\[0\].false_alarm_rate: expected a number in \(0, 1\)"),
        ({"threshold": np.nan}, r"smoothing\[0\].threshold"),
        ({"radius": -0.1}, r"smoothing\[0\].radius: expected one that can be certified at sigma 0.25"),
        ({"radius": 1e6, "alpha": 0.01}, r"smoothing\[0\].radius: expected one that can be certified"),
        ({"radius": "0.1"}, r"smoothing\[0\].radius: expected"),
        ({"radius": 0.1}, r"smoothing\[0\].alpha: expected a number in \(0, 1\)"),
        ({"alpha": 0.01}, r"smoothing\[0\].radius: expected above 0, as there is an alpha"),
        ({"radius": 0.1, "alpha": 0.01, "draws": 0}, r"smoothing\[0\].draws: expected an integer"),
        ({"affine": None}, r"smoothing\[0\].affine: expected a float32 array \(2, 20\), got 'NoneType'"),
        ({"affine": np.zeros((2, 19), np.float32)}, r"affine: .*\(2, 20\)"),
        ({"affine": np.full((2, 20), np.inf, np.float32)}, "affine: expected finite"),
        ({"affine": np.full((2, 20), 1e7, np.float32)}, "affine: expected factors up to 1e6"),
    ],
)
def test_inconsistent_smoothing(changes: dict[str, Any], message: str) -> None:
    model = without_norm(tiny_model())
    with pytest.raises(ModelFileError, match=message):
        dataclasses.replace(model, smoothing=(dataclasses.replace(make_smoothing(model.config), **changes),))


@pytest.mark.parametrize("sigma", [0.0, -1.0, True, "0.25", float("nan"), 0.001, 2.5, None])
def test_sigmas_out_of_range(sigma: Any) -> None:
    with pytest.raises(ModelFileError, match=r"smoothing\[0\].sigma: expected a sigma within"):
        tiny_model(smoothing=(dataclasses.replace(make_smoothing(tiny_model().config), sigma=sigma),))


def test_a_list_that_is_none() -> None:
    one, two = (make_smoothing(tiny_model().config, sigma) for sigma in (0.25, 0.5))
    for value in ([one], (1,), None, (one,) * 9):
        with pytest.raises(ModelFileError, match="smoothing: expected a tuple of at most 8"):
            tiny_model(smoothing=value)
    for sigmas in ((two, one), (one, one)):
        with pytest.raises(ModelFileError, match="smoothing: expected sigmas in rising order"):
            tiny_model(smoothing=sigmas)
    with pytest.raises(ModelFileError, match="affine: expected None"):
        tiny_model(smoothing=(dataclasses.replace(one, affine=np.zeros((2, 20), np.float32)),))
