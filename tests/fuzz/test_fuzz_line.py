"""Streams, sources, sinks and the page with anything as an argument: made, or an error of this package; never a wrong OK."""

from __future__ import annotations

import inspect
import logging
import math
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fuzz_functions import FRAME, LONG, QUICK, anything, call, detector, frames, numbers, texts, unit

from advrad_fast import Outcome, line
from advrad_fast.line import (
    Backoff,
    Calls,
    Camera,
    Drift,
    Frames,
    GenicamCamera,
    InspectionStream,
    VideoFile,
    WatchedFolder,
    sinks,
)
from advrad_fast.line.watch import WatchPage

milliseconds = st.sampled_from([1, 1.0, 50, 1000.0, 3.6e6, 0, -1, math.nan, 10**400])
paths = st.sampled_from(["file", Path("file"), "new/file", "folder", ".", "", "\0", "\ud800", "\udcff", "x" * 5000, "/dev/full"])
flags = st.booleans()
SCORES = [0.1, 0.2, 0.4]


class Sink:
    name, retry = "sink", True

    def write(self, result: object) -> None:
        raise OSError

    def close(self) -> None:
        raise OSError


class Client:
    """Stands in for the MQTT client: what it is given is looked at, and nothing is sent."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def connect_async(self, host: str, port: int, keepalive: int) -> None:
        assert isinstance(host, str) and host and 1 <= port <= 65535

    def username_pw_set(self, username: str, password: str | None) -> None:
        assert isinstance(username, str) and (password is None or isinstance(password, str))

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


SENSE: dict[str, st.SearchStrategy[Any]] = {
    "backoff": st.none() | st.just(Backoff(0.001, 0.001)),
    "busy_ms": milliseconds,
    "calibration": st.lists(unit, max_size=5).map(sorted),
    "camera": st.sampled_from([0, 7, "rtsp://user:secret@nowhere/", "http://", 2**40]),
    "cap": numbers,
    "capacity": st.integers(-1, 9),
    "closing_s": numbers,
    "contamination": unit,
    "copy": flags,
    "deadline_ms": st.none() | milliseconds,
    "drift": st.none() | st.builds(lambda: Drift(SCORES)),
    "every_s": numbers,
    "existing": flags,
    "false_alarm_rate": unit,
    "features": st.none() | st.just({"ExposureTime": 1.0}),
    "first": numbers,
    "folder": paths,
    "fsync": flags,
    "function": st.sampled_from([int, lambda: FRAME, lambda: 1 / 0]),
    "height": st.none() | st.integers(-1, 99),
    "hold_ms": milliseconds,
    "host": st.just("127.0.0.1") | texts,
    "interval_ms": milliseconds,
    "items": st.lists(frames | anything, max_size=3),
    "jitter": unit,
    "live": flags,
    "maps": flags,
    "max_hanging": st.integers(-1, 9),
    "name": st.just("part") | texts,
    "names": st.lists(texts, max_size=2),
    "open_timeout_ms": milliseconds,
    "password": st.none() | texts,
    "path": paths,
    "per_second": numbers,
    "policy": st.sampled_from(["auto", "newest", "queue"]),
    "port": st.sampled_from([0, -1, 65536, 1.0]),
    "producer": st.just(__file__) | paths,
    "properties": st.none() | st.just({1: 2.0}),
    "recursive": flags,
    "score": st.none() | numbers,
    "self_test": flags,
    "serial": st.none() | texts,
    "settle_ms": milliseconds,
    "sink": st.builds(Sink),
    "sinks_": st.lists(st.builds(Sink), max_size=2),
    "source": st.lists(frames | anything, max_size=3),
    "tls": flags,
    "token": st.none() | st.just("0123456789abcdef") | texts,
    "topic": st.just("parts") | texts,
    "triggered": flags,
    "username": st.none() | texts,
    "waiting": st.integers(-1, 99),
    "width": st.none() | st.integers(-1, 99),
}


@cache
def result() -> line.StreamInspection:
    with InspectionStream(detector(), [FRAME]) as stream:
        return next(stream)


def looked_at(stream: InspectionStream) -> None:
    """Three results of it: whatever is OK is OK."""
    with stream:
        for found in islice(stream, 3):
            assert isinstance(found.outcome, Outcome) and found.latency_ms >= 0.0
            assert found.outcome is not Outcome.OK or detector().inspect(found.frame).outcome is Outcome.OK


def streamed(
    source: Any, sinks_: Any = (), deadline_ms: Any = 1000.0, policy: Any = "auto", maps: Any = True, drift: Any = None,
    self_test: Any = True, capacity: Any = 8, open_timeout_ms: Any = 1e4, backoff: Any = SENSE, max_hanging: Any = 4,
) -> None:  # fmt: skip
    backoff = Backoff(0.001, 0.001) if backoff is SENSE or backoff is None else backoff
    named = {name: value for name, value in locals().items() if name not in ("source", "sinks_")}
    looked_at(InspectionStream(detector(), source, sinks=sinks_, **named))


def iterated(items: Any, name: Any, live: Any, copy: Any) -> None:
    looked_at(InspectionStream(detector(), Frames(items, name=name, live=live, copy=copy), backoff=Backoff(0.001, 0.001)))


def called(function: Any, name: Any, live: Any, copy: Any) -> None:
    looked_at(InspectionStream(detector(), Calls(function, name=name, live=live, copy=copy), backoff=Backoff(0.001, 0.001)))


def watched(folder: Any, existing: Any, recursive: Any, settle_ms: Any, interval_ms: Any) -> None:
    source = WatchedFolder(folder, existing=existing, recursive=recursive, settle_ms=settle_ms, interval_ms=interval_ms)
    opened = source.open()
    next(opened)
    opened.close()


def paused(first: Any, cap: Any, jitter: Any) -> None:
    made = Backoff(first, cap, jitter)
    assert all(0.0 <= made.pause(failures) <= 3600.0 for failures in (1, 2, 10**6))


def camera(camera: Any, width: Any, height: Any, properties: Any) -> None:
    assert "secret" not in Camera(camera, width=width, height=height, properties=properties).name


def video(path: Any) -> None:
    VideoFile(path)


def genicam(producer: Any, serial: Any, triggered: Any, features: Any) -> None:
    GenicamCamera(producer, serial, triggered=triggered, features=features)


def drift(calibration: Any, score: Any, false_alarm_rate: Any, contamination: Any) -> None:
    made = Drift(calibration, false_alarm_rate=false_alarm_rate, contamination=contamination)
    state = made.update(SimpleNamespace(score=score))
    assert state.frames == (score is not None) and math.isfinite(state.e_value)


def drift_of_anything(score: Any) -> None:
    Drift(SCORES).update(score)


def drift_kept(drift: Any, path: Any) -> None:
    made = drift if isinstance(drift, Drift) else Drift(SCORES)
    made.save(path)
    assert Drift.restore(path, SCORES).state == made.state


def used(sink: Any) -> None:
    try:
        sink.write(result())
    finally:
        sink.close()


def json_lines(path: Any, fsync: Any) -> None:
    used(sinks.JsonLines(path, fsync=fsync))


def sqlite(path: Any, fsync: Any, busy_ms: Any) -> None:
    used(sinks.Sqlite(path, fsync=fsync, busy_ms=busy_ms))


def drift_file(drift: Any, path: Any, every_s: Any) -> None:
    used(sinks.DriftFile(drift, path, every_s=every_s))


def background(sink: Any, waiting: Any, closing_s: Any) -> None:
    made = sinks.Background(sink, waiting=waiting, closing_s=closing_s)
    made.close()


def callback(function: Any, name: Any) -> None:
    sinks.Callback(function, name=name)


def mqtt(
    host: Any, topic: Any, port: Any = 1883, username: Any = None, password: Any = None, tls: Any = False, closing_s: Any = 5.0
) -> None:
    sinks.Mqtt(host, port, topic=topic, username=username, password=password, tls=tls, closing_s=closing_s)


def prometheus(host: Any, port: Any = 0) -> None:
    used(sinks.Prometheus(port, host=host))


def page(
    host: Any = "127.0.0.1", port: Any = 0, token: Any = None, names: Any = (), per_second: Any = 8.0,
    deadline_ms: Any = 1000.0, hold_ms: Any = 3000.0,
) -> None:  # fmt: skip
    used(WatchPage(**locals()))


CASES = (
    streamed, iterated, called, watched, paused, camera, video, genicam, drift, drift_of_anything, drift_kept, json_lines, sqlite,
    drift_file, background, callback, mqtt, prometheus, page,
)  # fmt: skip


def test_every_public_class_is_made() -> None:
    made = "".join(inspect.getsource(case) for case in CASES)
    results = {"Direction", "DriftState", "Frame", "IDLE", "Source", "StreamInspection", "StreamStatus", "SinkStatus", "Sink"}
    results |= {"Delivery"}  # a stream's own
    names = {*line.__all__, *sinks.__all__, "WatchPage"} - results
    assert not [name for name in names if f"{name}(" not in made]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A folder to write in, no network, and nothing left running."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    caplog.set_level(logging.CRITICAL, "advrad_fast")
    look_up = socket.getaddrinfo
    numeric = lambda *a, **k: look_up(*a, **{**k, "flags": k.get("flags", 0) | socket.AI_NUMERICHOST})  # noqa: E731
    monkeypatch.setattr(socket, "getaddrinfo", numeric)
    monkeypatch.setattr("paho.mqtt.client.Client", Client)
    for name in ("harvesters", "harvesters.core"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    threads = threading.active_count()
    yield
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.name.startswith("advrad-fast"):
            thread.join(5.0)
    assert threading.active_count() <= threads + 4


@pytest.mark.parametrize("depth", [pytest.param(QUICK, id="quick"), pytest.param(LONG, id="long", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_anything(case: Callable[..., None], depth: settings) -> None:
    result()
    depth(given(st.data())(lambda data: call(case, data, SENSE)))()
