"""``advrad-fast inspect``."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from advrad_fast.cli.common import FAILED, FOUND, OK, Adder, load_detector, model_options, output, say
from advrad_fast.errors import AdvRADError, ConfigError

INSPECT_KEYS = ("path", "outcome", "score", "threshold", "p_value", "backend", "ms")


def add(command: Adder) -> None:
    """Add the command."""
    parser = command("inspect", _inspect, "Inspect images: exit code 0 if all are OK, 1 if one is not, 2 on an error.")
    model_options(parser)
    parser.add_argument("images", nargs="+", help="files, folders (searched recursively) and patterns")
    parser.add_argument("--json", metavar="FILE", help="write JSON lines; - for standard output")
    parser.add_argument("--csv", metavar="FILE", help="write CSV; - for standard output")
    parser.add_argument("--overlay", type=Path, metavar="FOLDER", help="write heat maps as PNG, all on one colour scale")
    parser.add_argument("--threshold", type=float, help="instead of the model's")
    parser.add_argument("--false-alarm-rate", type=float, help="set the threshold for this rate")


def _inspect(options: argparse.Namespace) -> int:
    from advrad_fast.detector import Inspection, Outcome
    from advrad_fast.images import list_images, load_image
    from advrad_fast.overlay import overlay

    if options.json == options.csv == "-":
        raise ConfigError("--json and --csv can't both be - : standard output is for one of them")
    paths = list_images(options.images)
    detector = load_detector(options)
    if options.threshold is not None:
        detector.threshold = options.threshold
    if options.false_alarm_rate is not None:
        detector.false_alarm_rate = options.false_alarm_rate
    if options.overlay is not None:
        options.overlay.mkdir(parents=True, exist_ok=True)
    code = OK
    quiet = options.json == "-" or options.csv == "-"
    names = _flat_names(paths)
    with output(options.json) as as_json, output(options.csv) as as_csv:
        writer = csv.DictWriter(as_csv, INSPECT_KEYS) if as_csv else None
        if writer:
            writer.writeheader()
        for path in paths:
            frame, result = None, None
            try:
                frame = load_image(path)
                result = detector.inspect(frame, maps=options.overlay is not None)
            except AdvRADError as error:
                say(f"{path}: {error}")
                code = FAILED
            outcome = Outcome.ERROR if result is None else result.outcome
            if outcome in (Outcome.DEFECT, Outcome.ABSTAIN):
                code = max(code, FOUND)
            row = _row(path, outcome, result, detector)
            if as_json:
                as_json.write(json.dumps(row) + "\n")
            if writer:
                writer.writerow(row)
            if not quiet:
                score = "-" if row["score"] is None else f"{row['score']:.6g}"
                sys.stdout.write(f"{outcome!s:8s} {score:>12s}  {path}\n")
            if options.overlay is not None and isinstance(result, Inspection):
                overlay(frame, result).save(options.overlay / names[path])
    return code


def _row(path: Path, outcome: object, result: Any, detector: Any) -> dict[str, Any]:
    return {
        "path": str(path),
        "outcome": str(outcome),
        "score": None if result is None else result.score,
        "threshold": detector.threshold,
        "p_value": None if result is None else result.p_value,
        "backend": detector.backend,
        "ms": None if result is None else round(result.timings["total"], 3),
    }


def _flat_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A PNG name for every path: its last parts, as many as it takes to tell all paths apart."""
    for depth in range(1, max((len(p.parts) for p in paths), default=1) + 1):
        names = {p: "_".join(p.parts[-depth:]).strip("/").replace("/", "") + ".png" for p in paths}
        if len(set(names.values())) == len(paths):
            return names
    return {p: f"{i:06d}_{p.name}.png" for i, p in enumerate(paths)}
