"""``advrad-fast evaluate``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from advrad_fast.cli import robust
from advrad_fast.cli.common import OK, Adder, Progress, data_options, detector_maker, load_data, model_options, output, say


def add(command: Adder) -> None:
    """Add the command."""
    parser = command("evaluate", _evaluate, "Measure a detector on a labelled test set.")
    model_options(parser)
    data_options(parser, "the dataset's folder")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - for standard output")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FOLDER",
        help="write a page, FOLDER/index.html; other categories evaluated into it are kept",
    )
    parser.add_argument("--ray", metavar="ADDRESS", help="spread the images over a Ray cluster: auto, HOST:PORT, or local")
    robust.options_of(parser)


def _evaluate(options: argparse.Namespace) -> int:
    from advrad_fast.evaluation.evaluate import evaluate, table

    dataset = load_data(options)
    setup = detector_maker(options)
    detector = setup()
    results: dict[Any, Any] = {}
    attack = robust.run(options, dataset, detector) if options.robust else None
    with Progress(len(dataset.test), "images") as progress:

        def note(sample: Any, result: object) -> None:
            results[sample.path] = result
            progress.step()

        evaluation = evaluate(detector, dataset, seed=options.seed, on_sample=note, ray=options.ray, setup=setup)
    figures = {"model": str(options.model), **evaluation.figures}
    if attack is not None:
        figures |= robust.figures(attack)
    with output(options.json) as file:
        if file:
            file.write(json.dumps(figures) + "\n")
    if options.json != "-":
        sys.stdout.write(table(evaluation) + "\n")
        if attack is not None:
            sys.stdout.write(robust.table(attack) + "\n")
    if options.report is not None:
        from advrad_fast.evaluation import report

        ordered = [results[sample.path] for sample in evaluation.samples]
        say(f"wrote {report.write(options.report, report.collect(evaluation, ordered, detector, options.model, attack=attack))}")
    if attack is not None:
        robust.check(attack)
    return OK
