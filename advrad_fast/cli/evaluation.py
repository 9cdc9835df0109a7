"""``advrad-fast evaluate``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from advrad_fast.cli import robust
from advrad_fast.cli.common import (
    OK,
    Adder,
    Progress,
    data_options,
    detector_maker,
    load_data,
    model_options,
    output,
    ray_option,
    roi_options,
    say,
    stdout,
)
from advrad_fast.errors import ConfigError, expected


def add(command: Adder) -> None:
    """Add the command."""
    parser = command("evaluate", _evaluate, "Measure a detector on a labelled test set.")
    model_options(parser)
    roi_options(parser)
    data_options(parser, "the dataset's folder")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - for standard output")
    parser.add_argument("--certified", action="store_true", help="also the certified AUROC; takes --votes draws of every image")
    parser.add_argument("--sigma", type=float, help="with --certified: noise level (default: the model's smallest)")
    parser.add_argument("--votes", type=int, default=1000, help="with --certified: draws of every image (default 1000)")
    parser.add_argument("--radii", type=float, nargs="+", help="with --certified (default 0.05 0.1 0.2 0.5)")
    parser.add_argument("--alpha", type=float, default=0.001, help="with --certified: of each image's statement (default 0.001)")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="with --certified: keep the draws here, and go on from there")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="with --certified: the curve over all radii")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FOLDER",
        help="write a page, FOLDER/index.html; other categories evaluated into it are kept",
    )
    ray_option(parser)
    robust.options_of(parser)


def _evaluate(options: argparse.Namespace) -> int:
    from advrad_fast.evaluation import report
    from advrad_fast.evaluation.evaluate import evaluate, table

    given = [name for name in ("sigma", "radii", "scores", "plot") if getattr(options, name) is not None]
    if given and not options.certified:
        raise ConfigError(expected(f"--{given[0]}", "--certified with it", "none"))
    if (options.roi or options.roi_on_part) and (options.robust or options.certified):
        raise ConfigError("--roi: expected neither --robust nor --certified with it: both are of whole images")
    if options.plot is not None and options.plot.suffix != ".svg":
        raise ConfigError(expected("--plot", "a file name that ends in .svg", str(options.plot)))
    if options.report is not None:
        report.prepare(options.report)
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
    certified, lines = _certified(options, detector, setup, dataset) if options.certified else ({}, "")
    evaluation.figures.update(certified)
    figures = {"model": str(options.model), **evaluation.figures}
    if attack is not None:
        figures |= robust.figures(attack)
    with output(options.json) as file:
        if file:
            file.write(json.dumps(figures) + "\n")
    if options.json != "-":
        stdout().write(table(evaluation) + "\n" + lines)
        if attack is not None:
            stdout().write(robust.table(attack) + "\n")
    if options.report is not None:
        ordered = [results[sample.path] for sample in evaluation.samples]
        say(f"wrote {report.write(options.report, report.collect(evaluation, ordered, detector, options.model, attack=attack))}")
    if attack is not None:
        robust.check(attack)
    return OK


def _certified(options: argparse.Namespace, detector: Any, setup: Any, dataset: Any) -> tuple[dict[str, Any], str]:
    """The certified figures, and their lines of text."""
    from advrad_fast.evaluation import certified

    with Progress(len(dataset.test), f"images, {options.votes} draws each") as progress:
        found = certified.draw_scores(
            detector,
            dataset,
            draws=options.votes,
            sigma=options.sigma,
            seed=options.seed,
            file=options.scores,
            on_image=progress.step,
            ray=options.ray,
            setup=setup,
        )
    figures = certified.figures(found, options.radii or certified.RADII, options.alpha)
    if options.plot is not None:
        title = f"{dataset.name}, sigma {found.sigma:g}, {options.votes} draws, alpha {options.alpha:g} an image"
        options.plot.write_text(certified.curve_svg(*found.curve(options.alpha), title), encoding="utf-8", errors="replace")
        say(f"wrote {options.plot}")
    head = f"  certified AUROC, sigma {found.sigma:g}, {options.votes} draws, alpha {options.alpha:g} an image\n"
    rows = [f"    radius {radius:8s} {100 * value:.2f}\n" for radius, value in figures["certified_auroc"].items()]
    return figures, head + "".join(rows)
