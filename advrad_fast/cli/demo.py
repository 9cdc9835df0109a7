"""``advrad-fast demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

from advrad_fast.cli.common import OK, Adder


def add(command: Adder) -> None:
    """Add the command."""
    parser = command("demo", _demo, "Inspect real solar cells with the detector that comes with the package.")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the heat maps and the page")
    parser.add_argument("--limit", type=int, help="inspect at most this many good and this many defective cells")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="only write the cells in MVTec AD layout, to train on")


def _demo(options: argparse.Namespace) -> int:
    from advrad_fast import demo

    if options.prepare is not None:
        demo.prepare(options.prepare)
        return OK
    return demo.run(options.out, limit=options.limit, backend=options.backend)
