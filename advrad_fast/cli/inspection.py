"""``advrad-fast inspect``."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from advrad_fast.cli.common import (
    FAILED,
    FOUND,
    OK,
    Adder,
    detector_maker,
    model_options,
    output,
    ray_option,
    roi_options,
    say,
    stdout,
)
from advrad_fast.errors import ConfigError


def add(command: Adder) -> None:
    """Add the command."""
    parser = command("inspect", _inspect, "Inspect images: exit code 0 if all are OK, 1 if one is not, 2 on an error.")
    model_options(parser)
    roi_options(parser)
    parser.add_argument("images", nargs="+", help="files, folders (searched recursively) and patterns")
    parser.add_argument("--json", metavar="FILE", help="write JSON lines; - for standard output")
    parser.add_argument("--csv", metavar="FILE", help="write CSV; - for standard output")
    parser.add_argument("--overlay", type=Path, metavar="FOLDER", help="write heat maps as PNG, all on one colour scale")
    parser.add_argument("--threshold", type=float, help="instead of the model's")
    parser.add_argument("--false-alarm-rate", type=float, help="set the threshold for this rate")
    ray_option(parser)


def _inspect(options: argparse.Namespace) -> int:
    from advrad_fast.batch import ROW_KEYS, inspect_files, row
    from advrad_fast.detector import Outcome
    from advrad_fast.image_paths import list_images

    if options.json == options.csv == "-":
        raise ConfigError("--json and --csv can't both be - : standard output is for one of them")
    paths = list_images(options.images)
    setup: Callable[[], Any] = partial(_ready, detector_maker(options), options.threshold, options.false_alarm_rate)
    if options.ray is None:
        detector = setup()  # before any file is written

        def setup() -> Any:
            return detector

    if options.overlay is not None:
        options.overlay.mkdir(parents=True, exist_ok=True)
    code = OK
    quiet = options.json == "-" or options.csv == "-"
    names = _flat_names(paths)
    with output(options.json) as as_json, output(options.csv) as as_csv:
        writer = csv.DictWriter(as_csv, ROW_KEYS) if as_csv else None
        if writer:
            writer.writeheader()
        for path, result, picture in inspect_files(setup, paths, overlay=options.overlay is not None, ray=options.ray):
            if result.outcome is Outcome.ERROR:
                say(f"{path}: {result.error}")
                code = FAILED
            elif result.outcome is not Outcome.OK:
                code = max(code, FOUND)
            found = row(path, result)
            if as_json:
                as_json.write(json.dumps(found) + "\n")
            if writer:
                writer.writerow(found)
            if not quiet:
                score = "-" if found["score"] is None else f"{found['score']:.6g}"
                stdout().write(f"{result.outcome!s:8s} {score:>12s}  {path}\n")
            if picture is not None:
                (options.overlay / names[path]).write_bytes(picture)
    return code


def _ready(make: Callable[[], Any], threshold: float | None, false_alarm_rate: float | None) -> Any:
    detector = make()
    if threshold is not None:
        detector.threshold = threshold
    if false_alarm_rate is not None:
        detector.false_alarm_rate = false_alarm_rate
    return detector


def _flat_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A PNG name for every path: its last parts, as many as it takes to tell all paths apart."""
    for depth in range(1, max((len(p.parts) for p in paths), default=1) + 1):
        names = {p: "_".join(p.parts[-depth:]).strip("/").replace("/", "") + ".png" for p in paths}
        if len(set(names.values())) == len(paths):
            return names
    return {p: f"{i:06d}_{p.name}.png" for i, p in enumerate(paths)}
