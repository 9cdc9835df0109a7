"""What Ray costs a batch inspection: files over two workers of one thread each, beside plain loops in the same run.

    python benchmarks/spread.py [MODEL] [--images 2000] [--workers 2] [--repeats 5] [--certify]

Three contestants take turns on the same PNG files, with the same detector on one thread each:

- ``loop``: one process, one file after the other;
- ``loops``: as many processes as workers at the same time, each with its share of the files.
  What they lose against ``loop`` the machine takes (shared cores, caches, memory), not Ray;
- ``ray``: the workers of a cluster that is up, through ``inspect_files`` (``certify_files``), rows in order.

All processes are up and have inspected once, outside the time taken.  Results must be equal.  Throughput is files a second and
worker; the overhead of Ray is the time of ``ray`` over that of ``loops``, less one, at the median over the repeats.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from advrad_fast import Detector, ModelFile
from advrad_fast.batch import certify_files, inspect_files, row

BUILT_IN = Path(__file__).parent.parent / "advrad_fast" / "data" / "elpv-mono.safetensors"
_made: list[Detector] = []  # in a worker


def detector(model: ModelFile) -> Detector:
    """One a process, kept from run to run, as a worker of long standing has it."""
    if not _made:
        _made.append(Detector(model, backend="cpu", threads=1))
    return _made[0]


def results(model: ModelFile, paths: list[Path], certify: bool, ray: str | None) -> list[Any]:
    setup = partial(detector, model)
    if certify:
        return [c for _, c, _ in certify_files(setup, paths, max_votes=64, seed=1, ray=ray)]
    return [{**row(path, found), "ms": None} for path, found, _ in inspect_files(setup, paths, ray=ray)]


def looping(model: Path, paths: list[Path], certify: bool, pipe: Connection) -> None:
    """A process of ``loops``: runs its share whenever it is told to, until it is told to end."""
    os.environ["OMP_NUM_THREADS"] = "1"
    loaded = ModelFile.load(model)
    results(loaded, paths[:2], certify, None)
    pipe.send(None)
    while pipe.recv():
        pipe.send(results(loaded, paths, certify, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=BUILT_IN)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--certify", action="store_true", help="64 votes a file, in place of inspections")
    options = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    folder = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))  # workers import this file
    import ray
    import spread  # by the name that workers know it by, not __main__

    model = ModelFile.load(options.model)
    workers = options.workers
    with tempfile.TemporaryDirectory() as images:
        paths = spread.pictures(Path(images), options.images, options.size)
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        context = multiprocessing.get_context("spawn")
        pipes, processes = [], []
        for i in range(workers):
            mine, theirs = context.Pipe()
            share = paths[i::workers]
            process = context.Process(target=spread.looping, args=(options.model, share, options.certify, theirs), daemon=True)
            process.start()
            pipes.append(mine)
            processes.append(process)

        def loops() -> list[Any]:
            for pipe in pipes:
                pipe.send(True)
            shares = [pipe.recv() for pipe in pipes]
            return [shares[i % workers][i // workers] for i in range(len(paths))]

        contestants = {
            "loop": lambda: spread.results(model, paths, options.certify, None),
            "loops": loops,
            "ray": lambda: spread.results(model, paths, options.certify, "local"),
        }
        wanted = contestants["loop"]()
        for pipe in pipes:
            pipe.recv()
        contestants["ray"]()
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(options.repeats):
            for name, contestant in contestants.items():
                start = time.perf_counter()
                found = contestant()
                times[name].append(time.perf_counter() - start)
                if found != wanted:
                    raise SystemExit(f"{name}: other results than the first loop's")
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.send(False)
            process.join()
        ray.shutdown()
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    rates = {name: len(paths) / taken / (1 if name == "loop" else workers) for name, taken in medians.items()}
    turns = list(zip(times["loop"], times["loops"], times["ray"], strict=True))
    against = {
        "loops": statistics.median(cluster / several for _, several, cluster in turns) - 1.0,
        "loop": statistics.median(cluster * workers / one for one, _, cluster in turns) - 1.0,
    }
    print(
        json.dumps(
            {
                "model": options.model.name,
                "what": "certify" if options.certify else "inspect",
                "images": len(paths),
                "workers": workers,
                "cores": os.cpu_count(),
                "files_a_second_and_worker": {name: round(rate, 1) for name, rate in rates.items()},
                "overhead_of_ray_against_loops": round(against["loops"], 4),
                "overhead_of_ray_against_loop": round(against["loop"], 4),
                "seconds": {name: [round(t, 3) for t in taken] for name, taken in times.items()},
            }
        )
    )


def pictures(folder: Path, count: int, size: int) -> list[Path]:
    """Parts with the grain of a camera, so that they decode as photographs do."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    paths = []
    for i in range(count):
        grey = np.where(np.hypot(x - size / 2, y - size / 2) < 0.4 * size, 90.0, 200.0) + rng.normal(0.0, 4.0, (size, size))
        paths.append(folder / f"{i:05d}.png")
        Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB").save(paths[-1], compress_level=1)
    return paths


if __name__ == "__main__":
    main()
