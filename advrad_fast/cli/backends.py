"""``advrad-fast backends``."""

from __future__ import annotations

import argparse
import json
import sys

from advrad_fast.cli.common import FAILED, OK, Adder, output


def add(command: Adder) -> None:
    """Add the command."""
    parser = command("backends", _backends, "List the backends: which are usable here, and why the others are not.")
    parser.add_argument("--json", metavar="FILE", help="write JSON; - for standard output")


def _backends(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from advrad_fast.backends import available

    rows = available()
    with output(options.json) as file:
        if file:
            file.write(json.dumps([asdict(row) for row in rows]) + "\n")
    if options.json != "-":
        for row in rows:
            sys.stdout.write(f"{row.name:10s} {'usable' if row.usable else 'not usable':10s}  {row.detail}\n")
    return OK if any(row.usable for row in rows) else FAILED
