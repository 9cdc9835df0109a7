"""``advrad-fast``: train, inspect, evaluate, compile, bench, backends, demo.

Logs and progress go to standard error.  Exit codes: 0 fine, 1 a defect was found (or a part could not be judged), 2 something
could not be done.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from advrad_fast import __version__
from advrad_fast.errors import AdvRADError, ConfigError, expected

OK, FOUND, FAILED = 0, 1, 2
_CALIBRATION = 64  # frames that int8 is calibrated on, at most
_INSPECT_KEYS = ("path", "outcome", "score", "threshold", "p_value", "backend", "ms")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s", stream=sys.stderr)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except AdvRADError as error:
        _say(f"advrad-fast: {error}")
    except ModuleNotFoundError as error:
        extras = {"torch": "[train]", "tqdm": "[train]", "triton": "[compile]"}
        wanted = f"advrad-fast{extras.get((error.name or '').split('.')[0], '')}"
        _say(f"advrad-fast: {error.name} is not installed; needed here: pip install '{wanted}'")
    except OSError as error:
        _say(f"advrad-fast: {error}")
    except KeyboardInterrupt:
        _say("advrad-fast: interrupted")
    return FAILED


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="advrad-fast", description="Adversarially robust industrial anomaly detection.")
    parser.add_argument("--version", action="version", version=f"advrad-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("-v", "--verbose", action="store_true", help="say what is being done")
        sub.set_defaults(run=run)
        return sub

    train = command("train", _train, "Train a detector on a folder of good parts; go on where an interrupted run stopped.")
    train.add_argument("data", type=Path, help="a folder in MVTec AD layout, or any folder of good images")
    train.add_argument("--out", type=Path, required=True, help="the model file to write")
    train.add_argument("--preset", default="fast", help="fast (CPUs, line rates) or paper (the paper's scale, for GPUs)")
    train.add_argument("--size", type=int, default=256, help="the input has about SIZE x SIZE pixels (default 256)")
    train.add_argument("--align", choices=("auto", "on", "off"), default="auto", help="lay the part level first (default auto)")
    train.add_argument("--grey", action="store_true", default=None, help="one channel (default: where all images are grey)")
    train.add_argument("--brightness", type=float, help="scale every image to this median grey level in (0, 1)")
    train.add_argument("--flip", choices=("h", "v", "hv"), default="", help="augment with mirror images of a symmetric part")
    train.add_argument("--shift", type=int, help="augment with shifts of up to this many pixels")
    train.add_argument("--false-alarm-rate", type=float, default=0.05, help="of the threshold (default 0.05)")
    train.add_argument("--draws", type=int, help="noise draws an inspection averages over")
    train.add_argument("--prediction", choices=("eps", "x0", "v", "edm"), help="parametrisation of the network")
    train.add_argument("--patch", type=int, help="patch factor of the network's stem")
    train.add_argument("--steps", type=int, help="optimiser steps")
    train.add_argument("--batch-size", type=int, help="images a step, over all processes")
    train.add_argument("--learning-rate", type=float)
    train.add_argument("--seed", type=int, help="of the split, the weights, the batches and the noise")
    train.add_argument("--full-precision", action="store_true", help="store the weights in fp32 instead of fp16")
    train.add_argument("--note", help="a line to keep in the model file: a licence, an origin")
    train.set_defaults(verbose=True)

    inspect = command("inspect", _inspect, "Inspect images: exit code 0 if all are OK, 1 if one is not, 2 on an error.")
    _model_options(inspect)
    inspect.add_argument("images", nargs="+", help="files, folders (searched recursively) and patterns")
    inspect.add_argument("--json", metavar="FILE", help="write JSON lines; - for standard output")
    inspect.add_argument("--csv", metavar="FILE", help="write CSV; - for standard output")
    inspect.add_argument("--overlay", type=Path, metavar="FOLDER", help="write heat maps as PNG, all on one colour scale")
    inspect.add_argument("--threshold", type=float, help="instead of the model's")
    inspect.add_argument("--false-alarm-rate", type=float, help="set the threshold for this rate")

    evaluate = command("evaluate", _evaluate, "Measure a detector on a labelled test set in MVTec AD layout.")
    _model_options(evaluate)
    evaluate.add_argument("data", type=Path, help="the dataset's folder")
    evaluate.add_argument("--json", metavar="FILE", help="write the figures as JSON; - for standard output")

    making = command(
        "compile",
        _compile,
        "Prepare what takes long: for this machine's CPU, a model's int8 network; with --target, its TensorRT engines, for which"
        " no GPU is needed; with --kernels, the GPU kernels of every model.",
    )
    making.add_argument("model", type=Path, nargs="?", help="the model file; none with --kernels")
    making.add_argument(
        "--target",
        action="append",
        metavar="GPU",
        help="build for this GPU: here, or sm_75, sm_80, sm_86, sm_89, sm_120, sm_121 with TensorRT-RTX on any machine;"
        " may be repeated (with --kernels: default all)",
    )
    making.add_argument("--kernels", action="store_true", help="compile the fused operations to PTX and cubins (needs Triton)")
    making.add_argument("--precision", help="fp32, fp16 (default with --target), bf16, int8 (default without) or fp8")
    making.add_argument(
        "--calibration", nargs="+", metavar="IMAGES", help="good frames for int8 and fp8: files, folders, patterns"
    )
    making.add_argument(
        "--batches", type=int, nargs="+", metavar="N", help="images a call of an engine (default: the model's draws)"
    )
    making.add_argument("--out", "--cache", dest="out", type=Path, help="folder to write (default: the platform's cache folder)")
    making.add_argument("--processes", type=int, default=1, help="that compile kernels at the same time (default 1)")

    bench = command(
        "bench", _bench, "Measure this machine's CPU path against PyTorch and the machine's own peaks (needs PyTorch)."
    )
    bench.add_argument("model", type=Path, nargs="?", help="a model file (default: the demo's)")
    bench.add_argument("--frames", type=Path, help="images that the model is for (default: drawn frames)")
    bench.add_argument(
        "--parts", default="operations,network,inspect,votes", help="of operations, network, inspect, votes, paper-like"
    )
    bench.add_argument("--seconds", type=float, default=4.0, help="for each set of contestants (default 4)")
    bench.add_argument("--threads", type=int, help="of the operations and the engine (default: the machine's)")
    bench.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes a minute a network")
    bench.add_argument("--json", metavar="FILE", help="write a row a line; - for standard output")

    listing = command("backends", _backends, "List the backends: which are usable here, and why the others are not.")
    listing.add_argument("--json", metavar="FILE", help="write JSON; - for standard output")

    demo = command("demo", _demo, "Inspect real solar cells with the detector that comes with the package.")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the heat maps and the page")
    demo.add_argument("--limit", type=int, help="inspect at most this many good and this many defective cells")
    demo.add_argument("--backend", default="auto")
    demo.add_argument("--prepare", type=Path, metavar="FOLDER", help="only write the cells in MVTec AD layout, to train on")
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the model file")
    parser.add_argument("--backend", default="auto", help="auto, cpu, cuda or reference")
    parser.add_argument("--precision", help="of the cpu backend: auto, fp32, bf16, or int8 (see compile)")
    parser.add_argument("--threads", type=int, help="CPU threads of the engine")
    parser.add_argument("--cache", type=Path, help="folder for compiled engines (default: the platform's cache folder)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")


def _detector(options: argparse.Namespace) -> Any:
    from advrad_fast.detector import Detector

    extra = {"precision": options.precision, "threads": options.threads, "cache_dir": options.cache}
    return Detector.load(
        options.model, backend=options.backend, seed=options.seed, **{k: v for k, v in extra.items() if v is not None}
    )


@contextmanager
def _output(target: str | None) -> Iterator[TextIO | None]:
    """A text file for writing, standard output for ``-``, or None."""
    if target is None:
        yield None
    elif target == "-":
        yield sys.stdout
        sys.stdout.flush()
    else:
        with Path(target).open("w", encoding="utf-8", newline="") as file:
            yield file


def _compile(options: argparse.Namespace) -> int:
    if options.kernels:
        if options.model or options.precision or options.calibration or options.batches or options.out is None:
            raise ConfigError("--kernels: expected --out FOLDER and neither a model nor its options: kernels serve every model")
        return _compile_kernels(options)
    if options.model is None:
        raise ConfigError("compile: expected a model file, or --kernels")
    if options.target:
        return _compile_engines(options)
    if options.batches:
        raise ConfigError("--batches: expected --target with it")
    if options.precision not in (None, "int8"):
        message = "'int8': the CPU's others need no preparation; --target is for GPUs"
        raise ConfigError(expected("--precision", message, options.precision))
    from advrad_fast.backends.cpu import calibrate_int8

    model, images = _normals(options, "int8")
    calibrate_int8(model.config, model.weights, images, cache_dir=options.out)
    _say("use --precision int8, or Detector.load(..., precision='int8')")
    return OK


def _normals(options: argparse.Namespace, precision: str) -> tuple[Any, Any]:
    """The model, and calibration frames as it sees them: uint8 (N, H, W, C)."""
    import numpy as np

    from advrad_fast.images import list_images, load_image, prepare
    from advrad_fast.model import ModelFile

    if not options.calibration:
        raise ConfigError(expected("--calibration", f"good frames, which {precision} needs", options.calibration))
    model = ModelFile.load(options.model)
    paths = list_images(options.calibration)
    chosen = paths[:: max(1, len(paths) // _CALIBRATION)][:_CALIBRATION]
    images = np.stack([prepare(load_image(path), model.config.image).image for path in chosen])
    _say(f"calibrating on {len(images)} of {len(paths)} frames")
    return model, images


def _compile_kernels(options: argparse.Namespace) -> int:
    from advrad_fast.kernels import aot

    if not 1 <= options.processes <= 256:
        raise ConfigError(expected("--processes", "an integer in [1, 256]", options.processes))
    manifest = aot.build(options.out, options.target or aot.TARGETS, processes=options.processes)
    _say(f"wrote {options.out}: {len(manifest.kernels)} kernels for {len({k.target for k in manifest.kernels})} targets")
    return OK


def _compile_engines(options: argparse.Namespace) -> int:
    from time import perf_counter

    from advrad_fast.backends import cache
    from advrad_fast.backends import tensorrt_calibration as calibration
    from advrad_fast.backends import tensorrt_engine as engines
    from advrad_fast.model import ModelFile

    given, folder = options.precision or "fp16", cache.folder(options.out)
    for target in options.target:  # before anything takes long
        engines.check_precision(given, engines.check_target(target))
        engines.choose(target)
    precision = engines.check_precision(given, options.target[0])
    model, ranges = ModelFile.load(options.model), None
    if precision in ("int8", "fp8"):
        ranges = calibration.load_ranges(folder, model.config, model.weights) if not options.calibration else None
        if ranges is None:
            model, images = _normals(options, precision)
            inputs = calibration.network_inputs(model.config, images)
            ranges = calibration.collect_ranges(model.config, model.weights, inputs)
            if not calibration.store_ranges(folder, model.config, model.weights, ranges):
                raise ConfigError(f"--out: expected a folder that can be written, got {folder}")
    elif options.calibration:
        raise ConfigError(expected("--calibration", "int8 or fp8 with it", precision))
    batches = tuple(options.batches or (model.config.diffusion.draws,))
    for target in dict.fromkeys(options.target):
        start = perf_counter()
        compiled = engines.compile_engine(
            model.config, model.weights, target=target, precision=precision, batches=batches, ranges=ranges, folder=folder
        )
        if not compiled.stored:
            raise ConfigError(f"--out: expected a folder that can be written, got {folder}")
        did = "was there" if compiled.cached else f"built in {perf_counter() - start:.1f} s"
        size = f"{len(compiled.blob) / 1e6:.1f} MB"
        _say(f"{target} {precision}, batches {', '.join(map(str, batches))}: {did}, {size}, {folder}/{compiled.name}.blob")
    return OK


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
        options.data,
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
    )
    if model is not None:
        _say(f"wrote {options.out}: threshold {model.threshold:.6g} for a false-alarm rate of {model.false_alarm_rate:.3g}")
    return OK


def _inspect(options: argparse.Namespace) -> int:
    from advrad_fast.detector import Inspection, Outcome
    from advrad_fast.images import list_images, load_image
    from advrad_fast.overlay import overlay

    if options.json == options.csv == "-":
        raise ConfigError("--json and --csv can't both be - : standard output is for one of them")
    paths = list_images(options.images)
    detector = _detector(options)
    if options.threshold is not None:
        detector.threshold = options.threshold
    if options.false_alarm_rate is not None:
        detector.false_alarm_rate = options.false_alarm_rate
    if options.overlay is not None:
        options.overlay.mkdir(parents=True, exist_ok=True)
    code = OK
    quiet = options.json == "-" or options.csv == "-"
    names = _flat_names(paths)
    with _output(options.json) as as_json, _output(options.csv) as as_csv:
        writer = csv.DictWriter(as_csv, _INSPECT_KEYS) if as_csv else None
        if writer:
            writer.writeheader()
        for path in paths:
            frame, result = None, None
            try:
                frame = load_image(path)
                result = detector.inspect(frame, maps=options.overlay is not None)
            except AdvRADError as error:
                _say(f"{path}: {error}")
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


def _evaluate(options: argparse.Namespace) -> int:
    from advrad_fast.evaluation.datasets import load_dataset
    from advrad_fast.evaluation.evaluate import evaluate, table

    dataset = load_dataset(options.data)
    detector = _detector(options)
    evaluation = evaluate(detector, dataset, seed=options.seed)
    figures = {"model": str(options.model), **evaluation.figures}
    with _output(options.json) as file:
        if file:
            file.write(json.dumps(figures) + "\n")
    if options.json != "-":
        sys.stdout.write(table(evaluation) + "\n")
    return OK


def _bench(options: argparse.Namespace) -> int:
    from importlib.resources import as_file, files

    from advrad_fast import bench

    parts = tuple(options.parts.split(","))
    if unknown := sorted(set(parts) - set(bench.PARTS)):
        raise ConfigError(expected("--parts", f"a list of {list(bench.PARTS)}", unknown))
    if not 0.0 <= options.seconds <= 3600.0:
        raise ConfigError(expected("--seconds", "a number in [0, 3600]", options.seconds))
    rows = []
    with as_file(files("advrad_fast") / "data" / "elpv-mono.safetensors") as demo, _output(options.json) as file:
        for row in bench.run(
            options.model or demo,
            frames=options.frames,
            parts=parts,
            seconds=options.seconds,
            threads=options.threads,
            compile_torch=not options.no_compile,
        ):
            rows.append(row)
            _say(f"{row['name']}, batch {row['batch']}, {row['precision']}: {row['p50_ms']:.3g} ms")
            if file:
                file.write(json.dumps(row) + "\n")
                file.flush()
    if options.json != "-" and rows:
        sys.stdout.write(f"{rows[0]['machine']}; commit {rows[0]['commit']}; {json.dumps(rows[0]['details']['peaks'])}\n")
        sys.stdout.write(bench.table(rows) + "\n")
    return OK


def _backends(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from advrad_fast.backends import available

    rows = available()
    with _output(options.json) as file:
        if file:
            file.write(json.dumps([asdict(row) for row in rows]) + "\n")
    if options.json != "-":
        for row in rows:
            sys.stdout.write(f"{row.name:10s} {'usable' if row.usable else 'not usable':10s}  {row.detail}\n")
    return OK if any(row.usable for row in rows) else FAILED


def _demo(options: argparse.Namespace) -> int:
    from advrad_fast import demo

    if options.prepare is not None:
        demo.prepare(options.prepare)
        return OK
    return demo.run(options.out, limit=options.limit, backend=options.backend)


if __name__ == "__main__":
    sys.exit(main())
