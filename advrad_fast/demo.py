"""The demo: real electroluminescence images of solar cells, and the detector of them that comes with the package.

The images are the PyPI package ``elpv-dataset`` (Deitsch et al., Solar Energy 2019; Buerhop-Lutz et al. 2018), CC BY-NC-SA 4.0.
Used are its monocrystalline cells labelled functional (probability 0) and defective (probability 1).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from advrad_fast.detector import Detector, Inspection
from advrad_fast.errors import DatasetError, expected
from advrad_fast.evaluation import report
from advrad_fast.evaluation.datasets import Dataset, Sample, load_dataset
from advrad_fast.evaluation.evaluate import evaluate, table
from advrad_fast.images import load_image
from advrad_fast.overlay import overlay

#: Functional cells that the demo's detector was trained, fitted and calibrated on; the others are held out.
TRAINING_CELLS = 411

_SHOWN = 12  # cells of each label on the page

_INTRODUCTION = "Monocrystalline cells, none of them seen in training: functional ones, and ones that experts called defective."
_CREDIT = "Images: elpv-dataset (Deitsch et al. 2019, Buerhop-Lutz et al. 2018), CC BY-NC-SA 4.0."


@dataclass(frozen=True)
class Cells:
    """Paths of the monocrystalline cells."""

    train: list[Path]
    good: list[Path]
    defective: list[Path]


def cells() -> Cells:
    """The split: cells in the order of their file names' SHA-256, the first 411 functional ones for training.

    Raises:
        DatasetError: ``elpv-dataset`` is not installed, or not as expected.
    """
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise DatasetError("the demo's images are the package elpv-dataset: pip install elpv-dataset")
    data = Path(spec.origin).parent / "data"
    try:
        rows = [line.split() for line in (data / "labels.csv").read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise DatasetError(f"elpv-dataset has no labels.csv: {error}") from error
    chosen: dict[float, list[Path]] = {0.0: [], 1.0: []}
    for name, probability, kind in rows:
        if kind == "mono" and float(probability) in chosen:
            chosen[float(probability)].append(data / name)
    for paths in chosen.values():
        paths.sort(key=lambda p: hashlib.sha256(p.name.encode()).hexdigest())
    good = chosen[0.0]
    if len(good) <= TRAINING_CELLS:
        raise DatasetError(expected("functional monocrystalline cells in elpv-dataset", f"over {TRAINING_CELLS}", len(good)))
    return Cells(good[:TRAINING_CELLS], good[TRAINING_CELLS:], chosen[1.0])


def prepare(folder: Path) -> None:
    """Copy the cells into ``folder`` in MVTec AD layout, so that the demo's detector can be trained anew."""
    found = cells()
    for name, paths in (("train/good", found.train), ("test/good", found.good), ("test/defective", found.defective)):
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        for path in paths:
            shutil.copy(path, target / path.name)
    load_dataset(folder)


def run(out: Path, *, limit: int | None = None, backend: str = "auto") -> int:
    """Inspect the held-out cells, print the figures, write heat maps, figures and a page into ``out``.

    Args:
        limit: at most this many good and this many defective cells.

    Returns:
        0.
    """
    found = cells()
    test = [Sample(p, 0, "good", None) for p in found.good[:limit]]
    test += [Sample(p, 1, "defective", None) for p in found.defective[:limit]]
    model = files("advrad_fast") / "data" / "elpv-mono.safetensors"
    with as_file(model) as path:
        detector = Detector.load(path, backend=backend)
    detector.inspect(load_image(found.train[0]))  # warm up: the first frame pays for memory
    results: list[Inspection] = []

    def note(sample: Sample, result: Inspection) -> None:
        results.append(result)
        if sys.stderr.isatty() or len(results) % 100 == 0 or len(results) == len(test):
            sys.stderr.write(f"\r{len(results)}/{len(test)} cells" + ("" if sys.stderr.isatty() else "\n"))

    evaluation = evaluate(detector, Dataset("elpv-mono", found.train, test), pixels=False, on_sample=note)
    out.mkdir(parents=True, exist_ok=True)
    shown = report.choose(evaluation, _SHOWN)
    for index in shown:
        sample = test[index]
        frame = load_image(sample.path)
        overlay(frame, detector.inspect(frame)).save(out / f"{sample.defect}-{sample.path.stem}.png")
    (out / "figures.json").write_text(json.dumps(evaluation.figures, indent=1) + "\n", encoding="utf-8")
    category = report.collect(evaluation, results, detector, model.name, shown=_SHOWN)
    report.write(out, category, title="Solar cells under electroluminescence", introduction=_INTRODUCTION, credit=_CREDIT)
    sys.stdout.write("cell                     label      outcome       score   p-value\n")
    for index in shown:
        sample, result = test[index], results[index]
        row = f"{sample.path.name:24s} {sample.defect:10s} {result.outcome!s:8s}"
        sys.stdout.write(f"{row} {result.score:10.5g}  {result.p_value:.3f}\n")
    sys.stdout.write(table(evaluation) + "\n")
    sys.stdout.write(f"heat maps and the page: {out / 'index.html'}\n")
    return 0
