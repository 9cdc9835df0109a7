"""Where a stream's results go.  MQTT and Prometheus load their libraries when they are made."""

from advrad_fast.line.sinks.background import Background
from advrad_fast.line.sinks.base import Sink
from advrad_fast.line.sinks.callback import Callback
from advrad_fast.line.sinks.delivery import Delivery, SinkStatus
from advrad_fast.line.sinks.drift_file import DriftFile
from advrad_fast.line.sinks.json_lines import JsonLines
from advrad_fast.line.sinks.mqtt import Mqtt
from advrad_fast.line.sinks.prometheus import Prometheus
from advrad_fast.line.sinks.sqlite import Sqlite

__all__ = ["Background", "Callback", "Delivery", "DriftFile", "JsonLines", "Mqtt", "Prometheus", "Sink", "SinkStatus", "Sqlite"]
