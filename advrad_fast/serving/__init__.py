"""Inspection over HTTP, as a Ray Serve deployment (the extra ``[serve]``).

>>> setup = partial(Detector.load, "part.safetensors", threads=1)
>>> with running(setup, ServingSettings(replicas=2)) as url:
...     requests.post(f"{url}/inspect", data=Path("part.png").read_bytes()).json()["outcome"]

``POST /inspect`` takes an image file's bytes, ``GET /health`` runs the self-test (docs/serving.md).  Requests that wait at the
same time are handed to the detector together; each is inspected as if it were alone, with the seed that it names or else
the detector's.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from advrad_fast.detector import Detector
from advrad_fast.errors import ConfigError, SpreadError, expected
from advrad_fast.serving.service import Answer, Request, Service
from advrad_fast.spread import connection

__all__ = ["ServingSettings", "application", "running"]

NAME = "advrad_fast"  #: of the Serve application


@dataclass(frozen=True)
class ServingSettings:
    """How it is served.

    Attributes:
        host, port: where; a host beyond this machine needs a ``token``.
        replicas: processes with a detector each, of one CPU of the cluster each.
        max_batch: requests that are handed to a detector together, at most.
        wait_ms: how long a request waits for others to join it; 0: those that are there already do.
        max_bytes: of an image file; more is refused, and not kept.
        token: what requests must bring as ``Authorization: Bearer TOKEN``; None: nothing.

    Raises:
        ConfigError: a setting is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    max_batch: int = 8
    wait_ms: float = 0.0
    max_bytes: int = 32 << 20
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, low, high in (("port", 1, 65535), ("replicas", 1, 1024), ("max_batch", 1, 1024), ("max_bytes", 1, 1 << 30)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(expected(name, f"an integer in [{low}, {high}]", value))
        if isinstance(self.wait_ms, bool) or not isinstance(self.wait_ms, int | float) or not 0.0 <= self.wait_ms <= 1e4:
            raise ConfigError(expected("wait_ms", "a number in [0, 10000]", self.wait_ms))
        if self.token is not None and (not isinstance(self.token, str) or not self.token.isascii() or not self.token):
            raise ConfigError("token: expected ASCII text, or None")
        if self.token is None and not _is_loopback(self.host):
            raise ConfigError(expected("host", "127.0.0.1, or a token with it", self.host))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def application(setup: Callable[[], Detector], settings: ServingSettings | None = None) -> Any:
    """The Serve application, for ``serve.run`` on a cluster of one's own; its host and port are those that Serve has there.

    Args:
        setup: makes the detector in a replica.  Give it a seed, and one thread where there is a replica a core.

    Raises:
        SpreadError: Ray Serve is not installed.
    """
    import asyncio

    serve: Any = _serve()
    made = settings or ServingSettings()

    class Replica:
        """A detector behind HTTP."""

        def __init__(self) -> None:
            self._service = Service(setup(), made.max_bytes, made.token)

        async def __call__(self, request: Any) -> Any:
            from starlette.responses import JSONResponse

            answer = self._service.refusal(request.method, request.scope["path"], request.headers)
            if answer is None and request.method == "GET":
                answer = await asyncio.to_thread(self._service.health)
            if answer is None:
                body = bytearray()
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > made.max_bytes:  # a request need not say how long it is
                        break
                query = request.query_params.multi_items()
                answer = await self._inspect(Request(bytes(body), tuple(query)))
            # Connections with a body left unread are not used again.
            headers = {"Connection": "close"} if answer.status in (401, 404, 405, 413) else None
            return JSONResponse(answer.body, answer.status, headers)

        @serve.batch(max_batch_size=made.max_batch, batch_wait_timeout_s=made.wait_ms / 1e3)  # type: ignore[untyped-decorator]
        async def _inspect(self, requests: list[Request]) -> list[Answer]:
            return await asyncio.to_thread(lambda: [self._service.inspect(request) for request in requests])

        async def check_health(self) -> None:
            """Asked by Serve, which replaces a replica that fails."""
            await asyncio.to_thread(self._service.check)

    deployment = serve.deployment(
        Replica,
        name="Detector",
        num_replicas=made.replicas,
        max_ongoing_requests=2 * made.max_batch,
        max_queued_requests=32 * made.max_batch,  # more are told to come back later: 503
    )
    return deployment.bind()


@contextmanager
def running(setup: Callable[[], Detector], settings: ServingSettings | None = None, *, ray: str = "local") -> Iterator[str]:
    """Serve until the block is left: gives the address, such as ``http://127.0.0.1:8000``.

    Args:
        setup: as for :func:`application`.
        ray: the address of a cluster, as for :func:`advrad_fast.spread.map_tasks`.

    Raises:
        SpreadError: the cluster can't be used, has fewer CPUs than replicas or a Serve of its own, or the port is taken.
        AdvRADError: what ``setup`` raises; it is run here once, before anything is started.
    """
    made = settings or ServingSettings()
    Service(setup(), made.max_bytes, made.token)  # replicas would be tried again and again
    if ray == "local":
        with socket.socket(socket.AF_INET6 if ":" in made.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((made.host, made.port))
            except OSError as error:
                raise SpreadError(f"{made.host}:{made.port} can't be served at: {error}") from error
    serve = _serve()
    with connection(ray) as library:
        cpus = int(library.cluster_resources().get("CPU", 0))
        if cpus < made.replicas:
            raise SpreadError(expected("replicas", f"at most the cluster's {cpus} CPUs", made.replicas))
        if serve.status().proxies:
            raise SpreadError("Serve runs on this cluster already; deploy advrad_fast.serving.application() there with serve.run")
        try:
            try:
                serve.start(proxy_location="HeadOnly", http_options={"host": made.host, "port": made.port})
                serve.run(application(setup, made), name=NAME, route_prefix="/")
            except Exception as error:  # Ray's own, with the cause inside
                why = getattr(error, "cause", error)
                raise SpreadError(f"{made.host}:{made.port} can't be served at: {why}") from error
            yield f"http://[{made.host}]:{made.port}" if ":" in made.host else f"http://{made.host}:{made.port}"
        finally:
            serve.shutdown()


def _serve() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        from ray import serve
    except ModuleNotFoundError as error:
        raise SpreadError("ray[serve] is not installed; needed here: pip install 'advrad-fast[serve]'") from error
    return serve
