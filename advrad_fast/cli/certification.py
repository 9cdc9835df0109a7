"""``advrad-fast certify``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from advrad_fast.cli.common import FAILED, FOUND, OK, Adder, detector_maker, model_options, output, ray_option, say, stdout
from advrad_fast.errors import ConfigError, expected

CERTIFY_KEYS = ("path", "outcome", "radius", "votes", "p_lower", "sigma", "alpha", "threshold")


def add(command: Adder) -> None:
    """Add the command."""
    parser = command(
        "certify",
        _certify,
        "Certify images: no perturbation below a radius changes the answer. Exit code 0 if all are certified OK, 1 if one is not"
        " (DEFECT, or ABSTAIN: nothing is certified), 2 on an error. With --fit, make a model able to.",
    )
    model_options(parser, seed=None, seed_help="of the noise (default: fresh for every image, as a certificate needs it)")
    parser.add_argument("images", nargs="*", help="files, folders (searched recursively) and patterns")
    parser.add_argument(
        "--radius",
        type=float,
        help="l2 over all pixels in [0, 1] (default: the largest that the votes certify); with --fit: to certify good parts at",
    )
    parser.add_argument("--alpha", type=float, default=0.001, help="error probability of each certificate (default 0.001)")
    parser.add_argument(
        "--sigma", type=float, nargs="+", help="noise level (default: the smallest of the model's that can reach)"
    )
    parser.add_argument("--max-votes", type=int, default=10_000, help="ABSTAIN when undecided after so many (default 10000)")
    parser.add_argument("--threshold", type=float, help="instead of the model's at this sigma")
    parser.add_argument("--json", metavar="FILE", help="write JSON lines; - for standard output")
    parser.add_argument(
        "--fit", type=Path, metavar="GOOD", help="fit the model to --sigma on the good parts it was trained on (needs PyTorch)"
    )
    parser.add_argument("--out", type=Path, help="with --fit: the model file to write")
    ray_option(parser)


def _certify(options: argparse.Namespace) -> int:
    if options.fit is not None:
        return _fit(options)
    if options.out is not None or not options.images:
        raise ConfigError("certify: expected images, or --fit GOOD --sigma SIGMA --out FILE")
    if options.sigma is not None and len(options.sigma) > 1:
        raise ConfigError(expected("--sigma", "one sigma, without --fit", options.sigma))
    from advrad_fast.batch import certify_files
    from advrad_fast.image_paths import list_images

    paths = list_images(options.images)
    setup = detector_maker(options)
    if options.ray is None:
        detector = setup()  # before any file is written

        def setup() -> Any:
            return detector

    code = OK
    found = certify_files(
        setup,
        paths,
        options.radius,
        sigma=None if options.sigma is None else options.sigma[0],
        alpha=options.alpha,
        max_votes=options.max_votes,
        seed=options.seed,
        threshold=options.threshold,
        on_votes=_progress(options.max_votes),
        ray=options.ray,
    )
    with output(options.json) as as_json:
        for path, result, error in found:
            outcome = "ERROR" if result is None else result.outcome
            if result is None:
                say(f"{path}: {error}")
                code = FAILED
            elif outcome != "OK":
                code = max(code, FOUND)
            row = {"path": str(path), "outcome": outcome, **{key: getattr(result, key, None) for key in CERTIFY_KEYS[2:]}}
            if as_json:
                as_json.write(json.dumps(row) + "\n")
                as_json.flush()
            if options.json != "-":
                numbers = (
                    "-" if result is None else f"radius {result.radius:.4g}, {result.votes} votes, p >= {result.p_lower:.4f}"
                )
                stdout().write(f"{outcome:8s} {numbers:40s}  {path}\n")
                stdout().flush()
    return code


def _progress(max_votes: int) -> Callable[[Path, int, int], None] | None:
    """A line that is written over, for people."""
    if not sys.stderr.isatty():
        return None

    def show(path: Path, votes: int, defects: int) -> None:
        sys.stderr.write(f"\r{votes}/{max_votes} votes, {defects} for DEFECT  {path.name}\033[K\r")

    return show


def _fit(options: argparse.Namespace) -> int:
    if options.images or options.out is None or not options.sigma or options.ray is not None:
        raise ConfigError("--fit: expected --sigma SIGMA... and --out FILE, and neither images nor --ray")
    from advrad_fast.evaluation.datasets import load_dataset
    from advrad_fast.model import ModelFile
    from advrad_fast.training.certify import add as add_sigmas
    from advrad_fast.training.dataset import load_split

    model: Any = ModelFile.load(options.model)
    if model.tiling is not None:
        raise ConfigError("--fit: expected a model that inspects whole frames, got one that inspects tiles")
    seed = 0 if options.seed is None else options.seed
    split = load_split(load_dataset(options.fit).train, model.config.image, seed)
    if split.data_hash != model.provenance.get("data_sha256"):
        say(f"{options.fit}: other images than the model was trained on; any of those among them make thresholds too low")
    half = all((array.astype("float16") == array).all() for array in model.weights.values())
    made = add_sigmas(model, split, options.sigma, radius=options.radius, alpha=options.alpha, seed=seed)
    made.save(options.out, half=half)
    for smoothing in made.smoothing:
        rate = smoothing.false_alarm_rate
        text = f"sigma {smoothing.sigma:g}: threshold {smoothing.threshold:.6g} for a false-alarm rate of {rate:.3g}"
        say(text + (f", certified at radius {smoothing.radius:g}" if smoothing.radius else ""))
    say(f"wrote {options.out}")
    return OK
