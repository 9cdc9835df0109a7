"""An RTSP camera on loopback: RTP with JPEG payloads (RFC 2435), interleaved with RTSP on one TCP connection (RFC 2326)."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from io import BytesIO
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any

from PIL import Image

Script = Callable[[], Iterator[Any]]

SDP = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\nm=video 0 RTP/AVP 26\r\na=control:track0\r\n"


def rtp(frame: Any, number: int) -> bytes:
    """One frame as one interleaved packet on channel 0."""
    buffer = BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=95, subsampling="4:2:0")
    data, tables, position = buffer.getvalue(), b"", 2
    while True:  # segments, up to the start of the scan
        marker, length = data[position + 1], struct.unpack(">H", data[position + 2 : position + 4])[0]
        segment = data[position + 4 : position + 2 + length]
        position += 2 + length
        if marker == 0xDB:
            for first in range(0, len(segment), 65):
                tables += segment[first + 1 : first + 65]
        if marker == 0xDA:
            break
    scan = data[position:-2]
    height, width = frame.shape[:2]
    jpeg = struct.pack(">IBBBB", 0, 1, 255, width // 8, height // 8) + struct.pack(">BBH", 0, 0, len(tables)) + tables + scan
    packet = struct.pack(">BBHII", 0x80, 0x80 | 26, number & 0xFFFF, 3600 * number, 7) + jpeg
    return struct.pack(">cBH", b"$", 0, len(packet)) + packet


class RtspCamera:
    """Plays one script a connection, the last for all further ones; a script yields frames, and may block between them."""

    def __init__(self, *scripts: Script) -> None:
        self.played = 0
        camera = self

        class Handler(StreamRequestHandler):
            def handle(self) -> None:
                try:
                    while request := self.request_lines():
                        self.answer(*request)
                except OSError:
                    pass  # the other side has gone

            def request_lines(self) -> tuple[str, dict[str, str]] | None:
                first = self.rfile.readline().decode()
                if not first.strip():
                    return None
                headers = {}
                while line := self.rfile.readline().decode().strip():
                    name, _, value = line.partition(":")
                    headers[name.lower()] = value.strip()
                return first.split()[0], headers

            def answer(self, method: str, headers: dict[str, str]) -> None:
                status, extra, body = "200 OK", [], ""
                if method == "OPTIONS":
                    extra = ["Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN"]
                elif method == "DESCRIBE":
                    body = SDP
                    extra = ["Content-Type: application/sdp", f"Content-Length: {len(body)}"]
                elif method == "SETUP" and "interleaved" not in headers["transport"]:
                    status = "461 Unsupported Transport"
                elif method == "SETUP":
                    extra = ["Transport: RTP/AVP/TCP;unicast;interleaved=0-1", "Session: 1"]
                elif method == "PLAY":
                    extra = ["Session: 1"]
                lines = [f"RTSP/1.0 {status}", f"CSeq: {headers['cseq']}", *extra]
                self.wfile.write(("\r\n".join(lines) + "\r\n\r\n" + body).encode())
                if method == "PLAY":
                    self.play()

            def play(self) -> None:
                script = scripts[min(camera.played, len(scripts) - 1)]
                camera.played += 1
                for number, frame in enumerate(script()):
                    self.wfile.write(rtp(frame, number))
                raise OSError("the script is over: hang up")

        class Server(ThreadingTCPServer):
            allow_reuse_address, daemon_threads = True, True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"rtsp://user:secret@127.0.0.1:{self.server.server_address[1]}/main"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
