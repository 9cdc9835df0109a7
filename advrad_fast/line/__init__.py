"""On the line: streams of frames from folders, cameras and Python, and where their results go.  Loads no torch.

OpenCV and harvesters are loaded by the sources that need them, when they are made.
"""

from advrad_fast.line.backoff import Backoff
from advrad_fast.line.camera import Camera, VideoFile
from advrad_fast.line.drift import Direction, Drift, DriftState
from advrad_fast.line.folder import WatchedFolder
from advrad_fast.line.frames import IDLE, Calls, Frame, Frames, Source
from advrad_fast.line.genicam import GenicamCamera
from advrad_fast.line.results import StreamInspection
from advrad_fast.line.stream import InspectionStream, StreamStatus

__all__ = [
    "Backoff",
    "Calls",
    "Camera",
    "Direction",
    "Drift",
    "DriftState",
    "Frame",
    "Frames",
    "GenicamCamera",
    "IDLE",
    "InspectionStream",
    "Source",
    "StreamInspection",
    "StreamStatus",
    "VideoFile",
    "WatchedFolder",
]
