"""``advrad-fast serve``."""

from __future__ import annotations

import argparse
import os
import signal
import threading

from advrad_fast.cli.common import OK, Adder, detector_maker, model_options, roi_options, say


def add(command: Adder) -> None:
    """Add the command."""
    parser = command("serve", _serve, "Inspect images that are posted over HTTP, on Ray Serve, until Ctrl-C or SIGTERM.")
    model_options(parser)
    roi_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="beyond this machine ADVRAD_TOKEN must be set (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="(default 8000)")
    parser.add_argument("--replicas", type=int, default=1, help="processes with a detector each (default 1)")
    parser.add_argument("--max-batch", type=int, default=8, help="requests taken together, at most (default 8)")
    parser.add_argument("--wait-ms", type=float, default=0.0, help="how long a request waits for others (default 0)")
    parser.add_argument("--max-bytes", type=int, default=32 << 20, help="of an image file (default 33554432)")
    parser.add_argument(
        "--ray", metavar="ADDRESS", default="local", help="a Ray cluster: auto, HOST:PORT, or local (default); --threads is 1"
    )


def _serve(options: argparse.Namespace) -> int:
    from advrad_fast.serving import ServingSettings, running

    settings = ServingSettings(
        host=options.host,
        port=options.port,
        replicas=options.replicas,
        max_batch=options.max_batch,
        wait_ms=options.wait_ms,
        max_bytes=options.max_bytes,
        token=os.environ.get("ADVRAD_TOKEN") or None,
    )
    ended = threading.Event()
    with running(detector_maker(options), settings, ray=options.ray) as url:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda *_: ended.set())
        say(f"serving {options.model} at {url}/inspect; Ctrl-C ends it")
        ended.wait()
    return OK
