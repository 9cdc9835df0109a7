"""Who may see the page: tokens, host names, other sites, headers, paths."""

from __future__ import annotations

import http.client
import re
import socket
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import numpy as np
import pytest
from streams import wait_until
from watching import get

from advrad_fast.errors import ConfigError
from advrad_fast.line.watch import WatchPage

TOKEN = "a-token-that-is-long-enough"
PATHS = ("/", "/watch.js", "/watch.css", "/icon.svg", "/pictures/0/frame.jpg", "/nothing")


@pytest.fixture(scope="module")
def page() -> Iterator[WatchPage]:
    with WatchPage(port=0) as shown:
        yield shown


@pytest.fixture(scope="module")
def locked() -> Iterator[WatchPage]:
    """A page that other machines can reach."""
    with WatchPage("0.0.0.0", 0, names=["line7.factory.example"]) as shown:
        yield shown


@pytest.mark.parametrize("names", ["line7", 7, np.array("line7", dtype=object), [7]])
def test_names_are_a_list_of_texts(names: Any) -> None:
    with pytest.raises(ConfigError, match="names"):
        WatchPage(port=0, names=names)


@pytest.fixture(scope="module")
def given() -> Iterator[WatchPage]:
    with WatchPage(port=0, token=TOKEN) as shown:
        yield shown


def token_of(page: WatchPage) -> str:
    return page.sign_in_url.partition("?token=")[2]


def test_loopback_needs_no_token_and_anything_else_does(page: WatchPage, locked: WatchPage) -> None:
    assert get(page, "/")[0] == 200 and not page.needs_token and page.sign_in_url == page.url
    assert locked.needs_token and len(token_of(locked)) >= 43  # 256 bits
    for path in ("/", "/watch.js", "/events", "/pictures/0/map.jpg", "/nothing"):
        status, headers, body = get(locked, path)
        assert status == 401 and headers["www-authenticate"] == "Bearer" and token_of(locked).encode() not in body
    assert b"<form" in get(locked, "/")[2]
    for path in ("/watch.css", "/icon.svg"):  # of the sign-in page
        assert get(locked, path)[0] == 200


def test_the_token_is_shown_once_and_then_a_cookie(locked: WatchPage) -> None:
    status, headers, _ = get(locked, f"/?token={token_of(locked)}")
    assert (status, headers["location"]) == (303, "/")
    cookie, *attributes = headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=lax", "Path=/"} <= set(attributes) and str(locked.port) in cookie
    assert token_of(locked) not in cookie  # another server on this machine is sent it, too
    for path in ("/", "/watch.js"):
        assert get(locked, path, {"Cookie": cookie})[0] == 200
        assert get(locked, path, {"Cookie": cookie[:-1] + ("0" if cookie[-1] != "0" else "1")})[0] == 401
    assert get(locked, "/", {"Cookie": f"advrad-watch-{locked.port}={token_of(locked)}"})[0] == 401


def test_the_token_as_a_header(given: WatchPage) -> None:
    assert given.needs_token and TOKEN not in given.sign_in_url  # whoever gave it knows it
    assert get(given, "/watch.js", {"Authorization": f"Bearer {TOKEN}"})[0] == 200
    for wrong in (f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer", f"Basic {TOKEN}", "Bearer \xe4"):
        assert get(given, "/watch.js", {"Authorization": wrong})[0] == 401
    assert get(given, f"/watch.js?token={TOKEN}")[0] == 401  # in the address it is taken for signing in only
    status, headers, body = get(given, "/?token=wrong")
    assert status == 401 and "set-cookie" not in headers and b"This is not the token." in body


def test_tokens_are_compared_in_constant_time(given: WatchPage, monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    seen: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: seen.append((a, b)) or real(a, b))
    get(given, "/?token=guess-in-address")
    get(given, "/", {"Authorization": "Bearer guess-in-header"})
    get(given, "/", {"Cookie": f"advrad-watch-{given.port}=guess-in-cookie"})
    assert {b"guess-in-address", b"guess-in-header", b"guess-in-cookie"} <= {a for a, _ in seen}


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "10.0.0.7", "127.0.0.1.evil.example", "", "localhost@evil.example"]
)
def test_another_host_is_refused_on_loopback(page: WatchPage, host: str) -> None:
    """A foreign site whose name is rebound to this machine: the browser sends the foreign name."""
    assert get(page, "/", host=host.format(port=page.port) or " ")[0] in (400, 421)


