"""Results to a function."""

from __future__ import annotations

from collections.abc import Callable

from advrad_fast import checks
from advrad_fast.errors import ConfigError, expected
from advrad_fast.line.results import StreamInspection


class Callback:
    """Calls a function with every result, frame and maps included.

    It is called in the thread that iterates over the stream, before the result is given out, and holds it up as long as it
    takes.  What it raises is counted and shown on the result; it is not called again for it.

    Raises:
        ConfigError: it is no function, or the name no text.
    """

    retry = False

    def __init__(self, function: Callable[[StreamInspection], object], *, name: str = "callback") -> None:
        if not callable(function):
            raise ConfigError(expected("function", "a function of one result", type(function)))
        self.name = checks.text("name", name)
        self._function = function

    def write(self, result: StreamInspection) -> None:
        """Call it."""
        self._function(result)

    def close(self) -> None:
        """Nothing to do."""
