"""Memory of a large frame's inspection in tiles.

    python benchmarks/large_frames.py MODEL [--height 3000] [--width 4096] [--overlap 32] [--fixed]

MODEL is any model file without alignment; its own network is the tile.  Peaks are the process's (VmHWM, Linux): with the
detector built and a frame of one tile inspected, with the colour frame in memory, and after its inspection with map and mask.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np

from advrad_fast import Detector, ModelFile
from advrad_fast.config import TilingConfig
from advrad_fast.tiles import starts


def peak() -> int:
    """The process's peak memory so far, MiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) // 1024 if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--height", type=int, default=3000)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--overlap", type=int, default=32)
    parser.add_argument("--fixed", action="store_true", help="with a normal map of the frame's size")
    options = parser.parse_args()
    model, size = dataclasses.replace(ModelFile.load(options.model), smoothing=()), (options.height, options.width)
    tile, rng = model.config.image.height, np.random.default_rng(0)
    one = Detector(model, backend="cpu")
    one.inspect(rng.integers(0, 256, (tile, tile, 3), dtype=np.uint8))
    peaks = {"detector": peak()}
    tiling = TilingConfig(options.overlap, size if options.fixed else None)
    if options.fixed:
        spread = None if model.spread is None else np.ones(size, np.float32)
        tiled = dataclasses.replace(model, mu=np.zeros(size, np.float32), spread=spread, tiling=tiling)
    else:
        tiled = dataclasses.replace(model, tiling=tiling)
    detector = Detector(tiled, backend="cpu")
    peaks["with the model's maps"] = peak()
    frame = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    peaks["with the frame"] = peak()
    detector.inspect(frame)
    peaks["after"] = peak()
    count = len(starts(size[0], tile, options.overlap)) * len(starts(size[1], tile, options.overlap))
    row = {"frame": size, "fixed": options.fixed, "tiles": count, "backend": detector.backend, "peak_mib": peaks}
    sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
