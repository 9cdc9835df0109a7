"""Spreading tasks: here and on a Ray cluster of two workers, the results are the same, each exactly once."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import spread_tasks
from models import small_model
from parts import dataset

from advrad_fast import Detector
from advrad_fast.cli import main
from advrad_fast.errors import ConfigError, DatasetError, SpreadError
from advrad_fast.evaluation.attacker import RobustSettings
from advrad_fast.evaluation.datasets import load_dataset
from advrad_fast.evaluation.evaluate import evaluate
from advrad_fast.evaluation.robust import evaluate_robust
from advrad_fast.evaluation.rows import AttackRow
from advrad_fast.spread import RETRIES, in_order, map_tasks


def test_here_in_order_and_one_at_a_time() -> None:
    drawn: list[int] = []

    def tasks() -> Iterator[int]:
        for task in range(4):
            drawn.append(task)
            yield task

    results = map_tasks(spread_tasks.square, tasks(), setup=partial(spread_tasks.offset, 3))
    assert next(results) == (0, 3) and drawn == [0]
    assert list(results) == [(1, 4), (2, 7), (3, 12)]
    assert list(map_tasks(spread_tasks.square, [], setup=partial(spread_tasks.offset, 3))) == []


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SpreadError, match=r"pip install 'advrad-fast\[ray\]'"):
        list(map_tasks(spread_tasks.square, [1], setup=partial(spread_tasks.offset, 3), ray="auto"))


def test_each_task_comes_once(cluster: str) -> None:
    results = list(map_tasks(spread_tasks.square, range(30), setup=partial(spread_tasks.offset, 3), ray=cluster))
    assert sorted(results) == [(i, 3 + i * i) for i in range(30)]
    # Another run has its own state.
    again = map_tasks(spread_tasks.square, range(3), setup=partial(spread_tasks.offset, 5), ray=cluster)
    assert sorted(again) == [(0, 5), (1, 6), (2, 9)]
    assert list(map_tasks(spread_tasks.square, [], setup=partial(spread_tasks.offset, 3), ray=cluster)) == []


def test_tasks_are_drawn_as_workers_take_them(cluster: str) -> None:
    drawn: list[int] = []

    def tasks() -> Iterator[int]:
        for task in range(20):
            drawn.append(task)
            yield task

    results = map_tasks(spread_tasks.square, tasks(), setup=partial(spread_tasks.offset, 0), ray=cluster)
    next(results)
    assert len(drawn) == 4  # two for each worker
    results.close()
    assert len(drawn) == 4


def test_a_task_whose_worker_dies_is_run_again(cluster: str, tmp_path: Path) -> None:
    results = list(map_tasks(spread_tasks.dies_once, range(8), setup=partial(str, tmp_path), ray=cluster))
    assert sorted(results) == [(i, 10 * i) for i in range(8)]
    assert (tmp_path / "3").read_text() == "xx"


def test_a_worker_killed_half_way_loses_nothing_and_doubles_nothing(cluster: str, tmp_path: Path) -> None:
    found: list[tuple[int, tuple[int, int]]] = []
    killed = 0
    for index, result in map_tasks(spread_tasks.marks, range(16), setup=partial(str, tmp_path), ray=cluster):
        found.append((index, result))
        if len(found) == 5:
            killed = result[1]
            os.kill(killed, signal.SIGKILL)
    assert sorted(index for index, _ in found) == [task for _, (task, _) in sorted(found)] == list(range(16))
    assert killed not in {pid for _, (_, pid) in found[8:]}  # it is gone, and the others went on
    assert len({pid for _, (_, pid) in found}) >= 2


def test_a_task_that_kills_every_worker_is_given_up(cluster: str) -> None:
    with pytest.raises(SpreadError, match=f"workers died {RETRIES + 1} times"):
        list(map_tasks(spread_tasks.dies, [1], setup=partial(spread_tasks.offset, 0), ray=cluster))


@pytest.mark.parametrize("ray", [None, "local"])
def test_errors_are_the_same_here_and_there(cluster: str, ray: str | None) -> None:
    with pytest.raises(DatasetError, match=r"^task 2$"):
        list(map_tasks(spread_tasks.fails, range(5), setup=partial(spread_tasks.offset, 0), ray=ray))


def test_short_tasks_travel_in_groups_and_those_before_an_error_count(cluster: str) -> None:
    """A group holds tasks that follow one another, so its results come in a row."""
    results: list[int] = []
    found = map_tasks(spread_tasks.fails, (i if i < 400 else 2 for i in range(3, 1000)), setup=partial(str, 0), ray=cluster)
    with pytest.raises(DatasetError, match=r"^task 2$"):
        results.extend(index for index, _ in found)
    assert 397 not in results and len(set(results)) == len(results) >= 300
    assert sum(b == a + 1 for a, b in itertools.pairwise(results)) > 0.9 * len(results)


def test_in_order() -> None:
    assert list(in_order(pair for pair in [(2, "c"), (0, "a"), (1, "b"), (3, "d")])) == ["a", "b", "c", "d"]
    assert list(in_order(pair for pair in ())) == []


def test_an_evaluation_has_the_same_numbers(cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model()
    data = load_dataset(dataset(tmp_path / "discs", train=1, good=4, bad=5, size=48))
    detector = Detector(model, backend="cpu", threads=1)
    seen: list[Any] = []
    here = evaluate(detector, data, seed=3)
    setup = partial(Detector, model, backend="cpu", threads=1)
    there = evaluate(
        detector, data, seed=3, ray=cluster, setup=setup, on_sample=lambda sample, result: seen.append((sample, result))
    )
    assert there.scores.tolist() == here.scores.tolist()
    here.figures.pop("p50_ms"), there.figures.pop("p50_ms")
    assert there.figures == here.figures
    assert here.figures["pixel_auroc"] is not None
    scores = {sample.path: result.score for sample, result in seen}
    assert [scores[s.path] for s in here.samples] == here.scores.tolist()
    with pytest.raises(ConfigError, match="setup"):
        evaluate(detector, data, ray=cluster)

    model.save(tmp_path / "small.safetensors")
    arguments = ["evaluate", str(tmp_path / "small.safetensors"), str(tmp_path / "discs"), "--backend", "cpu", "--ray", cluster]
    assert main([*arguments, "--report", str(tmp_path / "out")]) == 0
    assert "9/9 images" in capsys.readouterr().err
    assert (tmp_path / "out" / "index.html").exists()


def test_attacks_have_the_same_rows(cluster: str, tmp_path: Path) -> None:
    """And so has a run that was stopped half way and goes on elsewhere."""
    torch = pytest.importorskip("torch")
    model = small_model()
    data = load_dataset(dataset(tmp_path / "discs", train=1, good=2, bad=2, size=32))
    make = partial(Detector, backend="cpu", threads=1)
    detector = make(model)
    settings = RobustSettings(attacks=("pgd", "square"), steps=3, eot=2, queries=4, sanity=0)

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert total == 4 * 5
        if done == 7:
            raise Stopped

    def run(name: str, **options: Any) -> list[AttackRow]:
        rows, _ = evaluate_robust(detector, data, tmp_path / name / "rows.jsonl", settings, keep=True, **options)
        assert len((tmp_path / name / "rows.jsonl").read_text().splitlines()) == len(rows) == 20
        return [dataclasses.replace(row, seconds=0.0) for row in rows]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker has it: sums differ in their last bits by the number of threads
    try:
        here = run("here")
        there = run("there", ray=cluster, make=make)
        with pytest.raises(Stopped):
            run("half", ray=cluster, make=make, on_step=stop)
        half = run("half", ray=cluster, make=make)
    finally:
        torch.set_num_threads(threads)
    assert here == there == half
    for row in here:
        if row.file is not None:
            images = {(tmp_path / name / row.file).read_bytes() for name in ("here", "there", "half")}
            assert len(images) == 1
    assert sum(row.file is not None for row in here) == 16
    with pytest.raises(ConfigError, match="make"):
        run("none", ray=cluster)
