"""What a report is made from: a category's figures, scores and pictures, and how they are kept as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast.errors import ConfigError, ReportError
from advrad_fast.evaluation import metrics
from advrad_fast.evaluation.rows import Budget
from advrad_fast.files import write_atomically
from advrad_fast.untrusted import clip

SCHEMA = 1  #: of the JSON files
SUFFIX = ".report.json"

_PICTURE = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/]+=*")

Settings = dict[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Scored:
    """One test image.

    Attributes:
        name: the last two parts of its path.
        label: 0 (good) or 1 (bad).
        defect: ``good``, or the kind of defect.
        outcome: what the inspection said.
        score: None where the part was not found (ABSTAIN), which counts as above all scores.
        attacked: its score under each budget that it was attacked with.
    """

    name: str
    label: int
    defect: str
    outcome: str
    score: float | None
    attacked: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """A frame and its heat map.

    Attributes:
        title: ``clean``, or the budget of the attack.
        frame, heat_map: JPEGs as data URIs.
        outcome, score: what the detector says of this frame.
    """

    title: str
    frame: str
    heat_map: str
    outcome: str
    score: float | None


@dataclass(frozen=True)
class Shown:
    """A test image on the page: its views, the clean one first."""

    name: str
    label: int
    defect: str
    views: list[View]


@dataclass(frozen=True)
class Check:
    """A sanity rule's outcome."""

    rule: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Category:
    """One category's evaluation, as it is kept in its JSON file.

    Attributes:
        figures: those of :class:`advrad_fast.evaluation.evaluate.Evaluation`, and ``model``, the model file.
        samples: every test image.
        shown: those with pictures.
        latency: milliseconds of each stage of an inspection: [median, 99th percentile].
        checks: of the sanity rules, where there was an attack.
        settings: titles, and under each names and values: of the model, of the attack, of the machine.
    """

    figures: dict[str, Any]
    samples: list[Scored]
    shown: list[Shown]
    latency: dict[str, list[float]]
    checks: list[Check] = field(default_factory=list)
    settings: dict[str, Settings] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The dataset's name."""
        return str(self.figures["data"])

    def scores(self, budget: str | None = None, defect: str | None = None) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Labels and scores, clean or under a budget, of the images that have one.

        Args:
            defect: of the bad images only those of this kind.
        """
        chosen = [s for s in self.samples if s.label == 0 or defect in (None, s.defect)]
        if budget is None:
            pairs = [(s.label, s.score) for s in chosen]
        else:
            pairs = [(s.label, s.attacked[budget]) for s in chosen if budget in s.attacked]
        # A part that was not found counts as above all that were.
        values = [np.finfo(np.float64).max if score is None else score for _, score in pairs]
        return np.array([label for label, _ in pairs], dtype=np.int64), np.array(values, dtype=np.float64)

    def auroc(self, budget: str | None = None, defect: str | None = None) -> float | None:
        """Of :meth:`scores`; None where a class has no images."""
        labels, values = self.scores(budget, defect)
        return metrics.auroc(labels, values) if 0 < labels.sum() < labels.size else None

    @property
    def attacked(self) -> int:
        """How many of the images have been attacked."""
        return sum(bool(s.attacked) for s in self.samples)

    def defects(self) -> list[str]:
        """The kinds of defect, in order."""
        return sorted({s.defect for s in self.samples if s.label == 1})


def save(folder: Path, category: Category) -> None:
    """Keep a category's data in a folder, in place of the same one's before.

    Raises:
        OSError: the folder can't be written.
    """
    document = {"schema": SCHEMA, **dataclasses.asdict(category)}
    # In ASCII: lone surrogates, of file names that are not UTF-8, are escapes.
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / _file_name(category.name), text.encode("ascii"))


def load(folder: Path) -> list[Category]:
    """The categories whose data are in a folder, by name.

    Raises:
        ReportError: a file is not a category's data.
    """
    found = [_read(path) for path in sorted(folder.glob(f"*{SUFFIX}"))]
    return sorted(found, key=lambda category: category.name)


def budgets(categories: Sequence[Category], key: str) -> list[str]:
    """The names under a figure (``robust_auroc``, ``certified_auroc``) over all categories, by norm and size."""
    return sorted({name for category in categories for name in category.figures.get(key, {})}, key=budget_size)


def budget_size(name: str) -> tuple[str, float]:
    """("linf", 0.0078) of ``linf 2/255``; ("", 0.2) of the radius ``0.2``; (the name, NaN) of anything else."""
    try:
        budget = Budget.parse(name)
    except ConfigError:
        try:
            size = float(name)
        except ValueError:
            size = math.nan
        return ("", size) if 0.0 <= size < math.inf else (name, math.nan)
    return budget.norm, budget.size


def _file_name(name: str) -> str:
    """Of a category's data: readable, and its own for every name."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:60].strip("-")
    unlike = "" if plain == name else "-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return (plain or "data") + unlike + SUFFIX


