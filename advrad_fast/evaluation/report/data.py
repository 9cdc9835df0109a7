"""What a report is made from: a category's figures, scores and pictures, and how they are kept as JSON."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import advrad_fast
from advrad_fast.backends.cpu import processor
from advrad_fast.detector import Detector, Inspection
from advrad_fast.errors import DatasetError, ReportError, expected
from advrad_fast.evaluation import metrics
from advrad_fast.evaluation.datasets import Sample
from advrad_fast.evaluation.evaluate import Evaluation, sample_name
from advrad_fast.files import write_atomically
from advrad_fast.images import load_image
from advrad_fast.overlay import overlay

SCHEMA = 1  #: of the JSON files
SUFFIX = ".report.json"
SHOWN = 6  #: images of each label on the page

_PICTURE_SIDE = 320  # pixels; frames on the page are made smaller than this
_PICTURE = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/]+=*")
_STAGES = ("prepare", "noise", "network", "error", "total")
_LIBRARIES = ("numpy", "scipy", "pillow", "openvino", "torch")

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

    def defects(self) -> list[str]:
        """The kinds of defect, in order."""
        return sorted({s.defect for s in self.samples if s.label == 1})


def collect(
    evaluation: Evaluation,
    results: Sequence[Inspection],
    detector: Detector,
    model: str | os.PathLike[str],
    *,
    shown: int = SHOWN,
) -> Category:
    """A category's data: its figures, every score, and pictures of a few images, whose maps are computed anew.

    Args:
        results: the inspection of each of ``evaluation.samples``, in their order.
        detector: that was evaluated.
        model: the file it was loaded from.
        shown: images of each label to have pictures of, spread evenly over the ranks of the score.
    """
    samples = [
        Scored(sample_name(s.path), s.label, s.defect, str(r.outcome), r.score)
        for s, r in zip(evaluation.samples, results, strict=True)
    ]
    seed = evaluation.figures["seed"]
    return Category(
        figures={**evaluation.figures, "model": str(model)},
        samples=samples,
        shown=[picture(detector, evaluation.samples[i], seed) for i in choose(evaluation, shown)],
        latency=_latency(results),
        settings={"Model": _model_settings(detector), "Machine": _machine()},
    )


def choose(evaluation: Evaluation, count: int) -> list[int]:
    """Indices of images to show, bad ones first: evenly spread over the ranks of each label's scores, so that misses and
    false alarms show as well as hits."""
    labels = np.array([s.label for s in evaluation.samples])
    chosen: list[int] = []
    for label in (1, 0):
        order = [int(i) for i in np.argsort(-evaluation.scores, kind="stable") if labels[i] == label]
        places = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
        chosen += [order[p] for p in places]
    return chosen


def picture(detector: Detector, sample: Sample, seed: int) -> Shown:
    """A test image and its heat map."""
    return Shown(sample_name(sample.path), sample.label, sample.defect, [view(detector, load_image(sample.path), "clean", seed)])


def view(detector: Detector, frame: NDArray[np.uint8], title: str, seed: int) -> View:
    """A frame with its heat map."""
    result = detector.inspect(frame, seed=seed)
    plain = Image.fromarray(frame[..., 0] if frame.shape[2] == 1 else frame)
    return View(title, embed(plain), embed(overlay(frame, result)), str(result.outcome), result.score)


def embed(image: Image.Image) -> str:
    """A picture as a data URI: JPEG, at most 320 pixels a side."""
    small = image.convert("RGB")
    small.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def save(folder: Path, category: Category) -> None:
    """Keep a category's data in a folder, in place of the same one's before.

    Raises:
        OSError: the folder can't be written.
    """
    document = {"schema": SCHEMA, **dataclasses.asdict(category)}
    # In ASCII: lone surrogates, of file names that are not UTF-8, are escapes.
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / _file_name(category.name), text.encode("ascii"))


def load(folder: str | os.PathLike[str]) -> list[Category]:
    """The categories whose data are in a folder, by name.

    Raises:
        ReportError: a file is not a category's data.
    """
    found = [_read(path) for path in sorted(Path(folder).glob(f"*{SUFFIX}"))]
    return sorted(found, key=lambda category: category.name)


def budgets(categories: Sequence[Category], key: str) -> list[str]:
    """The names under a figure (``robust_auroc``, ``certified_auroc``) over all categories, by norm and size."""
    return sorted({name for category in categories for name in category.figures.get(key, {})}, key=budget_size)


def budget_size(budget: str) -> tuple[str, float]:
    """("linf", 0.0078) of ``linf 2/255``; ("", 0.2) of ``0.2``; the size is NaN where there is none."""
    norm, _, size = budget.rpartition(" ")
    number = re.fullmatch(r"(\d+(?:\.\d+)?(?:[eE]-?\d+)?)(?:/([1-9]\d*))?", size)
    return (norm, float(number[1]) / float(number[2] or 1)) if number else (budget, math.nan)


def _file_name(name: str) -> str:
    """Of a category's data: readable, and its own for every name."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:60].strip("-")
    unlike = "" if plain == name else "-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return (plain or "data") + unlike + SUFFIX


