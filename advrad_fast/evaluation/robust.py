"""A detector under attack: every test image attacked, inspected as a camera would deliver it, and written down at once.

Each row is a function of the model, the settings, the image, the budget and the attack, never of order: a stopped run goes on
where it was, and rows of several machines can be put together.  The image is inspected as uint8 by
:meth:`advrad_fast.Detector.inspect`, with noise from a seed that no attack sees.  A detector whose seed is fixed and known (0 is
the default) can be attacked at that very noise: the figures are for one that draws a fresh seed (``seed=None``).

Attacked is the prepared image, the one that the network's noise is added to: budgets are in its pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from advrad_fast import images
from advrad_fast.backends.cpu_network import processor
from advrad_fast.detector import Detector, Inspection
from advrad_fast.errors import AttackError, ConfigError, DatasetError, PartNotFoundError, expected
from advrad_fast.evaluation.datasets import Dataset, Sample
from advrad_fast.evaluation.evaluate import sample_name
from advrad_fast.evaluation.rows import (
    CLEAN,
    NO_BUDGET,
    AttackRow,
    Budget,
    RobustSummary,
    append_row,
    auroc_of,
    read_rows,
    robust_figures,
)
from advrad_fast.evaluation.spread import map_tasks
from advrad_fast.model import ModelFile

ATTACKS = ("pgd", "square", "transfer")
_UNBOUNDED = "linf 1"


@dataclass(frozen=True)
class RobustSettings:
    """What is attacked, and how hard.

    Attributes:
        budgets: names, as :meth:`Budget.parse` reads them.
        attacks: out of ``pgd``, ``square``, ``transfer``.
        steps, eot, restarts: of PGD (:class:`advrad_fast.evaluation.attacks.pgd.PGD`).
        queries: of the Square Attack.
        limit: at most this many good and this many bad images, evenly spread over the test set; None for all.
        sanity: good and bad images that the sanity rules are tried on; 0 for none.
        seed: of all that is drawn.
    """

    budgets: tuple[str, ...] = ("linf 2/255", "l2 0.2")
    attacks: tuple[str, ...] = ("pgd",)
    steps: int = 100
    eot: int = 8
    restarts: int = 1
    queries: int = 500
    limit: int | None = None
    sanity: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.budgets or len({Budget.parse(b) for b in self.budgets}) != len(self.budgets):
            raise ConfigError(expected("budgets", "at least one, each once", self.budgets))
        if not self.attacks or len(set(self.attacks)) != len(self.attacks) or not set(self.attacks) <= set(ATTACKS):
            raise ConfigError(expected("attacks", f"some of {', '.join(ATTACKS)}", self.attacks))
        for name, least in (("steps", 1), ("eot", 1), ("restarts", 1), ("queries", 1), ("sanity", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(expected(name, f"an integer of at least {least}", value))
        if self.limit is not None and (isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 1):
            raise ConfigError(expected("limit", "None or an integer of at least 1", self.limit))

    def run(self, detector: Detector, data: str, other: ModelFile | None) -> str:
        """The digest that rows carry: over all that a row depends on.  More images, budgets or attacks are the same run."""
        own = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("budgets", "attacks", "limit", "sanity")}
        parts = [detector.model.fingerprint, detector.threshold, detector.backend, data, other and other.fingerprint, own]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def prepared_model(model: ModelFile) -> ModelFile:
    """The model for images that are prepared already: neither aligned nor brightened again.

    Raises:
        ConfigError: the model inspects tiles, which the attacks do not know.
    """
    _check_whole(model)
    image = dataclasses.replace(model.config.image, pose=None, brightness=None)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, image=image))


def _check_whole(model: ModelFile) -> None:
    if model.tiling is not None:
        raise ConfigError(
            "model: expected one that inspects whole images, which attacks are made for, got one that inspects tiles"
        )


def evaluate_robust(
    detector: Detector,
    dataset: Dataset,
    results: Path,
    settings: RobustSettings,
    *,
    name: str = "",
    prepared: Detector | None = None,
    other: ModelFile | None = None,
    device: str = "cpu",
    keep: bool = False,
    on_step: Callable[[int, int], None] | None = None,
    ray: str | None = None,
    setup: Callable[[], Detector] | None = None,
) -> tuple[list[AttackRow], RobustSummary]:
    """Attack the test set; rows that ``results`` holds already are not computed again.

    Args:
        results: the file that rows are appended to.
        name: the model's, for rows; else the start of its fingerprint.
        prepared: the detector of :func:`prepared_model`, for images as they come out of the alignment; None where the model
            neither aligns nor brightens, so that it is the detector itself.
        other: the model that transferred attacks are made on; of the same image size.
        device: PyTorch's, for the attacks.
        keep: also keep attacked images as PNG, in a folder beside ``results``.
        on_step: called with (rows there are, rows there will be).
        ray: the address of a Ray cluster to spread the attacks over (:mod:`advrad_fast.evaluation.spread`).  Rows are written
            here, as they come.  Workers run one thread; the rows are those that one thread computes here.
        setup: makes ``prepared`` in a worker; needed with ``ray``.

    Returns:
        The run's rows and its summary, whose ``sanity`` says whether the rules hold (:func:`check_sanity`).

    Raises:
        ConfigError: settings that do not fit the model.
        DatasetError: the test set has no good or no bad images.
    """
    start = time.perf_counter()
    _check_whole(detector.model)
    image, name = detector.model.config.image, name or detector.model.fingerprint[:12]
    if prepared is None:
        if image.pose is not None or image.brightness is not None:
            raise ConfigError("prepared: expected the detector of prepared_model(), as this model aligns or brightens, got None")
        prepared = detector
    if ("transfer" in settings.attacks) != (other is not None):
        raise ConfigError(expected("other", "a model exactly where 'transfer' is among the attacks", other and "a model"))
    if other is not None and _size(other) != _size(detector.model):
        raise ConfigError(expected("other: image size", str(_size(detector.model)), _size(other)))
    samples = choose_samples(dataset, settings.limit)
    run = settings.run(detector, dataset.name, other)
    attacker = _Attacker(detector.model, other, settings, device)
    wanted = [(NO_BUDGET, CLEAN), *((b, a) for b in settings.budgets for a in settings.attacks)]
    done = {row.key: row for row in read_rows(results, run)}
    if ray is not None and setup is None:
        raise ConfigError(expected("setup", "a function that makes the detector in a worker, as ray is given", setup))
    keys = [(s, b, a, (run, sample_name(s.path), b, a, "prepared")) for s in samples for b, a in wanted]

    def tasks() -> Iterator[_Task]:
        at, lattice = None, None
        for sample, budget, attack, key in keys:
            if key not in done:
                if sample is not at:
                    at, lattice = sample, _lattice(sample, detector)
                common = {
                    "run": run, "model": name, "data": dataset.name, "image": sample_name(sample.path),
                    "label": sample.label, "defect": sample.defect, "budget": budget, "attack": attack, "surface": "prepared",
                    "threshold": detector.threshold, "seed": settings.seed,
                }  # fmt: skip
                yield _Task(common, lattice)

    results.parent.mkdir(parents=True, exist_ok=True)
    make = partial(_worker, setup, detector.model, other, settings, device) if ray and setup else lambda: (attacker, prepared)
    there = sum(key in done for *_, key in keys)
    for _, (row, attacked) in map_tasks(_attack, tasks(), setup=make, ray=ray):
        if keep and attacked is not None:
            row = dataclasses.replace(row, file=_keep(row, attacked, results))
        append_row(results, row)
        done[row.key] = row
        there += 1
        if on_step is not None:
            on_step(there, len(keys))
    rows = [done[key] for *_, key in keys]
    figures = robust_figures(rows)
    chosen = [s for label in (0, 1) for s in [s for s in samples if s.label == label][: settings.sanity]]
    summary = RobustSummary(
        model=name,
        fingerprint=detector.model.fingerprint,
        run=run,
        data=dataset.name,
        threshold=detector.threshold,
        seed=settings.seed,
        sanity=attacker.sanity([(s, _lattice(s, detector)) for s in chosen]) if settings.sanity else [],
        settings={**dataclasses.asdict(settings), "budgets": list(settings.budgets), "attacks": list(settings.attacks)},
        versions={library: metadata.version(library) for library in ("advrad-fast", "torch", "numpy")}
        | {"python": platform.python_version()},
        backend=detector.backend,
        machine=processor(),
        seconds=round(time.perf_counter() - start, 1),
        **figures,
    )
    return rows, summary


def check_sanity(summary: RobustSummary) -> None:
    """Refuse figures of an attack that broke a rule.

    Raises:
        AttackError: names the rules, what was measured and the limit.
    """
    broken = [f"{r['rule']} ({r['budget']}: {r['value']:.4g}, limit {r['limit']:.4g})" for r in summary.sanity if not r["holds"]]
    if broken:
        raise AttackError(f"the attack is too weak for its figures to mean anything: {'; '.join(broken)}")


def choose_samples(dataset: Dataset, limit: int | None) -> list[Sample]:
    """All test images, or ``limit`` of each label, evenly spread in their order.

    Raises:
        DatasetError: a label has none.
    """
    chosen = []
    for label in (0, 1):
        of_label = [s for s in dataset.test if s.label == label]
        if not of_label:
            raise DatasetError(f"{dataset.name}: the test set needs good and defective images, got none of label {label}")
        count = len(of_label) if limit is None else min(limit, len(of_label))
        chosen += [of_label[i * len(of_label) // count] for i in range(count)]
    return chosen


def table(summary: RobustSummary) -> str:
    """The figures as text."""
    lines = [f"under attack, {summary.n_good} good and {summary.n_bad} defective: clean AUROC {100 * summary.image_auroc:.2f}"]
    for budget, value in summary.robust_auroc.items():
        parts = ", ".join(f"{name} {100 * v[budget]:.2f}" for name, v in summary.by_attack.items() if budget in v)
        exact = 100 * summary.robust_auroc_float[budget]
        good, bad = summary.flipped[budget]
        lines.append(f"  {budget:12s} {100 * value:6.2f}  ({parts}; before rounding to uint8 {exact:.2f})")
        lines.append(f"               at the threshold: {good} good parts rejected, {bad} defects passed")
    for rule in summary.sanity:
        verdict = "holds" if rule["holds"] else "BROKEN"
        lines.append(f"  {verdict:6s} {rule['rule']} ({rule['budget']}): {rule['value']:.4g}, limit {rule['limit']:.4g}")
    return "\n".join(lines)


class _Attacker:
    """The attacks by name, and the pipelines they run on, built when the first is needed."""

    def __init__(self, model: ModelFile, other: ModelFile | None, settings: RobustSettings, device: str) -> None:
        self.model, self.other, self.settings, self.device = model, other, settings, device
        self._pipelines: dict[str, Any] = {}

    def pipeline(self, name: str = "own") -> Any:
        """The differentiable score of the attacked model, or of the ``other``."""
        from advrad_fast.evaluation.attacks.pipeline import ScorePipeline

        if name not in self._pipelines:
            model = self.other if name == "other" and self.other is not None else self.model
            self._pipelines[name] = ScorePipeline(model, device=self.device)
        return self._pipelines[name]

    def attack(self, name: str, image: NDArray[np.uint8], label: int, budget: Budget, tag: str, steps: int | None = None) -> Any:
        """An :class:`~advrad_fast.evaluation.attacks.pipeline.Attacked` of one prepared image."""
        from advrad_fast.evaluation.attacks.pgd import PGD, pgd
        from advrad_fast.evaluation.attacks.pipeline import generator
        from advrad_fast.evaluation.attacks.square import Square, square

        s = self.settings
        generators = [generator(s.seed, "attack", tag, budget.name, name)]
        if name == "square":
            return square(self.pipeline(), image[None], [label], budget, Square(s.queries, s.eot), generators=generators)
        pipeline = self.pipeline("other" if name == "transfer" else "own")
        made = PGD(steps or s.steps, s.eot, s.restarts)
        return pgd(pipeline, image[None], [label], budget, made, generators=generators)

    def sanity(self, chosen: Sequence[tuple[Sample, NDArray[np.uint8] | None]]) -> list[dict[str, Any]]:
        """The rules, on a few images, before rounding, all judged on the same fresh draws."""
        from advrad_fast.evaluation.attacks.pipeline import generator, signs_of, to_float

        found = [(s, image) for s, image in chosen if image is not None]
        if len({s.label for s, _ in found}) < 2:
            return []
        pipeline, settings = self.pipeline(), self.settings
        first = Budget.parse(settings.budgets[0])
        double = Budget(first.norm, 2 * first.size, f"twice {first.name}")
        unbounded = Budget.parse(_UNBOUNDED)
        plans: dict[str, tuple[str, Budget, int]] = {
            "full": ("pgd", first, settings.steps),
            "fewer": ("pgd", first, max(settings.steps // 4, 1)),
            "larger": ("pgd", double, settings.steps),
            "unbounded": ("pgd", unbounded, max(settings.steps, 40)),
            "square": ("square", first, 0),
        }
        gains: dict[str, list[NDArray[np.float64]]] = {name: [] for name in ("clean", *plans)}
        for sample, image in found:
            name = sample_name(sample.path)
            noise = pipeline.draw([generator(settings.seed, "sanity", name)], 8)
            signs = signs_of([sample.label], pipeline.device)

            def judged(x: Any, noise: Any = noise, signs: Any = signs) -> NDArray[np.float64]:
                return np.array([float(pipeline.gains(x, signs, noise[:, i : i + 1])) for i in range(noise.shape[1])])

            gains["clean"].append(judged(to_float(image[None], pipeline.device)))
            for plan, (attack, budget, steps) in plans.items():
                attacked = self.attack(attack, image, sample.label, budget, name, steps or None)
                gains[plan].append(judged(attacked.images))
        arrays = {name: np.array(values) for name, values in gains.items()}  # (images, draws)
        # What chance may do: three standard errors over the draws, for these images, and a hundredth of the clean scores.
        scale = 0.01 * float(np.abs(arrays["clean"]).mean())

        def no_less(rule: str, strong: str, weak: str, budget: str) -> dict[str, Any]:
            difference = arrays[strong] - arrays[weak]
            error = float(np.sqrt(difference.var(axis=1, ddof=1).sum() / difference.shape[1])) / len(difference)
            limit = -(3.0 * error + scale)
            value = float(difference.mean())
            return {"rule": rule, "budget": budget, "holds": value >= limit, "value": value, "limit": limit}

        signs_ = {str(i): (s.label, float(arrays["unbounded"][i].mean()) * (1 - 2 * s.label)) for i, (s, _) in enumerate(found)}
        area = auroc_of(signs_)
        return [
            no_less("more steps never help the defender", "full", "fewer", first.name),
            no_less("a larger budget never helps the defender", "larger", "full", double.name),
            no_less("a search without gradients does not beat the gradient", "full", "square", first.name),
            {"rule": "an unbounded budget breaks it", "budget": _UNBOUNDED, "holds": area <= 0.1, "value": area, "limit": 0.1},
        ]


@dataclass(frozen=True)
class _Task:
    """One image under one attack: what its row says of it beforehand, and the prepared image (None: the part was not found)."""

    common: dict[str, Any]
    lattice: NDArray[np.uint8] | None


def _worker(
    setup: Callable[[], Detector], model: ModelFile, other: ModelFile | None, settings: RobustSettings, device: str
) -> tuple[_Attacker, Detector]:
    """What a worker keeps from task to task."""
    return _Attacker(model, other, settings, device), setup()


def _attack(state: tuple[_Attacker, Detector], task: _Task) -> tuple[AttackRow, NDArray[np.uint8] | None]:
    """The row, without a file, and the attacked image: a function of the task and of what the worker was made from."""
    from advrad_fast.evaluation.attacks.pipeline import seed_from

    (attacker, detector), common, lattice = state, task.common, task.lattice
    began = time.perf_counter()
    clean, s = common["attack"] == CLEAN, attacker.settings
    steps = 0 if clean else s.queries if common["attack"] == "square" else s.steps
    how: dict[str, Any] = {
        "steps": steps,
        "eot": 0 if clean else s.eot,
        "restarts": s.restarts if common["attack"] in ("pgd", "transfer") else 0,
    }
    if lattice is None:  # the part was not found: it is not passed, whatever an attacker does to the prepared image
        nothing: dict[str, Any] = {
            "outcome": "ABSTAIN",
            "score": None,
            "score_float": None,
            "linf": 0.0,
            "l2": 0.0,
            "seconds": 0.0,
        }
        return AttackRow(**common, **how, **nothing), None
    # Not the attacker's: another branch of the hash.
    seed = seed_from(s.seed, "inspection", common["image"])
    final, score_float = lattice, None
    if not clean:
        budget = Budget.parse(common["budget"])
        attacked = attacker.attack(common["attack"], lattice, common["label"], budget, common["image"])
        final = attacked.rounded[0]
        pipeline = attacker.pipeline()
        score_float = float(pipeline.scores(attacked.images, pipeline.detector_noise(seed))[0, 0])
    result: Inspection = detector.inspect(final, maps=False, seed=seed)
    change = np.abs(final.astype(np.float64) - lattice) / 255.0
    row = AttackRow(
        **common,
        **how,
        outcome=str(result.outcome),
        score=result.score,
        score_float=score_float,
        linf=float(change.max()),
        l2=float(np.sqrt(np.square(change).sum())),
        seconds=round(time.perf_counter() - began, 3),
    )
    return row, None if clean else final


def _keep(row: AttackRow, image: NDArray[np.uint8], results: Path) -> str:
    """Write an attacked image, and say where, seen from the results' folder."""
    slug = "".join(c if c.isalnum() else "-" for c in f"{row.budget} {row.attack} {row.image}")
    path = results.with_suffix(".images") / row.run / f"{slug}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(path)
    return str(path.relative_to(results.parent))


def _lattice(sample: Sample, detector: Detector) -> NDArray[np.uint8] | None:
    """The prepared image, or None where the part is not found."""
    try:
        return images.prepare(images.load_image(sample.path), detector.model.config.image).image
    except PartNotFoundError:
        return None


def _size(model: ModelFile) -> tuple[int, int, int]:
    image = model.config.image
    return (image.height, image.width, image.channels)
