"""Serves the page in a thread of its own, with an event loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from advrad_fast.errors import SinkError
from advrad_fast.line.watch.access import Guard
from advrad_fast.line.watch.board import Publication

_log = logging.getLogger(__name__)

CLIENTS = 16  #: browsers that are kept up to date at the same time
_CONNECTIONS = 6 * CLIENTS + 16  # of all kinds: a browser opens six to one server.  More would take files from the line's sinks.
_FIRST = 10.0  # seconds for the first request of a connection
_STALLED = 20.0  # seconds after which the system drops a connection that takes nothing
_BUFFER = 1 << 18  # bytes that wait in the system for one connection at most
_CLOSING = 2.0  # seconds for browsers to hear that the stream has ended

_DATA = Path(__file__).parent.parent.parent / "data"
_FILES = {
    "/": ("watch.html", "text/html; charset=utf-8"),
    "/watch.css": ("watch.css", "text/css; charset=utf-8"),
    "/watch.js": ("watch.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("watch.svg", "image/svg+xml"),
}


def bound(host: str, port: int) -> tuple[socket.socket, bool]:
    """A socket that is bound to an address, and whether only this machine can reach it.

    Raises:
        SinkError: the address is taken, or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Connections inherit these.  One that takes nothing must neither stay for ever nor fill memory.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1e3 * _STALLED))
            made.bind(address)
            made.listen(128)  # from now on, though the server has yet to start
        except BaseException:
            made.close()
            raise
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host
        raise SinkError(f"page {host}:{port}: {error}") from error
    return made, ipaddress.ip_address(made.getsockname()[0]).is_loopback


class Server:
    """Serves publications, the newest to each client as fast as it takes them.

    Args:
        listener: from :func:`bound`.
        local: only this machine can reach it.
        token: None for a page without one.
        names: that the page is reached by.
        picture: a JPEG file by a result's sequence and ``frame`` or ``map``.
        on_watched: called when a browser has come.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        local: bool,
        token: str | None,
        names: Iterable[str],
        picture: Callable[[int, str], bytes | None],
        on_watched: Callable[[], None],
    ) -> None:
        self._listener, self._picture, self._on_watched = listener, picture, on_watched
        self._files = {path: ((_DATA / name).read_bytes(), kind) for path, (name, kind) in _FILES.items()}
        self._newest: Publication | None = None
        self._waiting: set[asyncio.Event] = set()
        self._watching = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        routes = [Route(path, self._file) for path in _FILES]
        routes += [Route("/events", _Asgi(self._events)), Route("/pictures/{sequence}/{view}.jpg", self._jpeg)]
        sign_in = (_DATA / "watch-sign-in.html").read_text(encoding="utf-8")
        port = listener.getsockname()[1]
        guard = Guard(Starlette(routes=routes), token=token, local=local, port=port, names=names, sign_in=sign_in)
        config = uvicorn.Config(
            guard,
            loop="asyncio",
            http=_Bounded,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # a browser that goes away is nothing to report; what fails here, the guard reports
            access_log=False,  # addresses carry the token
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=16384,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="advrad-fast page", daemon=True)
        self._thread.start()

    @property
    def watching(self) -> int:
        """Browsers that are kept up to date now."""
        return self._watching

    @property
    def is_alive(self) -> bool:
        """Whether it serves."""
        return self._thread.is_alive()

    def publish(self, publication: Publication) -> None:
        """Hand a state to all clients; from any thread; does not wait for them."""
        self._newest = publication
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody watches
                loop.call_soon_threadsafe(self._wake)

    def close(self) -> None:
        """Stop serving, ``_CLOSING`` seconds at most.  Browsers get what was published last first."""
        self._server.should_exit = True
        self._thread.join(_CLOSING)
        self._listener.close()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException:  # the inspection goes on without a page
            _log.exception("the page is no longer served")

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._server.serve(sockets=[self._listener])

    def _wake(self) -> None:
        for event in self._waiting:
            event.set()

    async def _file(self, request: Request) -> Response:
        content, kind = self._files[request.url.path]
        return Response(content, media_type=kind)

    async def _jpeg(self, request: Request) -> Response:
        sequence = request.path_params["sequence"]
        known = sequence.isascii() and sequence.isdecimal() and len(sequence) <= 18
        file = self._picture(int(sequence), request.path_params["view"]) if known else None
        return PlainTextResponse("no such picture", 404) if file is None else Response(file, media_type="image/jpeg")

    async def _events(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The newest state again and again.  While a client is slow, states pass it by: nothing is queued for it."""
        if self._watching >= CLIENTS or scope["method"] != "GET":
            await PlainTextResponse("too many browsers", 503, {"Retry-After": "10"})(scope, receive, send)
            return
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        news = asyncio.Event()
        gone = asyncio.create_task(_until_gone(receive, news))
        self._waiting.add(news)
        self._watching += 1
        try:
            self._on_watched()
            await send({"type": "http.response.body", "body": b"retry: 1000\n\n", "more_body": True})
            number, sequence = 0, -1
            while not gone.done():
                newest = self._newest
                if newest is not None and newest.number > number:
                    number = newest.number
                    message, sequence = newest.message(sequence)
                    await send({"type": "http.response.body", "body": message, "more_body": not newest.ended})
                    if newest.ended:
                        return
                    continue
                news.clear()
                if self._newest is newest:
                    await news.wait()
        finally:
            self._watching -= 1
            self._waiting.discard(news)
            gone.cancel()


class _Bounded(H11Protocol):
    """A connection, if there are not too many, and for as long as it asks for something."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _CONNECTIONS:
            transport.abort()
        else:
            self.loop.call_later(_FIRST, self._expect_request)

    def _expect_request(self) -> None:
        if self.cycle is None:
            self.transport.abort()


class _Asgi:
    """Marks a function of scope, receive and send as one for Starlette, which takes bare functions for another kind."""

    def __init__(self, serve: Callable[[Scope, Receive, Send], object]) -> None:
        self._serve = serve

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._serve(scope, receive, send)  # type: ignore[misc]


async def _until_gone(receive: Receive, news: asyncio.Event) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    news.set()
