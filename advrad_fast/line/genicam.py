"""Frames from GenICam cameras (GigE Vision, USB3 Vision), through harvesters (the extra ``genicam``) and the maker's producer.

Tested against a stand-in for harvesters only; no camera has been on it yet.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast import checks
from advrad_fast.errors import ConfigError, ImageError, SourceError, expected
from advrad_fast.line.frames import IDLE, Frame

_FETCH = 0.05  # seconds of one look for a frame
_SILENCE = 10.0  # seconds without a frame after which a camera that runs freely has failed

_FORMAT = re.compile(r"(Mono|RGB|BGR)(8|10|12|14|16)")


class GenicamCamera:
    """A GenICam camera.

    Pixel formats: Mono, RGB and BGR with 8, 10, 12, 14 or 16 bits, unpacked; every frame of another one is an ERROR that says so.
    BGR is turned to RGB, 10 to 14 bits are scaled to 16.

    Args:
        producer: the maker's GenTL producer, a ``.cti`` file.
        serial: the camera's serial number; None for the first that is found.
        triggered: frames come when a part passes: to wait is no fault.
        features: of the camera, set in this order on every connection: ``{"PixelFormat": "RGB8", "ExposureTime": 2000.0}``.

    Raises:
        ConfigError: there is no such producer, or an argument is of the wrong type.
        ModuleNotFoundError: harvesters is not installed.
    """

    live = True
    restartable = True

    def __init__(
        self,
        producer: str | os.PathLike[str],
        serial: str | None = None,
        *,
        triggered: bool = False,
        features: Mapping[str, object] | None = None,
    ) -> None:
        import harvesters.core  # noqa: F401  (a missing library shows here, not on the line)

        self._producer = checks.path("producer", producer)
        if not os.path.isfile(self._producer):  # noqa: PTH113  (pathlib's raises where a name is too long)
            raise ConfigError(expected("producer", "a GenTL producer (.cti file)", self._producer))
        self._serial = None if serial is None else checks.text("serial", serial)
        self._triggered = checks.truth("triggered", triggered)
        if features is not None and not isinstance(features, Mapping):
            raise ConfigError(expected("features", "a dict from features to values", type(features)))
        self._features = {checks.text("features", key): value for key, value in (features or {}).items()}
        self.name = f"genicam {serial or 'camera'}"

    def open(self) -> Iterator[Any]:
        """Connect and start to acquire.

        Raises:
            SourceError: there is no such camera, or it refuses.
        """
        from harvesters.core import Harvester

        with contextlib.ExitStack() as opened:
            harvester = Harvester()
            opened.callback(harvester.reset)
            try:
                harvester.add_file(self._producer)
                harvester.update()
                acquirer = harvester.create(0 if self._serial is None else {"serial_number": self._serial})
                opened.callback(acquirer.destroy)
                nodes = acquirer.remote_device.node_map
                for name, value in self._features.items():
                    getattr(nodes, name).value = value
                acquirer.start()
                opened.callback(acquirer.stop)
            except Exception as error:  # harvesters has many kinds
                raise SourceError(f"{self.name}: it cannot be opened: {type(error).__name__}: {error}") from error
            return _Acquisition(self.name, acquirer, self._triggered, opened.pop_all())
        raise SourceError(f"{self.name}: it cannot be opened")


class _Acquisition:
    """Not a generator: one that is closed before its first read would not give the camera back."""

    def __init__(self, name: str, acquirer: Any, triggered: bool, opened: contextlib.ExitStack) -> None:
        self._name, self._acquirer, self._triggered, self._opened = name, acquirer, triggered, opened

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        end = time.monotonic() + _SILENCE
        while True:
            buffer = self._acquirer.try_fetch(timeout=_FETCH)
            if buffer is not None:
                with buffer:  # goes back to the producer afterwards: what is kept is a copy
                    return _frame(buffer.payload.components[0])
            if self._triggered:
                return IDLE
            if time.monotonic() > end:
                raise SourceError(f"{self._name}: no frame for {_SILENCE:.0f} s")

    def close(self) -> None:
        self._opened.close()


def _frame(component: Any) -> Frame:
    try:
        return Frame(_pixels(component.data, component.data_format, component.height, component.width))
    except ImageError as error:
        return Frame(None, error=error)


def _pixels(data: NDArray[Any], name: str, height: int, width: int) -> NDArray[Any]:
    """A buffer as the contract wants it: uint8 or uint16, grey or RGB, a copy."""
    found = _FORMAT.fullmatch(name)
    if found is None:
        raise ImageError(expected("pixel format", "Mono, RGB or BGR with 8 to 16 bits, unpacked (set PixelFormat)", name))
    colours, bits = (1 if found[1] == "Mono" else 3), int(found[2])
    kind = np.dtype(np.uint8 if bits == 8 else np.uint16)
    flat = np.asarray(data).reshape(-1)
    row = width * colours
    if height < 1 or width < 1 or flat.dtype != kind or flat.size % height or flat.size // height < row:
        raise ImageError(f"frame: expected {kind} of {height} x {width} x {colours}, got {flat.dtype} of {flat.size} values")
    pixels = flat.reshape(height, -1)[:, :row].reshape(height, width, colours)  # lines may be padded
    if found[1] == "BGR":
        pixels = pixels[:, :, ::-1]
    if 8 < bits < 16:
        top = (1 << bits) - 1
        return ((pixels.astype(np.uint32) * 65535 + top // 2) // top).astype(np.uint16)
    return np.array(pixels, order="C")
