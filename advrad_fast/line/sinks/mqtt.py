"""Results to an MQTT broker (the extra ``mqtt``)."""

from __future__ import annotations

import json
import threading
from typing import Any

from advrad_fast import checks
from advrad_fast.errors import ConfigError, SinkError, expected
from advrad_fast.line.results import StreamInspection

MAX_QUEUED = 10_000  #: messages without the broker's receipt, beyond which further ones are refused


class Mqtt:
    """Publishes each result as JSON, the keys ``ROW_KEYS``, with quality of service 1: the broker gets it at least once.

    Messages leave in a thread of their own.  While the broker is away they wait in memory, ``MAX_QUEUED`` of them, and follow
    when it is back; :attr:`unacknowledged` counts those that it has not confirmed.  What is still unconfirmed when the sink is
    closed is an error then.

    Args:
        host, port: the broker's.
        topic: published to.
        username, password: if the broker asks for them.
        tls: encrypt, and check the broker's certificate against the system's authorities.
        closing_s: seconds that :meth:`close` waits for the broker's last receipts.

    Raises:
        ConfigError: an argument cannot be.
        ModuleNotFoundError: paho-mqtt is not installed.
    """

    retry = True

    def __init__(
        self,
        host: str,
        port: int = 1883,
        *,
        topic: str = "advrad/inspections",
        username: str | None = None,
        password: str | None = None,
        tls: bool = False,
        closing_s: float = 5.0,
    ) -> None:
        host, port = checks.text("host", host), checks.integer("port", port, 1, 65535)
        for name, value in (("username", username), ("password", password)):
            if value is not None and not isinstance(value, str):
                raise ConfigError(expected(name, "a text or None", type(value)))  # not the value: it may be a secret
        tls = checks.truth("tls", tls)
        if not isinstance(topic, str) or not topic or any(c in topic for c in "+#\0"):
            raise ConfigError(expected("topic", "a name without +, # and NUL", topic))
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        self.name = f"mqtt {host}:{port} {topic}"
        self._topic = topic
        self._closing = checks.number("closing_s", closing_s, 0.0, 3600.0, "a number of seconds")
        self._changed = threading.Condition()
        self._waiting: set[int] = set()
        self._early: set[int] = set()  # receipts that came before publish() had returned
        self._client = Client(CallbackAPIVersion.VERSION2, client_id="", clean_session=True)
        self._client.on_publish = self._on_receipt
        self._client.max_inflight_messages_set(100)
        self._client.reconnect_delay_set(min_delay=1, max_delay=10)
        if username is not None:
            self._client.username_pw_set(username, password)
        if tls:
            self._client.tls_set()
        self._client.connect_async(host, port, keepalive=15)
        self._client.loop_start()

    @property
    def unacknowledged(self) -> int:
        """Messages that the broker has not confirmed yet."""
        return len(self._waiting)

    def write(self, result: StreamInspection) -> None:
        """Queue the message; it is not with the broker yet."""
        if self.unacknowledged >= MAX_QUEUED:
            raise SinkError(f"{self.name}: {MAX_QUEUED} messages wait for the broker")
        sent = self._client.publish(self._topic, json.dumps(result.row(), allow_nan=False), qos=1)
        with self._changed:
            if sent.mid in self._early:
                self._early.remove(sent.mid)
            else:
                self._waiting.add(sent.mid)

    def close(self) -> None:
        """Wait for the broker's receipts, and disconnect.

        Raises:
            SinkError: messages are left that the broker has not confirmed.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, self._closing)
            left = len(self._waiting)
        self._client.disconnect()
        self._client.loop_stop()
        if left:
            raise SinkError(f"{self.name}: the broker has not confirmed {left} messages")

    def _on_receipt(self, client: Any, userdata: Any, mid: int, *_: Any) -> None:
        with self._changed:
            if mid in self._waiting:
                self._waiting.remove(mid)
                self._changed.notify_all()
            else:
                self._early.add(mid)
