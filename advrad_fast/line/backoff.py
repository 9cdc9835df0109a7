"""Pauses between attempts: doubled from one to the next, and jittered, so that many clients do not come back at once."""

from __future__ import annotations

import random
from dataclasses import dataclass

from advrad_fast import checks
from advrad_fast.errors import ConfigError, expected


@dataclass(frozen=True)
class Backoff:
    """Pauses in seconds.

    Attributes:
        first: the longest first pause.
        cap: the longest of all.
        jitter: each pause is drawn from [1 - jitter, 1] times its longest.
    """

    first: float = 0.1
    cap: float = 10.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        """A ConfigError if a number is out of range."""
        if not 0.0 < checks.finite("backoff: first", self.first) <= checks.finite("backoff: cap", self.cap) <= 3600.0:
            raise ConfigError(expected("backoff", "0 < first <= cap <= 3600 seconds", (self.first, self.cap)))
        checks.number("backoff: jitter", self.jitter, 0.0, 1.0)

    def pause(self, failures: int) -> float:
        """Seconds to wait after this many failures in a row, from 1."""
        longest = min(self.cap, self.first * 2.0 ** min(failures - 1, 60))
        return longest * (1.0 - self.jitter * random.random())
