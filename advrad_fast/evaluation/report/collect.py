"""From an evaluation, and an attack's rows if there was one, to a report's data."""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import advrad_fast
from advrad_fast.backends.cpu_network import processor
from advrad_fast.detector import Detector, Inspection
from advrad_fast.evaluation.datasets import Sample
from advrad_fast.evaluation.evaluate import Evaluation, sample_name
from advrad_fast.evaluation.report.data import Category, Check, Scored, Settings, Shown, View
from advrad_fast.evaluation.report.markup import embed
from advrad_fast.evaluation.rows import CLEAN, AttackRow, RobustSummary, worst
from advrad_fast.images import load_image
from advrad_fast.overlay import overlay

SHOWN = 6  #: images of each label on the page

_STAGES = ("prepare", "noise", "network", "error", "total")
_LIBRARIES = ("numpy", "scipy", "pillow", "openvino", "torch")


@dataclass(frozen=True)
class Attack:
    """What an attack on the detector found.

    Attributes:
        rows: one run's, the clean ones among them.
        summary: the same run's.
        folder: that of the results file, which the rows' images are relative to.
    """

    rows: Sequence[AttackRow]
    summary: RobustSummary
    folder: Path

    def scores(self) -> dict[str, dict[str, float | None]]:
        """{image: {budget: score}}, the attacker's best over attacks and surfaces; None for a part that was not found."""
        found: dict[str, dict[str, float | None]] = {}
        clean = [row for row in self.rows if row.attack == CLEAN]
        for budget in self.summary.robust_auroc:
            for image, (_, score) in worst([*clean, *(row for row in self.rows if row.budget == budget)]).items():
                found.setdefault(image, {})[budget] = score if np.isfinite(score) else None
        return found

    def views(self, image: str, detectors: Mapping[str, Detector], seed: int) -> list[View]:
        """The image as it was attacked, once for each budget for which one was kept: the attacker's best.

        Args:
            detectors: for the images of each surface.
        """
        views = []
        for budget in self.summary.robust_auroc:
            kept = [row for row in self.rows if row.image == image and row.budget == budget and row.file is not None]
            if kept:
                best = (min if kept[0].label else max)(kept, key=lambda row: row.rank_score)
                how = best.attack if best.surface == "prepared" else f"{best.attack} {best.surface}"
                frame = load_image(self.folder / str(best.file))
                views.append(view(detectors[best.surface], frame, f"{budget}, {how}", seed))
        return views

    def checks(self) -> list[Check]:
        """What the sanity rules found."""
        checks = []
        for row in self.summary.sanity:
            rule = ", ".join(str(row[key]) for key in ("rule", "budget") if row.get(key))
            values = [f"{row[key]:.6g}" if isinstance(row.get(key), float) else str(row.get(key)) for key in ("value", "limit")]
            checks.append(Check(rule, row["holds"] is True, " against ".join(values)))
        return checks

    def settings(self) -> Settings:
        """Of the attack, and the versions it ran with."""
        s = self.summary
        general: Settings = {
            "run": s.run,
            "images": f"{s.n_good} good, {s.n_bad} defective",
            "seed": s.seed,
            "seconds": s.seconds,
        }
        versions = {f"version of {name}": version for name, version in s.versions.items()}
        return {**general, **{key: _plain(value) for key, value in s.settings.items()}, **versions}


def _plain(value: object) -> str | int | float | bool | None:
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _of_prepared(detector: Detector) -> Detector:
    """The same detector for images that are prepared already, which must not be aligned or brightened again."""
    config = detector.model.config
    if config.image.pose is None and config.image.brightness is None:
        return detector
    plain = replace(config, image=replace(config.image, pose=None, brightness=None))
    name, precision = detector.backend.removesuffix(")").split(" (")
    # int8 is calibrated for one configuration; what another precision shows is as good.
    options: dict[str, Any] = {"precision": precision} if name == "cpu" and precision != "int8" else {}
    made = Detector(replace(detector.model, config=plain), backend=name, **options)
    made.threshold = detector.threshold
    return made


def collect(
    evaluation: Evaluation,
    results: Sequence[Inspection],
    detector: Detector,
    model: str | os.PathLike[str],
    *,
    attack: Attack | None = None,
    shown: int = SHOWN,
) -> Category:
    """A category's data: its figures, every score, and pictures of a few images, whose maps are computed anew.

    Args:
        results: the inspection of each of ``evaluation.samples``, in their order.
        detector: that was evaluated.
        model: the file it was loaded from.
        attack: what an attack on it found; the images shown are then some of those attacked.
        shown: images of each label to have pictures of, spread evenly over the ranks of the score.
    """
    scores = attack.scores() if attack else {}
    names = [sample_name(s.path) for s in evaluation.samples]
    samples = [
        Scored(name, s.label, s.defect, str(r.outcome), r.score, scores.get(name, {}))
        for name, s, r in zip(names, evaluation.samples, results, strict=True)
    ]
    chosen = choose(evaluation, shown, among={i for i, name in enumerate(names) if name in scores} or None)
    seed = evaluation.figures["seed"]
    pictures = [picture(detector, evaluation.samples[i], seed) for i in chosen]
    figures = {**evaluation.figures, "model": str(model)}
    settings = {"Model": _model_settings(detector)}
    if attack:
        detectors = {"camera": detector, "prepared": _of_prepared(detector)}
        pictures = [replace(one, views=[*one.views, *attack.views(one.name, detectors, seed)]) for one in pictures]
        figures |= {"robust_auroc": attack.summary.robust_auroc, "attacked_clean_auroc": attack.summary.image_auroc}
        settings["Attack"] = attack.settings()
    return Category(
        figures=figures,
        samples=samples,
        shown=pictures,
        latency=_latency(results),
        checks=attack.checks() if attack else [],
        settings={**settings, "Machine": _machine()},
    )


def choose(evaluation: Evaluation, count: int, among: Collection[int] | None = None) -> list[int]:
    """Indices of images to show, bad ones first: evenly spread over the ranks of each label's scores, so that misses and
    false alarms show as well as hits.

    Args:
        count: of each label.
        among: the indices to choose from; None for all.
    """
    labels = np.array([s.label for s in evaluation.samples])
    chosen: list[int] = []
    for label in (1, 0):
        ranked = map(int, np.argsort(-evaluation.scores, kind="stable"))
        order = [i for i in ranked if labels[i] == label and (among is None or i in among)]
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
    return {
        **versions,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
    }
