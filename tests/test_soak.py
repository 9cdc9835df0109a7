"""Soak: memory, threads and open files do not grow with the number of frames, and slow frames stay as they were."""

from __future__ import annotations

import gc
import resource
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from models import small_model
from numpy.typing import NDArray
from parts import disc, scratched
from PIL import Image

from advrad_fast import Detector, ImageError
from advrad_fast.images import load_image

#: A resident set that grows faster than this with the frames is a leak: less than one map of the soak's 32 x 32 frames a frame.
BYTES_A_FRAME = {"quick": 2048.0, "long": 32.0}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def entries(name: str) -> int:
    """How many threads (``task``) or open files (``fd``) the kernel counts."""
    return sum(1 for _ in Path("/proc/self", name).iterdir())


def slope(frames: list[int], values: list[int]) -> float:
    """Theil and Sen's: the median of the slopes between all pairs; single jumps do not move it."""
    x, y = np.array(frames, dtype=np.float64), np.array(values, dtype=np.float64)
    i, j = np.triu_indices(len(x), 1)
    return float(np.median((y[j] - y[i]) / (x[j] - x[i])))


def soak(folder: Path, count: int, limit: float) -> tuple[float, NDArray[np.float64]]:
    """Inspect ``count`` frames: arrays and files, good and bad, with maps and without, the odd one damaged, seeds old and new.

    Returns:
        Bytes a frame after the first fifth, and the milliseconds of the frames.
    """
    rng = np.random.default_rng(0)
    detector = Detector(small_model(spread=True), backend="cpu", precision="fp32", threads=1, cache_dir=False)
    arrays = [make(rng, size) for size in (32, 48) for make in (disc, scratched)]
    files = []
    for i, (array, suffix) in enumerate((a, s) for a in arrays for s in ("png", "jpg", "tiff", "bmp")):
        files.append(folder / f"{i}.{suffix}")
        Image.fromarray(array).save(files[-1])
    damaged = folder / "damaged.png"
    damaged.write_bytes(files[0].read_bytes()[:-40])
    broken = [np.full((8, 8), np.nan), np.zeros((0, 4), np.uint8), None]

    def one(i: int) -> None:
        if i % 50 == 49:
            with pytest.raises(ImageError):
                detector.inspect(broken[i // 50 % 3]) if i % 100 == 49 else load_image(damaged)
        elif i % 10 == 9:
            detector.inspect(load_image(files[i // 10 % len(files)]), seed=i)
        else:
            detector.inspect(arrays[i % 4], maps=i % 3 == 0)

    for i in range(200):  # buffers, plugins, kept noise
        one(i)
    gc.collect()
    threads, descriptors, native = threading.active_count(), entries("fd"), entries("task")
    frames, values, milliseconds = [], [], np.full(count, np.nan)  # written once: it grows no more
    every = max(1, count // 200)
    for i in range(count):
        start = time.perf_counter()
        one(i)
        milliseconds[i] = (time.perf_counter() - start) * 1e3
        if i % every == 0 and i >= count // 5:
            frames.append(i)
            values.append(resident())
    gc.collect()
    assert (threading.active_count(), entries("fd")) == (threads, descriptors)
    assert entries("task") <= native
    rate = slope(frames, values)
    assert rate < limit, f"{rate:.1f} bytes a frame"
    assert values[-1] - values[0] < max(limit * count, 8 << 20)
    return rate, milliseconds


def test_nothing_grows(tmp_path: Path) -> None:
    soak(tmp_path, 2_000, BYTES_A_FRAME["quick"])


def test_the_slope_sees_a_leak_and_not_a_jump() -> None:
    frames = list(range(0, 2000, 10))
    noise = np.random.default_rng(0).normal(0, 4096, len(frames))
    assert slope(frames, [int(3072 * f + n) for f, n in zip(frames, noise, strict=True)]) > BYTES_A_FRAME["quick"]
    assert slope(frames, [int((1 << 20) * (f > 1500) + n) for f, n in zip(frames, noise, strict=True)]) < BYTES_A_FRAME["long"]


@pytest.mark.slow
def test_nothing_grows_in_100_000_frames(tmp_path: Path) -> None:
    count = 100_000
    rate, milliseconds = soak(tmp_path, count, BYTES_A_FRAME["long"])
    tenths = milliseconds.reshape(10, -1)
    p99 = np.percentile(tenths, 99, axis=1)
    sys.stderr.write(
        f"\n{count} frames: {rate:+.2f} bytes a frame; p50 {np.median(tenths):.2f} ms; p99 of each tenth, ms: "
        + " ".join(f"{p:.2f}" for p in p99)
        + "\n"
    )
    # The least of the tenths on either side of the middle: another program's burst is not ours.
    assert p99[5:].min() < 1.5 * p99[:5].min()
