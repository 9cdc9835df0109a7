"""``advrad-fast compile``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from advrad_fast.cli.common import OK, Adder, say
from advrad_fast.errors import ConfigError, expected

_CALIBRATION = 64  # frames that int8 is calibrated on, at most


def add(command: Adder) -> None:
    """Add the command."""
    parser = command(
        "compile",
        _compile,
        "Prepare what takes long: for this machine's CPU, a model's int8 network; with --target, its TensorRT engines, for which"
        " no GPU is needed; with --kernels, the GPU kernels of every model.",
    )
    parser.add_argument("model", type=Path, nargs="?", help="the model file; none with --kernels")
    parser.add_argument(
        "--target",
        action="append",
        metavar="GPU",
        help="build for this GPU: here, or sm_75, sm_80, sm_86, sm_89, sm_120, sm_121 with TensorRT-RTX on any machine;"
        " may be repeated (with --kernels: default all)",
    )
    parser.add_argument("--kernels", action="store_true", help="compile the fused operations to PTX and cubins (needs Triton)")
    parser.add_argument("--precision", help="fp32, fp16 (default with --target), bf16, int8 (default without) or fp8")
    parser.add_argument(
        "--calibration", nargs="+", metavar="IMAGES", help="good frames for int8 and fp8: files, folders, patterns"
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", metavar="N", help="images a call of an engine (default: the model's draws)"
    )
    parser.add_argument("--out", "--cache", dest="out", type=Path, help="folder to write (default: where a detector looks)")
    parser.add_argument("--processes", type=int, default=1, help="that compile kernels at the same time (default 1)")


def _compile(options: argparse.Namespace) -> int:
    if options.kernels:
        if options.model or options.precision or options.calibration or options.batches:
            raise ConfigError("--kernels: expected neither a model nor its options: kernels serve every model")
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
    from advrad_fast.backends.cpu_network import calibrate_int8

    model, images = _normals(options, "int8")
    calibrate_int8(model.config, model.weights, images, cache_dir=options.out)
    say("use --precision int8, or Detector.load(..., precision='int8')")
    return OK


def _normals(options: argparse.Namespace, precision: str) -> tuple[Any, Any]:
    """The model, and calibration frames as it sees them: uint8 (N, H, W, C)."""
    import numpy as np

    from advrad_fast.image_paths import list_images
    from advrad_fast.images import load_image, prepare, prepare_whole
    from advrad_fast.model import ModelFile
    from advrad_fast.tiles import cut

    if not options.calibration:
        raise ConfigError(expected("--calibration", f"good frames, which {precision} needs", options.calibration))
    model = ModelFile.load(options.model)
    paths = list_images(options.calibration)
    chosen = paths[:: max(1, len(paths) // _CALIBRATION)][:_CALIBRATION]
    image = model.config.image
    if model.tiling is None:
        images = np.stack([prepare(load_image(path), image).image for path in chosen])
    else:
        size, rng = (image.height, image.width), np.random.default_rng(0)
        each = -(-_CALIBRATION // len(chosen))
        images = np.stack([t for path in chosen for t in cut(prepare_whole(load_image(path), image), size, each, rng)])
    say(f"calibrating on {f'{len(images)} tiles from ' if model.tiling else ''}{len(chosen)} of {len(paths)} frames")
    return model, images


def _compile_kernels(options: argparse.Namespace) -> int:
    from advrad_fast.kernels import aot

    if not 1 <= options.processes <= 256:
        raise ConfigError(expected("--processes", "an integer in [1, 256]", options.processes))
    from advrad_fast.backends.cuda_options import kernels_folder

    folder = kernels_folder(options.out)
    manifest = aot.build(folder, options.target or aot.TARGETS, processes=options.processes)
    say(f"wrote {folder}: {len(manifest.kernels)} kernels for {len({k.target for k in manifest.kernels})} targets")
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
        say(f"{target} {precision}, batches {', '.join(map(str, batches))}: {did}, {size}, {folder}/{compiled.name}.blob")
    return OK
