"""The figures of an evaluation against values computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from advrad_fast import Inspection, Outcome
from advrad_fast.errors import DatasetError, PartNotFoundError
from advrad_fast.evaluation.datasets import Dataset, Sample
from advrad_fast.evaluation.evaluate import Evaluation, evaluate, sample_name, table

SHAPE = (4, 4)
LEFT, TOP = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
LEFT[:, :2] = True
TOP[:2] = True


class Fake:
    """A detector that finds in its list what the first pixel points to: a score (None: no part), and a map."""

    backend = "fake (fp32)"
    threshold = 2.4

    def __init__(self, scores: list[float | None], maps: list[NDArray[np.bool_]] | None = None) -> None:
        self.scores, self.maps = scores, maps
        self.calls: list[tuple[int, bool, int]] = []

    def inspect(self, frame: NDArray[np.uint8], *, maps: bool, seed: int) -> Inspection:
        index = int(frame[0, 0, 0])
        self.calls.append((index, maps, seed))
        score, timings = self.scores[index], {"total": float(index)}
        if score is None:
            error = PartNotFoundError("none")
            return Inspection(Outcome.ABSTAIN, None, self.threshold, None, None, None, self.backend, timings, error)
        found = self.maps[index] if self.maps else np.zeros(SHAPE, bool)
        outcome = Outcome.DEFECT if score > self.threshold else Outcome.OK
        values = found.astype(np.float32) if maps else None
        return Inspection(outcome, score, self.threshold, 0.5, values, found if maps else None, self.backend, timings)


def data(root: Path, defects: list[str], masks: dict[int, NDArray[np.bool_]] | None = None) -> Dataset:
    """One image a name, ``good`` among them; its pixels are its index."""
    samples = []
    for i, defect in enumerate(defects):
        path, mask = root / f"{i}.png", None
        Image.fromarray(np.full(SHAPE, i, np.uint8)).save(path)
        if masks and i in masks:
            mask = root / f"{i}_mask.png"
            Image.fromarray(masks[i].astype(np.uint8) * 255).save(mask)
        samples.append(Sample(path, int(defect != "good"), defect, mask))
    return Dataset("drawn", [], samples)


def run(fake: Fake, dataset: Dataset, **options: Any) -> Evaluation:
    return evaluate(fake, dataset, **options)  # type: ignore[arg-type]


KINDS = ["good", "good", "good", "scratch", "scratch", "dent", "dent"]
SCORES: list[float | None] = [1.0, 2.0, 3.0, 2.5, 4.0, 3.0, None]


def test_figures(tmp_path: Path) -> None:
    evaluation = run(Fake(SCORES), data(tmp_path, KINDS), seed=7)
    figures = evaluation.figures
    low, high = figures.pop("image_auroc_interval")
    assert 0.3 < low < 10.5 / 12 < high < 1.0
    assert figures == {
        "data": "drawn",
        "n_good": 3,
        "n_bad": 4,
        "image_auroc": 10.5 / 12,  # 2.5 beats two good ones, 4 and infinity all three, 3 beats two and ties with one
        "f1_max": pytest.approx(8 / 9),  # above 2: four hits, one false alarm
        "pixel_auroc": None,  # no masks
        "aupro": None,
        "robust_auroc": {},
        "certified_auroc": {},
        "threshold": 2.4,
        "false_alarms": 1,
        "defects_found": 4,
        "abstained": 1,
        "seed": 7,
        "backend": "fake (fp32)",
        "p50_ms": 3.0,
    }
    assert evaluation.scores.tolist() == [1.0, 2.0, 3.0, 2.5, 4.0, 3.0, np.inf]
    json.dumps(figures, allow_nan=False)


def test_a_part_that_is_not_found_is_never_good(tmp_path: Path) -> None:
    """Neither as a good part, where it is a false alarm, nor as a bad one, where it is found."""
    evaluation = run(Fake([1.0, None, 5.0, None]), data(tmp_path, ["good", "good", "dent", "dent"]))
    assert evaluation.scores.tolist() == [1.0, np.inf, 5.0, np.inf]
    figures = evaluation.figures
    assert (figures["false_alarms"], figures["defects_found"], figures["abstained"]) == (1, 2, 2)
    assert figures["image_auroc"] == (1 + 0 + 1 + 0.5) / 4
    assert evaluation.by_defect() == {"dent": (2, 2, 2.5 / 4)}
    json.dumps(figures, allow_nan=False)


def test_by_defect(tmp_path: Path) -> None:
    evaluation = run(Fake(SCORES), data(tmp_path, KINDS))
    assert evaluation.by_defect() == {"dent": (2, 2, 5.5 / 6), "scratch": (2, 2, 5 / 6)}
    fake = Fake(SCORES)
    fake.threshold = 3.0  # a score equal to the threshold is not above it
    assert {kind: row[1] for kind, row in run(fake, data(tmp_path, KINDS)).by_defect().items()} == {"dent": 1, "scratch": 1}


def test_pixel_figures(tmp_path: Path) -> None:
    nothing, everything = np.zeros(SHAPE, bool), np.ones(SHAPE, bool)
    kinds, scores = ["good", "good", "dent", "dent", "dent"], [0.0, 0.0, 1.0, 1.0, 1.0]
    # The last has no mask: whatever is on its map does not count.
    dataset = data(tmp_path, kinds, {2: LEFT, 3: LEFT})
    perfect = run(Fake([*scores], [nothing, nothing, LEFT, LEFT, everything]), dataset).figures
    assert (perfect["pixel_auroc"], perfect["aupro"]) == (1.0, 1.0)
    # Of 16 bad pixels 8 are marked, of 48 good ones 8: (8 (40 + 8 / 2) + 8 (40 / 2)) / (16 x 48).
    half = run(Fake([*scores], [nothing, nothing, TOP, TOP, everything]), dataset).figures
    assert half["pixel_auroc"] == pytest.approx(2 / 3)
    assert half["aupro"] < 1.0
    # A bad part that was not found has nothing marked on it: of the 16 bad pixels 8 are found, and no good one.
    lost = run(Fake([0.0, 0.0, None, 1.0, 1.0], [nothing, nothing, LEFT, LEFT, everything]), dataset).figures
    assert lost["pixel_auroc"] == pytest.approx(0.75)


def test_pixel_figures_are_left_out_on_request(tmp_path: Path) -> None:
    fake = Fake([0.0, 0.0, 1.0, 1.0], [TOP] * 4)
    dataset = data(tmp_path, ["good", "good", "dent", "dent"], {2: LEFT, 3: LEFT})
    figures = run(fake, dataset, pixels=False, seed=3).figures
    assert (figures["pixel_auroc"], figures["aupro"]) == (None, None)
    assert fake.calls == [(i, False, 3) for i in range(4)]


def test_large_frames_are_thinned_out(tmp_path: Path) -> None:
    """Maps and masks alike: a camera's frame fits in memory, and the figures stay."""
    shape, samples = (1100, 8), []
    mask = np.zeros(shape, np.uint8)
    mask[:550] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for i in range(4):
        Image.fromarray(np.full(shape, i, np.uint8)).save(tmp_path / f"{i}.png")
        samples.append(
            Sample(tmp_path / f"{i}.png", i // 2, "dent" if i > 1 else "good", tmp_path / "mask.png" if i > 1 else None)
        )
    fake = Fake([0.0, 0.0, 1.0, 1.0], [np.zeros(shape, bool)] * 2 + [mask > 0] * 2)
    figures = run(fake, Dataset("large", [], samples)).figures
    assert (figures["pixel_auroc"], figures["aupro"]) == (1.0, pytest.approx(1.0))


def test_every_sample_is_reported_in_order(tmp_path: Path) -> None:
    seen: list[tuple[str, float | None]] = []
    run(Fake(SCORES), data(tmp_path, KINDS), on_sample=lambda sample, result: seen.append((sample.path.stem, result.score)))
    assert seen == [(str(i), score) for i, score in enumerate(SCORES)]


@pytest.mark.parametrize(("kinds", "got"), [(["good"] * 3, "got 3 and 0"), (["dent"] * 2, "got 0 and 2"), ([], "got 0 and 0")])
def test_both_classes_are_needed(tmp_path: Path, kinds: list[str], got: str) -> None:
    fake = Fake(SCORES)
    with pytest.raises(DatasetError, match=f"drawn: the test set needs good and defective images, {got}$"):
        run(fake, data(tmp_path, kinds))
    assert not fake.calls


def test_the_table(tmp_path: Path) -> None:
    lines = table(run(Fake(SCORES), data(tmp_path, KINDS), seed=7)).splitlines()
    assert lines[0] == "drawn: 3 good, 4 defective; fake (fp32), seed 7, median 3.0 ms"
    assert lines[1].startswith("  image AUROC  87.50  (95 % interval ")
    assert lines[2] == "  F1max        88.89"
    assert lines[3:5] == ["  pixel AUROC  -", "  AUPRO        -"]
    assert lines[5] == "  at the threshold 2.4: 4/4 defects found, 1/3 false alarms, 1 abstained"
    assert [line.split() for line in lines[6:]] == [
        ["dent", "2/2", "found,", "AUROC", "91.67"],
        ["scratch", "2/2", "found,", "AUROC", "83.33"],
    ]


def test_sample_name() -> None:
    assert sample_name(Path("/data/test/scratch/001.png")) == "scratch/001.png"
    assert sample_name(Path("001.png")) == "001.png"
