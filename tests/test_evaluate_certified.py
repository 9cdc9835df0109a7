"""Certified AUROC from draws: figures, resumption, parts not found, the curve, and ``evaluate --certified``."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import certifiable, small_model
from parts import dataset
from pictures import POSE
from PIL import Image

from advrad_fast import Detector, certify
from advrad_fast.cli import main
from advrad_fast.errors import ConfigError, DatasetError, InferenceError
from advrad_fast.evaluation import certified
from advrad_fast.evaluation.datasets import Dataset, load_dataset

MODEL = certifiable(small_model(), 0.125, 0.25)
PIXELS = 32 * 32 * 3
DRAWS = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset(tmp_path_factory.mktemp("data") / "discs", train=1, good=3, bad=3, size=32)


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(MODEL, backend="reference", threads=1)


@pytest.fixture
def counted(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seed of every image that is drawn for."""
    seeds: list[int] = []
    draw = detector.smoothed_scores

    def spy(frame: object, draws: int, **options: Any) -> Any:
        seeds.append(options["seed"])
        return draw(frame, draws, **options)

    monkeypatch.setattr(detector, "smoothed_scores", spy)
    return seeds


def test_figures_are_those_of_the_draws(detector: Detector, data: Path) -> None:
    found = certified.draw_scores(detector, load_dataset(data), draws=DRAWS, sigma=0.25)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (found.scores.shape, found.sigma, found.pixels) == ((6, DRAWS), 0.25, PIXELS)
    figures = certified.figures(found, [0.0, 0.1, 5 / 16], 0.01)
    wanted = certify.certified_auroc(found.labels, found.scores, [0.0, 0.1, 5 / 16], sigma=0.25, pixels=PIXELS, alpha=0.01)
    assert figures == {
        "certified_auroc": {"0": wanted[0], "0.1": wanted[1], "0.3125": wanted[2]},
        "certified_sigma": 0.25,
        "certified_draws": DRAWS,
        "certified_alpha": 0.01,
    }


def test_draws_are_the_images_own(detector: Detector, data: Path, counted: list[int]) -> None:
    """Whatever else is in the test set; and no two images share noise."""
    whole = load_dataset(data)
    found = certified.draw_scores(detector, whole, draws=3)
    assert found.sigma == 0.125
    part = certified.draw_scores(detector, Dataset(whole.name, [], whole.test[2:4]), draws=3)
    np.testing.assert_array_equal(part.scores, found.scores[2:4])
    assert len(set(counted[:6])) == 6 and counted[6:] == counted[2:4]
    assert not np.array_equal(certified.draw_scores(detector, whole, draws=3, seed=1).scores, found.scores)


def test_an_interrupted_run_goes_on(detector: Detector, data: Path, tmp_path: Path, counted: list[int]) -> None:
    test, file = load_dataset(data), tmp_path / "draws.jsonl"
    whole = certified.draw_scores(detector, test, draws=5, file=file)
    text = file.read_text()
    lines = text.splitlines(keepends=True)
    assert len(lines) == 7
    del counted[:]
    for kept, drawn in (("".join(lines[:4]) + lines[4][:20], 3), (text, 0), ("", 6), (lines[0], 6)):
        file.write_text(kept)
        again = certified.draw_scores(detector, test, draws=5, file=file)
        np.testing.assert_array_equal(again.scores, whole.scores)
        assert file.read_text() == text and len(counted) == drawn
        del counted[:]


def test_draws_of_another_run_are_refused(detector: Detector, data: Path, tmp_path: Path) -> None:
    test, file = load_dataset(data), tmp_path / "draws.jsonl"
    certified.draw_scores(detector, test, draws=2, file=file)
    before = file.read_text()
    for changes in ({"draws": 3}, {"seed": 1}, {"sigma": 0.25}):
        with pytest.raises(ConfigError, match=r"draws\.jsonl: draws: expected those of"):
            certified.draw_scores(detector, test, **{"draws": 2, "file": file, **changes})  # type: ignore[arg-type]
    other = Detector(certifiable(small_model(mu=MODEL.mu + np.float32(1)), 0.125), backend="reference")
    with pytest.raises(ConfigError, match="draws: expected"):
        certified.draw_scores(other, test, draws=2, file=file)
    assert file.read_text() == before
    head = before.splitlines(keepends=True)[0]
    for line in ("{}\n", "1\n", "x\n", '{"image": "a", "scores": "b"}\n'):
        file.write_text(head + line)
        with pytest.raises(ConfigError, match="not a file of draws"):
            certified.draw_scores(detector, test, draws=2, file=file)
    for scores in ("[1.0]", "[1.0, NaN]"):
        file.write_text(f'{head}{{"image": "a", "scores": {scores}}}\n')
        with pytest.raises(InferenceError, match="expected 2 finite scores"):
            certified.draw_scores(detector, test, draws=2, file=file)
    file.write_text(f'{head}{{"image": "{"x" * 50_000}", "scores": [1.0]}}\n')
    with pytest.raises(InferenceError) as problem:
        certified.draw_scores(detector, test, draws=2, file=file)
    assert len(str(problem.value)) < 1000


