"""What the commands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TextIO

OK, FOUND, FAILED = 0, 1, 2  #: exit codes: fine, a part is not OK, something could not be done


class Adder(Protocol):
    """Adds a command to the parser."""

    def __call__(self, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        """``run`` gets the parsed options and returns the exit code; ``text`` is its help."""


def say(line: str) -> None:
    """A line on standard error."""
    sys.stderr.write(line + "\n")


def model_options(parser: argparse.ArgumentParser, *, seed: int | None = 0, seed_help: str = "of the noise (default 0)") -> None:
    """The model file, and how to run it."""
    parser.add_argument("model", type=Path, help="the model file")
    parser.add_argument("--backend", default="auto", help="auto, cpu, cuda or reference")
    parser.add_argument("--precision", help="auto, fp32, bf16, int8 (see compile); fp16 and fp8 on GPUs")
    parser.add_argument("--threads", type=int, help="CPU threads of the engine")
    parser.add_argument("--cache", type=Path, help="folder for compiled engines (default: the platform's cache folder)")
    parser.add_argument("--seed", type=int, default=seed, help=seed_help)


def roi_options(parser: argparse.ArgumentParser) -> None:
    """The region of interest."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--roi", type=Path, metavar="IMAGE", help="look only where this image, of the frames' size, is white")
    text = "the same on the aligned part: an image of the network's input size; the region moves with the part"
    either.add_argument("--roi-on-part", type=Path, metavar="IMAGE", help=text)


def region_of(options: argparse.Namespace) -> Any:
    """The :class:`~advrad_fast.roi.Roi` that :func:`roi_options` describe, or None; also for commands without them.

    Raises:
        ImageError: the image can't be read.
        ConfigError: nothing in it is white.
    """
    for name, on in (("roi", "frame"), ("roi_on_part", "part")):
        if getattr(options, name, None) is not None:
            from advrad_fast.roi import Roi

            return Roi.load(getattr(options, name), on)  # type: ignore[arg-type]
    return None


def ray_option(parser: argparse.ArgumentParser) -> None:
    """``--ray``."""
    text = "spread the work over a Ray cluster: auto, HOST:PORT, or local; --threads, of each worker, is 1 unless given"
    parser.add_argument("--ray", metavar="ADDRESS", help=text)


def engine_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those of :func:`model_options` that are the backend's own; over a cluster, where each core has a worker, one thread."""
    threads = 1 if options.threads is None and getattr(options, "ray", None) is not None else options.threads
    extra = {"precision": options.precision, "threads": threads, "cache_dir": options.cache}
    return {key: value for key, value in extra.items() if value is not None}


def load_detector(options: argparse.Namespace) -> Any:
    """The detector that :func:`model_options` describe."""
    return detector_maker(options)()


def detector_maker(options: argparse.Namespace) -> Callable[[], Any]:
    """A function that makes the detector, here or, once it has been sent there, on another machine: it holds the whole model.

    Raises:
        ModelFileError: the model file is damaged, foreign or inconsistent.
        ImageError, ConfigError: as :func:`region_of`.
    """
    from advrad_fast.detector import Detector
    from advrad_fast.model import ModelFile

    model, roi = ModelFile.load(options.model), region_of(options)
    return partial(Detector, model, backend=options.backend, seed=options.seed, roi=roi, **engine_options(options))


def data_options(parser: argparse.ArgumentParser, text: str) -> None:
    """The dataset: a folder, or one of the public datasets as its makers ship it.  ``text`` says what the folder may be."""
    parser.add_argument("data", type=Path, nargs="?", help=text)
    parser.add_argument("--dataset", choices=("mvtec", "visa", "btad", "folder"), help="its layout (default: by what is there)")
    parser.add_argument("--root", type=Path, help="the same as DATA: the dataset's folder")
    parser.add_argument("--category", help="with --dataset mvtec, visa or btad: which of its categories, such as pcb1")


def load_data(options: argparse.Namespace) -> Any:
    """The :class:`~advrad_fast.evaluation.datasets.Dataset` that :func:`data_options` describe."""
    from advrad_fast.errors import DatasetError
    from advrad_fast.evaluation.datasets import load_dataset

    if (options.data is None) == (options.root is None):
        got = "neither" if options.data is None else "both"
        raise DatasetError(f"data: expected the dataset's folder once, as DATA or as --root, got {got}")
    return load_dataset(options.root or options.data, options.dataset or "auto", options.category)


_results: list[TextIO] = []  # standard output, while sys.stdout is standard error


@contextmanager
def results_alone() -> Iterator[None]:
    """Keep standard output for what is written to :func:`stdout`: Ray's threads print there what befalls its workers."""
    _results.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results.pop()


def stdout() -> TextIO:
    """Standard output, for results."""
    return _results[-1] if _results else sys.stdout


@contextmanager
def output(target: str | None) -> Iterator[TextIO | None]:
    """A text file for writing, standard output for ``-``, or None."""
    if target is None:
        yield None
    elif target == "-":
        yield stdout()
        stdout().flush()
    else:
        # A file name that is not UTF-8 is written as the bytes that it is.
        with Path(target).open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield file


class Progress:
    """``12/83 images`` on standard error: one line that counts on a terminal, a line every ten per cent elsewhere.

    Args:
        total: steps there will be.
        what: is counted, in the plural.
    """

    def __init__(self, total: int, what: str) -> None:
        self._total, self._what, self._done, self._shown = total, what, 0, 0
        self._live = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live and self._done:
            say("")

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        if self._live:
            sys.stderr.write(f"\r{self._done}/{self._total} {self._what}")
            sys.stderr.flush()
        elif self._done - self._shown >= max(self._total // 10, 20) or self._done == self._total:
            self._shown = self._done
            say(f"{self._done}/{self._total} {self._what}")
