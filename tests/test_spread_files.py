"""Image files over a Ray cluster of two workers: rows, order and exit codes of one process; a worker's death costs nothing."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spread_tasks
from models import certifiable, small_model
from parts import dataset, disc, scratched
from PIL import Image

from advrad_fast import Detector, ModelFile, Outcome
from advrad_fast.batch import LARGE, certify_files, inspect_files, row
from advrad_fast.cli import main
from advrad_fast.errors import ConfigError, ImageDecodeError, SpreadError
from advrad_fast.evaluation.certified import draw_scores
from advrad_fast.evaluation.datasets import load_dataset

COUNT = 24


@pytest.fixture(scope="module")
def model() -> ModelFile:
    return certifiable(small_model(), 0.25)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images, one of them broken, one missing."""
    folder, rng = tmp_path_factory.mktemp("in"), np.random.default_rng(3)
    paths = [folder / f"{i:02d}.png" for i in range(COUNT)]
    for i, path in enumerate(paths):
        Image.fromarray((disc if i % 3 else scratched)(rng, 40)).save(path)
    paths[5].write_bytes(b"no image")
    paths[7].unlink()
    return paths


def rows(found: Any) -> list[Any]:
    return [{**row(path, result), "ms": None, "why": repr(result.error), "picture": picture} for path, result, picture in found]


@pytest.mark.parametrize("overlay", [False, True])
def test_inspections_are_those_of_one_process(cluster: str, model: ModelFile, files: list[Path], overlay: bool) -> None:
    setup = partial(Detector, model, backend="cpu", threads=1, seed=9)
    here = rows(inspect_files(setup, files, overlay=overlay))
    assert rows(inspect_files(setup, files, overlay=overlay, ray=cluster)) == here
    assert [r["path"] for r in here] == [str(path) for path in files]
    detector = setup()
    for i, found in enumerate(here):
        if i in (5, 7):
            assert (found["outcome"], found["score"], found["picture"]) == ("ERROR", None, None)
        else:
            wanted = detector.inspect(np.asarray(Image.open(files[i])))
            assert (found["outcome"], found["score"], found["p_value"]) == (wanted.outcome, wanted.score, wanted.p_value)
            assert (found["picture"] is not None) == overlay


def test_certificates_are_those_of_one_process(cluster: str, model: ModelFile, files: list[Path]) -> None:
    setup = partial(Detector, model, backend="cpu", threads=1)
    settings: Any = {"radius": 0.1, "max_votes": 60, "seed": 4}
    here = [(path, found, repr(error)) for path, found, error in certify_files(setup, files, **settings)]
    there = [(path, found, repr(error)) for path, found, error in certify_files(setup, files, **settings, ray=cluster)]
    assert there == here and [path for path, *_ in here] == files
    assert [i for i, (_, found, _) in enumerate(here) if found is None] == [5, 7]
    fresh = [found for _, found, _ in certify_files(setup, files[:3], 0.1, max_votes=40, ray=cluster)]
    assert all(found is not None for found in fresh)
    with pytest.raises(ConfigError, match="sigma: expected one of the model's"):
        list(certify_files(setup, files, 0.1, sigma=0.3, ray=cluster))


@pytest.mark.parametrize("what", ["inspect", "certify"])
def test_a_killed_worker_loses_nothing_and_doubles_nothing(
    cluster: str, model: ModelFile, files: list[Path], tmp_path: Path, what: str
) -> None:
    def results(setup: Any, ray: str | None) -> Iterator[Any]:
        if what == "inspect":
            for path, result, _ in inspect_files(setup, files, ray=ray):
                yield {**row(path, result), "ms": None}
        else:
            for path, found, _ in certify_files(setup, files, 0.1, max_votes=40, seed=2, ray=ray):
                yield path, found

    found = []
    for result in results(partial(spread_tasks.slow, tmp_path, model), cluster):
        found.append(result)
        if len(found) == 3:
            first = sorted(int(path.name) for path in tmp_path.iterdir())
            os.kill(first[0], signal.SIGKILL)
    assert found == list(results(partial(Detector, model, backend="cpu", threads=1), None))
    assert len(list(tmp_path.iterdir())) > len(first)  # another took its place


