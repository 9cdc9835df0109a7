"""Which score keeps its power under smoothing noise: certified AUROC of many of them, on the same draws.

    python benchmarks/certified_ladder.py bottle.safetensors bottle/ --sigma 0.125 --out certified_ladder.jsonl

The model certifies at sigma (``advrad-fast train`` makes it so), the dataset is in MVTec AD layout.  Every score is a function of
the error between x + delta and its reconstruction and of nothing else, so every one of them may be certified.  Statistics come
from training normals; nothing is chosen on the test images, on which the figures are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from advrad_fast import _native as operations
from advrad_fast import lattice, schedule
from advrad_fast.backends.cpu import compile_network
from advrad_fast.bench.timing import commit, machine
from advrad_fast.certify import certified_auroc, vote_probability
from advrad_fast.detector import Detector
from advrad_fast.evaluation.datasets import load_dataset
from advrad_fast.evaluation.metrics import auroc
from advrad_fast.images import load_image, prepare
from advrad_fast.model import ModelFile
from advrad_fast.training.dataset import load_split

RADII = (0.05, 0.1, 0.2, 0.3, 0.5)
BATCH = 8
CELL = 4  # the residual is kept as means over cells of so many pixels; finer errors as means of their squares

Map = Callable[[Tensor], Tensor]


def box(x: Tensor, size: int) -> Tensor:
    """The mean over windows of size x size cells, edges repeated."""
    if size == 1:
        return x
    before, after = size // 2, size - 1 - size // 2
    x = F.avg_pool2d(F.pad(x, (0, 0, before, after), mode="replicate"), (size, 1), 1)
    return F.avg_pool2d(F.pad(x, (before, after, 0, 0), mode="replicate"), (1, size), 1)


class Cells(NamedTuple):
    """Of some draws: the residual at scale 1/4, and the squares of the finer ones averaged over cells."""

    residual: Tensor  # (draws, C, h, w)
    fine: Tensor  # (draws, 2, h, w): scales 1 and 1/2


def cells(error: Tensor) -> Cells:
    half = F.avg_pool2d(error, 2)
    whole = F.avg_pool2d(error.square().mean(1, keepdim=True), CELL)
    halves = F.avg_pool2d(half.square().mean(1, keepdim=True), CELL // 2)
    return Cells(F.avg_pool2d(half, 2), torch.cat([whole, halves], 1))


def squares(weights: tuple[float, ...], size: int) -> Callable[[Cells], Tensor]:
    """Algorithm 4 on the grid of cells: the weighted squares of the four scales, then the mean filter."""

    def maps(c: Cells) -> Tensor:
        quarter = c.residual.square().mean(1, keepdim=True)
        eighth = F.avg_pool2d(c.residual, 2, ceil_mode=True, count_include_pad=False).square().mean(1, keepdim=True)
        eighth = eighth.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : quarter.shape[2], : quarter.shape[3]]
        parts = (c.fine[:, :1], c.fine[:, 1:], quarter, eighth)
        total = torch.zeros_like(quarter)
        for w, part in zip(weights, parts, strict=True):
            total += w * part
        return box(total, size)

    return maps


def signed(*sizes: int) -> Callable[[Cells], Tensor]:
    """Residuals averaged, sign and all, over windows of these sizes: a matched filter for blobs."""
    return lambda c: torch.cat([box(c.residual, size) for size in sizes], 1)


def largest(z: Tensor) -> Tensor:
    return z.flatten(1).amax(1)


def magnitude(z: Tensor) -> Tensor:
    return z.abs().flatten(1).amax(1)


def energy(z: Tensor) -> Tensor:
    return z.square().sum(1).flatten(1).amax(1)


def top(k: int, of: str = "z") -> Map:
    """The mean of the k largest cells: a smoother maximum."""

    def pool(z: Tensor) -> Tensor:
        values = z.square().sum(1) if of == "energy" else z
        return values.flatten(1).topk(k, dim=1).values.mean(1)

    return pool


def soft(z: Tensor) -> Tensor:
    return torch.logsumexp(z.flatten(1), 1)


EQUAL = (0.25,) * 4

#: name -> maps of a draw, whether they are divided by their spread, what becomes of the map.
RUNGS: dict[str, tuple[Callable[[Cells], Tensor], bool, Map]] = {
    "Algorithm 4: equal weights, 12 px, no spread": (squares(EQUAL, 3), False, magnitude),
    "over its spread": (squares(EQUAL, 3), True, magnitude),
    "1/4 alone, 12 px": (squares((0, 0, 1, 0), 3), True, largest),
    "1/8 alone, 12 px": (squares((0, 0, 0, 1), 3), True, largest),
    "1/4 and 1/8, 12 px": (squares((0, 0, 0.36, 0.64), 3), True, largest),
    "1/4 and 1/8, 20 px": (squares((0, 0, 0.36, 0.64), 5), True, largest),
    "1/4 and 1/8, 12 px, mean of the top 40": (squares((0, 0, 0.36, 0.64), 3), True, top(40)),
    "1/4 and 1/8, 12 px, log-sum-exp": (squares((0, 0, 0.36, 0.64), 3), True, soft),
    "signed means, 4 px": (signed(1), True, magnitude),
    "signed means, 8 px": (signed(2), True, magnitude),
    "signed means, 16 px": (signed(4), True, magnitude),
    "signed means, 32 px": (signed(8), True, magnitude),
    "signed means, 8 px, energy over channels": (signed(2), True, energy),
    "signed means, 4 + 8 + 16 px, energy": (signed(1, 2, 4), True, energy),
    "signed means, 4 + 8 + 16 px, energy, mean of the top 40": (signed(1, 2, 4), True, top(40, "energy")),
}
OWN = "the model's own score"


class Drawer:
    """Residuals of noised images at one sigma, by the cpu backend's engine."""

    def __init__(self, model: ModelFile, sigma: float) -> None:
        smoothing = model.smoothing[model.sigmas.index(sigma)]
        config = smoothing.config(model.config)
        self.request = compile_network(config, smoothing.weights(config.unet, model.weights), batch=BATCH).request()
        bar = float(schedule.alpha_bar(config.diffusion)[config.diffusion.timestep])
        self.c = schedule.coefficients(config.unet.prediction, bar, config.unet.sigma_data)
        self.a, self.b = schedule.error_coefficients(self.c, smoothed=True)
        self.lattice = operations.Lattice(lattice.thresholds(sigma))

    def cells(self, image: np.ndarray, seed: int, draws: int) -> Cells:
        parts = []
        for first in range(0, draws, BATCH):
            c, request = self.c, self.request
            operations.noise(
                np.ascontiguousarray(image[None]), BATCH, seed, c.signal, c.noise, c.input_scale, request.x,
                first_draw=first, lattice=self.lattice,
            )  # fmt: skip
            outputs = request.infer()
            parts.append(cells(self.a * _floats(request.x) + self.b * _floats(outputs)))
        return Cells(*(torch.cat(some)[:draws] for some in zip(*parts, strict=True)))


