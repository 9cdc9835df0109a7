"""Cameras and video files through OpenCV, against a camera on loopback and files made here; GenICam against a stand-in."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from mjpeg import MjpegCamera, plain
from rtsp import RtspCamera
from streams import detector

from advrad_fast import ConfigError, Detector, ImageError, Outcome
from advrad_fast.errors import SourceError, SourceStalledError
from advrad_fast.line import IDLE, Backoff, Camera, GenicamCamera, InspectionStream, VideoFile

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")

COLOURS = {"red": (250, 20, 30), "green": (20, 250, 30), "blue": (20, 30, 250)}
QUICK = Backoff(first=0.01, cap=0.02)


@pytest.fixture(scope="module")
def model() -> Detector:
    return detector()


def colour(pixels: Any) -> str:
    mean = np.asarray(pixels).reshape(-1, 3).mean(axis=0)
    return min(COLOURS, key=lambda name: float(np.abs(mean - COLOURS[name]).max()))


def test_a_video_file_gives_all_frames_in_order_as_rgb(model: Detector, tmp_path: Path) -> None:
    path = tmp_path / "a.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for i in range(30):
        writer.write(plain(list(COLOURS.values())[i % 3])[:, :, ::-1])
    writer.release()
    with InspectionStream(model, VideoFile(path)) as stream:
        results = list(stream)
    assert [r.item for r in results] == [str(i) for i in range(30)]
    assert [colour(r.frame) for r in results] == list(COLOURS) * 10
    assert all(r.error is None and r.dropped == 0 for r in results)
    assert stream.source == f"video {path}"


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.avi").write_text("no video")
    for name in ("text.avi", "none.avi"):
        with pytest.raises(SourceError, match="cannot be opened as a video"):
            VideoFile(tmp_path / name)


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("kind", [RtspCamera, MjpegCamera])
def test_a_network_camera_that_closes_stalls_and_comes_back(model: Detector, release: threading.Event, kind: Any) -> None:
    """RGB before and after: first the camera hangs up, then it falls silent."""

    def shows(name: str, then: bool) -> Any:
        def script() -> Iterator[Any]:
            for _ in range(60):  # OpenCV looks at half of them before it says that it is connected
                yield plain(COLOURS[name])
                time.sleep(0.002)
            if then:
                release.wait(60.0)

        return script

    def steady() -> Iterator[Any]:
        while not release.is_set():
            yield plain(COLOURS["green"])
            time.sleep(0.02)

    camera = kind(shows("red", False), shows("blue", True), steady)
    seen: list[str] = []
    with InspectionStream(model, Camera(camera.url), deadline_ms=1000.0, policy="queue", backoff=QUICK) as stream:
        for result in stream:
            label = type(result.error).__name__ if result.error else colour(result.frame)
            assert (result.outcome is Outcome.ERROR) == (result.error is not None)
            if not seen or seen[-1] != label:
                seen.append(label)
            if label == "green":
                break
        assert "secret" not in stream.source and "://127.0.0.1:" in stream.source
    release.set()
    camera.close()
    assert seen == ["red", "SourceError", "blue", "SourceStalledError", "green"]
    assert stream.status.opened == 3


def test_a_camera_that_is_not_there(model: Detector) -> None:
    source = Camera("http://user:secret@127.0.0.1:9/none", width=64)
    with InspectionStream(model, source, backoff=QUICK) as stream:
        errors = [next(stream).error for _ in range(2)]
    assert all(isinstance(error, SourceError) and not isinstance(error, SourceStalledError) for error in errors)
    assert "secret" not in str(errors)


@pytest.mark.parametrize("camera", [-1, True, "0", "/dev/video0", None, 1.0])
def test_cameras_that_are_refused(camera: Any) -> None:
    with pytest.raises(ConfigError, match="camera: expected"):
        Camera(camera)


class FakeGenicam:
    """A stand-in for harvesters, with a camera that gives the buffers it is told to."""

    def __init__(self) -> None:
        self.buffers: list[Any] = []
        self.log: list[str] = []
        self.nodes = type("Nodes", (), {"PixelFormat": type("Node", (), {"value": None})()})()
        fake = self

        class Acquirer:
            remote_device = type("Device", (), {"node_map": fake.nodes})()

            def start(self) -> None:
                fake.log.append("start")

            def stop(self) -> None:
                fake.log.append("stop")

            def destroy(self) -> None:
                fake.log.append("destroy")

            def try_fetch(self, *, timeout: float) -> Any:
                if fake.buffers:
                    return fake.buffers.pop(0)
                time.sleep(timeout)
                return None

        class Harvester:
            def add_file(self, path: str) -> None:
                self.path = path

            def update(self) -> None:
                pass

            def create(self, key: Any) -> Acquirer:
                fake.log.append(f"create {key}")
                if key == {"serial_number": "none"}:
                    raise ValueError("no such device")
                return Acquirer()

            def reset(self) -> None:
                fake.log.append("reset")

        self.module = ModuleType("harvesters.core")
        self.module.Harvester = Harvester  # type: ignore[attr-defined]

    def give(self, data: Any, name: str, height: int = 4, width: int = 6) -> Any:
        """A buffer whose memory is used again once it has gone back."""
        fake = self

        class Component:
            def __init__(self) -> None:
                self.data, self.data_format, self.height, self.width = np.array(data).reshape(-1), name, height, width

        class Buffer:
            def __init__(self) -> None:
                self.payload = type("Payload", (), {"components": [Component()]})()

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: Any) -> None:
                self.payload.components[0].data[:] = 0
                fake.log.append("queue")

        self.buffers.append(Buffer())


@pytest.fixture
def genicam(monkeypatch: pytest.MonkeyPatch) -> FakeGenicam:
    fake = FakeGenicam()
    package = ModuleType("harvesters")
    package.core = fake.module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "harvesters", package)
    monkeypatch.setitem(sys.modules, "harvesters.core", fake.module)
    return fake


@pytest.fixture
def producer(tmp_path: Path) -> Path:
    path = tmp_path / "maker.cti"
    path.touch()
    return path


def test_genicam_formats(genicam: FakeGenicam, producer: Path, rng: np.random.Generator) -> None:
    grey = rng.integers(0, 256, (4, 6), dtype=np.uint8)
    rgb = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    twelve = rng.integers(0, 4096, (4, 6), dtype=np.uint16)
    twelve[0, :2] = 0, 4095
    padded = np.concatenate([rgb.reshape(4, -1), np.full((4, 2), 9, np.uint8)], axis=1)
    sixteen = (twelve * 16).astype(np.uint16)
    iterator = GenicamCamera(producer, features={"PixelFormat": "RGB8"}).open()
    assert genicam.nodes.PixelFormat.value == "RGB8"
    wanted12 = np.rint(twelve.astype(np.float64) * 65535 / 4095).astype(np.uint16)
    for data, name, wanted in (
        (grey, "Mono8", grey[:, :, None]),
        (rgb, "RGB8", rgb),
        (rgb[:, :, ::-1], "BGR8", rgb),
        (padded, "RGB8", rgb),
        (twelve, "Mono12", wanted12[:, :, None]),
        (sixteen, "Mono16", sixteen[:, :, None]),
    ):
        genicam.give(data, name)
        frame = next(iterator)
        assert np.array_equal(frame.pixels, wanted) and frame.pixels.dtype == wanted.dtype
    assert genicam.log.count("queue") == 6
    for data, name in ((grey, "BayerRG8"), (twelve, "Mono12Packed"), (grey[:2], "Mono8"), (grey, "Mono12")):
        genicam.give(data, name)
        assert isinstance(next(iterator).error, ImageError)


def test_genicam_in_a_stream(model: Detector, genicam: FakeGenicam, producer: Path) -> None:
    for name in ("Mono8", "BayerRG8", "Mono8"):
        genicam.give(np.full((4, 6), 7, np.uint8), name)
    source = GenicamCamera(producer, "123", triggered=True)
    with InspectionStream(model, source, policy="queue", deadline_ms=500.0) as stream:
        results = [next(stream) for _ in range(3)]
        time.sleep(0.6)  # no part passes: no fault
        assert stream.status.faults == 0
    assert [r.outcome is Outcome.ERROR for r in results] == [False, True, False]
    assert [entry for entry in genicam.log if entry != "queue"] == [
        "create {'serial_number': '123'}",
        "start",
        "stop",
        "destroy",
        "reset",
    ]


def test_genicam_that_cannot_be_had(genicam: FakeGenicam, producer: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="producer: expected"):
        GenicamCamera(tmp_path / "none.cti")
    with pytest.raises(SourceError, match="no such device"):
        GenicamCamera(producer, "none").open()
    assert genicam.log == ["create {'serial_number': 'none'}", "reset"]
    iterator = GenicamCamera(producer, triggered=True).open()
    assert next(iterator) is IDLE
    iterator.close()  # type: ignore[attr-defined]
    assert genicam.log[-3:] == ["stop", "destroy", "reset"]
