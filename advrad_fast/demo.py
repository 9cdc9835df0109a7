"""The demo: real electroluminescence images of solar cells, and the detector of them that comes with the package.

The images are the PyPI package ``elpv-dataset`` (Deitsch et al., Solar Energy 2019; Buerhop-Lutz et al. 2018), CC BY-NC-SA 4.0.
Used are its monocrystalline cells labelled functional (probability 0) and defective (probability 1).
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import io
import json
import shutil
import statistics
import sys
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from advrad_fast.detector import Detector, Inspection
from advrad_fast.errors import DatasetError, expected
from advrad_fast.evaluation.datasets import Dataset, Sample, load_dataset
from advrad_fast.evaluation.evaluate import Evaluation, evaluate, table
from advrad_fast.images import load_image
from advrad_fast.overlay import FULL_SCALE, legend, overlay

#: Functional cells that the demo's detector was trained, fitted and calibrated on; the others are held out.
TRAINING_CELLS = 411

_SHOWN = 12  # cells of each label on the page

_Picture = tuple[int, NDArray[np.uint8], Image.Image]  # index of the cell, the cell, its heat map


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
    with as_file(files("advrad_fast") / "data" / "elpv-mono.safetensors") as path:
        detector = Detector.load(path, backend=backend)
    detector.inspect(load_image(found.train[0]))  # warm up: the first frame pays for memory
    results: list[Inspection] = []

    def note(sample: Sample, result: Inspection) -> None:
        results.append(result)
        if sys.stderr.isatty() or len(results) % 100 == 0 or len(results) == len(test):
            sys.stderr.write(f"\r{len(results)}/{len(test)} cells" + ("" if sys.stderr.isatty() else "\n"))

    evaluation = evaluate(detector, Dataset("elpv-mono", found.train, test), pixels=False, on_sample=note)
    out.mkdir(parents=True, exist_ok=True)
    shown = _choose(evaluation)
    pictures = []
    for index in shown:
        sample = test[index]
        frame = load_image(sample.path)
        picture = overlay(frame, detector.inspect(frame))
        picture.save(out / f"{sample.defect}-{sample.path.stem}.png")
        pictures.append((index, frame, picture))
    (out / "figures.json").write_text(json.dumps(evaluation.figures, indent=1) + "\n", encoding="utf-8")
    (out / "index.html").write_text(_page(evaluation, results, pictures, detector), encoding="utf-8")
    sys.stdout.write("cell                     label      outcome       score   p-value\n")
    for index in shown:
        sample, result = test[index], results[index]
        row = f"{sample.path.name:24s} {sample.defect:10s} {result.outcome!s:8s}"
        sys.stdout.write(f"{row} {result.score:10.5g}  {result.p_value:.3f}\n")
    sys.stdout.write(table(evaluation) + "\n")
    sys.stdout.write(f"heat maps and the page: {out / 'index.html'}\n")
    return 0


def _choose(evaluation: Evaluation) -> list[int]:
    """Cells to show, evenly spread over the ranks of the score, so that misses show as well as hits."""
    labels = np.array([s.label for s in evaluation.samples])
    shown: list[int] = []
    for label in (1, 0):
        order = [int(i) for i in np.argsort(-evaluation.scores) if labels[i] == label]
        places = np.unique(np.linspace(0, len(order) - 1, min(_SHOWN, len(order))).round().astype(int))
        shown += [order[p] for p in places]
    return shown


def _embed(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _page(evaluation: Evaluation, results: list[Inspection], pictures: list[_Picture], detector: Detector) -> str:
    f = evaluation.figures
    figures = []
    for index, frame, picture in pictures:
        sample, result = evaluation.samples[index], results[index]
        cell = Image.fromarray(frame[..., 0] if frame.shape[2] == 1 else frame)
        score = "-" if result.score is None else f"{result.score:.4g}"
        name = html.escape(sample.path.name)
        figures.append(
            f'<figure class="{result.outcome}"><img alt="{name}" src="{_embed(cell)}">'
            f'<img alt="heat map" src="{_embed(picture)}">'
            f"<figcaption><b>{result.outcome}</b> &middot; labelled {html.escape(sample.defect)} &middot; score {score}"
            f"<br>{name}</figcaption></figure>"
        )
    stages = ("prepare", "noise", "network", "error", "total")
    medians = [f"{stage} {statistics.median(r.timings[stage] for r in results):.2f}" for stage in stages]
    low, high = f["image_auroc_interval"]
    rows = {
        "cells": f"{f['n_good']} functional, {f['n_bad']} defective, none of them seen in training",
        "image AUROC": f"{100 * f['image_auroc']:.1f} (95 % interval {100 * low:.1f} to {100 * high:.1f})",
        "F1max": f"{100 * f['f1_max']:.1f}",
        "defective cells found": f"{f['defects_found']} of {f['n_bad']} at the threshold",
        "functional cells rejected": f"{f['false_alarms']} of {f['n_good']} at the threshold",
        "threshold": f"{f['threshold']:.4g}, set on calibration cells for a false-alarm rate of {detector.false_alarm_rate:.3g}",
        "backend": str(f["backend"]),
        "median ms a frame": ", ".join(medians),
    }
    lines = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
    return _TEMPLATE.format(rows=lines, figures="".join(figures), legend=_embed(legend()), full=f"{FULL_SCALE:g}")


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>advrad_fast: solar cells</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 74rem; padding: 0 1rem; color: #1c2430;
  background: #fafbfc }}
h1 {{ font-size: 1.5rem }} table {{ border-collapse: collapse; margin: 1rem 0 }}
th {{ text-align: left; font-weight: 600; padding: .2rem 1.2rem .2rem 0; vertical-align: top; white-space: nowrap }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem }}
figure {{ margin: 0; padding: .6rem; background: #fff; border: 1px solid #d9dee5; border-left: 6px solid #3b8f5a;
  border-radius: 6px }}
figure.DEFECT {{ border-left-color: #c0392b }} figure.ABSTAIN, figure.ERROR {{ border-left-color: #888 }}
figure img {{ width: 49%; border-radius: 3px }} figcaption {{ font-size: .85rem; color: #445 }}
.legend {{ display: flex; gap: .6rem; align-items: center; font-size: .85rem }}
</style></head><body>
<h1>Solar cells under electroluminescence</h1>
<p>Each held-out cell beside its anomaly map. The red bar marks what the detector calls a defect; every cell has the same
colour scale, whose middle is the threshold. Cells are spread evenly over the ranking of their label, so misses and false
alarms show too.</p>
<table>{rows}</table>
<p class="legend"><span>0</span><img alt="colour scale" src="{legend}"><span>{full} &times; threshold</span></p>
<main>{figures}</main>
<p>Images: elpv-dataset (Deitsch et al. 2019, Buerhop-Lutz et al. 2018), CC BY-NC-SA 4.0.</p>
</body></html>
"""
