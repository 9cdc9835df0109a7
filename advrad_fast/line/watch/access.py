"""Who may see the page: the checks before, and the headers on, every answer.

The page only shows; nothing that it serves changes anything.  What is guarded is who can look:

* The ``Host`` header must be this machine's own: a foreign web site whose name was rebound to this machine's address is refused.
* What a browser asks for on behalf of another site is refused (``Sec-Fetch-Site``, ``Origin``), but for opening the page itself.
* Where a token is needed, it is shown once in the address and from then on in a cookie of this port, or always as
  ``Authorization: Bearer``.  The cookie is derived from the token, so that another server on the machine, which is sent
  it too, does not learn the token.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import socket
from collections.abc import Iterable

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from advrad_fast.errors import ConfigError

_log = logging.getLogger(__name__)

PUBLIC = frozenset({"/watch.css", "/icon.svg"})  #: what the sign-in page needs

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self';"
        " base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]/@\s]+)(?::\d{1,5})?")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,512}")


def check_token(token: str) -> str:
    """A token as it is.

    Raises:
        ConfigError: it is too short, or has characters that a header or an address does not carry.  The message does not show it.
    """
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise ConfigError("token: expected 16 to 512 of the characters A-Z a-z 0-9 . _ ~ + / = -, got something else")
    return token


def new_token() -> str:
    """A fresh token of 256 bits."""
    return secrets.token_urlsafe(32)


class Guard:
    """Checks requests before they reach the application.

    Args:
        app: what serves.
        token: None for none: only for a page that no other machine can reach.
        local: the page listens on loopback only.
        port: where.
        names: further names that the page is reached by, such as a reverse proxy's.
        sign_in: the page that asks for the token.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, local: bool, port: int, names: Iterable[str], sign_in: str) -> None:
        self._app, self._local, self._sign_in = app, local, sign_in
        self._names = {"localhost", *(name.lower() for name in names)}
        if not local:
            own = socket.gethostname().lower()
            self._names |= {own, f"{own}.local"}
        self._token = None if token is None else token.encode()
        self._cookie = f"advrad-watch-{port}"
        self._pass = "" if token is None else hmac.new(token.encode(), b"advrad-fast watch cookie", hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        if scope["type"] != "http":
            return
        answer = self._refusal(Request(scope))
        try:
            await (answer or self._app)(scope, receive, send_with_headers)
        except Exception:
            _log.exception("serving the page failed")
            if not started:
                await PlainTextResponse("internal error", 500)(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("this page only shows", 405, {"Allow": "GET, HEAD"})
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            return PlainTextResponse("this is not that host; `--host NAME` allows a name", 421)
        opening = request.url.path == "/" and request.headers.get("sec-fetch-mode", "navigate") == "navigate"
        site = request.headers.get("sec-fetch-site", "none")
        origin = request.headers.get("origin")
        if (site not in ("same-origin", "none") and not opening) or (origin and origin.partition("://")[2] != hosts[0]):
            return PlainTextResponse("not for another site", 403)
        if self._token is None or request.url.path in PUBLIC:
            return None
        if request.url.path == "/" and "token" in request.query_params:
            if not hmac.compare_digest(request.query_params["token"].strip().encode(), self._token):
                return self._sign_in_page(wrong=True)
            answer = RedirectResponse("/", 303)
            answer.set_cookie(self._cookie, self._pass, max_age=30 * 86400, httponly=True, samesite="lax")
            return answer
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(shown.strip().encode(), self._token):
            return None
        if hmac.compare_digest(request.cookies.get(self._cookie, "").encode(), self._pass.encode()):
            return None
        if request.url.path == "/":
            return self._sign_in_page(wrong=False)
        return PlainTextResponse("a token is needed", 401, {"WWW-Authenticate": "Bearer"})

    def _sign_in_page(self, *, wrong: bool) -> Response:
        note = "This is not the token." if wrong else ""
        return HTMLResponse(self._sign_in.replace("{{note}}", note), 401, {"WWW-Authenticate": "Bearer"})

    def _is_own(self, host: str) -> bool:
        """Whether a Host header names this machine.  An address, unlike a name, cannot be rebound."""
        match = _HOST.fullmatch(host.lower())
        if match is None:
            return False
        name = match[1]
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return address.is_loopback or not self._local
