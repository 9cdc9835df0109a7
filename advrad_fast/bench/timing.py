"""Paired timings: contestants take turns, so that a busy machine slows all of them, and what they ran on."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_log = logging.getLogger(__name__)

_WARM_UP = 2  # rounds: the first calls pay for memory
# Seconds before a call: OpenMP's threads spin for a while after their work, and would slow whoever comes next.  No longer than
# that: after 10 ms PyTorch's sleep so deeply that its small operations take three times as long, which would flatter us.
_REST = 0.003
# A turn is this many calls, of which the first isn't counted: it finds the caches, and the processors, as another left them.
# A call of more than so many seconds is a turn of its own: to that it makes no difference.
_TURN, _LONG = 4, 0.03
_FEATURES = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")


@dataclass(frozen=True)
class Timing:
    """Quantiles of a call's duration in milliseconds."""

    p20: float
    p50: float
    p80: float
    p99: float


def alternate(contestants: Mapping[str, Callable[[], object]], *, seconds: float, least: int = 5) -> dict[str, Timing]:
    """Time every contestant a few times a round, in turn, for about ``seconds`` and at least ``least`` rounds."""
    durations: dict[str, list[float]] = {name: [] for name in contestants}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < least + _WARM_UP or time.perf_counter() < end:
        for name, call in contestants.items():
            turn: list[float] = []
            while len(turn) < _TURN and (not turn or turn[0] < _LONG):
                time.sleep(_REST)
                start = time.perf_counter()
                call()
                turn.append(time.perf_counter() - start)
            if rounds >= _WARM_UP:
                durations[name] += turn[1:] or turn
        rounds += 1
    quantiles = {name: np.quantile(values, (0.2, 0.5, 0.8, 0.99)) * 1e3 for name, values in durations.items()}
    return {name: Timing(*(float(v) for v in values)) for name, values in quantiles.items()}


def torch_compiled(function: Callable[..., Any], *arguments: Any, mode: str | None = None) -> Callable[..., Any] | None:
    """``torch.compile(function, mode=mode)``, called once with ``arguments``; or None, with a warning, where that fails."""
    import torch

    compiled: Callable[..., Any] = torch.compile(function, mode=mode)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled(*arguments)
    except Exception as error:  # no C++ compiler, or an operation that it refuses
        _log.warning("torch.compile is left out: %s: %s", type(error).__name__, error)
        return None
    return compiled


def row(
    name: str,
    shape: tuple[int, ...],
    batch: int,
    backend: str,
    precision: str,
    timing: Timing,
    *,
    eager: Timing | None = None,
    best_torch: Timing | None = None,
    peak_share: float | None = None,
) -> dict[str, Any]:
    """One result under the keys that README promises; a ratio or share that was not measured is None."""

    def ratio(other: Timing | None) -> float | None:
        return None if other is None else round(other.p50 / timing.p50, 3)

    return {
        "name": name,
        "shape": list(shape),
        "batch": batch,
        "backend": backend,
        "precision": precision,
        "p50_ms": round(timing.p50, 4),
        "p20_ms": round(timing.p20, 4),
        "p80_ms": round(timing.p80, 4),
        "p99_ms": round(timing.p99, 4),
        "ratio_eager": ratio(eager),
        "ratio_best_torch": ratio(best_torch),
        "peak_share": None if peak_share is None else round(peak_share, 4),
        "commit": commit(),
        "machine": machine(),
    }


def commit() -> str | None:
    """The revision of the source tree this package stands in, with ``+`` if it was changed; None outside of one."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(("git", *arguments), cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> str:
    """Processor, cores and the vector units that matter here."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set((names.get("flags") or names.get("Features") or "").split())
    present = [feature for feature in _FEATURES if feature in flags]
    model = f"{names.get('model name', platform.machine())} (family {names.get('cpu family')}, model {names.get('model')})"
    return ", ".join([model, f"{os.cpu_count()} cores", *present])
