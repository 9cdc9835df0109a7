"""The command line as scripts rely on it: exit codes, what is on which stream, and the keys of its files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import small_model
from numpy.typing import NDArray
from parts import dataset, disc, scratched
from pictures import POSE, part
from PIL import Image

import advrad_fast
from advrad_fast import Detector, ModelFile
from advrad_fast.cli import main
from advrad_fast.images import load_image

MODEL = small_model()
KEYS = ["path", "outcome", "score", "threshold", "p_value", "backend", "ms"]
FIGURES = {"model", "data", "n_good", "n_bad", "image_auroc", "f1_max", "pixel_auroc", "aupro", "seed"}
FIGURES |= {"robust_auroc", "certified_auroc"}
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVRAD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    MODEL.save(path)
    return path


def save(path: Path, image: NDArray[np.uint8]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three frames, each of its own size."""
    rng = np.random.default_rng(3)
    for i, (make, size) in enumerate(((disc, 32), (disc, 40), (scratched, 48))):
        save(tmp_path / "in" / f"{i}.png", make(rng, size))
    return tmp_path / "in"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def inspect(model: Path, *arguments: object, backend: str = "reference") -> int:
    return run("inspect", model, *arguments, "--backend", backend, "--threads", 1)


def rows(text: str) -> list[dict[str, Any]]:
    """JSON lines, each with exactly the documented keys."""
    found = [json.loads(line) for line in text.splitlines()]
    assert all(list(row) == KEYS for row in found)
    return found


@pytest.mark.parametrize(("threshold", "code", "outcome"), [(1e6, 0, "OK"), (-1, 1, "DEFECT")])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_exit_codes_of_inspect(
    model: Path, images: Path, capsys: Capture, threshold: float, code: int, outcome: str, backend: str
) -> None:
    assert inspect(model, images, "--threshold", threshold, backend=backend) == code
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [outcome] * 3
    assert [line.split()[2] for line in lines] == [str(images / f"{i}.png") for i in range(3)]


def test_rows_are_what_the_detector_says(model: Path, images: Path, capsys: Capture) -> None:
    assert inspect(model, images, "--json", "-", "--seed", 5) in (0, 1)
    captured = capsys.readouterr()
    detector = Detector.load(model, backend="reference", seed=5)
    found = rows(captured.out)
    assert len(found) == 3
    for i, row in enumerate(found):
        inspection = detector.inspect(load_image(images / f"{i}.png"))
        assert row.pop("ms") > 0
        assert row == {
            "path": str(images / f"{i}.png"),
            "outcome": str(inspection.outcome),
            "score": inspection.score,
            "threshold": MODEL.threshold,
            "p_value": inspection.p_value,
            "backend": "reference (fp32)",
        }


def test_one_defect_among_good_parts(model: Path, images: Path, capsys: Capture) -> None:
    inspect(model, images, "--json", "-")
    scores = sorted(row["score"] for row in rows(capsys.readouterr().out))
    assert inspect(model, images, "--json", "-", "--threshold", repr(scores[1])) == 1
    assert sorted(row["outcome"] for row in rows(capsys.readouterr().out)) == ["DEFECT", "OK", "OK"]
    assert inspect(model, images, "--json", "-", "--threshold", repr(scores[2])) == 0  # not above it


@pytest.mark.parametrize("as_json", [True, False])
def test_what_ray_prints_is_not_among_the_results(
    model: Path, images: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """Its threads write to sys.stdout, whatever is said to ray.init()."""
    from advrad_fast import batch

    inspect_files = batch.inspect_files

    def noisy(*arguments: Any, ray: str, **options: Any) -> Any:
        for result in inspect_files(*arguments, **options):
            sys.stdout.write(f"(raylet) a worker of {ray} died\n")
            yield result

    monkeypatch.setattr(batch, "inspect_files", noisy)
    assert inspect(model, images, "--ray", "x", *(["--json", "-"] if as_json else [])) in (0, 1)
    captured = capsys.readouterr()
    assert captured.err.count("(raylet) a worker of x died") == len(captured.out.splitlines()) == 3
    assert "raylet" not in captured.out
    sys.stdout.write("back")
    assert capsys.readouterr().out == "back"


@pytest.mark.parametrize("threshold", [1e6, -1])
def test_a_broken_file_does_not_keep_the_others_from_being_inspected(
    model: Path, images: Path, capsys: Capture, threshold: float
) -> None:
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:60])
    overlays = images.parent / "out"
    assert inspect(model, images, "--json", "-", "--threshold", threshold, "--overlay", overlays) == 2
    captured = capsys.readouterr()
    found = rows(captured.out)
    other = "OK" if threshold > 0 else "DEFECT"
    assert [row["outcome"] for row in found] == [other, "ERROR", other]
    assert (found[1]["score"], found[1]["p_value"], found[1]["ms"]) == (None, None, None)
    assert "1.png" in captured.err and "Traceback" not in captured.err
    assert sorted(path.name for path in overlays.iterdir()) == ["0.png.png", "2.png.png"]