def _floats(values: np.ndarray) -> Tensor:
    """fp32, also from the bits of bf16."""
    if values.dtype == np.float32:
        return torch.from_numpy(values)
    return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).float()


def rows(model_path: Path, data: Path, sigma: float, draws: int, seed: int) -> Iterator[dict[str, object]]:
    model = ModelFile.load(model_path)
    dataset = load_dataset(data)
    image = model.config.image
    normals = load_split(dataset.train, image, seed).train
    drawer = Drawer(model, sigma)
    start = time.monotonic()
    sums: dict[str, list[Tensor]] = {}
    count = 0
    for i, normal in enumerate(normals[:120]):
        some = drawer.cells(normal, 10_000 + i, BATCH)
        count += BATCH
        for name, (maps, _, _) in RUNGS.items():
            y = maps(some).double()
            kept = sums.setdefault(name, [torch.zeros_like(y[0]), torch.zeros_like(y[0])])
            kept[0] += y.sum(0)
            kept[1] += y.square().sum(0)
    mu = {name: (first / count).float() for name, (first, _) in sums.items()}
    deviation = {
        name: (second / count - (first / count).square()).clamp_min(1e-20).sqrt().float()
        for name, (first, second) in sums.items()
    }
    detector = Detector(model, backend="cpu")
    labels = np.array([sample.label for sample in dataset.test])
    values = {name: np.empty((len(labels), draws)) for name in (*RUNGS, OWN)}
    for i, sample in enumerate(dataset.test):
        frame = load_image(sample.path)
        values[OWN][i] = detector.smoothed_scores(frame, draws, sigma=sigma, seed=50_000 + i)
        some = drawer.cells(prepare(frame, image).image, 50_000 + i, draws)
        for name, (maps, spread, pool) in RUNGS.items():
            z = maps(some) - mu[name]
            values[name][i] = pool(z / deviation[name] if spread else z).numpy()
        print(f"\r{i + 1}/{len(labels)} images, {time.monotonic() - start:.0f} s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    pixels = image.height * image.width * image.channels
    for name, scores in values.items():
        plug_in, reached = [], [r for r in RADII if r / sigma < 3.0]
        for r in reached:
            p = vote_probability(r, sigma, pixels=pixels)
            side = np.where(labels == 1, np.quantile(scores, 1 - p, axis=1), np.quantile(scores, p, axis=1))
            plug_in.append(auroc(labels, side))
        certified = certified_auroc(labels, scores, reached, sigma=sigma, pixels=pixels)
        yield {
            "data": data.name,
            "sigma": sigma,
            "score": name,
            "draws": draws,
            "median_auroc": auroc(labels, np.median(scores, axis=1)),
            "plug_in_auroc": dict(zip(map(str, reached), plug_in, strict=True)),
            "certified_auroc": dict(zip(map(str, reached), certified.tolist(), strict=True)),
            "commit": commit(),
            "machine": machine(),
        }


def table(found: list[dict]) -> str:
    """Rows of one dataset and sigma as markdown: certified AUROC; in brackets, uncorrected for finitely many draws."""
    reached = list(found[0]["plug_in_auroc"])
    lines = ["| score | median | " + " | ".join(f"r = {r}" for r in reached) + " |", "|---|---|" + "---|" * len(reached)]
    for row in found:
        cells_ = [f"{100 * row['certified_auroc'][r]:.1f} ({100 * row['plug_in_auroc'][r]:.1f})" for r in reached]
        lines.append(f"| {row['score']} | {100 * row['median_auroc']:.1f} | " + " | ".join(cells_) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sigma", type=float, required=True)
    parser.add_argument("--draws", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0, help="of the split that the model was trained with")
    parser.add_argument("--out", type=Path, help="append rows to this file")
    options = parser.parse_args()
    found = list(rows(options.model, options.data, options.sigma, options.draws, options.seed))
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
    print(table(found))


if __name__ == "__main__":
    main()
