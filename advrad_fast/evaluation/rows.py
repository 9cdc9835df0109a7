"""What an evaluation under attack writes down: one JSON line for each image, budget and attack.

A results file is JSON lines, each an :class:`AttackRow`; rows are only ever appended, so a run can be stopped and gone on with.
Rows of different runs (another model, other settings) may share a file: :attr:`AttackRow.run` tells them apart.
:func:`robust_figures` turns the rows of one run into figures.  No PyTorch is needed to read, write or tabulate rows.

The committed rows in ``benchmarks/results/robustness.jsonl`` are one :class:`RobustSummary` a line, a whole run each.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from advrad_fast.errors import ConfigError, DatasetError, expected
from advrad_fast.evaluation import metrics
from advrad_fast.untrusted import clip

Norm = Literal["linf", "l2"]
CLEAN = "clean"  #: the attack's name in the row of an image as it is
NO_BUDGET = "none"  #: the budget's name in such a row

_BUDGET = re.compile(r"(linf|l2) (\d+(?:\.\d+)?)(?:/(\d+(?:\.\d+)?))?")
_T = TypeVar("_T", "AttackRow", "RobustSummary")


@dataclass(frozen=True)
class Budget:
    """How far an attacked image may lie from the original, in [0, 1] pixel units.

    Attributes:
        norm: ``linf`` (the largest change of a value) or ``l2`` (over all pixels and channels).
        size: at least 0.
        name: as people write it, ``linf 2/255`` or ``l2 0.2``: the key in ``robust_auroc``.
    """

    norm: Norm
    size: float
    name: str

    @classmethod
    def parse(cls, text: object) -> Budget:
        """``linf 2/255``, ``l2 0.2``.

        Raises:
            ConfigError: the text is not a norm, a space and a number or fraction.
        """
        found = _BUDGET.fullmatch(text.strip()) if isinstance(text, str) else None
        size = math.inf
        if found is not None:
            over = float(found[3] or 1)
            size = float(found[2]) / over if over else math.inf
        if found is None or not math.isfinite(size):
            raise ConfigError(expected("budget", "'linf SIZE' or 'l2 SIZE', SIZE a number or fraction in [0, 1] units", text))
        norm: Norm = "linf" if found[1] == "linf" else "l2"
        return cls(norm, size, found[0])


@dataclass(frozen=True)
class AttackRow:
    """One image under one attack within one budget, or as it is (``attack`` = ``clean``).

    Attributes:
        run: hex, a digest of the model's fingerprint and of every setting that the result depends on.
        model: the model file's stem.
        data: the data set's name.
        image: folder and file name, ``scratch/003.png``: unique in the data set.
        label: 0 (good: the attack raises the score) or 1 (bad: it lowers it).
        defect: the folder, ``good`` or the kind of defect.
        budget: :attr:`Budget.name`; ``none`` for clean.
        attack: ``clean``, ``pgd``, ``square`` or ``transfer``.
        surface: what was perturbed: ``prepared``, the uint8 image that the network's noise is added to, or ``camera``, the frame,
            through resizing and the alignment of the part.
        outcome: of :meth:`advrad_fast.Detector.inspect` on the uint8 image: OK, DEFECT or ABSTAIN.
        score: the score of that inspection, with noise that the attacker has not seen; None for ABSTAIN.
        score_float: the score, with the same noise, of the attacked image before it was rounded to uint8; None for clean.
        threshold: the detector's.
        linf, l2: the distance of the uint8 image from the original, in [0, 1] units.
        steps, eot, restarts: the attack's settings; 0 where they have no meaning.  For ``square``, ``steps`` are queries.
        seed: the run's.
        seconds: that the attack took.
        file: the attacked image as PNG, relative to the results file; None where it was not kept.
    """

    run: str
    model: str
    data: str
    image: str
    label: int
    defect: str
    budget: str
    attack: str
    surface: str
    outcome: str
    score: float | None
    score_float: float | None
    threshold: float
    linf: float
    l2: float
    steps: int
    eot: int
    restarts: int
    seed: int
    seconds: float
    file: str | None = None

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What there is one row of."""
        return (self.run, self.image, self.budget, self.attack, self.surface)

    @property
    def rank_score(self) -> float:
        """The score for ranking: a part that was not found (ABSTAIN) is never passed as good, so it is infinite."""
        return math.inf if self.score is None else self.score


