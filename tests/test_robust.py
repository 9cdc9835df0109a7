"""Evaluation under attack: rows that survive a crash, a run that goes on, figures by hand, and the command."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from models import small_model
from parts import dataset
from pictures import POSE, part
from PIL import Image

from advrad_fast import Detector
from advrad_fast.cli import main
from advrad_fast.errors import AttackError, BackendUnavailableError, ConfigError, DatasetError
from advrad_fast.evaluation import robust
from advrad_fast.evaluation.attacker import RobustSettings
from advrad_fast.evaluation.datasets import load_dataset
from advrad_fast.evaluation.robust import check_sanity, choose_samples, evaluate_robust
from advrad_fast.evaluation.rows import AttackRow, Budget, append_row, read_rows, robust_figures, to_line, worst

QUICK = RobustSettings(budgets=("linf 8/255", "l2 0.5"), attacks=("pgd", "square"), steps=4, eot=2, queries=4, limit=2, sanity=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset(tmp_path_factory.mktemp("data") / "drawn", train=1, good=4, bad=3, size=32)


def row(image: str, label: int, score: float | None, attack: str = "pgd", budget: str = "l2 1", **changes: object) -> AttackRow:
    made = AttackRow(
        run="r", model="m", data="d", image=image, label=label, defect="good", budget=budget, attack=attack, surface="prepared",
        outcome="OK" if score is not None else "ABSTAIN", score=score, score_float=None, threshold=2.5, linf=0.0, l2=0.0,
        steps=1, eot=1, restarts=1, seed=0, seconds=0.1,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def clean(image: str, label: int, score: float | None) -> AttackRow:
    return row(image, label, score, "clean", "none")


def test_budgets() -> None:
    assert Budget.parse("linf 2/255") == Budget("linf", 2 / 255, "linf 2/255")
    assert Budget.parse(" l2 0.2 ") == Budget("l2", 0.2, "l2 0.2")
    for text in ("l1 1", "linf", "linf -1", "linf 1/0", "l2 nan", "l2  1", 3, None):
        with pytest.raises(ConfigError, match="budget"):
            Budget.parse(text)


def test_figures_by_hand() -> None:
    """Good 1, 2 and bad 3, 4.  Under attack the good 2 rises to 3.5 by one attack; the bad 4 falls to 2 by the other."""
    rows = [clean("a", 0, 1.0), clean("b", 0, 2.0), clean("c", 1, 3.0), clean("d", 1, 4.0)]
    rows += [row("a", 0, 0.5), row("b", 0, 3.5), row("c", 1, 3.2), row("d", 1, 5.0)]
    rows += [row(*p, attack="square") for p in (("a", 0, 1.0), ("b", 0, 2.0), ("c", 1, 3.0), ("d", 1, 2.0))]
    figures = robust_figures(rows)
    assert (figures["n_good"], figures["n_bad"], figures["image_auroc"]) == (2, 2, 1.0)
    # Worst: good 1 (left as it is) and 3.5, bad 3 and 2: of four pairs 1 < 3 and 1 < 2 are in order.
    assert figures["robust_auroc"] == {"l2 1": 0.5}
    assert figures["by_attack"] == {"pgd": {"l2 1": 0.75}, "square": {"l2 1": 0.875}}
    assert figures["flipped"] == {"none": [0, 0], "l2 1": [1, 1]}
    with pytest.raises(DatasetError, match="3 of 4 images"):
        robust_figures(rows[:-1])
    with pytest.raises(DatasetError, match="one run"):
        robust_figures([*rows, row("a", 0, 1.0, run="s")])


def test_a_part_that_is_not_found_is_never_passed() -> None:
    rows = [clean("a", 0, 1.0), clean("b", 1, 2.0), row("a", 0, None), row("b", 1, None)]
    assert worst(rows) == {"a": (0, np.inf), "b": (1, 2.0)}
    assert robust_figures(rows)["robust_auroc"] == {"l2 1": 0.0}


def test_rows_survive_a_crash(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    first, second = row("a", 0, 1.0), row("b", 1, None)
    append_row(file, first)
    with file.open("a") as stream:
        stream.write(to_line(second)[:50])
    assert read_rows(file) == [first]
    append_row(file, second)
    assert read_rows(file) == [first, second]
    append_row(file, dataclasses.replace(second, score=3.0))
    assert [r.score for r in read_rows(file, "r")] == [1.0, 3.0]
    assert read_rows(file, "s") == [] == read_rows(tmp_path / "none.jsonl")
    file.write_text('{"a": 1}\n')
    with pytest.raises(DatasetError, match=r"rows.jsonl:1"):
        read_rows(file)


def test_a_run_goes_on_where_it_was_stopped(data: Path, tmp_path: Path) -> None:
    detector, found = Detector(small_model(), backend="reference"), load_dataset(data)

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert total == 4 * 5
        if done == 7:
            raise Stopped

    whole, summary = evaluate_robust(detector, found, tmp_path / "whole.jsonl", QUICK)
    with pytest.raises(Stopped):
        evaluate_robust(detector, found, tmp_path / "parts.jsonl", QUICK, on_step=stop)
    half = read_rows(tmp_path / "parts.jsonl")
    assert len(half) == 7
    parts, again = evaluate_robust(detector, found, tmp_path / "parts.jsonl", QUICK)
    assert parts[:7] == half
    assert len((tmp_path / "parts.jsonl").read_text().splitlines()) == 20

    def timeless(rows: list[AttackRow]) -> list[AttackRow]:
        return [dataclasses.replace(r, seconds=0.0) for r in rows]

    assert timeless(parts) == timeless(whole)
    assert again.robust_auroc == summary.robust_auroc
    # More of the same run: what is there stays, what is missing is added.
    more, _ = evaluate_robust(detector, found, tmp_path / "parts.jsonl", dataclasses.replace(QUICK, attacks=("pgd",), limit=3))
    assert len((tmp_path / "parts.jsonl").read_text().splitlines()) == 20 + 2 * 3
    assert set(timeless(more)) > {r for r in timeless(whole) if r.attack == "pgd" and r.label == 1}


def test_rows_say_what_was_done(data: Path, tmp_path: Path) -> None:
    model = small_model()
    rows, summary = evaluate_robust(
        Detector(model, backend="reference"), load_dataset(data), tmp_path / "rows.jsonl", QUICK, name="m", keep=True
    )
    scores = {r.image: r.score for r in rows if r.attack == "clean"}
    for r in rows:
        budget = None if r.attack == "clean" else Budget.parse(r.budget)
        assert r.model == "m" and r.score is not None
        if budget is None:
            assert (r.linf, r.l2, r.file, r.score_float) == (0.0, 0.0, None, None)
            continue
        assert (r.linf if budget.norm == "linf" else r.l2) <= budget.size * (1 + 1e-6)
        assert r.file is not None and (tmp_path / r.file).is_file()
        if r.attack == "pgd":
            assert (r.score - scores[r.image]) * (1 - 2 * r.label) > 0.0
    assert set(summary.robust_auroc) == set(QUICK.budgets)
    assert all(value <= summary.image_auroc for value in summary.robust_auroc.values())
    json.loads(to_line(summary))


def test_the_frame_is_attacked_through_the_alignment(tmp_path: Path) -> None:
    """Parts that lie at any angle.  Both surfaces, by default; the frame stays within its budget and is inspected whole."""
    rng = np.random.default_rng(4)
    for index in range(6):
        angle = float(rng.uniform(0, 360))
        folder = tmp_path / "parts" / ("train/good" if index < 2 else "test/good" if index < 4 else "test/bad")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(part()).rotate(angle, Image.Resampling.BICUBIC, fillcolor=200).save(folder / f"{index}.png")
    found = load_dataset(tmp_path / "parts")
    model = small_model(pose=POSE)
    settings = dataclasses.replace(QUICK, budgets=("linf 8/255",), attacks=("pgd",), steps=6)
    make = partial(Detector, backend="reference")
    rows, summary = evaluate_robust(make(model), found, tmp_path / "rows.jsonl", settings, make=make, keep=True)
    assert set(summary.by_attack) == {"pgd", "pgd camera"} and summary.settings["surfaces"] == ["prepared", "camera"]
    scores = {r.image: r.score for r in rows if r.attack == "clean"}
    gains: dict[str, list[float]] = {"prepared": [], "camera": []}
    for r in rows:
        if r.attack != "clean":
            assert r.score is not None
            gains[r.surface].append((r.score - scores[r.image]) * (1 - 2 * r.label))
            assert 0.0 < r.linf <= 8 / 255 * (1 + 1e-6) and r.file is not None
            size = np.asarray(Image.open(tmp_path / r.file)).shape[:2]
            assert size == (part().shape[:2] if r.surface == "camera" else (32, 32))
    assert min(np.mean(found) for found in gains.values()) > 0.0, gains
    camera = dataclasses.replace(settings, surfaces=("camera",))
    alone, _ = evaluate_robust(make(model), found, tmp_path / "rows.jsonl", camera, make=make)
    assert {r.surface for r in alone if r.attack != "clean"} == {"camera"}
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(rows)


def test_sanity_rules_hold_and_are_enforced(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector, found = Detector(small_model(), backend="reference"), load_dataset(data)
    settings = dataclasses.replace(QUICK, attacks=("pgd",), budgets=("linf 16/255",), sanity=2, queries=20, limit=1)
    _, summary = evaluate_robust(detector, found, tmp_path / "rows.jsonl", settings)
    assert len({r["rule"] for r in summary.sanity}) == 4
    check_sanity(dataclasses.replace(summary, sanity=summary.sanity[:3]))

    # An attack that goes nowhere is found out by the search that needs no gradient.
    from advrad_fast.evaluation.attacks import pgd as module

    monkeypatch.setattr(module, "_descend", lambda pipeline, x, *_: ([x], 0))
    _, summary = evaluate_robust(detector, found, tmp_path / "rows.jsonl", settings)
    broken = {r["rule"] for r in summary.sanity if not r["holds"]}
    assert "a search without gradients does not beat the gradient" in broken
    with pytest.raises(AttackError, match="without gradients"):
        check_sanity(summary)


def test_what_does_not_fit_is_refused(data: Path, tmp_path: Path) -> None:
    for changes in ({"budgets": ()}, {"budgets": ("l1 2",)}, {"attacks": ("fgsm",)}, {"steps": 0}, {"limit": 0}, {"eot": True}):
        with pytest.raises(ConfigError, match=next(iter(changes)).rstrip("s")):
            dataclasses.replace(QUICK, **changes)  # type: ignore[arg-type]
    detector, found = Detector(small_model(), backend="reference"), load_dataset(data)
    with pytest.raises(ConfigError, match="transfer"):
        evaluate_robust(detector, found, tmp_path / "r", dataclasses.replace(QUICK, attacks=("transfer",)))
    posed = Detector(small_model(pose=POSE), backend="reference")
    with pytest.raises(ConfigError, match="make"):
        evaluate_robust(posed, found, tmp_path / "r", QUICK)
    for device, problem in (("", ConfigError), ("gpu", ConfigError), ("meta", BackendUnavailableError)):
        with pytest.raises(problem, match="device"):
            evaluate_robust(detector, found, tmp_path / "r", QUICK, device=device)
    assert not (tmp_path / "r").exists()
    with pytest.raises(ConfigError, match="surfaces"):
        dataclasses.replace(QUICK, surfaces=("lens",))
    with pytest.raises(DatasetError, match="none of label 1"):
        choose_samples(dataclasses.replace(found, test=[s for s in found.test if s.label == 0]), None)


def test_another_run_has_another_key() -> None:
    detector = Detector(small_model(), backend="reference")
    keys = {QUICK.run(detector, "d", None)}
    for changes in ({"steps": 9}, {"eot": 3}, {"restarts": 2}, {"queries": 9}, {"seed": 1}):
        keys.add(dataclasses.replace(QUICK, **changes).run(detector, "d", None))
    keys |= {QUICK.run(detector, "e", None), QUICK.run(detector, "d", small_model(spread=True))}
    keys.add(QUICK.run(Detector(small_model(spread=True), backend="reference"), "d", None))
    assert len(keys) == 9
    for changes in ({"budgets": ("l2 1",)}, {"attacks": ("pgd",)}, {"limit": None}, {"sanity": 1}):
        assert dataclasses.replace(QUICK, **changes).run(detector, "d", None) in keys


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = tmp_path / "small.safetensors", tmp_path / "other.safetensors"
    small_model().save(model)
    small_model(spread=True).save(other)
    results = tmp_path / "rows.jsonl"
    arguments = ["evaluate", str(model), str(data), "--backend", "reference", "--robust", "--limit", "1", "--budgets", "l2 0.5"]
    arguments += ["--attack-steps", "4", "--eot", "1", "--queries", "4", "--sanity", "0", "--results", str(results)]
    arguments += ["--attacks", "pgd,square,transfer", "--transfer-model", str(other)]
    assert main([*arguments, "--json", "-"]) == 0
    captured = capsys.readouterr()
    figures = json.loads(captured.out)
    assert set(figures["robust_auroc"]) == {"l2 0.5"}
    assert set(figures["robust"]["by_attack"]) == {"pgd", "square", "transfer"}
    assert "8/8 attacks" in captured.err
    assert len(read_rows(results)) == 8
    monkeypatch.setattr(robust, "check_sanity", lambda summary: (_ for _ in ()).throw(AttackError("too weak: broken")))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "under attack" in captured.out and "too weak: broken" in captured.err
    assert main([*arguments[:-2], "--attacks", "transfer"]) == 2
