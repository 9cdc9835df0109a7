"""The page of a stream: what it says, what it keeps, and that it never holds up the line."""

from __future__ import annotations

import io
import socket
import threading
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image
from streams import detector, frames, wait_until
from watching import Listener, get, running, threshold_between

from advrad_fast import ConfigError, Detector, Outcome
from advrad_fast.errors import SinkError
from advrad_fast.line import InspectionStream
from advrad_fast.line.watch import WatchPage, board, page, pictures


@pytest.fixture(scope="module")
def model() -> Detector:
    return detector()


def pixels(file: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(file)))


def test_states_follow_the_results(model: Detector) -> None:
    good, bad = threshold_between(model)
    with running(model) as line, Listener(line.page) as listener:
        state = listener.until(lambda state: state["idle"])
        assert state["result"] is None and state["source"]["connected"]
        assert state["name"] == line.line.name and state["run"] == line.stream.run
        line.line.part(good)
        state = listener.until(lambda state: state["result"])
        assert state["result"]["outcome"] == "OK" and state["result"]["views"] == ["frame", "map"]
        assert state["result"]["score"] == line.results[0].score
        line.line.part(bad, ValueError("a frame that cannot be read"), np.zeros((3,), np.uint8))
        state = listener.until(lambda state: sum(state["outcomes"].values()) == 4)
        assert state["outcomes"] == {"OK": 1, "DEFECT": 1, "ABSTAIN": 0, "ERROR": 2}
        assert state["result"]["outcome"] == "ERROR" and state["result"]["views"] == []
        assert "expected a uint8" in state["result"]["message"] and state["source"]["faults"] == 1
        assert [reject["sequence"] for reject in state["rejects"]] == [1]
        assert [point[2] for point in listener.points] == [0, 1, 3, 3] and [point[0] for point in listener.points] == [0, 1, 2, 3]
        assert state["source"]["sinks"][0] == {"name": "memory", "waiting": 0, "lost": 0}
        line.stream.stop()
        line.end()
        while not state["ended"]:
            found = listener.next()
            assert found is not None
            state = found
        assert listener.next() is None
    assert not line.page.is_serving


def test_pictures_are_the_frame_and_its_heat_map(model: Detector) -> None:
    frame = np.zeros((64, 96, 3), np.uint8)
    frame[:, 48:] = (200, 40, 40)
    with running(model) as line, Listener(line.page) as listener:
        line.line.part(frame)
        state = listener.until(lambda state: state["result"])
        answers = [get(line.page, f"/pictures/{state['result']['sequence']}/{view}.jpg") for view in ("frame", "map")]
        assert [status for status, _, _ in answers] == [200, 200]
        assert all(headers["content-type"] == "image/jpeg" for _, headers, _ in answers)
        shown, heat = (pixels(body) for _, _, body in answers)
        assert shown.shape == heat.shape == (64, 96, 3)
        np.testing.assert_allclose(shown[:, 60:].mean((0, 1)), (200, 40, 40), atol=1.0)  # none was seen
        for path in (
            "/pictures/99/frame.jpg",
            "/pictures/0/other.jpg",
            "/pictures/-1/frame.jpg",
            f"/pictures/{'9' * 5000}/map.jpg",
        ):
            assert get(line.page, path)[0] == 404


def test_a_large_frame_is_drawn_smaller_and_keeps_its_hottest_spot(model: Detector) -> None:
    frame = np.full((1300, 2100, 3), 80, np.uint8)
    with InspectionStream(model, [frame]) as stream:
        (result,) = list(stream)
    heat = np.zeros(frame.shape[:2], np.float32)
    heat[777, 1234] = 10.0 * abs(result.inspection.threshold)
    object.__setattr__(result.inspection, "anomaly_map", heat)
    object.__setattr__(result.inspection, "mask", heat > result.inspection.threshold)
    made = pictures.pictures(result)
    assert made is not None and made.map is not None
    assert pixels(made.frame).shape == pixels(made.map).shape == (434, 700, 3)
    spot = pixels(made.map)[257:262, 409:414].reshape(-1, 3).max(0)
    assert spot.max() > 200  # outlined in white, and red


def test_all_is_bounded(model: Detector) -> None:
    """More parts than are kept, all of them rejects, watched by nobody: pictures are kept of the last, and of no other."""
    model.threshold = -1.0
    try:
        with running(model, per_second=60.0) as line:
            for _ in range(30):
                for frame in frames(10):
                    line.line.part(frame)
            wait_until(lambda: len(line.results) == 300)
            inner = line.page._board
            wait_until(lambda: not inner.waits_to_be_drawn)
            wait_until(lambda: 299 in inner._rejects)
            assert len(inner._rejects) <= board.REJECTS and len(inner._live) == 0  # nobody watches
            with Listener(line.page) as listener:
                state = listener.until(lambda state: state["result"]["sequence"] == 299)
                assert len(state["rejects"]) <= board.REJECTS and state["rejects"][0]["sequence"] == 299
                assert len(listener.points) == board.TREND and listener.points[-1][0] == 299
                assert get(line.page, "/pictures/299/map.jpg")[0] == 200
    finally:
        model.threshold = model.model.threshold