def _read(path: Path) -> Category:
    try:
        data = json.loads(path.read_bytes(), parse_constant=_no_number)
        _want(isinstance(data, dict) and data.pop("schema", None) == SCHEMA, f"schema {SCHEMA}")
        samples = [Scored(**row) for row in data.pop("samples")]
        shown = [Shown(**{**row, "views": [View(**v) for v in row["views"]]}) for row in data.pop("shown")]
        checks = [Check(**row) for row in data.pop("checks")]
        category = Category(samples=samples, shown=shown, checks=checks, **data)
        _check(category)
        return category
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ReportError(
            f"{path}: not a category's data; delete it, or evaluate that category again: {clip(str(error))}"
        ) from error


def _check(category: Category) -> None:
    """That everything has the type that the page relies on."""
    figures = category.figures
    for key in ("image_auroc", "f1_max", "threshold", "p50_ms"):
        _want(_is_number(figures[key]), f"figures: a number for {key}")
    for key in ("pixel_auroc", "aupro"):
        _want(figures[key] is None or _is_number(figures[key]), f"figures: a number or null for {key}")
    for key in ("n_good", "n_bad", "false_alarms", "defects_found", "abstained"):
        _want(type(figures[key]) is int, f"figures: an integer for {key}")
    for key in ("data", "model", "backend"):
        _want(isinstance(figures[key], str), f"figures: a text for {key}")
    for key in ("robust_auroc", "certified_auroc"):
        _want(all(map(_is_number, figures[key].values())), f"figures: numbers in {key}")
    _want(_are_numbers(figures["image_auroc_interval"], 2), "figures: two numbers for image_auroc_interval")
    _want("seed" in figures and _is_number(figures.get("attacked_clean_auroc", 0.0)), "figures: seed, attacked_clean_auroc")
    _want(all(_are_numbers(pair, 2) for pair in category.latency.values()), "latency: two numbers a stage")
    for sample in category.samples:
        _want(
            sample.label in (0, 1) and isinstance(sample.name, str) and isinstance(sample.defect, str),
            f"names and labels: {sample}",
        )
        _want(isinstance(sample.outcome, str), f"an outcome: {sample}")
        _want(all(v is None or _is_number(v) for v in (sample.score, *sample.attacked.values())), f"numbers or null: {sample}")
    for one in category.shown:
        texts = (one.name, one.defect, *(t for v in one.views for t in (v.title, v.outcome)))
        _want(bool(one.views) and all(isinstance(text, str) for text in texts), "shown: views, and texts in them")
        _want(all(v.score is None or _is_number(v.score) for v in one.views), "shown: scores that are numbers or null")
        _want(all(_PICTURE.fullmatch(uri) for v in one.views for uri in (v.frame, v.heat_map)), "shown: JPEGs as data URIs")
    _want(all(isinstance(text, str) for c in category.checks for text in (c.rule, c.detail)), "checks: texts")
    values = [value for group in category.settings.values() for value in group.values()]
    _want(all(value is None or isinstance(value, str | int | float) for value in values), "settings: texts and numbers")


def _want(fine: bool, wanted: str) -> None:
    if not fine:
        raise ValueError(f"expected {wanted[:200]}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_numbers(values: object, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(map(_is_number, values))


def _no_number(text: str) -> float:
    raise ValueError(f"expected finite numbers, got {text}")
