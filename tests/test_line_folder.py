"""Watched folders: every complete file once, in order, and never half of one."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from streams import detector, frames, wait_until

from advrad_fast import ConfigError, Detector, ImageError, Outcome
from advrad_fast.errors import SourceError
from advrad_fast.line import IDLE, Backoff, InspectionStream, WatchedFolder

PICTURES = frames(6)


@pytest.fixture(scope="module")
def model() -> Detector:
    return detector()


def png(frame: Any) -> bytes:
    buffer = BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


def put(folder: Path, name: str, frame: Any) -> None:
    """As a careful writer does."""
    temporary = folder / f".{name}.tmp"
    temporary.write_bytes(png(frame))
    temporary.rename(folder / name)


class Watched:
    """A folder's frames, taken by hand."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.source = WatchedFolder(folder, **{"settle_ms": 0, "interval_ms": 0, **options})
        self.iterator = self.source.open()

    def idle(self, looks: int = 3) -> None:
        assert [next(self.iterator) for _ in range(looks)] == [IDLE] * looks

    def take(self, name: str, frame: Any = None) -> Any:
        for _ in range(1000):
            found = next(self.iterator)
            if found is not IDLE:
                assert Path(found.item).name == name
                if frame is not None:
                    assert np.array_equal(found.pixels, frame)
                return found
            time.sleep(0.002)
        pytest.fail(f"{name} did not come")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    made = tmp_path / "camera"
    made.mkdir()
    yield made


def test_new_files_once_and_in_order(folder: Path) -> None:
    put(folder, "old.png", PICTURES[0])
    watched = Watched(folder)
    watched.idle()
    for i, name in enumerate(("c.png", "a.png", "b.png")):  # by time of change, not by name
        put(folder, name, PICTURES[i])
        os.utime(folder / name, ns=(0, 10 + i))
    for i, name in enumerate(("c.png", "a.png", "b.png")):
        watched.take(name, PICTURES[i])
    watched.idle()
    put(folder, "d.png", PICTURES[3])
    os.utime(folder / "d.png", ns=(0, 1))  # a clock that jumped back
    watched.take("d.png", PICTURES[3])
    watched.idle()


def test_existing_files_on_request(folder: Path) -> None:
    for i in (0, 1):
        put(folder, f"{i}.png", PICTURES[i])
    watched = Watched(folder, existing=True)
    watched.take("0.png", PICTURES[0])
    watched.take("1.png", PICTURES[1])
    watched.idle()


class Clock:
    """Time that passes only in sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_file_is_taken_when_it_stands_still(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, data = Clock(), png(PICTURES[0])
    monkeypatch.setattr("advrad_fast.line.folder.time", clock)
    watched = Watched(folder, settle_ms=150, interval_ms=10)
    with (folder / "slow.png").open("wb") as file:
        for i in range(0, len(data), len(data) // 8 + 1):
            file.write(data[i : i + len(data) // 8 + 1])
            file.flush()
            end = clock.now + 0.1
            while clock.now < end:
                assert next(watched.iterator) is IDLE
    written = clock.now
    watched.take("slow.png", PICTURES[0])
    assert 0.04 <= clock.now - written <= 0.2
    watched.idle()


def test_a_file_written_anew_is_taken_again(folder: Path) -> None:
    watched = Watched(folder)
    for frame in PICTURES[:3]:
        put(folder, "current.png", frame)
        watched.take("current.png", frame)
        watched.idle()
    (folder / "current.png").unlink()
    watched.idle()
    put(folder, "current.png", PICTURES[3])
    watched.take("current.png", PICTURES[3])


def test_what_is_left_alone(folder: Path) -> None:
    watched = Watched(folder)
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden.png").write_bytes(png(PICTURES[0]))
    (folder / "folder.png").mkdir()
    (folder / "below").mkdir()
    put(folder / "below", "a.png", PICTURES[0])
    (folder / "dangling.png").symlink_to(folder / "nothing")
    watched.idle()
    below = Watched(folder, recursive=True, existing=True)
    below.take("a.png", PICTURES[0])
    below.idle()


def test_broken_files_are_errors_in_their_place(model: Detector, folder: Path) -> None:
    for i, name in enumerate(("a.png", "b.png", "c.png")):
        put(folder, name, PICTURES[i])
        os.utime(folder / name, ns=(0, i))
    cut = png(PICTURES[1])[:200]
    (folder / "b.png").write_bytes(cut)
    os.utime(folder / "b.png", ns=(0, 1))
    source = WatchedFolder(folder, existing=True, settle_ms=0)
    with InspectionStream(model, source) as stream:
        results = [next(stream) for _ in range(3)]
    assert [Path(r.item or "").name for r in results] == ["a.png", "b.png", "c.png"]
    assert [r.outcome is Outcome.ERROR for r in results] == [False, True, False]
    assert isinstance(results[1].error, ImageError)
    assert [results[i].score for i in (0, 2)] == [model.inspect(PICTURES[i]).score for i in (0, 2)]


def test_an_empty_folder_is_no_fault(model: Detector, folder: Path) -> None:
    with InspectionStream(model, WatchedFolder(folder, interval_ms=2000), deadline_ms=500) as stream:
        wait_until(lambda: stream.status.connected)
        time.sleep(0.8)
        assert stream.status.faults == 0


def test_a_folder_that_goes_and_comes_back(model: Detector, folder: Path) -> None:
    """Unmounted, say: ERROR, and nothing is taken twice or missed afterwards."""
    away = folder.with_name("away")
    backoff = Backoff(first=0.01, cap=0.02)
    put(folder, "old.png", PICTURES[5])
    with InspectionStream(model, WatchedFolder(folder, settle_ms=0, interval_ms=1), backoff=backoff) as stream:
        wait_until(lambda: stream.status.connected)
        put(folder, "a.png", PICTURES[0])
        assert next(stream).error is None
        folder.rename(away)
        assert isinstance(next(stream).error, SourceError)
        put(away, "b.png", PICTURES[1])
        away.rename(folder)
        found = next(r for r in stream if r.error is None)
    assert Path(found.item or "").name == "b.png"


def test_a_frame_thrown_away_is_not_lost(folder: Path) -> None:
    """A read that was given up: the file comes again from the next iterator."""
    put(folder, "a.png", PICTURES[0])
    watched = Watched(folder, existing=True)
    watched.take("a.png")
    watched.iterator.close()
    watched.iterator = watched.source.open()
    watched.take("a.png", PICTURES[0])
    watched.idle()


def test_folders_and_settings_that_are_refused(tmp_path: Path) -> None:
    for options in ({"settle_ms": -1}, {"interval_ms": float("nan")}, {"interval_ms": True}):
        with pytest.raises(ConfigError, match="_ms: expected"):
            WatchedFolder(tmp_path, **options)
    with pytest.raises(SourceError, match="No such file"):
        WatchedFolder(tmp_path / "none").open()
    (tmp_path / "gone").mkdir()
    watched = WatchedFolder(tmp_path / "gone")
    iterator = watched.open()
    assert next(iterator) is IDLE
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(OSError, match="No such file"):
        [next(iterator) for _ in range(1000)]
