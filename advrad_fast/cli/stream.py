"""``advrad-fast stream``."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from advrad_fast.cli.common import FAILED, FOUND, OK, Adder, load_detector, model_options, roi_options, say
from advrad_fast.errors import ConfigError, expected


def add(command: Adder) -> None:
    """Add the command."""
    parser = command(
        "stream",
        run,
        "Inspect what a source gives until it ends, Ctrl-C or SIGTERM: exit code 0 if all was OK, 1 if a part was not, 2 if a"
        " frame could not be inspected, the source failed or a result could not be stored.",
    )
    stream_options(parser)


def stream_options(parser: argparse.ArgumentParser) -> None:
    """What is inspected, with what, and where the results go."""
    model_options(parser)
    roi_options(parser)
    source_options(parser)
    parser.add_argument("--jsonl", type=Path, metavar="FILE", help="append results as JSON lines; - for standard output")
    parser.add_argument("--sqlite", type=Path, metavar="FILE", help="store results in an SQLite database")
    parser.add_argument("--mqtt", metavar="URL", help="publish results: mqtt://HOST[:PORT][/TOPIC], mqtts:// for TLS")
    parser.add_argument("--prometheus", type=int, metavar="PORT", help="serve metrics at http://127.0.0.1:PORT/metrics")
    parser.add_argument("--threshold", type=float, help="instead of the model's")
    parser.add_argument("--limit", type=int, help="stop after this many results")


def source_options(parser: argparse.ArgumentParser) -> None:
    """The source of frames, and how to read it."""
    parser.add_argument(
        "source",
        help="a folder to watch, a video file, the number of a USB camera, the address of a network camera (rtsp://...), or"
        " genicam:PRODUCER.cti[:SERIAL]",
    )
    parser.add_argument("--existing", action="store_true", help="inspect the files that a watched folder has already, too")
    parser.add_argument("--recursive", action="store_true", help="watch the folders below it, too")
    parser.add_argument(
        "--settle-ms", type=float, default=200.0, help="how long a file stands still until it is read (default 200)"
    )
    parser.add_argument("--deadline-ms", type=float, default=1000.0, help="for a read; 0 for none (default 1000)")
    parser.add_argument("--policy", default="auto", help="newest, queue, or auto: newest for cameras (default auto)")


def make_source(options: argparse.Namespace) -> Any:
    """The source that :func:`source_options` describe.

    Raises:
        ConfigError: it is nothing that can be read.
    """
    text: str = options.source
    if text.startswith("genicam:"):
        from advrad_fast.line import GenicamCamera

        producer, _, serial = text.removeprefix("genicam:").partition(":")
        return GenicamCamera(producer, serial or None)
    if re.fullmatch(r"\d+", text) or "://" in text:
        from advrad_fast.line import Camera

        return Camera(text if "://" in text else int(text))
    if Path(text).is_dir():
        from advrad_fast.line import WatchedFolder

        return WatchedFolder(text, existing=options.existing, recursive=options.recursive, settle_ms=options.settle_ms)
    if Path(text).is_file():
        from advrad_fast.line import VideoFile

        return VideoFile(text)
    raise ConfigError(expected("source", "a folder, a video file, a camera's number or its address", text))


def _sinks(options: argparse.Namespace) -> Iterator[Any]:
    from advrad_fast.line import sinks

    if options.jsonl is not None and str(options.jsonl) != "-":
        yield sinks.JsonLines(options.jsonl)
    if options.sqlite is not None:
        yield sinks.Sqlite(options.sqlite)
    if options.mqtt is not None:
        url = urlsplit(options.mqtt)
        if url.scheme not in ("mqtt", "mqtts") or not url.hostname:
            raise ConfigError(expected("--mqtt", "mqtt://HOST[:PORT][/TOPIC]", options.mqtt))
        tls = url.scheme == "mqtts"
        port = url.port or (8883 if tls else 1883)
        topic = url.path.strip("/") or "advrad/inspections"
        yield sinks.Mqtt(url.hostname, port, topic=topic, username=url.username, password=url.password, tls=tls)
    if options.prometheus is not None:
        yield sinks.Prometheus(options.prometheus)


def run(options: argparse.Namespace, make_page: Callable[[], Any] | None = None) -> int:
    """Inspect as :func:`stream_options` say, and return the exit code.

    Args:
        make_page: makes the :class:`~advrad_fast.line.watch.WatchPage` that shows it.
    """
    import json

    from advrad_fast.detector import Outcome
    from advrad_fast.line import InspectionStream

    if options.limit is not None and options.limit < 1:
        raise ConfigError(expected("--limit", "at least 1", options.limit))
    source = make_source(options)
    detector = load_detector(options)
    if options.threshold is not None:
        detector.threshold = options.threshold
    with ExitStack() as stack:
        sinks = list(_sinks(options))
        page = None if make_page is None else stack.enter_context(make_page())
        stream = InspectionStream(
            detector,
            source,
            deadline_ms=options.deadline_ms or None,
            policy=options.policy,
            sinks=sinks if page is None else [*sinks, page],  # last: it shows what the others refused
            maps=page is not None,
        )
        if page is not None:
            page.attach(stream)
            say(f"the page is at {page.sign_in_url}")
        stack.enter_context(stream)
        stack.enter_context(_ended_by_signals(stream))
        say(f"inspecting {stream.source}; Ctrl-C ends it")
        for count, result in enumerate(stream, 1):
            if str(options.jsonl) == "-":
                sys.stdout.write(json.dumps(result.row()) + "\n")
            else:
                score = "-" if result.score is None else f"{result.score:.6g}"
                item = result.item or result.sequence
                sys.stdout.write(f"{result.outcome!s:8s} {score:>12s} {result.latency_ms:8.1f} ms  {item}\n")
            sys.stdout.flush()
            if count == options.limit:
                break
    for problem in stream.close():
        say(f"advrad-fast: {problem}")
    status = stream.status
    counts = ", ".join(f"{n} {outcome}" for outcome, n in status.outcomes.items())
    say(f"{counts}; {status.dropped} dropped, {status.faults} faults of the source")
    if status.outcomes[Outcome.ERROR] or any(sink.lost for sink in status.sinks) or stream.close():
        return FAILED
    return FOUND if status.outcomes[Outcome.DEFECT] or status.outcomes[Outcome.ABSTAIN] else OK


@contextmanager
def _ended_by_signals(stream: Any) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the stream after the frame in hand; the second ends the program."""
    names = (signal.SIGINT, signal.SIGTERM)
    before: dict[signal.Signals, Any] = {}

    def end(number: int, frame: object) -> None:
        for name, handler in before.items():
            signal.signal(name, handler)
        stream.stop()

    for name in names:
        try:
            before[name] = signal.signal(name, end)
        except ValueError:  # not in the main thread
            break
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