def test_large_and_odd_files_are_judged_before_they_are_sent(cluster: str, model: ModelFile, tmp_path: Path) -> None:
    setup = partial(Detector, model, backend="cpu", threads=1)
    large, folder = tmp_path / "large.png", tmp_path / "folder.png"
    folder.mkdir()
    with large.open("wb") as file:
        file.truncate(LARGE + 1)  # a hole: nothing is stored
    for ray in (None, cluster):
        found = list(inspect_files(setup, [large, folder], ray=ray))
        assert [result.outcome for _, result, _ in found] == [Outcome.ERROR] * 2
        assert all(isinstance(result.error, ImageDecodeError) for _, result, _ in found)
        assert "it begins with" in str(found[0][1].error) and "not a regular file" in str(found[1][1].error)


def test_draws_of_certified_figures_are_the_same(cluster: str, model: ModelFile, tmp_path: Path) -> None:
    """And a file of draws that was begun here is gone on with there."""
    data = load_dataset(dataset(tmp_path / "discs", train=1, good=3, bad=3, size=32))
    setup = partial(Detector, model, backend="cpu", threads=1)
    detector = setup()
    here = draw_scores(detector, data, draws=20, file=tmp_path / "here.jsonl")
    lines = (tmp_path / "here.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "there.jsonl").write_text("".join(lines[:3]) + lines[3][:9])
    seen: list[int] = []
    there = draw_scores(
        detector, data, draws=20, file=tmp_path / "there.jsonl", on_image=lambda: seen.append(1), ray=cluster, setup=setup
    )
    assert there.scores.tobytes() == here.scores.tobytes() and len(seen) == 6
    assert sorted((tmp_path / "there.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)
    with pytest.raises(ConfigError, match="setup"):
        draw_scores(detector, data, draws=20, ray=cluster)
    other = partial(Detector, model, backend="cpu", threads=1, precision="fp32" if "fp32" not in detector.backend else "bf16")
    with pytest.raises(SpreadError, match=r"a worker ran cpu \("):
        draw_scores(detector, data, draws=20, ray=cluster, setup=other)


def test_command_lines(cluster: str, model: ModelFile, files: list[Path], tmp_path: Path, capsys: Any) -> None:
    model.save(tmp_path / "model")

    def run(name: str, *arguments: object) -> tuple[int, list[dict[str, Any]]]:
        line = [name, str(tmp_path / "model"), *map(str, arguments), "--backend", "cpu", "--threads", "1", "--json", "-"]
        code = main(line)
        return code, [{**json.loads(line), "ms": 0} for line in capsys.readouterr().out.splitlines()]

    for paths, codes in (([files[0], files[5], files[1]], {2}), (files[8:12], {0, 1})):
        for command in (["inspect", *paths, "--seed", 3], ["certify", *paths, "--seed", 3, "--radius", 0.1, "--max-votes", 40]):
            here = run(*command)
            assert run(*command, "--ray", cluster) == here
            assert here[0] in codes and len(here[1]) == len(paths)
    assert run("inspect", files[0], "--ray", cluster, "--false-alarm-rate", 1e-9)[0] == 2
    maps = [tmp_path / "here", tmp_path / "there"]
    for folder, ray in zip(maps, ([], ["--ray", cluster]), strict=True):
        run("inspect", *files[:3], "--overlay", folder, *ray)
    assert [path.read_bytes() for path in sorted(maps[0].iterdir())] == [p.read_bytes() for p in sorted(maps[1].iterdir())]
    assert len(list(maps[0].iterdir())) == 3


def test_the_command_line_of_everything_at_once(cluster: str, model: ModelFile, tmp_path: Path, capsys: Any) -> None:
    """``evaluate --certified --robust --report --ray``: the figures of one process."""
    pytest.importorskip("torch")
    model.save(tmp_path / "model")
    data = dataset(tmp_path / "discs", train=1, good=2, bad=2, size=32)
    line = ["evaluate", str(tmp_path / "model"), str(data), "--backend", "cpu", "--threads", "1", "--json", "-"]
    line += ["--certified", "--votes", "20", "--robust", "--limit", "1", "--budgets", "linf 2/255", "--attack-steps", "2"]
    figures = []
    for name, ray in (("here", []), ("there", ["--ray", cluster])):
        assert main([*line, "--report", str(tmp_path / name), "--sanity", "0", *ray]) == 0
        found = json.loads(capsys.readouterr().out)
        found.pop("p50_ms")
        found["robust"] = None  # with times, and attacks that differ in the last bits by PyTorch's number of threads
        figures.append(found)
        assert (tmp_path / name / "index.html").exists()
    assert figures[0] == figures[1]
    assert list(figures[0]["robust_auroc"]) and figures[0]["certified_auroc"]
