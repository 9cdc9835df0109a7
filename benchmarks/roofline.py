"""Where the native engine's time goes, operation by operation, against what the machine could do: tables in Markdown.

    python benchmarks/roofline.py [MODEL] [--paper-like] [--batch 1]

An operation's floor is the larger of its products at the bf16 peak and its tensors, each read or written once, at the rate of
a copy that stays in the cache; both are measured in the same run.  FLOPs are counted as the operation does them (four 2x2 phases
for a doubling), without padding to whole tiles.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from advrad_fast import bench
from advrad_fast.backends.native_engine import KERNELS, Builder, build_network, physical_cores
from advrad_fast.bench import peaks
from advrad_fast.bench.timing import commit, machine
from advrad_fast.config import DetectorConfig
from advrad_fast.graph import expected_tensors
from advrad_fast.model import ModelFile

DEMO = Path(bench.__file__).parents[1] / "data" / "elpv-mono.safetensors"


class Recorder:
    """Stands in for the network while it is built: what every operation is, multiplies and moves."""

    def __init__(self, batch: int, height: int, width: int, patch: int, channels: int) -> None:
        self.batch = batch
        self.shapes = [(height // patch, width // patch, channels * patch**2)]
        self.output = self.shapes[0]
        size = 4 * batch * channels * height * width
        self.operations: list[tuple[str, str, float, float]] = [("input, folded", "folding", 0.0, 1.5 * size)]

    def tensor(self, height: int, width: int, channels: int) -> int:
        self.shapes.append((height, width, channels))
        return len(self.shapes) - 1

    def bytes(self, tensor: int) -> float:
        return 2.0 * self.batch * float(np.prod(self.shapes[tensor]))

    def convolution(self, out: int | None, bias: Any, phases: Any, **options: Any) -> None:
        height, width, _ = self.output if out is None else self.shapes[out]
        pixels = self.batch * height * width // len(phases)
        products = sum(kernel.size for sources in phases for _, kernel, *_ in sources)
        moved = 4.0 * pixels * len(bias) if out is None else self.bytes(out)
        moved += sum(self.bytes(tensor) for tensor in {source[0] for sources in phases for source in sources})
        if options.get("residual") is not None:
            moved += self.bytes(options["residual"])
        kernels = " + ".join(f"{k.shape[2]}x{k.shape[3]} of {k.shape[1]}" for _, k, *_ in phases[0])
        stride = phases[0][0][2]
        kind = (
            "head" if out is None else "doubling" if len(phases) == 4 else "halving" if stride == 2 else f"at {height} x {width}"
        )
        text = f"{kernels} to {len(bias)}, {height} x {width}"
        self.operations.append((text + (", norm" if options.get("norm") else ""), kind, 2.0 * pixels * products, moved))

    def attention(self, tensor: int, out: int, heads: int) -> None:
        height, width, channels = self.shapes[out]
        positions = height * width
        self.operations.append((f"attention, {positions} positions: packing", "attention", 0.0, 2 * self.bytes(tensor)))
        work = 4.0 * self.batch * positions**2 * channels
        self.operations.append((f"attention, {positions} positions", "attention", work, self.bytes(tensor) + self.bytes(out)))


def cached_copy(seconds: float = 1.0) -> float:
    """Bytes a second, read and written, of a copy of 512 KB by one thread, times the cores."""
    a, b = (np.zeros(1 << 18, dtype=np.uint8) for _ in range(2))
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(20):
            np.copyto(a, b)
        best = max(best, 20 * 2 * a.nbytes / (time.perf_counter() - start))
    return best * physical_cores()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--paper-like", action="store_true", help="the network of `advrad-fast bench --parts paper-like` instead")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=200)
    options = parser.parse_args()
    if options.paper_like:
        config = DetectorConfig(unet=bench.PAPER_LIKE)
        weights = {n: bench.random_weights(s, i) for i, (n, s) in enumerate(expected_tensors(config.unet).items())}
    else:
        model = ModelFile.load(options.model)
        config, weights = model.config, model.weights
    image, unet = config.image, config.unet
    size = {"height": image.height, "width": image.width, "batch": options.batch, "timestep": config.diffusion.timestep}
    recorder = Recorder(options.batch, image.height, image.width, unet.patch, unet.in_channels)
    Builder(recorder, unet, weights, (image.height, image.width), config.diffusion.timestep).unet()  # type: ignore[arg-type]

    top, cached = peaks.measure(seconds=3.0), cached_copy()
    network = build_network(unet, weights, threads=physical_cores(), kernels=KERNELS[0], **size)
    workspace = network.workspace()
    shape = (options.batch, unet.in_channels, image.height, image.width)
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    out = np.empty_like(x)
    runs = [network.profile(workspace, x, out) for _ in range(options.runs)]
    times = np.median(runs[options.runs // 10 :], axis=0)

    name = "paper-like" if options.paper_like else options.model.stem
    print(f"{name}, batch {options.batch}, {KERNELS[0]} kernels; {machine()}; commit {commit()}.")
    print(f"Peaks: {top.bf16 / 1e12:.2f} TFLOP/s bf16; copy {cached / 1e9:.0f} GB/s in the cache, {top.copy / 1e9:.0f} beyond.\n")
    print("| operation | MFLOP | MB | floor us | us | of the floor |\n|---|---|---|---|---|---|")
    classes: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for (text, kind, work, moved), seconds in zip(recorder.operations, times, strict=True):
        floor = max(work / top.bf16, moved / cached)
        share = 100 * floor / seconds
        print(f"| {text} | {work / 1e6:.0f} | {moved / 1e6:.2f} | {floor * 1e6:.0f} | {seconds * 1e6:.0f} | {share:.0f} % |")
        for i, value in enumerate((work, floor, seconds)):
            classes[kind][i] += value
    total = [sum(values[i] for values in classes.values()) for i in range(3)]
    print("\n| class | GFLOP | floor us | us | share of the time | TFLOP/s |\n|---|---|---|---|---|---|")
    for kind, (work, floor, seconds) in {**classes, "**all**": total}.items():
        share, rate = 100 * seconds / total[2], work / seconds / 1e12
        print(f"| {kind} | {work / 1e9:.2f} | {floor * 1e6:.0f} | {seconds * 1e6:.0f} | {share:.0f} % | {rate:.2f} |")


if __name__ == "__main__":
    main()
