"""The UNet of :mod:`advrad_fast.reference.unet` as a plan of the C++ engine (``csrc/engine``), with the timestep folded in.

As :mod:`advrad_fast.graph` does for ONNX, but every residual block is two operations: a convolution with the norm and activation
before it, or the activation after it, and one that adds the block's input, through the skip's 1x1 kernel where there is one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast import _native
from advrad_fast.backends.base import Array
from advrad_fast.config import DetectorConfig, UNetConfig
from advrad_fast.graph import DOUBLED, check_weights, time_embedding

_Norm = tuple[Array, Array, int, bool]
_Source = tuple[int, Array, int, int, int, bool]

KERNELS = tuple(_native.engine_kernels())  #: "amx" where the processor has it, and "portable", the plain form


class NativeEngine:
    """The network in the C++ engine, of a fixed batch, in bf16.

    Args:
        batch: images a call.
        threads: None for one a physical core.
        kernels: one of :data:`KERNELS`; ``portable`` is for comparisons, and slow.
    """

    name = "native"
    precision = "bf16"

    def __init__(
        self,
        config: DetectorConfig,
        weights: Mapping[str, Array],
        *,
        batch: int,
        threads: int | None = None,
        kernels: str = "amx",
    ) -> None:
        image = config.image
        self.threads = physical_cores() if threads is None else threads
        self._shape = (batch, image.channels, image.height, image.width)
        self._network = build_network(
            config.unet,
            weights,
            height=image.height,
            width=image.width,
            batch=batch,
            timestep=config.diffusion.timestep,
            threads=self.threads,
            kernels=kernels,
        )

    def request(self) -> NativeRequest:
        """Something that runs the network; not for two threads at once."""
        return NativeRequest(self._network, self._shape)


class NativeRequest:
    """Fill :attr:`x`, then :meth:`infer`.

    Attributes:
        x: float32 (batch, C, H, W), the network's input.
    """

    def __init__(self, network: _native.Network, shape: tuple[int, ...]) -> None:
        self.x, self._out = (np.zeros(shape, dtype=np.float32) for _ in range(2))
        self._network = network
        self._workspace = network.workspace()

    def infer(self) -> Array:
        """The network's output, float32 like :attr:`x`; the request's own memory, until the next call."""
        self._network.run(self._workspace, self.x, self._out)
        return self._out

    def infer_noised(
        self, image: NDArray[np.uint8], seed: int, signal: float, noise: float, input_scale: float, normals: Array | None
    ) -> Array:
        """The same on what :func:`advrad_fast._native.noise` would fill :attr:`x` with, which is left alone.

        Args:
            image: uint8 (1, H, W, C); draw i of the batch has draw i of the stream.
            normals: float32 (batch, C, H, W), the stream's if they are at hand.
        """
        self._network.run_noised(self._workspace, image, seed, signal, noise, input_scale, normals, self._out)
        return self._out


def physical_cores(root: Path = Path("/sys")) -> int:
    """How many cores this process may use.

    Hardware threads of one core share its matrix unit and count once; where a container is given a share of the processors'
    time, threads beyond it would only wait for one another.
    """
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in cpus:
        try:
            cores.add((root / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return max(1, min(len(cores), _quota(root / "fs/cgroup")))


def _quota(root: Path) -> int:
    """Whole processors' worth of time that control groups (version 2 or 1) allow, or a large number."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = " ".join((root / name).read_text() for name in names).split()
            quota, period = int(words[0]), int(words[1])
        except (OSError, ValueError, IndexError):
            continue  # not this version, or "max"
        if quota > 0 and period > 0:
            return quota // period
    return 1 << 16


def _float32(array: NDArray[Any]) -> Array:
    return np.ascontiguousarray(array, dtype=np.float32)