def test_a_part_that_is_not_found_is_not_ok(tmp_path: Path, capsys: Capture) -> None:
    small_model(pose=POSE).save(tmp_path / "pose.safetensors")
    blank = save(tmp_path / "blank.png", np.full((100, 120), 200, np.uint8))
    found = save(tmp_path / "part.png", part())
    overlays = tmp_path / "out"
    arguments = (found, blank, "--threshold", 1e6, "--json", "-", "--overlay", overlays)
    assert inspect(tmp_path / "pose.safetensors", *arguments) == 1
    first, second = rows(capsys.readouterr().out)
    assert (first["outcome"], second["outcome"], second["score"]) == ("OK", "ABSTAIN", None)
    plain = load_image(overlays / "blank.png.png")
    assert (plain == 200).all() and plain.shape == (100, 120, 3)


def test_json_and_csv_files_hold_the_same(model: Path, images: Path, tmp_path: Path, capsys: Capture) -> None:
    (images / "2.png").write_bytes(b"no image")
    as_json, as_csv = tmp_path / "a.jsonl", tmp_path / "a.csv"
    assert inspect(model, images, "--json", as_json, "--csv", as_csv) == 2
    assert len(capsys.readouterr().out.splitlines()) == 3  # the text for people is still there
    written = rows(as_json.read_text())
    with as_csv.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == KEYS
    assert table == [{key: "" if value is None else str(value) for key, value in row.items()} for row in written]
    assert inspect(model, images / "0.png", "--csv", "-") in (0, 1)
    assert capsys.readouterr().out.splitlines()[0] == ",".join(KEYS)


def test_overlays_have_the_frames_size_and_names_of_their_own(model: Path, tmp_path: Path, capsys: Capture) -> None:
    rng = np.random.default_rng(4)
    names = ["a/x.png", "b/x.png", "a_b/x.png", "c/a/b_x.png", "c/a_b/x.png"]
    paths = [save(tmp_path / "in" / name, disc(rng, 32 + 2 * i)) for i, name in enumerate(names)]
    assert inspect(model, *paths, "--overlay", tmp_path / "deep" / "out") in (0, 1)
    pictures = []
    for path in (tmp_path / "deep" / "out").iterdir():
        with Image.open(path) as picture:
            pictures.append((picture.format, picture.mode, picture.size))
    assert sorted(pictures) == [("PNG", "RGB", (32 + 2 * i, 32 + 2 * i)) for i in range(len(names))]
    assert [load_image(path).shape[0] for path in paths] == [32 + 2 * i for i in range(len(names))]  # inputs are untouched


def test_false_alarm_rate(model: Path, images: Path, capsys: Capture) -> None:
    assert inspect(model, images, "--json", "-", "--false-alarm-rate", 0.02) in (0, 1)
    assert {row["threshold"] for row in rows(capsys.readouterr().out)} == {2.0}  # the largest of 50 calibration scores
    assert inspect(model, images, "--json", "-", "--false-alarm-rate", 0.001) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "at least 999 normal scores" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threshold", "nan"), "threshold: expected a finite number"),
        (("--seed", "-1"), "seed: expected"),
        (("--backend", "npu"), "backend: expected one of"),
        (("--backend", "cpu", "--precision", "fp8"), "precision: expected one of"),
        (("--overlay", "{file}"), "exists"),
        (("--json", "{file}/a.json"), "a.json"),
    ],
)
def test_bad_options(model: Path, images: Path, capsys: Capture, arguments: tuple[str, ...], message: str) -> None:
    given = [argument.format(file=images / "0.png") for argument in arguments]
    backend = [] if "--backend" in given else ["--backend", "reference"]
    assert run("inspect", model, images, *given, *backend) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err and captured.err.startswith("advrad-fast: ")


