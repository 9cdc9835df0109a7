"""``advrad-fast bench``: what the CPU path does on this machine, as ratios and shares measured in one run.  Needs PyTorch.

No figure of an operation, network or detector is given unless its parity with the reference has just been checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from advrad_fast.bench import inspection, network, operations, peaks, votes
from advrad_fast.config import DetectorConfig, UNetConfig
from advrad_fast.graph import expected_tensors
from advrad_fast.image_paths import list_images
from advrad_fast.images import load_image
from advrad_fast.model import ModelFile
from advrad_fast.training.trainer import tune_malloc

#: A network of the paper's kind at a scale that a CPU can run: 64 channels at full resolution, GroupNorm, attention.
PAPER_LIKE = UNetConfig(
    in_channels=3,
    base_channels=64,
    channel_mult=(1, 1, 2, 2, 4),
    attention_resolutions=(16,),
    patch=1,
    prediction="eps",
)

PARTS = ("operations", "network", "inspect", "votes", "paper-like")


def run(
    model: Path,
    *,
    frames: Path | None = None,
    parts: tuple[str, ...] = ("operations", "network", "inspect", "votes"),
    seconds: float = 4.0,
    threads: int | None = None,
    compile_torch: bool = True,
) -> Iterator[dict[str, Any]]:
    """Measure and yield a row at a time; under ``details``: peaks, versions, parity, stages, what was timed.

    Args:
        model: a model file.
        frames: a file, folder or pattern of images that the model is for; without one only drawn frames are used.
        parts: of :data:`PARTS`.
        seconds: for each set of contestants.
        threads: of the fused operations and the engine; None for the machine's.

    Raises:
        InferenceError: an operation, network or detector differs from the reference by more than its bound.
    """
    # PyTorch gains from it, the engine does not: the ratios are held against PyTorch at its best.
    tune_malloc()
    loaded = ModelFile.load(model)
    top = peaks.measure(seconds=seconds)
    common = {
        "peaks": {"copy_GB_s": round(top.copy / 1e9, 1), "fp32_TFLOP_s": _tera(top.fp32), "bf16_TFLOP_s": _tera(top.bf16)},
        "versions": {name: version(name) for name in ("advrad-fast", "openvino", "torch", "numpy")},
    }
    for row, details in _rows(model, loaded, top, frames, parts, seconds, threads, compile_torch):
        yield {**row, "details": {**common, **details}}


def _rows(
    model: Path,
    loaded: ModelFile,
    top: peaks.Peaks,
    frames: Path | None,
    parts: tuple[str, ...],
    seconds: float,
    threads: int | None,
    compile_torch: bool,
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    options: dict[str, Any] = {"seconds": seconds, "threads": threads, "compile_torch": compile_torch}
    if "operations" in parts:
        yield from ((row, {}) for row in operations.rows(top, **options))
    if "network" in parts:
        yield from network.rows(model.stem, loaded.config, loaded.weights, top, **options)
    if "paper-like" in parts:
        weights = {n: random_weights(s, i) for i, (n, s) in enumerate(expected_tensors(PAPER_LIKE).items())}
        yield from network.rows("paper-like", DetectorConfig(unet=PAPER_LIKE), weights, top, **options)
    if "votes" in parts:
        yield from votes.rows(model.stem, loaded, seconds=seconds, threads=threads)
    if "inspect" in parts:
        paths = [] if frames is None else list_images([frames])
        chosen = {str(p): load_image(p) for p in paths[:: max(1, len(paths) // 20)][:20]}
        yield from inspection.rows(model.stem, loaded, chosen, seconds=seconds, threads=threads)


def _tera(rate: float) -> float:
    return round(rate / 1e12, 3)


def random_weights(shape: tuple[int, ...], seed: int) -> Any:
    """Weights under which activations stay near 1: the time does not depend on their values, parity checks do."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape, dtype=np.float32)
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
    return values / np.float32(fan_in**0.5) if len(shape) > 1 else np.float32(1.0) + np.float32(0.1) * values


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as text, for a terminal."""
    heads = ("name", "shape", "batch", "precision", "p50 ms", "p20", "p80", "x eager", "x best torch", "of peak")

    def cell(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    lines: list[tuple[str, ...]] = [heads]
    for r in rows:
        share = "-" if r["peak_share"] is None else f"{100 * r['peak_share']:.0f} %"
        times = (cell(r[key], 2 if r[key] < 100 else 0) for key in ("p50_ms", "p20_ms", "p80_ms"))
        ratios = (cell(r[key], 2) for key in ("ratio_eager", "ratio_best_torch"))
        size = " x ".join(map(str, r["shape"])) or "-"
        lines.append((r["name"], size, str(r["batch"]), r["precision"], *times, *ratios, share))
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