def _read(path: Path) -> Category:
    try:
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(expected("schema", str(SCHEMA), data.get("schema") if isinstance(data, dict) else data))
        data.pop("schema")
        samples = [Scored(**row) for row in data.pop("samples")]
        shown = [Shown(**{**row, "views": [View(**v) for v in row["views"]]}) for row in data.pop("shown")]
        checks = [Check(**row) for row in data.pop("checks")]
        for uri in (u for s in shown for v in s.views for u in (v.frame, v.heat_map)):
            if not _PICTURE.fullmatch(uri):
                raise ValueError(expected("picture", "a JPEG as a data URI", uri))
        for number, sample in enumerate(samples):
            if sample.label not in (0, 1):
                raise ValueError(expected(f"samples[{number}].label", "0 or 1", sample.label))
            if not all(isinstance(score, float | int | None) for score in (sample.score, *sample.attacked.values())):
                raise ValueError(expected(f"samples[{number}]", "scores that are numbers or null", sample))
        category = Category(samples=samples, shown=shown, checks=checks, **data)
        needed = ("data", "model", "image_auroc", "image_auroc_interval", "f1_max", "threshold", "seed", "backend", "p50_ms")
        if missing := [key for key in needed if key not in category.figures]:
            raise ValueError(f"figures: {missing} missing")
        return category
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, DatasetError) as error:
        raise ReportError(f"{path}: not a category's data; delete it, or evaluate that category again: {error}") from error


def _latency(results: Sequence[Inspection]) -> dict[str, list[float]]:
    """[median, 99th percentile] of the stages of those that have them: an inspection that ABSTAINs has the total only."""
    times = defaultdict(list)
    for result in results:
        for stage in _STAGES:
            if stage in result.timings:
                times[stage].append(result.timings[stage])
    return {stage: [round(float(q), 4) for q in np.percentile(times[stage], (50, 99))] for stage in _STAGES if stage in times}


def _model_settings(detector: Detector) -> Settings:
    model = detector.model
    settings: Settings = {
        "backend": detector.backend,
        "image size": f"{model.config.image.height} x {model.config.image.width}, {model.config.image.channels} channels",
        "timestep k": model.config.diffusion.timestep,
        "filter s": model.config.score.filter_size,
        "draws": model.config.diffusion.draws,
        "parametrisation": model.config.unet.prediction,
        "pose laid level": model.config.image.pose is not None,
        "false-alarm rate": round(detector.false_alarm_rate, 6),
        "fingerprint": model.fingerprint[:16],
    }
    return {**settings, **{f"provenance: {key}": value for key, value in model.provenance.items()}}


def _machine() -> Settings:
    versions: Settings = {"advrad_fast": advrad_fast.__version__, "Python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return {**versions, "system": platform.platform(), "processor": processor(), "cores": os.cpu_count()}