@dataclass(frozen=True)
class RobustSummary:
    """A run in one line: what ``advrad-fast evaluate --robust --json`` writes, and ``benchmarks/results/robustness.jsonl`` keeps.

    Attributes:
        robust_auroc: {budget: AUROC}, each image at its worst over all attacks and surfaces, as uint8, through the detector.
        robust_auroc_float: {budget: AUROC}, the same with images before rounding to uint8.
        by_attack: {attack: {budget: AUROC}}; attacks on the camera's frame are named ``pgd camera``.
        flipped: {budget: [good parts rejected, defects passed]} at the threshold, worst case; the clean ones under ``none``.
        sanity: what the sanity rules found: rows of ``rule``, ``budget``, ``holds`` (True or False), ``value``, ``limit``.
        settings: every setting of the attacks.
        versions: of advrad_fast, torch, numpy and Python.
    """

    model: str
    fingerprint: str
    run: str
    data: str
    n_good: int
    n_bad: int
    image_auroc: float
    robust_auroc: dict[str, float]
    robust_auroc_float: dict[str, float]
    by_attack: dict[str, dict[str, float]]
    flipped: dict[str, list[int]]
    threshold: float
    seed: int
    sanity: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    backend: str = ""
    machine: str = ""
    commit: str = ""
    seconds: float = 0.0


def to_line(row: AttackRow | RobustSummary) -> str:
    """The row as one line of strict JSON, without the newline."""
    return json.dumps(dataclasses.asdict(row), allow_nan=False)


def read_rows(path: str | os.PathLike[str], run: str | None = None) -> list[AttackRow]:
    """The rows of a results file (of one ``run``), in order; of rows with one key the last counts.

    A line that was cut off at the file's end, by a crash while it was written, is skipped.  A missing file has no rows.

    Raises:
        DatasetError: a line is not a row.
    """
    rows = {row.key: row for row in _read(path, AttackRow) if run is None or row.run == run}
    return list(rows.values())


def read_summaries(path: str | os.PathLike[str]) -> list[RobustSummary]:
    """The lines of ``robustness.jsonl``.

    Raises:
        DatasetError: a line is not a summary.
    """
    return _read(path, RobustSummary)


def _read(path: str | os.PathLike[str], kind: type[_T]) -> list[_T]:
    file = Path(path)
    if not file.exists():
        return []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeError) as error:
        raise DatasetError(f"{file}: cannot be read: {error}") from error
    hints = typing.get_type_hints(kind)
    rows: list[_T] = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            made = kind(**json.loads(line))
            if wrong := [name for name, hint in hints.items() if not _fits(getattr(made, name), hint)]:
                raise ValueError(f"of the wrong type or not finite: {', '.join(wrong)}")
            rows.append(made)
        except (ValueError, TypeError, RecursionError) as error:
            if number == len(lines):  # no newline after it: half a line
                break
            raise DatasetError(f"{file}:{number}: not a line of results: {clip(str(error))}") from error
    return rows