def test_missing_models_and_images(model: Path, images: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").mkdir()
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"not a model")
    for arguments, message in (
        ((tmp_path / "none.safetensors", images), "none.safetensors: cannot be read"),
        ((foreign, images), "foreign.safetensors: header length"),
        ((model, tmp_path / "empty"), "no image found"),
        ((model, tmp_path / "nowhere"), "no such file or folder"),
        ((model, images / "*.webp"), "no image found"),
    ):
        assert inspect(*arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("advrad-fast: ") and len(captured.err.splitlines()) == 1
        assert message in captured.err


@pytest.mark.parametrize("arguments", [(), ("inspect",), ("inspect", "model"), ("paint",), ("train", "data")])
def test_usage_errors(capsys: Capture, arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as info:
        run(*arguments)
    assert info.value.code == 2
    assert "usage: advrad-fast" in capsys.readouterr().err


def test_evaluate(model: Path, tmp_path: Path, capsys: Capture) -> None:
    data = dataset(tmp_path / "discs", train=1, good=3, bad=2, size=32)
    common = ("evaluate", model, data, "--backend", "reference", "--seed", 4)
    assert run(*common, "--json", "-") == 0
    captured = capsys.readouterr()
    figures = json.loads(captured.out)
    assert set(figures) >= FIGURES
    assert (figures["model"], figures["data"], figures["seed"]) == (str(model), "discs", 4)
    assert (figures["n_good"], figures["n_bad"], figures["robust_auroc"], figures["certified_auroc"]) == (3, 2, {}, {})
    assert all(0.0 <= figures[key] <= 1.0 for key in ("image_auroc", "f1_max", "pixel_auroc", "aupro"))
    assert run(*common, "--json", tmp_path / "a.json") == 0
    text = capsys.readouterr().out
    assert text.startswith("discs: 3 good, 2 defective; reference (fp32), seed 4") and "scratch" in text
    again = json.loads((tmp_path / "a.json").read_text())
    figures.pop("p50_ms"), again.pop("p50_ms")
    assert again == figures


def test_evaluate_needs_a_labelled_test_set(model: Path, images: Path, capsys: Capture) -> None:
    assert run("evaluate", model, images, "--backend", "reference") == 2
    assert "needs good and defective images, got 0 and 0" in capsys.readouterr().err


def test_backends(capsys: Capture, tmp_path: Path) -> None:
    assert run("backends") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["cuda", "cpu", "reference"]
    assert run("backends", "--json", "-") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [set(row) for row in listed] == [{"name", "usable", "detail"}] * 3
    assert [row["usable"] for row in listed[1:]] == [True, True]
    for line, row in zip(lines, listed, strict=True):
        assert row["detail"] and row["detail"] in line
        assert ("not usable" in line) != row["usable"]
    assert run("backends", "--json", tmp_path / "a.json") == 0
    assert json.loads((tmp_path / "a.json").read_text()) == listed


def test_no_usable_backend(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advrad_fast.backends._installed", lambda module: False)
    assert run("backends") == 2
    assert "torch is not installed" in capsys.readouterr().out


def test_train_then_inspect(tmp_path: Path, capsys: Capture) -> None:
    data, out = dataset(tmp_path / "discs", train=12, good=1, bad=1, size=32), tmp_path / "disc.safetensors"
    options = ("--size", 32, "--steps", 3, "--batch-size", 2, "--seed", 1, "--note", "drawn, no licence needed", "--align", "off")
    assert run("train", data, "--out", out, *options) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"wrote {out}: threshold " in captured.err
    trained = ModelFile.load(out)
    assert (trained.config.image.height, trained.config.image.width) == (32, 32)
    assert trained.provenance["note"] == "drawn, no licence needed"
    assert "'steps': 3" in str(trained.provenance["settings"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disc.safetensors", "discs"]  # no checkpoint is left
    assert inspect(out, data / "test", "--json", "-", backend="cpu") in (0, 1)
    found = rows(capsys.readouterr().out)
    assert [Path(row["path"]).parent.name for row in found] == ["good", "scratch"]
    assert all(row["score"] > 0 and row["threshold"] == trained.threshold for row in found)


@pytest.mark.parametrize(
    ("options", "message"), [((), "no such folder"), (("--preset", "quick"), "fast"), (("--steps", "0"), "steps: expected")]
)
def test_training_that_cannot_be_done(tmp_path: Path, capsys: Capture, options: tuple[str, ...], message: str) -> None:
    out, data = tmp_path / "out.safetensors", tmp_path / ("good" if options else "nowhere")
    save(tmp_path / "good" / "a.png", np.zeros((32, 32), np.uint8))
    assert run("train", data, "--out", out, *options) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("advrad-fast: ") and message in captured.err
    assert not out.exists()


def test_a_missing_library_names_its_extra(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "advrad_fast.training.pipeline", raising=False)
    assert run("train", tmp_path, "--out", tmp_path / "a") == 2
    line = capsys.readouterr().err
    assert line == "advrad-fast: torch is not installed; needed here: pip install 'advrad-fast[train]'\n"


def test_an_interruption_is_a_failure(model: Path, images: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Detector, "inspect", interrupt)
    assert inspect(model, images) == 2
    assert capsys.readouterr().err == "advrad-fast: interrupted\n"


def test_version_and_streams_in_a_process_of_its_own(model: Path, images: Path) -> None:
    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "advrad_fast.cli", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    version = command("--version")
    assert (version.returncode, version.stdout) == (0, f"advrad-fast {advrad_fast.__version__}\n")
    done = command("inspect", model, images, "--backend", "cpu", "--json", "-", "--threshold", -1, "-v")
    assert done.returncode == 1, done.stderr
    assert [row["outcome"] for row in rows(done.stdout)] == ["DEFECT"] * 3
    assert "backend cpu" in done.stderr