def test_own_hosts_are_served(page: WatchPage, locked: WatchPage) -> None:
    for host in ("localhost", "127.0.0.1", "[::1]", "LOCALHOST:80"):
        assert get(page, "/", host=host)[0] == 200
    shown = {"Authorization": f"Bearer {token_of(locked)}"}
    for host in ("10.0.0.7", "10.0.0.7:99", "[fe80::1]", socket.gethostname(), "line7.factory.example"):
        assert get(locked, "/", shown, host=host)[0] == 200
    assert get(locked, "/", shown, host="evil.example")[0] == 421


def test_two_hosts_are_refused(page: WatchPage) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", page.port, timeout=20)) as connection:
        connection.putrequest("GET", "/", skip_host=True)
        connection.putheader("Host", "localhost")
        connection.putheader("Host", "evil.example")
        connection.endheaders()
        assert connection.getresponse().status in (400, 421)


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),  # a link
        ("/", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ("/events", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403),
        ("/pictures/0/map.jpg", {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ("/watch.js", {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "no-cors"}, 200),
        ("/watch.js", {"Origin": "http://evil.example"}, 403),
        ("/watch.js", {"Origin": "null"}, 403),
        ("/watch.js", {"Origin": "http://127.0.0.1:{port}"}, 200),
    ],
)
def test_other_sites_get_nothing(page: WatchPage, path: str, headers: dict[str, str], status: int) -> None:
    sent = {name: value.format(port=page.port) for name, value in headers.items()}
    assert get(page, path, sent)[0] == status


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "QUERY"])
def test_nothing_can_be_written(page: WatchPage, locked: WatchPage, method: str) -> None:
    for path in PATHS:
        assert get(page, path, method=method)[0] == 405
        assert get(locked, path, method=method)[0] == 405


def test_every_answer_has_the_headers(page: WatchPage, locked: WatchPage) -> None:
    answers = [get(page, path) for path in PATHS] + [get(locked, path) for path in PATHS]
    answers += [get(page, "/", host="evil.example"), get(page, "/", method="POST"), get(locked, f"/?token={token_of(locked)}")]
    for _, headers, _ in answers:
        policy = dict(re.findall(r"([a-z-]+) ([^;]+)", headers["content-security-policy"]))
        assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'" and "unsafe" not in str(policy)
        assert set(policy.values()) == {"'none'", "'self'"}
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer" and headers["cache-control"] == "no-store"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in headers and "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "path",
    [
        "/../pyproject.toml",
        "/..%2f..%2fetc/passwd",
        "/watch.js/../../page.py",
        "//etc/passwd",
        "/pictures/../../x/frame.jpg",
        "/pictures/..%2f..%2fwatch/frame.jpg",
        "/pictures/0/..%2fframe.jpg",
        "/data/elpv-mono.safetensors",
        "/%00",
        "/watch.html",
    ],
)
def test_there_is_no_way_to_other_files(page: WatchPage, path: str) -> None:
    status, _, body = get(page, path)
    assert status in (400, 404) and b"root:" not in body and len(body) < 100


def test_requests_that_are_none(page: WatchPage) -> None:
    """Neither ends the server."""
    long = b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n"
    for sent in (b"\x16\x03\x01\x02", b"GET / HTTP/9\r\n\r\n", long, b"GET / HTTP/1.1\r\n\r\n"):
        with closing(socket.create_connection(("127.0.0.1", page.port), timeout=20)) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            received: Any = b""
            with suppress(ConnectionResetError):
                received = connection.recv(100)
            assert b" 200 " not in received
    assert get(page, "/")[0] == 200


def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that ask for nothing would take the files that the line's sinks need."""
    from advrad_fast.line.watch import server

    monkeypatch.setattr(server, "_CONNECTIONS", 4)
    monkeypatch.setattr(server, "_FIRST", 0.5)
    with WatchPage(port=0) as shown:
        idle = [socket.create_connection(("127.0.0.1", shown.port), timeout=20) for _ in range(10)]
        for connection in idle[:-1]:
            connection.sendall(b"GET / HT")
        for connection in idle:  # each is closed: six at once, four for they are slow
            with closing(connection), suppress(ConnectionResetError):
                assert connection.recv(10) == b""
        wait_until(lambda: not shown._server._server.server_state.connections)
        assert get(shown, "/")[0] == 200
