"""A network camera on loopback: MJPEG over HTTP, as many of them speak it, which OpenCV opens as it opens RTSP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

Script = Callable[[], Iterator[Any]]


def jpeg(frame: Any) -> bytes:
    buffer = BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def plain(colour: tuple[int, int, int]) -> Any:
    return np.full((48, 64, 3), colour, np.uint8)


class MjpegCamera:
    """Serves one script a connection, the last for all further ones; a script yields frames, and may block between them."""

    def __init__(self, *scripts: Script) -> None:
        self.connections = 0
        camera = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                script = scripts[min(camera.connections, len(scripts) - 1)]
                camera.connections += 1
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                try:
                    for frame in script():
                        data = jpeg(frame)
                        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                        self.wfile.write(head.encode() + data + b"\r\n")
                        self.wfile.flush()
                except OSError:
                    pass  # the other side has gone

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://user:secret@127.0.0.1:{self.server.server_port}/stream.mjpg"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
