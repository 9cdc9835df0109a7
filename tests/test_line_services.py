"""Results to an MQTT broker and to Prometheus: real ones, on loopback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from streams import Memory, detector, frames, wait_until

from advrad_fast import ConfigError, Detector
from advrad_fast.errors import SinkError
from advrad_fast.line import InspectionStream, StreamInspection
from advrad_fast.line.sinks import Mqtt, Prometheus

BROKER = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
needs_broker = pytest.mark.skipif(
    BROKER is None and "ADVRAD_REQUIRE_MOSQUITTO" not in os.environ,
    reason="mosquitto is not installed (Debian: apt-get install mosquitto)",
)


@pytest.fixture(scope="module")
def model() -> Detector:
    return detector()


@pytest.fixture(scope="module")
def results(model: Detector) -> list[StreamInspection]:
    with InspectionStream(model, [*frames(5), None]) as stream:
        return list(stream)


class Broker:
    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        configuration = self.folder / "mosquitto.conf"
        configuration.write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\npersistence false\n")
        assert BROKER is not None
        self.process = subprocess.Popen([BROKER, "-c", str(configuration)], stderr=subprocess.DEVNULL)
        wait_until(self.answers)

    def answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1.0).close()
        except OSError:
            return False
        return True

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    made = Broker(tmp_path)
    yield made
    made.stop()


class Subscriber:
    """Another client, which keeps what it hears, also over the broker's absence."""

    def __init__(self, port: int, topic: str) -> None:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        self.heard: list[dict[str, Any]] = []
        self.ready = threading.Event()
        self.client = Client(CallbackAPIVersion.VERSION2)
        self.client.on_connect = lambda *_: self.client.subscribe(topic, qos=1)
        self.client.on_subscribe = lambda *_: self.ready.set()
        self.client.on_message = lambda client, data, message: self.heard.append(json.loads(message.payload))
        self.client.reconnect_delay_set(1, 1)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        assert self.ready.wait(20.0)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@needs_broker
def test_mqtt_delivers_every_row_in_order(model: Detector, broker: Broker) -> None:
    broker.start()
    subscriber = Subscriber(broker.port, "line/1")
    sink = Mqtt("127.0.0.1", broker.port, topic="line/1")
    with InspectionStream(model, [*frames(50), None], sinks=[sink]) as stream:
        given = list(stream)
    assert stream.close() == () and sink.unacknowledged == 0
    wait_until(lambda: len(subscriber.heard) == 51)
    subscriber.close()
    assert subscriber.heard == [result.row() for result in given]


@needs_broker
def test_mqtt_while_the_broker_is_away(results: list[StreamInspection], broker: Broker) -> None:
    """Rows wait, are counted, and follow when it is back; the stream does not wait."""
    sink = Mqtt("127.0.0.1", broker.port)
    for result in results[:3]:
        sink.write(result)
    assert sink.unacknowledged == 3
    broker.start()
    wait_until(lambda: sink.unacknowledged == 0)
    broker.stop()
    broker.start()
    subscriber = Subscriber(broker.port, "advrad/inspections")
    for result in results[3:]:
        sink.write(result)
    wait_until(lambda: len(subscriber.heard) >= 3)
    sink.close()
    subscriber.close()
    assert subscriber.heard == [result.row() for result in results[3:]]


def test_mqtt_says_what_was_not_confirmed(results: list[StreamInspection]) -> None:
    with socket.socket() as nobody:  # bound, not listening
        nobody.bind(("127.0.0.1", 0))
        sink = Mqtt("127.0.0.1", nobody.getsockname()[1], closing_s=0.1)
        for result in results:
            sink.write(result)
        with pytest.raises(SinkError, match=f"has not confirmed {len(results)} messages"):
            sink.close()


def test_mqtt_queues_are_bounded(results: list[StreamInspection], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advrad_fast.line.sinks.mqtt.MAX_QUEUED", 2)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        sink = Mqtt("127.0.0.1", nobody.getsockname()[1], closing_s=0.0)
        for result in results[:2]:
            sink.write(result)
        with pytest.raises(SinkError, match="2 messages wait for the broker"):
            sink.write(results[2])
        with pytest.raises(SinkError):
            sink.close()


@pytest.mark.parametrize(
    "options", [{"port": 0}, {"port": 65536}, {"port": True}, {"topic": ""}, {"topic": "a/#"}, {"topic": "+"}]
)
def test_mqtt_settings_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"(port|topic): expected"):
        Mqtt("127.0.0.1", **options)


def test_prometheus_serves_the_counts(model: Detector) -> None:
    sink = Prometheus(0)
    refused = Memory(fail=lambda result: result.sequence == 2, retry=False)
    with InspectionStream(model, [*frames(4), None], sinks=[refused, sink]) as stream:
        given = list(stream)
        with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics") as response:
            text = response.read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    label = 'source="frames"'
    outcomes = {str(o): count for o, count in stream.status.outcomes.items()}
    assert sum(outcomes.values()) == 5 and outcomes["ERROR"] == 1
    for outcome, count in outcomes.items():
        assert float(values[f'advrad_results_total{{outcome="{outcome}",{label}}}']) == count
    assert float(values[f"advrad_unstored_total{{{label}}}"]) == 1
    assert float(values[f"advrad_dropped_total{{{label}}}"]) == 0
    assert float(values[f"advrad_latency_seconds_count{{{label}}}"]) == 5
    assert float(values[f"advrad_score{{{label}}}"]) == given[3].score
    assert float(values[f"advrad_threshold{{{label}}}"]) == model.threshold
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=1.0)


def test_prometheus_addresses(results: list[StreamInspection]) -> None:
    sink = Prometheus(0)
    assert sink.host == "127.0.0.1"
    with pytest.raises(SinkError, match=f"prometheus 127.0.0.1:{sink.port}: "):
        Prometheus(sink.port)
    sink.close()
    for port in (-1, 65536, True, "9108"):
        with pytest.raises(ConfigError, match="port: expected"):
            Prometheus(port)  # type: ignore[arg-type]


def test_a_broker_that_is_away_does_not_hold_up_the_stream(model: Detector) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        sink = Mqtt("127.0.0.1", nobody.getsockname()[1], closing_s=0.1)
        stream = InspectionStream(model, frames(10), sinks=[sink])
        start = time.monotonic()
        with stream:
            assert len(list(stream)) == 10
    assert time.monotonic() - start < 20.0
    assert ["has not confirmed 10 messages" in str(problem) for problem in stream.close()] == [True]
