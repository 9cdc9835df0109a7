"""Which network for the ``fast`` preset: accuracy of short trainings against latency, a row a network and dataset.

    python benchmarks/sweep.py bottle/ screw/ --steps 1000 --out sweep.jsonl

Datasets are in MVTec AD layout.  Networks are trained on good parts alone, with default settings; the AUROC on the test images
says which would do, at this length of training.  Rows that are in the file already are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from advrad_fast.backends.cpu_network import compile_network
from advrad_fast.bench.network import flops
from advrad_fast.bench.timing import commit, machine
from advrad_fast.detector import Detector
from advrad_fast.evaluation.datasets import load_dataset
from advrad_fast.evaluation.evaluate import evaluate
from advrad_fast.model import ModelFile
from advrad_fast.training import pipeline

#: Changes to the preset's UNet, but the first.  The patch is that of a 256 x 256 input; the aligned screws get half of it.
NETWORKS = {
    "32 (1,2,4), patch 4": {},
    "32 (1,2,2), patch 4": {"channel_mult": (1, 2, 2)},
    "64 (1,2,2), patch 4": {"base_channels": 64, "channel_mult": (1, 2, 2)},
    "64 (1,2), patch 8": {"base_channels": 64, "channel_mult": (1, 2), "patch": 8},
    "32 (1,2,4), patch 4, GroupNorm": {"norm_groups": 32},
}


def run(name: str, data: Path, steps: int, seed: int) -> dict[str, object]:
    changes = dict(NETWORKS[name])
    if "patch" in changes and "screw" in data.name:
        changes["patch"] = changes["patch"] // 2
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        start = time.monotonic()
        pipeline.train(data, file, unet=changes, settings={"steps": steps, "seed": seed}, certify=())
        minutes = (time.monotonic() - start) / 60
        figures = evaluate(Detector.load(file), load_dataset(data)).figures
        model = ModelFile.load(file)
    request = compile_network(model.config, model.weights, batch=1).request()
    times = []
    for _ in range(60):
        time.sleep(0.003)
        start = time.perf_counter()
        request.infer()
        times.append((time.perf_counter() - start) * 1e3)
    config = model.config
    return {
        "network": name,
        "data": data.name,
        "steps": steps,
        "seed": seed,
        "patch": config.unet.patch,
        "parameters": int(sum(array.size for array in model.weights.values())),
        "GFLOP": round(flops(config, model.weights, 1) / 1e9, 2),
        "network_p50_ms": round(float(np.median(times)), 3),
        "minutes": round(minutes, 1),
        "timestep": config.diffusion.timestep,
        "filter_size": config.score.filter_size,
        **{key: figures[key] for key in ("image_auroc", "pixel_auroc", "aupro")},
        "commit": commit(),
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {(row["network"], row["data"], row["steps"], row["seed"]) for row in rows}
    for data in options.data:
        for name in NETWORKS:
            if (name, data.name, options.steps, options.seed) in done:
                continue
            row = run(name, data, options.steps, options.seed)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            sys.stderr.write(f"{row}\n")


if __name__ == "__main__":
    main()