def test_browsers_that_take_nothing_hold_up_nothing(model: Detector) -> None:
    """Parts that come every 50 ms, of which the newest is inspected: a result later than a frame would push one out."""
    with WatchPage(port=0, per_second=60.0) as shown:
        stalled = []
        for _ in range(4):
            client = socket.create_connection(("127.0.0.1", shown.port))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.sendall(f"GET /events HTTP/1.1\r\nHost: 127.0.0.1:{shown.port}\r\n\r\n".encode())
            stalled.append(client)
        wait_until(lambda: shown._server.watching == 4)
        given = frames(40)

        def paced() -> Any:
            for frame in given:
                yield frame
                time.sleep(0.05)

        with InspectionStream(model, paced(), policy="newest", sinks=[shown]) as stream:
            shown.attach(stream)
            results = list(stream)
        for client in stalled:
            client.close()
    assert [result.sequence for result in results] == list(range(40))
    assert stream.status.dropped == 0
    assert [result.score for result in results] == [model.inspect(frame).score for frame in given]


def test_drawing_that_hangs_holds_up_nothing(model: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    release, drawing = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        drawing.set()
        release.wait(30.0)

    monkeypatch.setattr(board, "pictures", hang)
    with WatchPage(port=0) as shown, Listener(shown), InspectionStream(model, frames(50), sinks=[shown]) as stream:
        assert len([next(stream), *stream]) == 50 and drawing.wait(20.0)
        release.set()


def test_a_server_that_dies_ends_no_inspection(model: Detector) -> None:
    with running(model) as line:
        line.line.part()
        wait_until(lambda: len(line.results) == 1)
        line.page._server._server.should_exit = True
        wait_until(lambda: not line.page.is_serving)
        line.line.part(*frames(5))
        wait_until(lambda: len(line.results) == 6)
        assert all(not result.unstored for result in line.results)
    assert [result.outcome for result in line.results].count(Outcome.ERROR) == 0


def test_a_state_that_cannot_be_made_is_followed_by_the_next(model: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    good, failed = board.pictures, []

    def fail_once(result: Any) -> Any:
        if not failed:
            failed.append(1)
            raise MemoryError
        return good(result)

    monkeypatch.setattr(board, "pictures", fail_once)
    with running(model) as line, Listener(line.page) as listener:
        listener.next()
        line.line.part()
        state = listener.until(lambda state: state["result"])
        assert failed and state["result"]["views"] == ["frame", "map"]


def test_what_hangs_is_not_idle(model: Detector) -> None:
    """An engine that hangs after a good part: the page must not go on to say that no part has come."""
    release = threading.Event()

    class Hanging:
        threshold, backend = model.threshold, model.backend
        hang = False

        def inspect(self, frame: object, *, maps: bool) -> Any:
            if self.hang:
                release.wait(30.0)
            return model.inspect(frame, maps=maps)

    engine = Hanging()
    with running(engine, deadline_ms=100.0, hold_ms=3000.0) as line, Listener(line.page) as listener:  # type: ignore[arg-type]
        line.line.part()
        assert listener.until(lambda state: state["result"])["idle"]
        engine.hang = True
        line.line.part()
        state = listener.until(lambda state: not state["idle"])
        assert state["age_ms"] > state["deadline_ms"] == 100  # the page says NO DATA from here
        release.set()
        listener.until(lambda state: state["idle"] and sum(state["outcomes"].values()) == 2)


def test_a_source_that_is_gone_is_not_idle(model: Detector) -> None:
    with running(model) as line, Listener(line.page) as listener:
        listener.until(lambda state: state["idle"])
        line.line.part(*[OSError("no route to host")] * 12)  # pauses between attempts double: this takes a while
        state = listener.until(lambda state: state["outcomes"]["ERROR"] >= 2 and not state["idle"])
        assert not state["source"]["connected"] and "no route" in state["result"]["message"]


def test_too_many_browsers_are_turned_away(model: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    from advrad_fast.line.watch import server

    monkeypatch.setattr(server, "CLIENTS", 2)
    with WatchPage(port=0) as shown, Listener(shown) as one, Listener(shown) as two:
        assert one.next() is not None and two.next() is not None
        status, headers, _ = get(shown, "/events")
        assert (status, headers["retry-after"]) == (503, "10")
        two.close()
        wait_until(lambda: shown._server.watching == 1)
        with Listener(shown) as three:
            assert three.next() is not None


@pytest.mark.parametrize(
    "arguments",
    [
        {"port": -1},
        {"port": True},
        {"per_second": 0.0},
        {"per_second": float("nan")},
        {"deadline_ms": 0.5},
        {"hold_ms": "3"},
        {"token": "short"},
        {"token": "sixteen characters"},
    ],
)
def test_arguments_that_are_refused(arguments: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        WatchPage(**{"port": 0, **arguments})
    assert next(iter(arguments)) in str(raised.value) and "sixteen" not in str(raised.value)


def test_an_address_that_is_taken() -> None:
    with WatchPage(port=0) as shown, pytest.raises(SinkError, match=f"page 127.0.0.1:{shown.port}"):
        WatchPage(port=shown.port)
    with pytest.raises(SinkError):
        WatchPage("192.0.2.1", 0)


def test_threads_end_with_the_page() -> None:
    before = threading.active_count()
    with WatchPage(port=0) as shown, Listener(shown) as listener:
        assert listener.next() is not None and shown.is_serving
    assert not shown.is_serving
    wait_until(lambda: threading.active_count() == before)
    assert page.HEARTBEAT <= 1.0  # the page takes 2.5 s of silence for a fault
