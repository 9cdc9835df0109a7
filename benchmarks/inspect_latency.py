"""``inspect`` on the cpu backend against the reference backend: parity first, then the ratio of latencies in one run.

    python benchmarks/inspect_latency.py [MODEL] [--frames FOLDER] [--rounds N] [--rows FILE]

The model is the demo's unless one is named.  The backends take turns, frame by frame, so that a busy machine slows both.  If a
parity bound is broken no ratio is printed and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

from advrad_fast import Detector
from advrad_fast.demo import cells
from advrad_fast.images import list_images, load_image

#: Worst difference allowed between the backends, by precision of the cpu backend, as a share of the threshold.
BOUNDS = {"fp32": 1e-3, "bf16": 5e-2}


def frames(folder: Path | None, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Black, white, saturated, noise and real frames."""
    rng = np.random.default_rng(0)
    drawn = {
        "black": np.zeros(shape, np.uint8),
        "white": np.full(shape, 255, np.uint8),
        "saturated": np.where(np.indices(shape).sum(axis=0) // 32 % 2, 255, 0).astype(np.uint8),
        "noise": rng.integers(0, 256, shape, dtype=np.uint8),
    }
    if folder is not None:
        paths = list_images([folder])
    else:
        found = cells()
        paths = found.good[:10] + found.defective[:10]
    step = max(1, len(paths) // 20)
    return drawn | {str(p): load_image(p) for p in paths[::step][:20]}


def parity(cpu: Detector, reference: Detector, inputs: dict[str, np.ndarray]) -> dict[str, float]:
    """Worst and 99th-percentile differences, in units of the threshold, and decisions that differ outside that band."""
    scores, tails, flips = [], [], 0
    for frame in inputs.values():
        a, b = cpu.inspect(frame), reference.inspect(frame)
        if a.score is None or b.score is None:
            flips += a.outcome != b.outcome
            continue
        unit = max(abs(b.score), reference.threshold)
        scores.append(abs(a.score - b.score) / unit)
        tails.append(abs(np.quantile(a.anomaly_map, 0.999) - np.quantile(b.anomaly_map, 0.999)) / unit)
        flips += a.outcome != b.outcome and abs(b.score - b.threshold) > scores[-1] * unit
    return {
        "score_worst": float(max(scores)),
        "score_p99": float(np.quantile(scores, 0.99)),
        "map_p999_worst": float(max(tails)),
        "flips_outside_band": int(flips),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--frames", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--rows", type=Path, help="append JSON rows to this file")
    options = parser.parse_args()
    with as_file(files("advrad_fast") / "data" / "elpv-mono.safetensors") as demo:
        path = options.model or demo
        reference = Detector.load(path, backend="reference")
        detectors = {p: Detector.load(path, backend="cpu", precision=p) for p in ("fp32", "bf16")}
    image = reference.model.config.image
    inputs = frames(options.frames, (image.height, image.width, image.channels))
    failed = False
    rows: list[dict[str, Any]] = []
    for precision, cpu in detectors.items():
        differences = parity(cpu, reference, inputs)
        print(f"{cpu.backend} against {reference.backend}: {json.dumps(differences)}")
        if differences["score_worst"] > BOUNDS[precision] or differences["flips_outside_band"]:
            print(f"parity bound {BOUNDS[precision]} broken: no ratio")
            failed = True
            continue
        real = [f for name, f in inputs.items() if "/" in name]
        times: dict[str, list[float]] = {"cpu": [], "reference": []}
        stages: list[dict[str, float]] = []
        for i in range(options.rounds + 3):
            for name, detector in (("cpu", cpu), ("reference", reference)):
                start = time.perf_counter()
                result = detector.inspect(real[i % len(real)])
                if i >= 3:  # the first ones pay for memory
                    times[name].append((time.perf_counter() - start) * 1e3)
                    if name == "cpu":
                        stages.append(dict(result.timings))
        p20, p50, p80, p99 = np.quantile(times["cpu"], [0.2, 0.5, 0.8, 0.99])
        eager = float(np.median(times["reference"]))
        row = {
            "name": "inspect",
            "model": Path(path).name,
            "shape": [image.height, image.width, image.channels],
            "batch": 1,
            "backend": "cpu",
            "precision": precision,
            "p50_ms": round(p50, 2),
            "p20_ms": round(p20, 2),
            "p80_ms": round(p80, 2),
            "p99_ms": round(p99, 2),
            "ratio_eager": round(eager / p50, 2),
            "stages_p50_ms": {k: round(float(np.median([s[k] for s in stages])), 3) for k in stages[0]},
            "parity": differences,
            "versions": {name: version(name) for name in ("advrad-fast", "openvino", "torch", "numpy")},
            "commit": _output("git", "rev-parse", "--short", "HEAD"),
            "machine": _cpu(),
        }
        rows.append(row)
        print(
            f"  p50 {p50:.2f} ms (p20 {p20:.2f}, p80 {p80:.2f}, p99 {p99:.2f}); reference {eager:.1f} ms: {eager / p50:.2f} times"
        )
        print(f"  stages, ms: {row['stages_p50_ms']}")
    if options.rows is not None:
        with options.rows.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return 1 if failed else 0


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu() -> str:
    features = ""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = next(line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name"))
        features = ", ".join(f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f" {f}" in info)
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {os.cpu_count()} cores, {features}"


if __name__ == "__main__":
    sys.exit(main())
