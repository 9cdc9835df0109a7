"""A detector under attack: every test image attacked, inspected as a camera would deliver it, and written down at once.

Each row is a function of the model, the settings, the image, the budget and the attack, never of order: a stopped run goes on
where it was, and rows of several machines can be put together.  The image is inspected as uint8 by
:meth:`advrad_fast.Detector.inspect`, with noise from a seed that no attack sees.  A detector whose seed is fixed and known (0 is
the default) can be attacked at that very noise: the figures are for one that draws a fresh seed (``seed=None``).

Two surfaces are attacked: the prepared image, which the network's noise is added to, and, where a model aligns or brightens, the
camera's frame as well, through the alignment.  Budgets are in the pixels of what is attacked.  A resampled value is nearly a mean
of frame values, so within ``linf`` a frame hardly gives more than the prepared image does, but for what it does to the pose;
within ``l2`` it gives less, as a large frame has many pixels for each of the network's.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from advrad_fast import images
from advrad_fast.backends.cpu_network import processor
from advrad_fast.detector import Detector, Inspection
from advrad_fast.errors import AttackError, ConfigError, DatasetError, PartNotFoundError, expected
from advrad_fast.evaluation.attacker import Attacker, RobustSettings, changes
from advrad_fast.evaluation.datasets import Dataset, Sample
from advrad_fast.evaluation.evaluate import check_backend, sample_name
from advrad_fast.evaluation.rows import (
    CLEAN,
    NO_BUDGET,
    AttackRow,
    Budget,
    RobustSummary,
    append_row,
    read_rows,
    robust_figures,
)
from advrad_fast.model import ModelFile
from advrad_fast.spread import map_tasks


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
    make: Callable[[ModelFile], Detector] | None = None,
    other: ModelFile | None = None,
    device: str = "cpu",
    threads: int | None = None,
    keep: bool = False,
    on_step: Callable[[int, int], None] | None = None,
    ray: str | None = None,
) -> tuple[list[AttackRow], RobustSummary]:
    """Attack the test set; rows that ``results`` holds already are not computed again.

    Args:
        results: the file that rows are appended to.
        name: the model's, for rows; else the start of its fingerprint.
        make: makes a detector of a model, as ``detector`` was made: of :func:`prepared_model`, for images as they come out of
            the alignment, and with ``ray`` in each worker.  None will do without ``ray``, if the model does neither.
        other: the model that transferred attacks are made on; of the same image size.
        device: PyTorch's, for the attacks.
        threads: PyTorch's, for the attacks, of the whole process and of each worker; None leaves them: one in a worker,
            all cores here.  The last bits of an attacked image depend on them.
        keep: also keep attacked images as PNG, in a folder beside ``results``.
        on_step: called with (rows there are, rows there will be).
        ray: the address of a Ray cluster to spread the attacks over (:mod:`advrad_fast.spread`).  Rows are written
            here, as they come, and are those that as many threads as a worker has compute here.

    Returns:
        The run's rows and its summary, whose ``sanity`` says whether the rules hold (:func:`check_sanity`).

    Raises:
        ConfigError: settings that do not fit the model.
        BackendUnavailableError: PyTorch cannot compute on ``device``.
        DatasetError: the test set has no good or no bad images.
        SpreadError: the cluster can't be used, or a worker runs another backend than ``detector``.
    """
    start = time.perf_counter()
    _check_whole(detector.model)
    model, name = detector.model, name or detector.model.fingerprint[:12]
    if make is None and (ray is not None or changes(model)):
        raise ConfigError("make: expected a function, as this model aligns or brightens, or ray is given, got None")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ConfigError(expected("threads", "None or an integer of at least 1", threads))
    if ray is None:
        from advrad_fast.reference.device import torch_device

        torch_device(device)  # refuses it before any work is done
    if ("transfer" in settings.attacks) != (other is not None):
        raise ConfigError(expected("other", "a model exactly where 'transfer' is among the attacks", other and "a model"))
    if other is not None and _size(other) != _size(model):
        raise ConfigError(expected("other: image size", str(_size(model)), _size(other)))
    samples = choose_samples(dataset, settings.limit)
    run = settings.run(detector, dataset.name, other)
    attacker = Attacker(model, other, settings, device, threads)
    surfaces = settings.attacked(model)
    wanted = [(NO_BUDGET, CLEAN, "prepared"), *product(settings.budgets, settings.attacks, surfaces)]
    done = {row.key: row for row in read_rows(results, run)}
    keys = [(s, w, (run, sample_name(s.path), *w)) for s in samples for w in wanted]

    def tasks() -> Iterator[_Task]:
        at, frame, lattice = None, None, None
        for sample, (budget, attack, surface), key in keys:
            if key not in done:
                if sample is not at:
                    at, frame = sample, images.load_image(sample.path)
                    lattice = _lattice(frame, detector)
                common = {
                    "run": run, "model": name, "data": dataset.name, "image": sample_name(sample.path),
                    "label": sample.label, "defect": sample.defect, "budget": budget, "attack": attack, "surface": surface,
                    "threshold": detector.threshold, "seed": settings.seed,
                }  # fmt: skip
                yield _Task(common, None if lattice is None or surface == "prepared" else frame, lattice)

    results.parent.mkdir(parents=True, exist_ok=True)
    state: Callable[[], tuple[Attacker, _Detectors]] = partial(_worker, make, attacker, detector.threshold, detector.backend)
    if ray is None:
        detectors = _Detectors(make, model, detector.threshold, detector.backend, detector)
        state = lambda: (attacker, detectors)  # noqa: E731
    there = sum(key in done for *_, key in keys)
    for _, (row, attacked) in map_tasks(_attack, tasks(), setup=state, ray=ray):
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
        sanity=attacker.sanity([(s, _lattice(images.load_image(s.path), detector)) for s in chosen]) if settings.sanity else [],
        settings=dataclasses.asdict(settings)
        | {"budgets": list(settings.budgets), "attacks": list(settings.attacks), "surfaces": list(surfaces)},
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


@dataclass(frozen=True)
class _Task:
    """One image under one attack: what its row says of it beforehand, the camera's frame where that is attacked, and the prepared
    image (None: the part was not found)."""

    common: dict[str, Any]
    frame: NDArray[np.uint8] | None
    lattice: NDArray[np.uint8] | None


class _Detectors:
    """The detector for each surface, made when it is first needed."""

    def __init__(
        self,
        make: Callable[[ModelFile], Detector] | None,
        model: ModelFile,
        threshold: float,
        backend: str,
        camera: Detector | None = None,
    ) -> None:
        self._make, self._model, self._threshold, self._backend = make or Detector, model, threshold, backend
        self._made = {} if camera is None else {"camera": camera} if changes(model) else {"camera": camera, "prepared": camera}

    def __getitem__(self, surface: str) -> Detector:
        if surface not in self._made:
            self._made[surface] = made = self._make(self._model if surface == "camera" else prepared_model(self._model))
            check_backend(self._backend, made.backend)
            made.threshold = self._threshold
        return self._made[surface]


def _worker(
    make: Callable[[ModelFile], Detector] | None, attacker: Attacker, threshold: float, backend: str
) -> tuple[Attacker, _Detectors]:
    """What a worker keeps from task to task."""
    return attacker, _Detectors(make, attacker.model, threshold, backend)


def _attack(state: tuple[Attacker, _Detectors], task: _Task) -> tuple[AttackRow, NDArray[np.uint8] | None]:
    """The row, without a file, and the attacked image: a function of the task and of what the worker was made from."""
    from advrad_fast.evaluation.attacks.pipeline import seed_from

    (attacker, detectors), common, lattice = state, task.common, task.lattice
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
    original = lattice if task.frame is None else task.frame
    final, score_float = original, None
    if not clean:
        budget = Budget.parse(common["budget"])
        attacked = attacker.attack(
            common["attack"], original, common["label"], budget, common["image"], camera=task.frame is not None
        )
        final = attacked.rounded[0]
        pipeline = attacker.pipeline(frame=task.frame)
        score_float = float(pipeline.scores(attacked.images, pipeline.detector_noise(seed))[0, 0])
    result: Inspection = detectors[common["surface"]].inspect(final, maps=False, seed=seed)
    change = np.abs(final.astype(np.float64) - original) / 255.0
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
    slug = "".join(c if c.isalnum() else "-" for c in f"{row.budget} {row.attack} {row.surface} {row.image}")
    path = results.with_suffix(".images") / row.run / f"{slug}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(path)
    return str(path.relative_to(results.parent))


def _lattice(frame: NDArray[np.uint8], detector: Detector) -> NDArray[np.uint8] | None:
    """The prepared image, or None where the part is not found."""
    try:
        return images.prepare(frame, detector.model.config.image).image
    except PartNotFoundError:
        return None


def _size(model: ModelFile) -> tuple[int, int, int]:
    image = model.config.image
    return (image.height, image.width, image.channels)
