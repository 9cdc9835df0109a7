"""The page as a sink of a stream."""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from advrad_fast import checks
from advrad_fast.errors import ConfigError, expected
from advrad_fast.line.results import StreamInspection
from advrad_fast.line.stream import InspectionStream
from advrad_fast.line.watch.board import Board

if TYPE_CHECKING:
    from advrad_fast.line.watch.server import Server

_log = logging.getLogger(__name__)

HEARTBEAT = 0.5  #: seconds: the page hears from the inspection at least this often
_CLOSING = 2.0  # seconds that closing waits for the last pictures


class WatchPage:
    """Serves a page with the live frame, heat map, outcome, counts, score trend and last defects of one stream.

    >>> with WatchPage() as page, InspectionStream(detector, Camera(0), sinks=[Sqlite("line.db"), page]) as stream:
    ...     page.attach(stream)
    ...     for inspection in stream: ...

    Put it last among the sinks.  It costs the stream's thread no more than keeping a reference; drawing and serving are done in
    two threads of its own.  When browsers are slow they miss states, and never hold up the stream; when serving ends, the
    inspection goes on.  Nothing that it serves changes anything.

    The page shows an outcome for no longer than ``deadline_ms`` after it came, then NO DATA; where the source says that no part
    has come, for ``hold_ms``, then WAITING.  A browser that hears nothing shows NO DATA by itself.

    Args:
        host: the address to listen on: this machine's own by default.
        port: 0 for any free one, see :attr:`port`.
        token: what a browser has to show.  Beyond loopback it is needed: None makes one, see :attr:`sign_in_url`.
        names: further names that the page is reached by, such as a reverse proxy's; others are refused.
        per_second: states and pictures a second at most.  Pictures of live frames are made only while somebody watches.
        deadline_ms, hold_ms: in [1, 3600000].

    Raises:
        ConfigError: an argument is out of range, or the token too weak.
        SinkError: the address is taken, or not this machine's.
        ModuleNotFoundError: Starlette or uvicorn is not installed.
    """

    retry = False

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8765,
        *,
        token: str | None = None,
        names: Iterable[str] = (),
        per_second: float = 8.0,
        deadline_ms: float = 1000.0,
        hold_ms: float = 3000.0,
    ) -> None:
        host, port = checks.text("host", host), checks.integer("port", port, 0, 65535)
        self._pause = 1.0 / checks.number("per_second", per_second, 0.1, 60.0)
        deadline, hold = (
            checks.number(name, value, 1.0, 3.6e6) / 1e3 for name, value in (("deadline_ms", deadline_ms), ("hold_ms", hold_ms))
        )
        if not checks.several(names):
            raise ConfigError(expected("names", "a list of names", names))
        names = [checks.text("names", name) for name in names]
        from advrad_fast.line.watch.access import check_token, new_token
        from advrad_fast.line.watch.server import Server, bound

        given = None if token is None else check_token(token)
        listener, local = bound(host, port)
        self._given, self._token = given is not None, given if local else given or new_token()
        self.host, self.port = host, int(listener.getsockname()[1])
        self.name = f"page {host}:{self.port}"
        self._board = Board(deadline=deadline, hold=max(deadline, hold), heartbeat=HEARTBEAT)
        self._stream: InspectionStream | None = None
        self._changed = threading.Condition()
        self._news, self._closed = False, threading.Event()
        self._server: Server = Server(
            listener,
            local=local,
            token=self._token,
            names=names,
            picture=self._board.picture,
            on_watched=self._notify,
        )
        self._thread = threading.Thread(target=self._publish, name="advrad-fast page drawing", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The page's address."""
        name = self.host
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            pass
        else:
            name = socket.gethostname() if address.is_unspecified else f"[{name}]" if address.version == 6 else name
        return f"http://{name}:{self.port}/"

    @property
    def sign_in_url(self) -> str:
        """The page's address with the token that was made for it, to be opened once on each device; :attr:`url` without one."""
        return self.url if self._token is None or self._given else f"{self.url}?token={self._token}"

    @property
    def needs_token(self) -> bool:
        """Whether a browser has to show a token."""
        return self._token is not None

    @property
    def is_serving(self) -> bool:
        """Whether the page can be reached; the inspection does not depend on it."""
        return self._server.is_alive and not self._closed.is_set()

    def attach(self, stream: InspectionStream) -> None:
        """Also show the stream's own state: its source, its sinks, and whether no part has come or something hangs."""
        self._stream = stream

    def write(self, result: StreamInspection) -> None:
        """Show it."""
        self._board.add(result)
        self._notify()

    def close(self) -> None:
        """Show that the stream has ended, and stop serving; four seconds at most."""
        self._closed.set()
        self._notify()
        self._thread.join(_CLOSING)
        self._server.close()

    def __enter__(self) -> WatchPage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _notify(self) -> None:
        with self._changed:
            self._news = True
            self._changed.notify_all()

    def _is_due(self) -> bool:
        return self._closed.is_set() or (self._news and (self._server.watching > 0 or self._board.waits_to_be_drawn))

    def _publish(self) -> None:
        ended = False
        while not ended:
            with self._changed:
                self._changed.wait_for(self._is_due, HEARTBEAT)
                self._news = False
            ended = self._closed.is_set()
            try:
                self._server.publish(self._board.publish(self._stream, draw=self._server.watching > 0, ended=ended))
            except Exception:  # the page then says NO DATA; the next state may be better
                _log.exception("%s: no state could be published", self.name)
            self._closed.wait(self._pause)
