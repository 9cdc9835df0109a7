"""The report: its data on the disk, its numbers, and the command that makes it."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import small_model
from parts import dataset
from pictures import POSE
from PIL import Image
from reports import BUDGETS, HOSTILE, category

from advrad_fast import Detector
from advrad_fast.cli import main
from advrad_fast.config import PoseConfig
from advrad_fast.errors import ReportError
from advrad_fast.evaluation import report
from advrad_fast.evaluation.datasets import load_dataset
from advrad_fast.evaluation.evaluate import Evaluation, evaluate, sample_name
from advrad_fast.evaluation.report.charts import Line, chart
from advrad_fast.evaluation.report.data import budget_size, budgets, load
from advrad_fast.evaluation.report.markup import tag
from advrad_fast.evaluation.report.page import PAPER, page, percent
from advrad_fast.evaluation.rows import AttackRow, RobustSummary, robust_figures


def text_of(html: bytes) -> str:
    return re.sub(r"<[^>]*>", " ", re.sub(r"(?s)<(style|script)>.*?</\1>", "", html.decode()))


def test_what_is_kept_is_what_was_given(tmp_path: Path) -> None:
    given = [category(name, seed=i) for i, name in enumerate(("screw", "b/../c", "", "Ünï\udcff", HOSTILE))]
    for one in given:
        report.write(tmp_path, one)
    assert load(tmp_path) == sorted(given, key=lambda c: c.name)
    assert {path.parent for path in tmp_path.rglob("*")} == {tmp_path}  # no name leads out of the folder
    assert len(list(tmp_path.iterdir())) == len(given) + 1


def test_a_category_again_takes_its_place(tmp_path: Path) -> None:
    report.write(tmp_path, category("screw"))
    report.write(tmp_path, category("screw", seed=3))
    (only,) = load(tmp_path)
    assert only.figures["seed"] == 3


DAMAGE = {
    "cut off": lambda text: text[:100],
    "no JSON": lambda text: "\x00",
    "a list": lambda text: "[]",
    "another version": lambda text: text.replace('"schema": 1', '"schema": 2'),
    "a field that is not known": lambda text: text.replace('"checks"', '"cheques"'),
    "a picture from elsewhere": lambda text: text.replace("data:image/jpeg;base64,", "http://192.0.2.1/", 1),
    "a figure that is missing": lambda text: text.replace('"seed"', '"sead"'),
    "a label out of range": lambda text: text.replace('"label": 1', '"label": 2'),
    "a figure that is no number": lambda text: text.replace('"f1_max": ', '"f1_max": "x", "f2_max": '),
    "a number that is none": lambda text: text.replace('"p50_ms": 1.8', '"p50_ms": NaN'),
    "a score that is a text": lambda text: text.replace('"score": ', '"score": "x", "old": ', 1).replace(
        '"old": ', '"attacked": {}, "x": ', 1
    ),
    "no views": lambda text: re.sub(r'(?s)"views": \[.*?\n   \]', '"views": []', text, count=1),
    "a setting that is a list": lambda text: text.replace('"cores": 2', '"cores": [2]'),
    "deep": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_data_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    report.write(tmp_path, category("screw"))
    path = tmp_path / "screw.report.json"
    path.write_text(DAMAGE[damage](path.read_text()))
    with pytest.raises(ReportError, match=r"screw\.report\.json: not a category's data; delete it"):
        load(tmp_path)


def test_a_folder_that_will_not_do_is_refused_before_the_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = detector_and_data(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.report.json").write_text("{}")
    (tmp_path / "file").write_text("")
    for out, message in (("out", "old.report.json: not a category's data"), ("file", "File exists")):
        arguments = ["evaluate", str(model), str(data), "--backend", "reference", "--report", str(tmp_path / out)]
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err and "images" not in captured.err and captured.out == ""


def test_text_is_escaped() -> None:
    html = page([category(HOSTILE)], introduction=HOSTILE, credit=HOSTILE).decode()
    found: list[tuple[str, list[tuple[str, str | None]]]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda name, attributes: found.append((name, attributes))  # type: ignore[method-assign]
    parser.feed(html)
    assert [name for name, _ in found].count("script") == 1
    attributes = [pair for _, pairs in found for pair in pairs]
    assert not [key for key, _ in attributes if key.startswith("on")]
    assert all(str(value).startswith("data:") for key, value in attributes if key in ("src", "href"))
    assert html.count("&lt;img src=x") >= 4


def test_scores_of_a_part_that_was_not_found() -> None:
    """It counts as above all others, clean or attacked."""
    made = category()
    labels, scores = made.scores()
    assert labels[-1] == 1 and scores[-1] == np.finfo(np.float64).max
    assert made.auroc("linf 2/255") == made.figures["robust_auroc"]["linf 2/255"]
    assert made.auroc("linf 4/255") is None
    alone = dataclasses.replace(made, samples=[s for s in made.samples if s.label == 0 or s.outcome == "ABSTAIN"])
    assert alone.auroc() == alone.auroc(defect="dent") == 1.0
    assert alone.auroc(defect="scratch") is None
    assert made.defects() == ["dent", "scratch"]


def test_means_say_what_they_are_over() -> None:
    first, second = category("screw"), category("grid", seed=1)
    bare = category("wood", seed=2, attacked=False)
    text = " ".join(text_of(page([first, second, bare])).split())
    clean = np.mean([c.figures["image_auroc"] for c in (first, second, bare)])
    robust = np.mean([c.figures["robust_auroc"]["linf 2/255"] for c in (first, second)])
    assert f"Image AUROC {percent(clean)} mean of 3 of 3 categories" in text
    assert f"Robust AUROC, linf 2/255 {percent(robust)} under attack, 82 of 82 images; mean of 2 of 3 categories" in text
    assert f"robust AUROC, linf 2/255 MVTec AD, mean of 15 81.1 {percent(robust)} mean of 2 of 3 categories" in text
    assert "certified AUROC, l2 radius 0.2 MVTec AD, grid 98.2 81.00" in text
    assert "The attack broke a sanity rule on screw, grid: the robust figures there are not to be trusted." in text
    assert "1.80 ms" in text and "violated more steps" in text.replace("screw", "")


def test_a_page_of_clean_figures_has_nothing_of_attacks() -> None:
    text = text_of(page([category("cookie", attacked=False)]))
    assert "Robust AUROC," not in text and "broke" not in text and "Sanity" not in text and "Certified" not in text
    assert "95 % interval" in text


def test_the_papers_numbers() -> None:
    """As far as they are known, and never without saying who says so."""
    assert {(p.category, p.value) for p in PAPER if p.printed} == {("screw", "99.3"), ("toothbrush", "100"), ("wood", "98.3")}
    assert {(p.category, p.value) for p in PAPER if not p.printed} == {("grid", "98.2"), (None, "81.1"), (None, "at most 2.3")}


@pytest.mark.parametrize(
    ("name", "size"),
    [("linf 2/255", ("linf", 2 / 255)), ("l2 0.2", ("l2", 0.2)), ("0.05", ("", 0.05)), ("l2 1/4", ("l2", 0.25))],
)
def test_budgets_are_read(name: str, size: tuple[str, float]) -> None:
    assert budget_size(name) == size


def test_budgets_in_order() -> None:
    made = category()
    made.figures["robust_auroc"] = dict.fromkeys(("linf 16/255", "linf 2/255", "l2 0.2", "linf 0.5/255", "odd"), 0.5)
    assert budgets([made], "robust_auroc") == ["l2 0.2", "linf 0.5/255", "linf 2/255", "linf 16/255", "odd"]
    html = page([made]).decode()  # a name that is no budget is in the tables, and on no axis
    assert "AUROC against the l2 budget" in html and "AUROC against the odd budget" not in html


@pytest.mark.parametrize(("count", "coloured"), [(1, 1), (5, 6), (6, 1), (15, 1)])
def test_many_categories_are_quiet_lines(count: int, coloured: int) -> None:
    """Each its own colour while there are enough of them, and the mean another."""
    html = page([category(f"c{i}", seed=i, count=4) for i in range(count)]).decode()
    (drawn,) = re.findall(r"(?s)<figcaption>AUROC against the l2 budget.*?</figure>", html)
    lines = re.findall(r'class="line (\w+)"', drawn)
    assert len(lines) == count + (count > 1)
    assert len(set(lines) - {"quiet"}) == coloured == len([line for line in lines if line != "quiet"])
    assert list(category().figures["robust_auroc"]) == list(BUDGETS)


def test_charts() -> None:
    """A line goes where its points are: x from 0 to its maximum over the width, y up."""
    svg = chart([Line("a", [(0.0, 0.0), (2.0, 1.0)], 0, marks=True)], x_label="x", y_label="y", x_max=2.0)[0]
    (path,) = (node for node in svg.iter("path"))
    assert path.get("d") == "M44 258 L368 12"
    assert [node[0].text for node in svg.iter("circle")] == ["a, 0: 0.00", "a, 2: 100.00"]
    assert [n.text for n in svg.iter("text")][5:10] == ["0", "0.5", "1", "1.5", "2"]


def test_tags() -> None:
    node = tag("p", "a", tag("b", "c"), "d", None, "e", class_="x", data_value=1, hidden=False)
    assert (node.text, node[0].tail, node.attrib) == ("a", "de", {"class": "x", "data-value": "1"})


def detector_and_data(tmp_path: Path) -> tuple[Path, Path]:
    small_model().save(tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors", dataset(tmp_path / "discs", train=1, good=4, bad=9, size=48)


def test_collected_figures_are_those_of_the_evaluation(tmp_path: Path) -> None:
    model, data = detector_and_data(tmp_path)
    detector = Detector.load(model, backend="reference")
    results: list[Any] = []
    evaluation = evaluate(detector, load_dataset(data), seed=2, on_sample=lambda _, result: results.append(result))
    made = report.collect(evaluation, results, detector, model)
    assert made.figures == {**evaluation.figures, "model": str(model)}
    assert made.auroc() == evaluation.figures["image_auroc"]
    assert [s.name for s in made.samples[:2]] == ["good/000.png", "good/001.png"]
    assert [s.score for s in made.samples] == evaluation.scores.tolist()
    assert [s.label for s in made.shown] == [1] * 6 + [0] * 4
    scores = {s.name: s.score for s in made.samples}
    assert all(shown.views[0].score == scores[shown.name] for shown in made.shown)  # the same seed
    assert made.latency["total"][0] <= made.latency["total"][1]
    order = [scores[made.samples[i].name] for i in report.choose(evaluation, 3)[:3]]
    bad = sorted((s.score for s in made.samples if s.label == 1), reverse=True)
    assert order == [bad[0], bad[4], bad[8]]  # the highest, the middle and the lowest


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = detector_and_data(tmp_path)
    out = tmp_path / "made" / "here"
    arguments = ["evaluate", str(model), str(data), "--backend", "reference", "--report", str(out), "--json", "-"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    figures = json.loads(captured.out)  # nothing else on standard output
    assert f"wrote {out / 'index.html'}" in captured.err and "13/13 images" in captured.err
    html = (out / "index.html").read_bytes()
    assert f"Image AUROC {percent(figures['image_auroc'])}" in " ".join(text_of(html).split())
    assert html.count(b'<figure class="card') == 10


def attacked(evaluation: Evaluation, folder: Path, shape: tuple[int, int], files: bool = True) -> report.Attack:
    """Rows of an attack on two good and two bad images that moves every score by 0.1 and turns the images grey."""
    rows = []
    chosen = [i for label in (0, 1) for i, s in enumerate(evaluation.samples) if s.label == label][1:3]
    chosen += [i for i, s in enumerate(evaluation.samples) if s.label == 1][:2]
    for i in chosen:
        sample, score = evaluation.samples[i], float(evaluation.scores[i])
        for attack, budget, shift in (("clean", "none", 0.0), ("pgd", "linf 2/255", 0.1), ("square", "linf 2/255", 0.05)):
            name = f"{i}-{attack}.png"
            Image.fromarray(np.full((*shape, 3), 128, np.uint8)).save(folder / name)
            rows.append(
                AttackRow(
                    run="00",
                    model="small",
                    data="discs",
                    image=sample_name(sample.path),
                    label=sample.label,
                    defect=sample.defect,
                    budget=budget,
                    attack=attack,
                    surface="prepared",
                    outcome="OK",
                    score=score + shift * (1 - 2 * sample.label),
                    score_float=None,
                    threshold=1.0,
                    linf=0.0,
                    l2=0.0,
                    steps=1,
                    eot=1,
                    restarts=1,
                    seed=0,
                    seconds=0.0,
                    file=None if attack == "clean" or not files else name,
                )
            )
    figures = robust_figures(rows)
    sanity = [{"rule": "more steps", "budget": "linf 2/255", "holds": False, "value": 0.75, "limit": 0.5}]
    common: dict[str, Any] = {"model": "small", "fingerprint": "0", "run": "00", "data": "discs", "threshold": 1.0, "seed": 0}
    settings = {"steps": 1, "attacks": ["pgd", "square"]}
    summary = RobustSummary(**common, **figures, sanity=sanity, settings=settings, versions={"torch": "2"})
    return report.Attack(rows, summary, folder)


@pytest.mark.parametrize("pose", [None, POSE])
def test_an_attack_is_shown_beside_the_clean_images(tmp_path: Path, pose: PoseConfig | None) -> None:
    data = dataset(tmp_path / "discs", train=1, good=4, bad=4, size=48)
    detector = Detector(small_model(), backend="reference")
    results: list[Any] = []
    evaluation = evaluate(detector, load_dataset(data), on_sample=lambda _, result: results.append(result))
    attack = attacked(evaluation, tmp_path, (32, 32))
    if pose:  # grey all over: the camera's frame would have no part in it, but this one is prepared already
        detector = Detector(small_model(pose=pose), backend="reference")
    made = report.collect(evaluation, results, detector, "small.safetensors", attack=attack)
    assert made.figures["robust_auroc"] == attack.summary.robust_auroc
    by_name = {s.name: s for s in made.samples}
    for row in attack.rows:
        if row.attack == "pgd":
            assert by_name[row.image].attacked == {"linf 2/255": row.score}
    assert sum(bool(s.attacked) for s in made.samples) == 4
    assert made.auroc("linf 2/255") == attack.summary.robust_auroc["linf 2/255"]
    assert sorted(s.name for s in made.shown) == sorted({row.image for row in attack.rows})
    assert [[v.title for v in s.views] for s in made.shown] == [["clean", "linf 2/255, pgd"]] * 4
    assert all(s.views[1].score is not None for s in made.shown)
    assert [(c.rule, c.passed, c.detail) for c in made.checks] == [("more steps, linf 2/255", False, "0.75 against 0.5")]
    assert made.settings["Attack"]["attacks"] == "['pgd', 'square']"
    target = report.write(tmp_path / "out", made)
    assert load(tmp_path / "out") == [made]
    text = " ".join(text_of(target.read_bytes()).split())
    assert "violated" in text and "under attack, 4 of 8 images" in text and "4 of 8 Beside the paper" in text


def test_an_attack_without_pictures(tmp_path: Path) -> None:
    data = dataset(tmp_path / "discs", train=1, good=4, bad=4, size=48)
    detector = Detector(small_model(), backend="reference")
    results: list[Any] = []
    evaluation = evaluate(detector, load_dataset(data), on_sample=lambda _, result: results.append(result))
    made = report.collect(evaluation, results, detector, "m", attack=attacked(evaluation, tmp_path, (32, 32), files=False))
    assert [len(s.views) for s in made.shown] == [1] * 4
