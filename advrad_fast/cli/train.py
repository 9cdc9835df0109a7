"""``advrad-fast train``."""

from __future__ import annotations

import argparse
from pathlib import Path

from advrad_fast.cli.common import OK, Adder, data_options, load_data, say


def add(command: Adder) -> None:
    """Add the command."""
    parser = command("train", _train, "Train a detector on a folder of good parts; go on where an interrupted run stopped.")
    data_options(parser, "a folder in MVTec AD layout, or any folder of good images")
    parser.add_argument("--out", type=Path, required=True, help="the model file to write")
    parser.add_argument("--preset", default="fast", help="fast (CPUs, line rates) or paper (the paper's scale, for GPUs)")
    parser.add_argument("--size", type=int, default=256, help="the input has about SIZE x SIZE pixels (default 256)")
    parser.add_argument("--align", choices=("auto", "on", "off"), default="auto", help="lay the part level first (default auto)")
    parser.add_argument("--tile", type=int, metavar="N", help="for large frames: train on, and inspect in, tiles of N x N pixels")
    parser.add_argument("--overlap", type=int, help="with --tile: of neighbouring tiles, in pixels (default N / 8)")
    parser.add_argument("--fixed", action="store_true", help="with --tile: every frame shows the same thing at the same place")
    parser.add_argument("--grey", action="store_true", default=None, help="one channel (default: where all images are grey)")
    parser.add_argument("--brightness", type=float, help="scale every image to this median grey level in (0, 1)")
    parser.add_argument("--flip", choices=("h", "v", "hv"), default="", help="augment with mirror images of a symmetric part")
    parser.add_argument("--shift", type=int, help="augment with shifts of up to this many pixels")
    parser.add_argument("--false-alarm-rate", type=float, default=0.05, help="of the threshold (default 0.05)")
    parser.add_argument("--draws", type=int, help="noise draws an inspection averages over")
    parser.add_argument("--prediction", choices=("eps", "x0", "v", "edm"), help="parametrisation of the network")
    parser.add_argument("--patch", type=int, help="patch factor of the network's stem")
    parser.add_argument("--steps", type=int, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, help="images a step, over all processes")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int, help="of the split, the weights, the batches and the noise")
    parser.add_argument("--full-precision", action="store_true", help="store the weights in fp32 instead of fp16")
    sigmas = parser.add_mutually_exclusive_group()
    sigmas.add_argument(
        "--certify", type=float, nargs="+", metavar="SIGMA", help="noise levels to certify at (default: 0.125 0.25)"
    )
    sigmas.add_argument(
        "--no-certify", dest="certify", action="store_const", const=(), help="at none: the model has no certificates"
    )
    parser.add_argument(
        "--radius",
        type=float,
        help="certify good parts OK at this l2 radius, but for the false-alarm rate (default: only take them for good)",
    )
    parser.add_argument("--note", help="a line to keep in the model file: a licence, an origin")
    parser.set_defaults(verbose=True)


def _train(options: argparse.Namespace) -> int:
    from advrad_fast.training.pipeline import train

    changes = {
        "steps": options.steps,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "shift": options.shift,
        "flip_horizontal": "h" in options.flip or None,
        "flip_vertical": "v" in options.flip or None,
    }
    model = train(
        load_data(options),
        options.out,
        preset_name=options.preset,
        size=options.size,
        align=options.align,
        grey=options.grey,
        brightness=options.brightness,
        false_alarm_rate=options.false_alarm_rate,
        draws=options.draws,
        prediction=options.prediction,
        patch=options.patch,
        half=not options.full_precision,
        settings=changes,
        note=options.note,
        certify=options.certify,
        certify_radius=options.radius,
        tile=options.tile,
        overlap=options.overlap,
        fixed=options.fixed,
    )
    if model is not None:
        say(f"wrote {options.out}: threshold {model.threshold:.6g} for a false-alarm rate of {model.false_alarm_rate:.3g}")
    return OK