def test_a_part_that_is_not_found_counts_as_wrong(tmp_path: Path) -> None:
    for name in ("test/good", "test/bad", "train/good"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(np.full((100, 120), 200, np.uint8)).save(tmp_path / name / "a.png")
    detector = Detector(certifiable(small_model(pose=POSE), 0.25), backend="reference")
    for file in (None, tmp_path / "draws.jsonl", tmp_path / "draws.jsonl"):
        found = certified.draw_scores(detector, load_dataset(tmp_path), draws=20, file=file)
        largest = np.finfo(np.float32).max
        assert found.scores[found.labels == 0].tolist() == [[largest] * 20]
        assert found.scores[found.labels == 1].tolist() == [[-largest] * 20]
        assert found.auroc([0.0], 0.01).tolist() == [0.0]


def test_refusals(detector: Detector, data: Path) -> None:
    test = load_dataset(data)
    with pytest.raises(DatasetError, match="needs good and defective images, got 3 and 0"):
        certified.draw_scores(detector, Dataset("x", [], test.test[:3]), draws=2)
    with pytest.raises(ConfigError, match="sigma: expected one of"):
        certified.draw_scores(detector, test, draws=2, sigma=0.3)
    with pytest.raises(ConfigError, match="a sigma to certify at"):
        certified.draw_scores(Detector(small_model(), backend="reference"), test, draws=2)


def test_the_curve() -> None:
    scores = np.r_[np.full((2, 100), 1.0), np.full((2, 100), 2.0)].astype(np.float32)
    found = certified.CertifiedScores(np.array([0, 0, 1, 1]), scores, 0.25, PIXELS)
    radii, values = found.curve(0.001)
    bound = float(certify.lower_bound(100, 100, 0.001))
    assert radii[0] == 0.0 and radii[-1] == float(certify.radius(bound, 0.25, pixels=PIXELS))
    assert (values[:-1] == 1.0).all()
    svg = ElementTree.fromstring(certified.curve_svg(radii, values, 'a < b & "c"'))
    texts = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert 'a < b & "c"' in texts and {"0", "100", "0.1", "0.3"} <= set(texts)


def test_the_curve_is_drawn_from_below() -> None:
    """Between two radii stands the value of the larger one."""
    svg = certified.curve_svg(np.array([0.0, 0.5, 1.0]), np.array([1.0, 0.5, 0.0]), "")
    assert "M60.0,40.0V195.0H340.0V350.0H620.0" in svg
    assert "path" in certified.curve_svg(np.array([0.0, 0.0]), np.array([1.0, 0.5]), "")  # too few draws for any radius


def test_evaluate_certified(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MODEL.save(tmp_path / "m")
    common = ["evaluate", str(tmp_path / "m"), str(data), "--backend", "reference", "--certified", "--votes", "20"]
    files = ["--scores", str(tmp_path / "draws.jsonl"), "--plot", str(tmp_path / "curve.svg")]
    assert main([*common, *files, "--sigma", "0.25", "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert list(figures["certified_auroc"]) == ["0.05", "0.1", "0.2", "0.5"]
    assert (figures["certified_sigma"], figures["certified_draws"], figures["certified_alpha"]) == (0.25, 20, 0.001)
    ElementTree.parse(tmp_path / "curve.svg")
    assert len((tmp_path / "draws.jsonl").read_text().splitlines()) == 7
    assert main([*common, "--radii", "0.01", "--alpha", "0.1"]) == 0
    captured = capsys.readouterr()
    assert "certified AUROC, sigma 0.125, 20 draws, alpha 0.1 an image\n    radius 0.01" in captured.out
    assert "6/6 images, 20 draws each" in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--radii", "0.1"], "--radii: expected --certified with it"),
        (["--certified", "--plot", "a.png"], "--plot: expected a file name that ends in .svg"),
        (["--certified", "--votes", "0"], "draws: expected"),
        (["--certified", "--votes", "2", "--radii", "-1"], "radius: expected"),
    ],
)
def test_bad_options(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    MODEL.save(tmp_path / "m")
    assert main(["evaluate", str(tmp_path / "m"), str(data), "--backend", "reference", *options]) == 2
    assert message in capsys.readouterr().err
