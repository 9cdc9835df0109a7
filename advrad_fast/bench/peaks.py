"""What this machine can do at most, measured: the floors that the other figures are shares of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from advrad_fast.bench.timing import alternate

_COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Peaks:
    """Bytes a second of a 256 MB copy (read and written, all threads), and FLOP a second in fp32 and bf16."""

    copy: float
    fp32: float
    bf16: float


def measure(*, seconds: float = 4.0) -> Peaks:
    """The best of a large matrix product and 3 x 3 convolutions, by their 20 % quantile; a copy by its own."""
    source, target = (torch.ones(_COPY_BYTES // 4) for _ in range(2))
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    flops: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        side = 2048
        matrix = torch.randn(side, side).to(dtype)
        calls[f"{name} product"] = lambda matrix=matrix: matrix @ matrix  # type: ignore[misc]
        flops[f"{name} product"] = 2.0 * side**3
        for channels, size, batch in ((256, 64, 1), (128, 64, 4), (256, 64, 8)):
            x = torch.randn(batch, channels, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
            conv = torch.nn.Conv2d(channels, channels, 3, padding=1).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            key = f"{name} convolution {channels} x {size} x {size} x {batch}"
            calls[key] = lambda conv=conv, x=x: conv(x)  # type: ignore[misc]
            flops[key] = 2.0 * batch * size**2 * channels**2 * 9
    with torch.inference_mode():
        timings = alternate(calls, seconds=seconds)
    rates = {key: amount / timings[key].p20 * 1e3 for key, amount in flops.items()}
    best = {kind: max(rate for key, rate in rates.items() if key.startswith(kind)) for kind in ("fp32", "bf16")}
    return Peaks(copy=2.0 * _COPY_BYTES / timings["copy"].p20 * 1e3, fp32=best["fp32"], bf16=best["bf16"])
