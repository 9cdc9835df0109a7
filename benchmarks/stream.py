"""What a stream costs a frame, beside ``inspect`` in the same run.

    python benchmarks/stream.py MODEL [--frames 2000] [--size 256] [--repeats 5] [--maps]

Frames are in memory.  A loop over ``inspect`` and a stream over the same frames take turns; the overhead is the difference of
their times a frame, at the median over the repeats.  The streams' sinks: none, JSON lines, SQLite.  A third loop runs 0.06 ms of
Python between the frames, which are not counted: what any pause costs ``inspect``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from advrad_fast import Detector
from advrad_fast.bench.timing import commit, machine
from advrad_fast.evaluation.rows import append_line
from advrad_fast.line import InspectionStream
from advrad_fast.line.sinks import JsonLines, Sink, Sqlite

PAUSE_MS = 0.06
RESULTS = Path(__file__).parent / "results" / "stream.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of the engine")
    parser.add_argument("--maps", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS, help="append the row to this file")
    options = parser.parse_args()
    detector = Detector.load(options.model, backend="cpu", threads=options.threads)
    shape = (16, options.size, options.size, 3)
    given = list(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    frames = [given[i % len(given)] for i in range(options.frames)]
    with tempfile.TemporaryDirectory() as folder:
        count = iter(range(10**6))
        sinks: dict[str, Callable[[], list[Sink]]] = {
            "stream": lambda: [],
            "stream to JSON lines": lambda: [JsonLines(Path(folder) / f"{next(count)}.jsonl")],
            "stream to SQLite": lambda: [Sqlite(Path(folder) / f"{next(count)}.db")],
            "stream to SQLite, no fsync": lambda: [Sqlite(Path(folder) / f"{next(count)}.db", fsync=False)],
        }

        def alone() -> list[float | None]:
            return [detector.inspect(frame, maps=options.maps).score for frame in frames]

        def paused() -> list[float | None]:
            scores = []
            for frame in frames:
                end = time.perf_counter() + PAUSE_MS / 1e3
                while time.perf_counter() < end:
                    pass
                scores.append(detector.inspect(frame, maps=options.maps).score)
            return scores

        def streamed(name: str) -> list[float | None]:
            with InspectionStream(detector, frames, maps=options.maps, sinks=sinks[name]()) as stream:
                return [result.score for result in stream]

        wanted = alone()
        runs = {"inspect": alone, "inspect after a pause": paused, **{name: partial(streamed, name) for name in sinks}}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.repeats):
            for name, taken in times.items():
                start = time.perf_counter()
                scores = runs[name]()
                taken.append(1e3 * (time.perf_counter() - start) / len(frames) - PAUSE_MS * (runs[name] is paused))
                if scores != wanted:
                    raise SystemExit(f"{name}: other scores than inspect's")  # no figure without parity
    base = times["inspect"]
    rows = {"inspect": {"ms": round(statistics.median(base), 4)}}
    for name in [name for name in times if name != "inspect"]:
        extra = [ms - alone for ms, alone in zip(times[name], base, strict=True)]
        overhead = statistics.median(extra)
        rows[name] = {
            "ms": round(statistics.median(times[name]), 4),
            "overhead_ms": round(overhead, 4),
            "overhead_share": round(overhead / statistics.median(base), 4),
        }
    head = {"backend": detector.backend, "frames": len(frames), "size": options.size, "maps": options.maps}
    row = json.dumps({**head, **rows, "commit": commit(), "machine": machine()})
    append_line(options.out, row)
    print(row)


if __name__ == "__main__":
    main()
