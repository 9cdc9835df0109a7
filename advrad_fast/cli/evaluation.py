"""``advrad-fast evaluate``."""

from __future__ import annotations

import argparse
import json
import sys

from advrad_fast.cli.common import OK, Adder, data_options, load_data, load_detector, model_options, output


def add(command: Adder) -> None:
    """Add the command."""
    parser = command("evaluate", _evaluate, "Measure a detector on a labelled test set.")
    model_options(parser)
    data_options(parser, "the dataset's folder")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - for standard output")


def _evaluate(options: argparse.Namespace) -> int:
    from advrad_fast.evaluation.evaluate import evaluate, table

    dataset = load_data(options)
    detector = load_detector(options)
    evaluation = evaluate(detector, dataset, seed=options.seed)
    figures = {"model": str(options.model), **evaluation.figures}
    with output(options.json) as file:
        if file:
            file.write(json.dumps(figures) + "\n")
    if options.json != "-":
        sys.stdout.write(table(evaluation) + "\n")
    return OK
