"""OpenVINO and nncf report their use over the network, from the moment they are imported: not from a program of ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SENDER = "openvino_telemetry"  # what both send with; without it they have stubs


@contextmanager
def no_telemetry() -> Iterator[None]:
    """Import openvino or nncf inside this: they find no telemetry package.  One that is imported already is left as it is."""
    missing = object()
    before = sys.modules.get(_SENDER, missing)
    sys.modules[_SENDER] = None  # type: ignore[assignment]  # Python's way to say: not to be imported
    try:
        yield
    finally:
        if before is missing:
            del sys.modules[_SENDER]
        else:
            sys.modules[_SENDER] = before  # type: ignore[assignment]
