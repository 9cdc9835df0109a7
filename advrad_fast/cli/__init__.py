"""``advrad-fast``: one file a command.

Logs and progress go to standard error.  Exit codes: 0 fine, 1 a defect was found (or a part could not be judged), 2 something
could not be done.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from advrad_fast import __version__
from advrad_fast.cli import (
    backends,
    bench,
    certification,
    compilation,
    demo,
    evaluation,
    inspection,
    serving,
    stream,
    train,
    watch,
)
from advrad_fast.cli.common import FAILED, FOUND, OK, results_alone, say
from advrad_fast.errors import AdvRADError

__all__ = ["FAILED", "FOUND", "OK", "main"]

#: In the order of ``--help``.
COMMANDS = (train, inspection, stream, watch, serving, certification, evaluation, compilation, bench, backends, demo)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a file name that is not UTF-8 is printed as the bytes that it is
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s", stream=sys.stderr)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        with results_alone() if getattr(options, "ray", None) is not None else nullcontext():
            return run(options)
    except AdvRADError as error:
        say(f"advrad-fast: {error}")
    except ModuleNotFoundError as error:
        extras = {"torch": "[train]", "tqdm": "[train]", "triton": "[compile]", "cv2": "[line]", "harvesters": "[genicam]"}
        extras |= {"paho": "[mqtt]", "prometheus_client": "[prometheus]", "starlette": "[watch]", "uvicorn": "[watch]"}
        wanted = f"advrad-fast{extras.get((error.name or '').split('.')[0], '')}"
        say(f"advrad-fast: {error.name} is not installed; needed here: pip install '{wanted}'")
    except OSError as error:
        say(f"advrad-fast: {error}")
    except KeyboardInterrupt:
        say("advrad-fast: interrupted")
    except Exception as error:  # Python's own exit code for it is 1, which says that a defect was found
        traceback.print_exc()
        say(f"advrad-fast: {type(error).__name__}, which is a bug or a lack of memory")
    return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="advrad-fast", description="Adversarially robust industrial anomaly detection.")
    parser.add_argument("--version", action="version", version=f"advrad-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("-v", "--verbose", action="store_true", help="say what is being done")
        sub.set_defaults(run=run)
        return sub

    for module in COMMANDS:
        module.add(command)
    return parser
