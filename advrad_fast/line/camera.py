"""Frames from USB and network cameras and from video files, through OpenCV (the extra ``line``)."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Mapping
from types import ModuleType
from typing import Any

from advrad_fast import checks
from advrad_fast.errors import ConfigError, SourceError, expected
from advrad_fast.line.frames import Frame

READ_TIMEOUT_MS = 10_000  #: after which OpenCV itself gives up on a network camera, which ends a thread that was given up


class Camera:
    """A USB camera by its number, or a network camera by its address (``rtsp://``, ``http://``).

    OpenCV gives blue first; each frame is turned to RGB where it is read, the same on every connection.  A camera that ends
    its stream, or gives no frame, has failed, and is opened again.

    Args:
        camera: a number from 0, or an address; name and password in it stay out of results and logs.
        width, height: pixels to ask a USB camera for; what comes is up to it.
        properties: further OpenCV settings, as ``{cv2.CAP_PROP_EXPOSURE: -6}``, set on every connection.

    Raises:
        ConfigError: the camera is neither, or a setting is no number.
        ModuleNotFoundError: OpenCV is not installed.
    """

    live = True
    restartable = True

    def __init__(
        self,
        camera: int | str,
        *,
        width: int | None = None,
        height: int | None = None,
        properties: Mapping[int, float] | None = None,
    ) -> None:
        number = isinstance(camera, int) and not isinstance(camera, bool) and 0 <= camera < 2**31
        if not number and not (isinstance(camera, str) and "://" in camera and _utf8(camera)):
            raise ConfigError(
                expected("camera", "a number from 0 or an address such as rtsp://host/path", _without_login(camera))
            )
        self._camera = camera
        self._cv2 = _opencv()
        if properties is not None and not isinstance(properties, Mapping):
            raise ConfigError(expected("properties", "a dict from settings to numbers", type(properties)))
        self._properties = {
            checks.integer("properties", key): checks.finite(f"properties[{key}]", value)
            for key, value in (properties or {}).items()
        }
        for name, value in (("width", width), ("height", height)):
            if value is not None:
                key = getattr(self._cv2, f"CAP_PROP_FRAME_{name.upper()}")
                self._properties[key] = checks.integer(name, value, 1, 1 << 20)
        self.name = f"camera {_without_login(camera)}"

    def open(self) -> Generator[Frame, None, None]:
        """Connect.

        Raises:
            SourceError: the camera does not answer.
        """
        cv2 = self._cv2
        if isinstance(self._camera, str):
            timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, READ_TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, READ_TIMEOUT_MS]
            capture = cv2.VideoCapture(self._camera, cv2.CAP_FFMPEG, timeouts)
        else:
            capture = cv2.VideoCapture(self._camera)
        if not capture.isOpened():
            raise SourceError(f"{self.name}: it cannot be opened")
        for key, value in self._properties.items():
            capture.set(key, value)
        return _frames(cv2, capture, self.name, endless=True)


class VideoFile:
    """All frames of a video file, in order; ``item`` is the frame's number from 0.

    Args:
        path: the file.

    Raises:
        ConfigError: it is no path.
        SourceError: it cannot be opened as a video.
        ModuleNotFoundError: OpenCV is not installed.
    """

    live = False
    restartable = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        cv2 = _opencv()
        name = checks.path("path", path)
        self.name = f"video {name}"
        if not _utf8(name):  # OpenCV ends the process
            raise SourceError(f"{self.name}: it cannot be opened as a video: its name is not UTF-8")
        capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG)
        if not capture.isOpened():
            raise SourceError(f"{self.name}: it cannot be opened as a video")
        self._frames = _frames(cv2, capture, self.name, endless=False)

    def open(self) -> Generator[Frame, None, None]:
        """The file's one iterator."""
        return self._frames


def _frames(cv2: ModuleType, capture: Any, name: str, *, endless: bool) -> Generator[Frame, None, None]:
    try:
        number = 0
        while True:
            there, frame = capture.read()
            if not there or frame is None:
                if endless:
                    raise SourceError(f"{name}: it gives no more frames")
                return
            rgb = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) if frame.ndim == 3 and frame.shape[2] == 3 else frame
            yield Frame(rgb, item=None if endless else str(number))
            number += 1
    finally:
        capture.release()


def _without_login(camera: object) -> object:
    """An address without name and password."""
    return re.sub(r"://[^/@]*@", "://", camera) if isinstance(camera, str) else camera


def _utf8(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _opencv() -> ModuleType:
    import cv2

    return cv2
