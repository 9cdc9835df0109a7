"""A station's inspection service: every image that appears in a folder is inspected, and its result appended to a file.

``python service.py MODEL FOLDER RESULTS``; docs/edge.md installs it.  The camera's program writes an image under another name
and renames it to NUMBER.png: then it is whole.  An image that has its line in RESULTS is deleted.  Runs until
SIGTERM; the exit code is 0 then.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np

from advrad_fast import Detector
from advrad_fast.errors import AdvRADError
from advrad_fast.images import load_image


def notify(message: str) -> None:
    """Tell systemd, where it asked for it: READY=1 once, WATCHDOG=1 while frames are being looked at."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
            there.connect("\0" + address[1:] if address.startswith("@") else address)
            there.send(message.encode())


def inspected(detector: Detector, path: Path) -> dict[str, object]:
    """One image's line.  A fault is ERROR, never OK."""
    start = time.perf_counter()
    try:
        result = detector.inspect(load_image(path), maps=False)
        line = {"path": path.name, "outcome": result.outcome.value, "score": result.score, "threshold": result.threshold}
    except AdvRADError as error:
        line = {"path": path.name, "outcome": "ERROR", "error": str(error)}
    return {**line, "ms": round((time.perf_counter() - start) * 1e3, 3)}


def main() -> None:
    model, folder, results = (Path(argument) for argument in sys.argv[1:])
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    detector = Detector.load(model, backend=os.environ.get("ADVRAD_BACKEND", "cuda"))
    image = detector.model.config.image
    detector.inspect(
        np.zeros((image.height, image.width, image.channels), np.uint8), maps=False
    )  # so that the first part isn't late
    notify("READY=1")
    with results.open("a", encoding="utf-8") as file:
        while not stopping:
            notify("WATCHDOG=1")
            for path in sorted(folder.glob("*.png")):
                file.write(json.dumps(inspected(detector, path)) + "\n")
                file.flush()
                path.unlink()
            time.sleep(0.002)


if __name__ == "__main__":
    main()