def _fits(value: object, hint: Any) -> bool:
    """Whether a JSON value is of a field's type; integers pass for floats, and numbers are finite and of 64 bits."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return any(_fits(value, each) for each in args)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(each, args[1]) for each in value.values())
    if origin is list:
        return isinstance(value, list) and all(_fits(each, args[0]) for each in value)
    if hint is float and type(value) in (int, float):
        return abs(value) <= 1e300  # type: ignore[arg-type]
    return hint is Any or (type(value) is hint and (hint is not int or abs(value) < 2**63))  # type: ignore[arg-type]


def append_row(path: str | os.PathLike[str], row: AttackRow) -> None:
    """:func:`append_line` of the row."""
    append_line(path, to_line(row))


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Append a line in one write and flush it to the disk, after mending one that a crash cut off.

    Raises:
        OSError: the file cannot be written.
    """
    with Path(path).open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")  # mode a: at the end, wherever the position is
        file.flush()
        os.fsync(file.fileno())


def worst(rows: Iterable[AttackRow], *, rounded: bool = True) -> dict[str, tuple[int, float]]:
    """{image: (label, score)}, each image at its worst: the highest score of a good part, the lowest of a bad one.

    Args:
        rows: give those of one budget and the clean ones, as an attacker may leave the image as it is.
        rounded: the scores of the uint8 images; else, where there are any, of the images before rounding.
    """
    found: dict[str, tuple[int, float]] = {}
    for row in rows:
        score = row.rank_score if rounded or row.score_float is None or row.score is None else row.score_float
        if row.image in found:
            score = (min if row.label else max)(score, found[row.image][1])
        found[row.image] = (row.label, score)
    return found


def auroc_of(scores: dict[str, tuple[int, float]]) -> float:
    """AUROC of :func:`worst`'s result.

    Raises:
        DatasetError: a class is missing.
    """
    labels, values = zip(*scores.values(), strict=True) if scores else ((), ())
    return metrics.auroc(np.array(labels, np.int64), np.minimum(np.array(values, np.float64), np.finfo(np.float64).max))


def robust_figures(rows: Sequence[AttackRow]) -> dict[str, Any]:
    """The figures of one run's rows: ``n_good``, ``n_bad``, ``image_auroc``, ``robust_auroc``, ``robust_auroc_float``,
    ``by_attack`` and ``flipped``, as :class:`RobustSummary` defines them.

    Raises:
        DatasetError: rows of more than one run, no clean rows of both classes, or a budget with images left out.
    """
    if len({row.run for row in rows}) > 1:
        raise DatasetError(expected("rows", "those of one run", sorted({row.run for row in rows})))
    clean = [row for row in rows if row.attack == CLEAN]
    plain = worst(clean)
    threshold = rows[0].threshold if rows else 0.0
    budgets = list(dict.fromkeys(row.budget for row in rows if row.attack != CLEAN))
    figures: dict[str, Any] = {
        "n_good": sum(label == 0 for label, _ in plain.values()),
        "n_bad": sum(label == 1 for label, _ in plain.values()),
        "image_auroc": auroc_of(plain),
        "robust_auroc": {},
        "robust_auroc_float": {},
        "by_attack": {},
        "flipped": {NO_BUDGET: _flipped(plain, threshold)},
    }
    for budget in budgets:
        attacked = [row for row in rows if row.budget == budget]
        groups: dict[str, list[AttackRow]] = {}
        for row in attacked:
            groups.setdefault(row.attack if row.surface == "prepared" else f"{row.attack} {row.surface}", []).append(row)
        for name, group in groups.items():
            if {row.image for row in group} != set(plain):
                raise DatasetError(f"{clip(budget)}, {clip(name)}: {len(group)} of {len(plain)} images have been attacked so far")
            figures["by_attack"].setdefault(name, {})[budget] = auroc_of(worst(group))
        scores = worst([*clean, *attacked])
        figures["robust_auroc"][budget] = auroc_of(scores)
        figures["robust_auroc_float"][budget] = auroc_of(worst([*clean, *attacked], rounded=False))
        figures["flipped"][budget] = _flipped(scores, threshold)
    return figures


def _flipped(scores: dict[str, tuple[int, float]], threshold: float) -> list[int]:
    good = sum(score > threshold for label, score in scores.values() if label == 0)
    return [good, sum(score <= threshold for label, score in scores.values() if label == 1)]
