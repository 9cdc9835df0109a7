"""Serving: answers are the detector's, whatever came together with them; nothing but an inspected image has another outcome."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import small_model
from parts import disc, scratched
from pictures import POSE
from PIL import Image

from advrad_fast import Detector
from advrad_fast.batch import ROW_KEYS, row
from advrad_fast.errors import ConfigError, InferenceError, SpreadError
from advrad_fast.serving import ServingSettings, application, running
from advrad_fast.serving.service import Request, Service, self_test_frame

KEYS = [*ROW_KEYS, "error", "message"]
LIMIT = 20_000


def picture(seed: int, size: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((disc if seed % 2 else scratched)(np.random.default_rng(seed), size)).save(buffer, "PNG")
    return buffer.getvalue()


def detector(**options: Any) -> Detector:
    return Detector(small_model(**options), backend="cpu", threads=1, cache_dir=False)


@pytest.fixture(scope="module")
def service() -> Service:
    return Service(detector(), LIMIT)


@pytest.mark.parametrize("seed", [None, 0, 2**64 - 1])
def test_an_answer_is_the_inspection(service: Service, seed: int | None) -> None:
    query = (("path", "a b.png"),) if seed is None else (("seed", str(seed)),)
    status, body = service.inspect(Request(picture(1), query))
    wanted = row(
        "a b.png" if seed is None else None, detector().inspect(np.asarray(Image.open(io.BytesIO(picture(1)))), seed=seed)
    )
    assert status == 200 and list(body) == KEYS
    assert {**body, "ms": 0} == {**wanted, "ms": 0, "error": None, "message": None}
    json.dumps(body)


@pytest.mark.parametrize(
    ("data", "query", "status", "error", "message"),
    [
        (b"", (), 400, "ImageDecodeError", "image: not a PNG"),
        (b"no image", (("path", "x"),), 400, "ImageDecodeError", "x: not a PNG"),
        (picture(1)[:300], (), 400, "ImageDecodeError", "can't be decoded"),
        (bytes(LIMIT + 1), (), 413, "ImageTooLargeError", f"expected at most {LIMIT} bytes"),
        (b"P5 99999 99999 255\n", (), 413, "ImageTooLargeError", "the cap is"),
        (picture(1), (("seed", "-1"),), 400, "ConfigError", "seed: expected"),
        (picture(1), (("seed", str(2**64)),), 400, "ConfigError", "seed: expected"),
        (picture(1), (("seed", "\u0663"),), 400, "ConfigError", "seed: expected"),
        (picture(1), (("seed", "1"), ("seed", "2")), 400, "ConfigError", "query: expected"),
        (picture(1), (("sead", "1"),), 400, "ConfigError", "query: expected"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(
    service: Service, data: bytes, query: Any, status: int, error: str, message: str
) -> None:
    answer = service.inspect(Request(data, query))
    assert (answer.status, answer.body["error"], answer.body["outcome"]) == (status, error, "ERROR")
    assert message in answer.body["message"] and list(answer.body) == KEYS and answer.body["score"] is None


def test_a_part_that_is_not_found_is_no_error_and_not_ok() -> None:
    aligned = Service(detector(pose=POSE), LIMIT)
    blank = io.BytesIO()
    Image.fromarray(np.full((60, 60), 200, np.uint8)).save(blank, "PNG")
    status, body = aligned.inspect(Request(blank.getvalue()))
    assert (status, body["outcome"], body["error"]) == (200, "ABSTAIN", "PartNotFoundError")
    assert detector(pose=POSE).inspect(self_test_frame()).score is not None  # the self-test is one
    aligned.check()


@pytest.mark.parametrize("fault", [InferenceError("the engine failed"), RuntimeError("what"), MemoryError()])
def test_faults_are_500_and_unhealthy(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    made = detector()
    service = Service(made, LIMIT)
    assert service.health().status == 200

    def fail(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(made, "inspect", fail)
    for answer in (service.inspect(Request(picture(1))), service.health()):
        assert (answer.status, answer.body["outcome"], answer.body["score"]) == (500, "ERROR", None)
    assert service.inspect(Request(picture(1))).body["error"] in ("InferenceError", "RuntimeError", "MemoryError")
    with pytest.raises(type(fault)):
        service.check()


def test_a_score_that_drifts_is_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    made = detector()
    service, inspect = Service(made, LIMIT), made.inspect
    made.threshold = 1e-9  # the service's own threshold is no drift
    service.check()
    monkeypatch.setattr(made, "inspect", lambda frame, **options: inspect(frame, **{**options, "seed": 1}))
    with pytest.raises(InferenceError, match="self-test: outcome and score: expected"):
        service.check()
    assert service.health().body["message"].startswith("self-test")


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/inspect", {}, 401),
        ("POST", "/inspect", {"authorization": "Bearer secre"}, 401),
        ("POST", "/inspect", {"authorization": "\u00fc"}, 401),
        ("GET", "/nowhere", {}, 401),
        ("POST", "/inspect", {"authorization": "Bearer secret"}, None),
        ("GET", "/health", {"authorization": "Bearer secret"}, None),
        ("GET", "/", {"authorization": "Bearer secret"}, 404),
        ("GET", "/inspect", {"authorization": "Bearer secret"}, 405),
        ("POST", "/inspect", {"authorization": "Bearer secret", "content-length": str(LIMIT)}, None),
        ("POST", "/inspect", {"authorization": "Bearer secret", "content-length": str(LIMIT + 1)}, 413),
    ],
)
def test_refusals(method: str, path: str, headers: dict[str, str], status: int | None) -> None:
    answer = Service(detector(), LIMIT, "secret").refusal(method, path, headers)
    assert (None if answer is None else answer.status) == status
    assert answer is None or answer.body["outcome"] == "ERROR"


@pytest.mark.parametrize(
    "given",
    [
        {"host": "0.0.0.0"}, {"host": "example.org"}, {"port": 0}, {"port": True}, {"replicas": 0}, {"max_batch": 0},
        {"wait_ms": -1.0}, {"wait_ms": float("nan")}, {"max_bytes": 0}, {"token": ""}, {"token": "\u00fc"},
    ],
)  # fmt: skip
def test_settings(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        ServingSettings(**given)
    assert "secret" not in repr(ServingSettings(host="0.0.0.0", token="secret"))
    assert ServingSettings(host="localhost").host == "localhost"


def test_without_serve_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SpreadError, match=r"pip install 'advrad-fast\[serve\]'"):
        application(detector)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def post(url: str, data: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


# Ray Serve declares its settings in a way that newer versions of Pydantic warn of.
pydantic_warns = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.mark.slow
@pydantic_warns
def test_a_port_of_the_cluster_that_is_taken(cluster: str) -> None:
    """Not seen from here beforehand, as the cluster may be another machine."""
    setup = partial(Detector, small_model(), backend="cpu", threads=1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = ServingSettings(port=taken.getsockname()[1])
        with pytest.raises(SpreadError, match="can't be served at"), running(setup, settings, ray="auto"):
            pass


@pytest.fixture(scope="module")
def url(cluster: str) -> Iterator[str]:
    pytest.importorskip("starlette")
    settings = ServingSettings(port=free_port(), max_batch=4, wait_ms=20.0, max_bytes=LIMIT)
    setup = partial(Detector, small_model(), backend="cpu", threads=1)
    with running(setup, settings, ray=cluster) as address:
        yield address


@pydantic_warns
def test_what_comes_together_is_inspected_as_if_alone(url: str) -> None:
    """Good images and broken ones, under seeds of their own, in batches of up to four."""
    made = detector()
    work = [(picture(i) if i % 5 else b"broken", i * 2**58) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda job: post(f"{url}/inspect?seed={job[1]}", job[0]), work))
    for (data, seed), (status, body) in zip(work, answers, strict=True):
        assert list(body) == KEYS
        if data == b"broken":
            assert (status, body["outcome"], body["error"]) == (400, "ERROR", "ImageDecodeError")
        else:
            wanted = row(None, made.inspect(np.asarray(Image.open(io.BytesIO(data))), seed=seed))
            assert status == 200
            assert {**body, "ms": 0} == {**wanted, "ms": 0, "error": None, "message": None}


@pydantic_warns
def test_limits_and_health_over_http(url: str) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield bytes(1000)

    status, body = post(f"{url}/inspect", chunks())  # chunked: no length is said beforehand
    assert (status, body["outcome"], body["error"]) == (413, "ERROR", "ImageTooLargeError")
    assert post(f"{url}/inspect", bytes(LIMIT + 1))[0] == 413
    assert post(f"{url}/nothing", b"")[0] == 404
    with urllib.request.urlopen(f"{url}/health", timeout=60) as reply:
        assert json.load(reply) == {"healthy": True, "backend": detector().backend, "threshold": small_model().threshold}


@pydantic_warns
def test_a_port_that_is_taken_and_too_many_replicas(cluster: str, url: str) -> None:
    setup = partial(Detector, small_model(), backend="cpu", threads=1)
    with pytest.raises(SpreadError, match="can't be served at"), running(setup, ServingSettings(port=int(url.rsplit(":")[-1]))):
        pass
    with (
        pytest.raises(SpreadError, match="at most the cluster's 2 CPUs"),
        running(setup, ServingSettings(port=free_port(), replicas=3), ray=cluster),
    ):
        pass
    with (
        pytest.raises(SpreadError, match="Serve runs on this cluster already"),
        running(setup, ServingSettings(port=free_port()), ray=cluster),
    ):
        pass


@pytest.mark.slow
def test_the_command_serves_until_sigterm(tmp_path: Path) -> None:
    pytest.importorskip("starlette")
    small_model().save(tmp_path / "model")
    port = free_port()
    line = [sys.executable, "-m", "advrad_fast.cli", "serve", str(tmp_path / "model"), "--port", str(port), "--backend", "cpu"]
    environment = {**os.environ, "ADVRAD_TOKEN": "secret"}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            said = ""
            while "Ctrl-C ends it" not in said:
                said = process.stderr.readline()
                assert said, "it ended"
            status, body = post(f"http://127.0.0.1:{port}/inspect", picture(2), Authorization="Bearer secret")
            assert status == 200
            assert body["score"] == detector().inspect(np.asarray(Image.open(io.BytesIO(picture(2))))).score
            assert post(f"http://127.0.0.1:{port}/inspect", picture(2))[0] == 401
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (process.returncode, out) == (0, "") and "Traceback" not in err
