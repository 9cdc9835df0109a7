"""What a sink is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from advrad_fast.line.results import StreamInspection


@runtime_checkable
class Sink(Protocol):
    """Takes results: a file, a database, a broker, a function.

    Attributes:
        name: in messages and counts.
        retry: whether a result that it failed to take is offered again; then taking one twice must do no harm.
    """

    @property
    def name(self) -> str: ...
    @property
    def retry(self) -> bool: ...

    def write(self, result: StreamInspection) -> None:
        """Take a result.  Having returned, the sink has it, as safely as its own text says; else it raises."""

    def close(self) -> None:
        """Finish.  May raise, if something that was taken is lost after all."""
