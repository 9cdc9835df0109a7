"""``advrad-fast watch``."""

from __future__ import annotations

import argparse
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from advrad_fast.cli.common import Adder
from advrad_fast.cli.stream import run, stream_options
from advrad_fast.errors import ConfigError, expected

TOKEN = "ADVRAD_WATCH_TOKEN"  #: the environment's variable


def add(command: Adder) -> None:
    """Add the command."""
    parser = command(
        "watch",
        _watch,
        "As stream, with a page for the person at the line: the live frame, heat map, outcome, counts, score trend and last"
        " defects, in a browser. Exit codes as for stream.",
    )
    stream_options(parser)
    parser.add_argument(
        "--listen",
        default="127.0.0.1:8765",
        metavar="HOST:PORT",
        help="where the page is served (default 127.0.0.1:8765); beyond this machine it needs a token, and goes out unencrypted",
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"holds the token that browsers have to show; or set {TOKEN}; where one is needed and none is given, one is printed",
    )
    parser.add_argument(
        "--host", action="append", default=[], metavar="NAME", help="another name that the page is reached by; may be repeated"
    )
    parser.add_argument("--per-second", type=float, default=8.0, help="updates of the page at most (default 8)")


def _watch(options: argparse.Namespace) -> int:
    host, port = _address(options.listen)
    token = _token(options.token_file)
    return run(options, partial(_page, options, host, port, token))


def _page(options: argparse.Namespace, host: str, port: int, token: str | None) -> Any:
    from advrad_fast.line.watch import WatchPage

    deadline = {"deadline_ms": options.deadline_ms} if options.deadline_ms else {}
    return WatchPage(host, port, token=token, names=options.host, per_second=options.per_second, **deadline)


def _address(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]/@]+)):([0-9]{1,5})", text)
    if match is None:
        raise ConfigError(expected("--listen", "HOST:PORT", text))
    return match[1] or match[2], int(match[3])


def _token(file: Path | None) -> str | None:
    text = os.environ.get(TOKEN) if file is None else file.read_text(encoding="utf-8", errors="replace")
    return None if text is None else text.strip()
