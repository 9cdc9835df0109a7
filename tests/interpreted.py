"""Runs the Triton kernels' host functions in Triton's interpreter, in a process of its own.

Whether a kernel is compiled or interpreted is decided when its module is loaded, so one process can't do both.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast.schedule import Coefficients


class Interpreter:
    """The operations on NumPy arrays, with the methods of :class:`emulated.Emulator`."""

    def __init__(self) -> None:
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
            self._pool.submit(os.getpid).result()
        finally:
            del os.environ["TRITON_INTERPRET"]
            if before is not None:
                os.environ["TRITON_INTERPRET"] = before

    def close(self) -> None:
        self._pool.shutdown()

    def call(self, function: Any, *arguments: Any, **options: Any) -> Any:
        return self._pool.submit(function, *arguments, **options).result()

    def noise(self, *arguments: Any, **options: Any) -> NDArray[Any]:
        return self.call(_noise, *arguments, **options)

    def reconstruction_error(self, *arguments: Any, **options: Any) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        return self.call(_reconstruction_error, *arguments, **options)

    def votes(self, *arguments: Any) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        return self.call(_votes, *arguments)


def _extra(options: dict[str, Any]) -> dict[str, Any]:
    """Options of the emulator's methods as those of the host functions."""
    import torch

    from advrad_fast.kernels.arguments import Lattice

    table, sigma, ids = options.pop("table", None), options.pop("sigma", 0.0), options.pop("image_ids", None)
    if table is not None:
        options["lattice"] = Lattice(torch.from_numpy(table.astype(np.int64)), sigma)
    if ids is not None:
        options["image_ids"] = torch.tensor(ids, dtype=torch.int32)
    return options


def _noise(
    images: NDArray[np.uint8], draws: int, seed: int, c: Coefficients, *, dtype: str = "fp32", channels_last: bool = False,
    **options: Any,
) -> NDArray[Any]:  # fmt: skip
    import torch

    from advrad_fast.kernels.noise import noise

    n, h, w, channels = images.shape
    shape = (n * draws, h, w, channels) if channels_last else (n * draws, channels, h, w)
    out = torch.full(shape, float("nan"), dtype={"fp32": torch.float32, "fp16": torch.float16}[dtype])
    noise(torch.from_numpy(images.copy()), draws, seed, c.signal, c.noise, c.input_scale, out, channels_last=channels_last,
          **_extra(options))  # fmt: skip
    return out.numpy()


def _reconstruction_error(
    images: NDArray[np.uint8], outputs: NDArray[Any], draws: int, coefficients: tuple[float, float], weights: Sequence[float],
    filter_size: int, mu: NDArray[np.float32], inverse_spread: NDArray[np.float32], *, maps: bool, seed: int, c: Coefficients,
    **options: Any,
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:  # fmt: skip
    import torch

    from advrad_fast.kernels.reconstruction_error import reconstruction_error

    options.pop("dtype", None)
    options.pop("order_seed", None)
    results, (h, w) = len(outputs) // draws, mu.shape
    scores, out = torch.full((results,), float("nan")), torch.full((results, h, w), float("nan")) if maps else None
    reconstruction_error(
        torch.from_numpy(images.copy()), torch.from_numpy(outputs.copy()), draws, *coefficients, tuple(weights), filter_size,
        torch.from_numpy(mu.copy()), torch.from_numpy(inverse_spread.copy()), out, scores, seed=seed, signal=c.signal,
        noise=c.noise, input_scale=c.input_scale, **_extra(options),
    )  # fmt: skip
    return scores.numpy(), None if out is None else out.numpy()


def _votes(
    scores: NDArray[np.float32], thresholds: NDArray[np.float32], ranks: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    import torch

    from advrad_fast.kernels.votes import votes

    counts, statistics = votes(*(torch.from_numpy(a.copy()) for a in (scores, thresholds, ranks)))
    return counts.numpy(), statistics.numpy()
