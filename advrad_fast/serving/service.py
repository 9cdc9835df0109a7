"""A detector as a service: from an image file's bytes to a status and a JSON document.  No HTTP library is needed here."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from advrad_fast.batch import row
from advrad_fast.detector import Detector, Inspection, Outcome
from advrad_fast.errors import AdvRADError, ConfigError, ImageError, ImageTooLargeError, InferenceError, expected
from advrad_fast.images import decode_image
from advrad_fast.philox import check_seed

_log = logging.getLogger(__name__)

ROUTES = {"/inspect": "POST", "/health": "GET"}


class Answer(NamedTuple):
    """An HTTP status and what its JSON says.  Only status 200 has an outcome other than ERROR."""

    status: int
    body: dict[str, Any]


class Request(NamedTuple):
    """A file's bytes, and the names and values of the query: ``seed``, and ``path``, which the answer repeats."""

    data: bytes
    query: tuple[tuple[str, str], ...] = ()


class Service:
    """Answers requests with a detector; safe to share among threads.

    Args:
        max_bytes: of a file.
        token: what requests must bring, or None.

    Raises:
        InferenceError: the detector fails on the self-test's frame.
    """

    def __init__(self, detector: Detector, max_bytes: int, token: str | None = None) -> None:
        self._detector, self._max_bytes, self._token = detector, max_bytes, token
        self._frame = self_test_frame()
        self._known = self._self_test()

    def refusal(self, method: str, path: str, headers: Mapping[str, str]) -> Answer | None:
        """Why a request is not worth reading its body, or None: 401, 404, 405 or 413.

        Args:
            headers: by lower-case names.
        """
        if self._token is not None:
            wanted = f"Bearer {self._token}".encode()
            if not hmac.compare_digest(headers.get("authorization", "").encode(), wanted):
                return self._failed(401, "Unauthorised", "Authorization: expected Bearer and the service's token")
        wanted_method = ROUTES.get(path.rstrip("/"))
        if wanted_method is None:
            return self._failed(404, "NotFound", expected("path", f"one of {list(ROUTES)}", path))
        if method != wanted_method:
            return self._failed(405, "MethodNotAllowed", expected(f"method of {path}", wanted_method, method))
        length = headers.get("content-length", "")
        if length.isdecimal() and len(length) < 20 and int(length) > self._max_bytes:
            return self._too_long()
        return None

    def inspect(self, request: Request) -> Answer:
        """200 and the inspection; 400 or 413 where the request is at fault, 500 where the detector is."""
        path = dict(request.query).get("path")
        try:
            if len(request.data) > self._max_bytes:
                return self._too_long()
            seed = _seed(request.query)
            frame = decode_image(request.data, path or "image")
            result = self._detector.inspect(frame, maps=False, seed=seed)
        except AdvRADError as error:
            return self._failed(_status(error), type(error).__name__, str(error), path)
        except Exception as error:
            _log.exception("unforeseen while inspecting")
            return self._failed(500, type(error).__name__, "unforeseen: the service's log has more", path)
        return self._answer(200, path, result)

    def check(self) -> None:
        """Inspect the self-test's frame again.

        Raises:
            InferenceError: the engine failed, or the result is not what it was at the start.
        """
        found = self._self_test()
        if found != self._known:
            raise InferenceError(expected("self-test: outcome and score", str(self._known), str(found)))

    def health(self) -> Answer:
        """200 if :meth:`check` passes, 500 if not."""
        try:
            self.check()
        except Exception as error:
            _log.exception("the self-test failed")
            return self._failed(500, type(error).__name__, str(error))
        return Answer(200, {"healthy": True, "backend": self._detector.backend, "threshold": self._detector.threshold})

    def _self_test(self) -> tuple[str, float | None]:
        result = self._detector.inspect(self._frame, maps=False, seed=0)
        threshold = self._detector.model.threshold  # the service's own may be moved
        return ("ABSTAIN" if result.score is None else "DEFECT" if result.score > threshold else "OK"), result.score

    def _too_long(self) -> Answer:
        return self._failed(413, ImageTooLargeError.__name__, f"image: expected at most {self._max_bytes} bytes, got more")

    def _failed(self, status: int, error: str, message: str, path: str | None = None) -> Answer:
        result = Inspection(Outcome.ERROR, None, self._detector.threshold, None, None, None, self._detector.backend, {})
        return Answer(status, {**row(path, result), "error": error, "message": message})

    def _answer(self, status: int, path: str | None, result: Inspection) -> Answer:
        why = result.error
        found = {"error": None if why is None else type(why).__name__, "message": None if why is None else str(why)}
        return Answer(status, {**row(path, result), **found})


def self_test_frame() -> NDArray[np.uint8]:
    """A drawn part on a bright ground, so that a model which looks for a part first finds one: uint8 (96, 128, 3)."""
    y, x = np.mgrid[:96, :128]
    frame = np.full((96, 128, 3), 220, np.uint8)
    inside = (np.abs(x - 60) < 40) & (np.abs(y - 46) < 22)
    texture = 60 + (7 * x + 13 * y) % 50
    frame[inside] = np.stack([texture, texture + 9, texture + 18], axis=2)[inside]
    return frame


def _seed(query: tuple[tuple[str, str], ...]) -> int | None:
    names = [name for name, _ in query]
    if len(set(names)) != len(names) or not set(names) <= {"seed", "path"}:
        raise ConfigError(expected("query", "seed and path, each once at most", names))
    text = dict(query).get("seed")
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 20:
        raise ConfigError(expected("seed", "an integer in [0, 2**64)", text))
    return check_seed(int(text))


def _status(error: AdvRADError) -> int:
    if isinstance(error, ImageTooLargeError):
        return 413
    return 400 if isinstance(error, ImageError | ConfigError) else 500
