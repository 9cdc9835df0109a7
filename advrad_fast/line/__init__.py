"""On the line: streams of frames from folders, cameras and Python, and where their results go.  Loads no torch, no OpenCV."""

from advrad_fast.line.backoff import Backoff
from advrad_fast.line.folder import WatchedFolder
from advrad_fast.line.frames import IDLE, Calls, Frame, Frames, Source
from advrad_fast.line.results import StreamInspection
from advrad_fast.line.stream import InspectionStream, StreamStatus

__all__ = [
    "IDLE",
    "Backoff",
    "Calls",
    "Frame",
    "Frames",
    "InspectionStream",
    "Source",
    "StreamInspection",
    "StreamStatus",
    "WatchedFolder",
]
