"""``advrad-fast bench``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from advrad_fast.cli.common import OK, Adder, output, say
from advrad_fast.errors import ConfigError, expected


def add(command: Adder) -> None:
    """Add the command."""
    parser = command(
        "bench",
        _bench,
        "Measure this machine's CPU path, or with --gpu its GPU's, against PyTorch and the machine's own peaks (needs PyTorch).",
    )
    parser.add_argument("model", type=Path, nargs="?", help="a model file (default: the demo's)")
    parser.add_argument("--gpu", action="store_true", help="inspect on the cuda backend, and the kernels, against PyTorch there")
    parser.add_argument("--precision", default="auto", help="of the engine, with --gpu: auto, fp32, fp16, bf16, int8, fp8")
    parser.add_argument("--frames", type=Path, help="images that the model is for (default: drawn frames)")
    parser.add_argument(
        "--parts",
        default="operations,network,inspect,votes",
        help="of operations, network, inspect, votes, paper-like (CPU)",
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="for each set of contestants (default 4)")
    parser.add_argument("--threads", type=int, help="of the operations and the engine (default: the machine's)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes a minute a network")
    parser.add_argument("--json", metavar="FILE", help="write a row a line; - for standard output")


def _bench(options: argparse.Namespace) -> int:
    from importlib.resources import as_file, files

    from advrad_fast import bench
    from advrad_fast.bench import gpu

    parts = tuple(options.parts.split(","))
    if unknown := sorted(set(parts) - set(bench.PARTS)):
        raise ConfigError(expected("--parts", f"a list of {list(bench.PARTS)}", unknown))
    if not 0.0 <= options.seconds <= 3600.0:
        raise ConfigError(expected("--seconds", "a number in [0, 3600]", options.seconds))
    if options.precision != "auto" and not options.gpu:
        raise ConfigError(expected("--precision", "--gpu with it", options.precision))
    rows = []
    with as_file(files("advrad_fast") / "data" / "elpv-mono.safetensors") as demo, output(options.json) as file:
        model, common = options.model or demo, {"frames": options.frames, "seconds": options.seconds}
        common["compile_torch"] = not options.no_compile
        if options.gpu:
            found = gpu.run(model, precision=options.precision, **common)
        else:
            found = bench.run(model, parts=parts, threads=options.threads, **common)
        for row in found:
            rows.append(row)
            say(f"{row['name']}, batch {row['batch']}, {row['precision']}: {row['p50_ms']:.3g} ms")
            if file:
                file.write(json.dumps(row) + "\n")
                file.flush()
    if options.json != "-" and rows and options.gpu:
        sys.stdout.write(gpu.table(rows) + "\n")
    elif options.json != "-" and rows:
        sys.stdout.write(f"{rows[0]['machine']}; commit {rows[0]['commit']}; {json.dumps(rows[0]['details']['peaks'])}\n")
        sys.stdout.write(bench.table(rows) + "\n")
    return OK