class Builder:
    """The plan as it grows; tensors are numbers, and an activation is one tensor or two that stand side by side."""

    def __init__(
        self, network: _native.Network, config: UNetConfig, weights: Mapping[str, Array], size: tuple[int, int], timestep: int
    ) -> None:
        self.network, self.config, self.weights = network, config, weights
        self.height, self.width = size
        self.embedding = time_embedding(config, weights, timestep)
        self.channels = {0: config.in_channels * config.patch**2}

    def tensor(self, level: int, channels: int) -> int:
        factor = self.config.patch << level
        tensor = self.network.tensor(self.height // factor, self.width // factor, channels)
        self.channels[tensor] = channels
        return tensor

    def array(self, name: str) -> NDArray[np.float64]:
        return self.weights[name].astype(np.float64)

    def sources(self, x: Sequence[int], kernel: NDArray[Any], *, stride: int = 1, normalised: bool = False) -> list[_Source]:
        """One source a tensor of ``x``, each with its share of a kernel (O, I, s, s) with "same" padding."""
        parts, first, shift = [], 0, -(kernel.shape[2] // 2)
        for tensor in x:
            share = kernel[:, first : first + self.channels[tensor]]
            first += self.channels[tensor]
            parts.append((tensor, _float32(share), stride, shift, shift, normalised))
        return parts

    def norm(self, name: str, silu: bool, gain: Any = 1.0, shift: Any = 0.0) -> _Norm:
        """GroupNorm, its result times ``gain`` plus ``shift``."""
        weight, bias = self.array(f"{name}.weight"), self.array(f"{name}.bias")
        return _float32(weight * gain), _float32(bias * gain + shift), self.config.norm_groups, silu

    def convolution(self, x: int, name: str, level: int, stride: int = 1) -> int:
        kernel = self.weights[f"{name}.weight"]
        out = self.tensor(level, len(kernel))
        self.network.convolution(out, _float32(self.weights[f"{name}.bias"]), [self.sources([x], kernel, stride=stride)])
        return out

    def doubled(self, x: int, name: str, level: int) -> int:
        """Nearest doubling, then a 3x3 convolution: each of the four pixels that come of one sees 2x2 pixels of the input."""
        kernel = np.einsum("yk,xl,oikl->oiyx", DOUBLED, DOUBLED, self.array(f"{name}.weight"), optimize=True)
        out = self.tensor(level, len(kernel))
        # The rows of DOUBLED are a transposed convolution's taps: output pixel 2y reads inputs y - 1 and y through the rows 3 and
        # 1, pixel 2y + 1 reads y and y + 1 through 2 and 0.
        taps = ([3, 1], [2, 0])
        phases = [
            [(x, _float32(kernel[:, :, taps[i]][:, :, :, taps[j]]), 1, i - 1, j - 1, False)] for i in range(2) for j in range(2)
        ]
        self.network.convolution(out, _float32(self.weights[f"{name}.bias"]), phases)
        return out

    def block(self, x: Sequence[int], name: str, level: int) -> int:
        scale, shift = np.split(self.array(f"{name}.embedding.weight") @ self.embedding + self.array(f"{name}.embedding.bias"), 2)
        kernel, bias = self.array(f"{name}.conv1.weight"), self.array(f"{name}.conv1.bias")
        hidden = self.tensor(level, len(kernel))
        normalised = self.config.norm_groups > 0
        if normalised:
            sources, norm = self.sources(x, kernel, normalised=True), self.norm(f"{name}.norm1", True)
            self.network.convolution(hidden, _float32(bias), [sources], norm=norm)
        else:
            gain = 1.0 + scale
            sources = self.sources(x, kernel * gain[:, None, None, None])
            self.network.convolution(hidden, _float32(bias * gain + shift), [sources], silu=True)
        kernel, bias = self.array(f"{name}.conv2.weight"), self.array(f"{name}.conv2.bias")
        out = self.tensor(level, len(kernel))
        sources = self.sources([hidden], kernel, normalised=normalised)
        residual = None
        if f"{name}.skip.weight" in self.weights:
            sources += self.sources(x, self.weights[f"{name}.skip.weight"])
            bias = bias + self.weights[f"{name}.skip.bias"]
        else:
            (residual,) = x
        self.network.convolution(
            out,
            _float32(bias),
            [sources],
            residual=residual,
            norm=self.norm(f"{name}.norm2", True, 1.0 + scale, shift) if normalised else None,
        )
        return out

    def attention(self, x: int, name: str, level: int) -> int:
        channels, heads = self.channels[x], self.config.num_heads
        # The 1/sqrt(d) of the scores goes into the queries' weights.
        scale = np.ones(3 * channels)
        scale[:channels] /= math.sqrt(channels // heads)
        qkv, values, out = self.tensor(level, 3 * channels), self.tensor(level, channels), self.tensor(level, channels)
        kernel, bias = self.array(f"{name}.qkv.weight") * scale[:, None, None, None], self.array(f"{name}.qkv.bias") * scale
        normalised = self.config.norm_groups > 0
        norm = self.norm(f"{name}.norm", False) if normalised else None
        self.network.convolution(qkv, _float32(bias), [self.sources([x], kernel, normalised=normalised)], norm=norm)
        self.network.attention(qkv, values, heads)
        kernel, bias = self.array(f"{name}.out.weight"), self.array(f"{name}.out.bias")
        self.network.convolution(out, _float32(bias), [self.sources([values], kernel)], residual=x)
        return out

    def stage(self, x: Sequence[int], name: str, level: int) -> int:
        h = self.block(x, f"{name}.block", level)
        attended = self.config.patch << level in self.config.attention_resolutions
        return self.attention(h, f"{name}.attention", level) if attended else h

    def unet(self) -> None:
        config, last = self.config, self.config.levels - 1
        h = self.convolution(0, "stem", 0)
        skips, index = [h], 0
        for level in range(config.levels):
            for _ in range(config.num_res_blocks):
                h, index = self.stage([h], f"down.{index}", level), index + 1
                skips.append(h)
            if level < last:
                h = self.convolution(h, f"downsample.{level}", level + 1, stride=2)
                skips.append(h)
        h = self.block([self.stage([h], "middle1", last)], "middle2", last)
        index = 0
        for level in reversed(range(config.levels)):
            for _ in range(config.num_res_blocks + 1):
                h, index = self.stage([h, skips.pop()], f"up.{index}", level), index + 1
            if level > 0:
                h = self.doubled(h, f"upsample.{last - level}", level - 1)
        normalised = config.norm_groups > 0
        self.network.convolution(
            None,
            _float32(self.weights["head.bias"]),
            [self.sources([h], self.weights["head.weight"], normalised=normalised)],
            norm=self.norm("norm", True) if normalised else None,
        )


def build_network(
    config: UNetConfig,
    weights: Mapping[str, Array],
    *,
    height: int,
    width: int,
    batch: int,
    timestep: int,
    threads: int,
    kernels: str = "amx",
) -> _native.Network:
    """The UNet at one timestep as a finished :class:`advrad_fast._native.Network`.

    Args:
        config, weights, height, width, batch, timestep: as for :func:`advrad_fast.graph.build_graph`.
        threads: that work at the same time.
        kernels: one of :data:`KERNELS`.

    Raises:
        ModelFileError: the weights are not this config's.
        ValueError: a size is out of range.
    """
    check_weights(config, weights)
    network = _native.Network(
        batch=batch,
        channels=config.in_channels,
        height=height,
        width=width,
        patch=config.patch,
        threads=threads,
        kernels=kernels,
    )
    with np.errstate(over="ignore", invalid="ignore"):  # damaged weights show as a non-finite score, not as a warning
        Builder(network, config, weights, (height, width), timestep).unet()
    network.finish()
    return network
