"""How often the pose rule lays a part right, in clean frames and with drawn shadows and clutter, with and without its outline.

    python benchmarks/pose.py GOOD_FRAMES FRAMES [--every 2] [--first 0] [--seed 1]

The rule is fitted on up to 60 of GOOD_FRAMES.  Right: within 2 degrees, and 3 % of the frame's shorter
side, of the silhouette's pose in the clean frame.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from advrad_fast.config import PoseConfig
from advrad_fast.errors import PartNotFoundError
from advrad_fast.images import list_images, load_image
from advrad_fast.pose import Affine, align, fit_pose

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from clutter import clutter, shadow  # type: ignore[import-not-found,unused-ignore]

HEIGHT, WIDTH = 96, 256
Frame = NDArray[np.uint8]


def find(frame: Frame, rule: PoseConfig) -> Affine | None:
    try:
        return align(frame, rule, HEIGHT, WIDTH)[1]
    except PartNotFoundError:
        return None


def off(a: Affine, b: Affine) -> tuple[float, float]:
    """Degrees and pixels between two poses."""
    turn = math.degrees(math.atan2(a[1, 0], a[0, 0]) - math.atan2(b[1, 0], b[0, 0]))
    return abs((turn + 180) % 360 - 180), float(np.hypot(*((a - b) @ [(WIDTH - 1) / 2, (HEIGHT - 1) / 2, 1.0])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("good", type=Path)
    parser.add_argument("frames", type=Path)
    parser.add_argument("--every", type=int, default=2, help="take every so-manieth frame")
    parser.add_argument("--first", type=int, default=0, help="from this one on")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    good = list_images(options.good)
    rule = fit_pose([load_image(path) for path in good[:: max(1, len(good) // 60)][:60]])
    before = dataclasses.replace(rule, profile=(), min_fit=0.0, trusted_fit=0.0)
    frames = [load_image(path) for path in list_images(options.frames)[options.first :: options.every]]
    clean = [find(frame, before) for frame in frames]
    pairs = [(f, c) for f, c in zip(frames, clean, strict=True) if c is not None]
    tones = (20, 110) if rule.dark_part else (150, 230)
    changes: dict[str, Callable[[Frame, np.random.Generator], Frame]] = {
        "clean": lambda f, rng: f,
        "shadow": shadow,
        "clutter": lambda f, rng: clutter(f, rng, tones),
        "clutter and shadow": lambda f, rng: shadow(clutter(f, rng, tones), rng),
    }
    for name, change in changes.items():
        for which, used in (("without outline", before), ("with outline", rule)):
            rng = np.random.default_rng(options.seed)
            counts = {"right": 0, "wrong": 0, "not found": 0}
            for frame, wanted in pairs:
                got = find(change(frame, rng), used)
                degrees, pixels = (0.0, 0.0) if got is None else off(got, wanted)
                right = degrees <= 2.0 and pixels <= 0.03 * min(frame.shape[:2])
                counts["not found" if got is None else "right" if right else "wrong"] += 1
            sys.stdout.write(json.dumps({"frames": len(pairs), "change": name, "rule": which, **counts}) + "\n")
    rng, found = np.random.default_rng(options.seed), 0
    for frame, _ in pairs:  # the part taken out
        empty = np.clip(np.median(frame) + rng.normal(0, 3, frame.shape), 0, 255).astype(np.uint8)
        found += find(shadow(clutter(empty, rng, tones, 3), rng), rule) is not None
    sys.stdout.write(json.dumps({"frames": len(pairs), "change": "no part, clutter and shadow", "found": found}) + "\n")


if __name__ == "__main__":
    main()
