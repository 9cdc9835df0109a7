"""``advrad-fast certify``: rows, exit codes, refusals, and fitting a model to a sigma."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import certifiable, small_model
from parts import dataset, disc, scratched
from pictures import POSE, part
from PIL import Image

from advrad_fast import Detector, ModelFile
from advrad_fast.cli import certification, main
from advrad_fast.images import load_image

KEYS = ["path", "outcome", "radius", "votes", "p_lower", "sigma", "alpha", "threshold"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVRAD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    certifiable(small_model(), 0.125, 0.25).save(path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    (tmp_path / "in").mkdir()
    for i, make in enumerate((disc, disc, scratched)):
        Image.fromarray(make(rng, 32)).save(tmp_path / "in" / f"{i}.png")
    return tmp_path / "in"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def certify(model: Path, *arguments: object) -> int:
    return run("certify", model, *arguments, "--backend", "reference", "--threads", 1)


def rows(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    assert all(list(row) == KEYS == list(certification.CERTIFY_KEYS) for row in found)
    return found


@pytest.mark.parametrize(("threshold", "code", "outcome"), [(1e9, 0, "OK"), (-1, 1, "DEFECT")])
def test_exit_codes_and_the_text(model: Path, images: Path, capsys: Capture, threshold: float, code: int, outcome: str) -> None:
    assert certify(model, images, "--radius", 0.2, "--sigma", 0.25, "--threshold", threshold) == code
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split()[0] for line in lines] == [outcome] * 3
    assert all("radius 0.2, 32 votes, p >= 0.7881" in line and line.endswith(".png") for line in lines)
    assert captured.err == ""  # no progress where nobody looks


def test_rows_are_what_the_detector_says(model: Path, images: Path, tmp_path: Path, capsys: Capture) -> None:
    options = ("--radius", 0.1, "--seed", 5, "--max-votes", 60, "--alpha", 0.01)
    code = certify(model, images, *options, "--json", "-")
    found = rows(capsys.readouterr().out)
    detector = Detector.load(model, backend="reference")
    for i, row in enumerate(found):
        wanted = detector.certify(load_image(images / f"{i}.png"), 0.1, seed=5, max_votes=60, alpha=0.01)
        assert row == {"path": str(images / f"{i}.png"), **{key: getattr(wanted, key) for key in KEYS[1:]}}
    assert code == int(any(row["outcome"] != "OK" for row in found))
    assert certify(model, images, *options, "--json", tmp_path / "a.jsonl") == code
    assert rows((tmp_path / "a.jsonl").read_text()) == found
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_abstaining_is_not_ok(model: Path, images: Path, capsys: Capture) -> None:
    assert certify(model, images / "0.png", "--radius", 0.2, "--threshold", 1e9, "--max-votes", 5, "--json", "-") == 1
    (row,) = rows(capsys.readouterr().out)
    assert (row["outcome"], row["radius"], row["votes"]) == ("ABSTAIN", 0.0, 5)


def test_a_part_that_is_not_found_is_not_ok(tmp_path: Path, capsys: Capture) -> None:
    certifiable(small_model(pose=POSE), 0.25).save(tmp_path / "pose.safetensors")
    Image.fromarray(np.full((100, 120), 200, np.uint8)).save(tmp_path / "blank.png")
    Image.fromarray(part()).save(tmp_path / "part.png")
    arguments = (tmp_path / "part.png", tmp_path / "blank.png", "--radius", 0.1, "--threshold", 1e9, "--json", "-")
    assert certify(tmp_path / "pose.safetensors", *arguments) == 1
    assert [(row["outcome"], row["votes"] > 0) for row in rows(capsys.readouterr().out)] == [("OK", True), ("ABSTAIN", False)]


def test_a_broken_file_does_not_keep_the_others_from_being_certified(model: Path, images: Path, capsys: Capture) -> None:
    (images / "1.png").write_bytes(b"no image")
    assert certify(model, images, "--radius", 0.2, "--threshold", 1e9, "--json", "-") == 2
    captured = capsys.readouterr()
    found = rows(captured.out)
    assert [row["outcome"] for row in found] == ["OK", "ERROR", "OK"]
    assert all(found[1][key] is None for key in KEYS[2:])
    assert "1.png" in captured.err and "Traceback" not in captured.err


def test_progress_is_for_terminals(model: Path, images: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert certify(model, images / "0.png", "--max-votes", 8, "--threshold", 1e9, "--json", "-") in (0, 1)
    captured = capsys.readouterr()
    assert "8/8 votes, 0 for DEFECT  0.png" in captured.err and len(rows(captured.out)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{images}", "--radius", "-1"), "radius: expected"),
        (("{images}", "--alpha", "2"), "alpha: expected"),
        (("{images}", "--sigma", "0.3"), "sigma: expected one of the model's [0.125, 0.25]"),
        (("{images}", "--sigma", "0.125", "0.25"), "--sigma: expected one sigma"),
        (("{images}", "--max-votes", "0"), "max_votes: expected"),
        ((), "certify: expected images"),
        (("{images}", "--out", "x"), "certify: expected images"),
        (("{images}", "--fit", "{images}", "--sigma", "0.25", "--out", "x"), "--fit: expected"),
        (("--fit", "{images}", "--out", "x"), "--fit: expected"),
        (("--fit", "{images}", "--sigma", "0.25"), "--fit: expected"),
        (("--fit", "{images}", "--sigma", "0.25", "--radius", "9", "--out", "x"), "good images: expected at least 10"),
        (("--fit", "{images}", "--sigma", "9", "--out", "x"), "good images: expected at least 10"),
    ],
)
def test_bad_options(model: Path, images: Path, capsys: Capture, arguments: tuple[str, ...], message: str) -> None:
    assert certify(model, *(argument.format(images=images) for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err


def test_a_model_without_a_sigma_says_how_to_get_one(tmp_path: Path, images: Path, capsys: Capture) -> None:
    small_model().save(tmp_path / "a")
    assert certify(tmp_path / "a", images, "--radius", 0.1) == 2
    assert "certify --fit" in capsys.readouterr().err


def test_fit_then_certify(tmp_path: Path, capsys: Capture) -> None:
    data, plain, out = dataset(tmp_path / "discs", train=14, good=1, bad=1, size=32), tmp_path / "plain", tmp_path / "out"
    options = ("--size", 32, "--steps", 2, "--batch-size", 2, "--align", "off", "--no-certify")
    assert run("train", data, "--out", plain, *options) == 0
    assert ModelFile.load(plain).sigmas == ()
    capsys.readouterr()
    for options, message in (
        (("--no-certify", "--radius", 0.1), "certify_radius: expected None"),
        (("--certify", 0.25, "--radius", 9), "radius: expected one above 0"),
    ):
        assert run("train", data, "--out", tmp_path / "no", "--size", 32, "--align", "off", *options) == 2
        assert message in capsys.readouterr().err
    assert run("certify", plain, "--fit", data, "--sigma", 0.25, "--out", out) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "sigma 0.25: threshold" in captured.err and "other images" not in captured.err
    before, after = ModelFile.load(plain), ModelFile.load(out)
    assert after.sigmas == (0.25,) and after.threshold == before.threshold
    assert all(np.array_equal(before.weights[name], after.weights[name]) for name in before.weights)
    assert out.stat().st_size < plain.stat().st_size + 60_000  # the weights stay in half precision
    assert certify(out, data / "test", "--radius", 0.1, "--max-votes", 50, "--json", "-") in (0, 1)
    assert [row["sigma"] for row in rows(capsys.readouterr().out)] == [0.25, 0.25]
    again = tmp_path / "again"
    assert run("certify", out, "--fit", data, "--sigma", 0.25, "--radius", 0.1, "--alpha", 0.01, "--out", again) == 0
    assert "certified at radius 0.1" in capsys.readouterr().err
    (fitted,), (at_radius,) = after.smoothing, ModelFile.load(again).smoothing
    assert (at_radius.radius, at_radius.alpha) == (0.1, 0.01) and at_radius.threshold > fitted.threshold
    assert np.array_equal(fitted.mu, at_radius.mu)
    assert run("certify", plain, "--fit", data / "train", "--sigma", 0.25, "--out", out, "--seed", 1) == 0
    assert "other images" not in capsys.readouterr().err
