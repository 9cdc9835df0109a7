"""Recalibration from new normals: the promise, what it needs, and that nothing is lost on the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import assert_equal, certifiable, small_model, tiny_model, without_norm
from PIL import Image
from streams import frames

from advrad_fast import Detector, ModelFile, calibrate, cli, selftest
from advrad_fast.errors import CalibrationError, ConfigError, DatasetError, ImageError, SelfTestError
from advrad_fast.recalibrate import frames_needed, recalibrate
from advrad_fast.selftest_record import with_self_test
from advrad_fast.tiling import fit_tiling
from advrad_fast.training import fitting

OPTIONS: dict[str, Any] = {"backend": "cpu", "precision": "fp32", "threads": 1, "cache_dir": False}


def test_scores_are_those_of_the_line() -> None:
    model = small_model()
    steps: list[tuple[int, int]] = []
    new = recalibrate(model, frames(20), on_frame=lambda *at: steps.append(at), **OPTIONS)
    detector = Detector(new, **OPTIONS)
    inspected = sorted(detector.inspect(frame, maps=False).score for frame in frames(20))  # type: ignore[type-var]
    np.testing.assert_array_equal(new.calibration_scores, inspected)
    assert new.threshold == calibrate.conformal_threshold(inspected, model.false_alarm_rate)  # type: ignore[arg-type]
    assert new.mu is model.mu or np.array_equal(new.mu, model.mu)
    assert new.provenance["recalibrated_on"] == 20 and steps == [(i, 20) for i in range(1, 21)]
    fresh = recalibrate(model, frames(20), seed=None, **OPTIONS)
    assert not np.array_equal(fresh.calibration_scores, new.calibration_scores)


@pytest.mark.parametrize("spread", [False, True])
def test_the_normal_map_is_that_of_training(spread: bool) -> None:
    model = small_model(spread=spread)
    many = frames(30)
    new = recalibrate(model, many, mu=True, **OPTIONS)
    order = np.random.default_rng(0).permutation(30)
    engine = Detector(small_model(mu=np.zeros((32, 32), np.float32)), **OPTIONS)
    errors = [engine.inspect(many[i]).anomaly_map for i in order[:15]]
    maps = fitting.normal_maps(torch.from_numpy(np.stack(errors)), model.config.score)  # type: ignore[arg-type]
    np.testing.assert_allclose(new.mu, maps.mu.numpy(), rtol=1e-5)
    np.testing.assert_allclose(1.0 / new.inverse_spread, maps.spread.numpy(), rtol=1e-4)
    detector = Detector(new, **OPTIONS)
    scores = sorted(detector.inspect(many[i], maps=False).score for i in order[15:])  # type: ignore[type-var]
    np.testing.assert_array_equal(new.calibration_scores, scores)
    assert new.self_test is not None and detector.self_test() is not None


def test_every_sigma_is_recalibrated() -> None:
    model = certifiable(without_norm(small_model()), 0.125, 0.25)
    new = recalibrate(model, frames(12), **OPTIONS)
    assert new.sigmas == model.sigmas
    for one, before in zip(new.smoothing, model.smoothing, strict=True):
        assert len(one.calibration_scores) == 12 and one.draws == before.draws
        assert one.threshold == calibrate.conformal_threshold(one.calibration_scores, model.false_alarm_rate)
        np.testing.assert_array_equal(one.mu, before.mu)
    detector = Detector(new, **OPTIONS)
    draws = [detector.smoothed_scores(frame, 5, sigma=0.25, seed=i + 1) for i, frame in enumerate(frames(12))]
    np.testing.assert_array_equal(new.smoothing[1].calibration_scores, np.sort(np.median(draws, axis=1)))


def test_a_threshold_for_a_radius_stays_one() -> None:
    """Its calibration scores are the least thresholds at which a frame is certified, not medians."""
    model = certifiable(without_norm(small_model()), 0.25, radius=0.05, alpha=0.05, draws=41)
    new = recalibrate(model, frames(9), **OPTIONS)
    one, detector = new.smoothing[0], Detector(new, **OPTIONS)
    assert (one.radius, one.alpha, one.draws) == (0.05, 0.05, 41)
    for i, frame in enumerate(frames(9)):
        again = {"sigma": 0.25, "alpha": 0.05, "max_votes": 41, "seed": i + 1}
        assert detector.certify(frame, 0.05, **again).outcome == "OK"  # type: ignore[arg-type]
    medians = [np.median(detector.smoothed_scores(f, 41, sigma=0.25, seed=i + 1)) for i, f in enumerate(frames(9))]
    assert one.threshold > max(medians)


def test_too_few_frames_say_how_many_it_takes() -> None:
    with pytest.raises(CalibrationError, match=r"false-alarm rate of 0\.05 takes at least 19 good frames, got 18"):
        recalibrate(small_model(), frames(18), false_alarm_rate=0.05, **OPTIONS)
    with pytest.raises(CalibrationError, match=r"at least 38 good frames, 19 of them for the normal map, got 37"):
        recalibrate(small_model(), frames(37), false_alarm_rate=0.05, mu=True, **OPTIONS)
    assert (frames_needed(0.05), frames_needed(0.05, mu=True), frames_needed(0.2, mu=True)) == (19, 38, 14)
    assert len(recalibrate(small_model(), frames(14), false_alarm_rate=0.2, mu=True, **OPTIONS).calibration_scores) == 4


def test_bad_frames_and_settings() -> None:
    with pytest.raises(ImageError, match="frame 9: frame: expected"):
        recalibrate(small_model(), [*frames(9), None], **OPTIONS)
    for wrong in (iter(frames(9)), np.array(1.0), "frames"):
        with pytest.raises(ConfigError, match="frames: expected a sequence"):
            recalibrate(small_model(), wrong, **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="false_alarm_rate"):
        recalibrate(small_model(), frames(1), false_alarm_rate=1.0, **OPTIONS)
    with pytest.raises(ConfigError, match="seed"):
        recalibrate(small_model(), frames(9), seed=-1, **OPTIONS)
    with pytest.raises(DatasetError, match="no part was found in 9 of 9 frames"):
        recalibrate(tiny_model(), [np.zeros((20, 20), np.uint8)] * 9, **OPTIONS)
    damaged = dataclasses.replace(small_model(), self_test=selftest.Expected((1.0, 1.0), (1.0, 1.0)))
    with pytest.raises(SelfTestError):
        recalibrate(damaged, frames(9), **OPTIONS)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_model_of_tiles(fixed: bool) -> None:
    large = [np.tile(frame, (2, 2, 1))[:48, :40] for frame in frames(8)]
    model = with_self_test(small_model(), cache_dir=False)
    tiled = fit_tiling(
        model, calibration=large[:3], normals=large[3:] if fixed else None, false_alarm_rate=0.25, cache_dir=False, threads=1
    )
    assert tiled.self_test is not None and (tiled.self_test != model.self_test) == fixed
    new = recalibrate(tiled, large, false_alarm_rate=0.2, **OPTIONS)
    detector = Detector(new, **OPTIONS)
    scores = sorted(detector.inspect(frame, maps=False).score for frame in large)  # type: ignore[type-var]
    np.testing.assert_array_equal(new.calibration_scores, scores)
    assert new.tiling == tiled.tiling
    with pytest.raises(ConfigError, match="mu: expected False"):
        recalibrate(tiled, large * 3, mu=True, **OPTIONS)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVRAD_CACHE", str(tmp_path / "cache"))
    folder, old, new = tmp_path / "good", tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    folder.mkdir()
    for i, frame in enumerate(frames(20)):
        Image.fromarray(frame).save(folder / f"{i:02}.png")
    model = with_self_test(small_model(), cache_dir=False)
    model.save(old, half=True)
    command = ["recalibrate", str(old), str(folder), "--backend", "cpu", "--precision", "fp32", "--threads", "1"]
    assert cli.main([*command, "--out", str(new), "--false-alarm-rate", "0.04"]) == 2
    assert "at least 24 good frames, got 20" in capsys.readouterr().err and not new.exists()
    assert cli.main([*command, "--out", str(new)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and f"wrote {new}: 20 calibration scores" in captured.err
    made = ModelFile.load(new)
    expected = recalibrate(ModelFile.load(old), frames(20), **OPTIONS)
    assert_equal(made, expected)
    assert made.self_test == model.self_test and new.stat().st_size < old.stat().st_size * 1.2
    assert cli.main([*command, "--out", str(new), "--mu"]) == 2
    assert "--force" in capsys.readouterr().err
    assert_equal(ModelFile.load(new), expected)
    assert cli.main([*command, "--out", str(new), "--mu", "--force"]) == 0
    assert len(ModelFile.load(new).calibration_scores) == 10
