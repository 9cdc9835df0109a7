"""Runs compiled kernels on the PTX interpreter of tests/gpu_emulation, as a launcher would: by the manifest alone."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gpu_emulation import Memory, Module, Report
from numpy.typing import NDArray

from advrad_fast.kernels.arguments import NARROW, error_scales, noise_scales, tiles
from advrad_fast.kernels.manifest import Kernel, Manifest
from advrad_fast.schedule import Coefficients

DTYPES = {"fp16": np.float16, "bf16": np.uint16, "fp32": np.float32}
Settings = Mapping[str, str | int | bool]

_FORMATS = {"i32": "i", "i64": "q", "u64": "Q", "f32": "f"}


class Emulator:
    """One target's kernels, each PTX parsed once."""

    def __init__(self, manifest: Manifest, target: str) -> None:
        self._manifest, self.target = manifest, target
        self._kernels = [kernel for kernel in manifest.kernels if kernel.target == target]
        self._modules: dict[str, Module] = {}
        self.reports: list[Report] = []

    def kernel(self, name: str, **variant: str | int | bool) -> Kernel:
        (found,) = [k for k in self._kernels if k.name == name and dict(k.variant) == variant]
        return found

    def launch(self, name: str, variant: Settings, arguments: Mapping[str, Any], *, order_seed: int | None = None) -> Report:
        """Launch a kernel; arrays among the arguments are copied to the emulator's memory, and back.

        An array of exactly the bytes that it has is all that the kernel may touch.  None stands for a null pointer.
        """
        kernel = self.kernel(name, **variant)
        if kernel.ptx not in self._modules:
            self._modules[kernel.ptx] = Module(self._manifest.image(kernel, "ptx").decode())
        module, memory = self._modules[kernel.ptx], Memory()
        packed, places = b"", []
        values = {argument.name for argument in kernel.arguments if argument.type != "null"}
        assert set(arguments) == values, f"{name}: {set(arguments) ^ values}"
        for argument in kernel.arguments:
            value = arguments.get(argument.name)
            if argument.type in _FORMATS:
                kind = _FORMATS[argument.type]
                data = struct.pack(f"<{kind}", float(value) if kind == "f" else int(value))  # type: ignore[arg-type]
            else:
                address = 0
                if isinstance(value, np.ndarray):
                    address = memory.alloc(value.nbytes)
                    memory.write(address, np.ascontiguousarray(value))
                    places.append((value, address))
                    assert address % argument.multiple_of == 0
                data = struct.pack("<Q", address)
            packed += b"\0" * (-len(packed) % len(data)) + data
        grid = kernel.grid_for({k: v for k, v in arguments.items() if isinstance(v, int)})
        report = module.launch(
            kernel.entry, grid, kernel.block, packed, memory, dynamic_shared=kernel.shared, order_seed=order_seed
        )
        for array, address in places:
            if array.flags.writeable:
                array[...] = np.frombuffer(memory.read(address, array.nbytes), array.dtype).reshape(array.shape)
        return report

    def noise(
        self, images: NDArray[np.uint8], draws: int, seed: int, c: Coefficients, *, dtype: str = "fp32",
        channels_last: bool = False, table: NDArray[np.uint64] | None = None, sigma: float = 0.0, first_draw: int = 0,
        image_ids: Sequence[int] | None = None,
    ) -> NDArray[Any]:  # fmt: skip
        """The operation ``noise``; bfloat16 as uint16.  Reports of all launches are kept in ``self.reports``."""
        n, h, w, channels = images.shape
        shape = (n * draws, h, w, channels) if channels_last else (n * draws, channels, h, w)
        out = filled(shape, dtype)
        pixel_scale, offset, noise_scale = noise_scales(c.signal, c.noise, c.input_scale, lattice=table is not None)
        variant = {
            "layout": "nhwc" if channels_last else "nchw", "dtype": dtype, "noise": "gaussian" if table is None else "lattice",
            "channels": channels,
        }  # fmt: skip
        report = self.launch("noise", variant, {
            **stream(images, seed, first_draw, image_ids, table, sigma), "out": out, "draws": draws, "frames": n,
            "items": h * w // (4 if dtype == "fp32" else 8), "pixel_scale": pixel_scale, "offset": offset,
            "noise_scale": noise_scale,
        })  # fmt: skip
        self.reports = [report]
        return out

    def reconstruction_error(
        self, images: NDArray[np.uint8], outputs: NDArray[Any], draws: int, coefficients: tuple[float, float],
        weights: Sequence[float], filter_size: int, mu: NDArray[np.float32], inverse_spread: NDArray[np.float32], *, maps: bool,
        seed: int, c: Coefficients, dtype: str = "fp32", table: NDArray[np.uint64] | None = None, sigma: float = 0.0,
        first_draw: int = 0, image_ids: Sequence[int] | None = None, order_seed: int | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:  # fmt: skip
        """The operation ``reconstruction_error``: scores, and maps if asked for."""
        (n, height, width, channels), results = images.shape, len(outputs) // draws
        pixel_scale, offset, noise_scale, output_scale = error_scales(
            *coefficients, c.signal, c.noise, c.input_scale, lattice=table is not None
        )
        errors, scores = filled((results, height, width)), filled((results,))
        out = filled((results, height, width)) if maps else None
        size = {"results": results, "height": height, "width": width}
        kind = "lattice" if table is not None else "gaussian" if noise_scale else "none"
        scaled = {f"weight_{s}": weight / (channels * draws) for s, weight in zip((1, 2, 4, 8), weights, strict=True)}
        first = self.launch("errors", {"dtype": dtype, "noise": kind, "channels": channels}, {
            **stream(images, seed, first_draw, image_ids, table, sigma), **size, **scaled, "outputs": outputs, "errors": errors,
            "scores": scores, "draws": draws, "groups": results // n, "pixel_scale": pixel_scale, "offset": offset,
            "noise_scale": noise_scale, "output_scale": output_scale,
        }, order_seed=order_seed)  # fmt: skip
        self.reports = [first]
        wide = filter_size > NARROW
        if wide:
            sums = filled(errors.shape)
            arguments = {**size, "errors": errors, "sums": sums, "filter_size": filter_size}
            self.reports.append(self.launch("rows", {}, arguments, order_seed=order_seed))
            errors = sums
        self.reports.append(self.launch("deviation", {"maps": maps, "wide": wide}, {
            **size, "errors": errors, "mu": mu, "inverse_spread": inverse_spread, "maps": out, "scores": scores,
            "filter_size": filter_size, "tiles": tiles(width, filter_size),
        }, order_seed=order_seed))  # fmt: skip
        return scores, out

    def votes(
        self, scores: NDArray[np.float32], thresholds: NDArray[np.float32], ranks: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The operation ``votes``."""
        images, draws = scores.shape
        counts, statistics = np.full((images, len(thresholds)), -7, np.int64), filled((images, len(ranks)))
        size, self.reports = {"scores": scores, "images": images, "draws": draws}, []
        for name, arguments in (("counts", {"thresholds": thresholds, "counts": counts}),
                                ("ranks", {"ranks": ranks, "statistics": statistics})):  # fmt: skip
            count = len(arguments["thresholds" if name == "counts" else "ranks"])
            if count:
                self.reports.append(self.launch(f"votes_{name}", {}, {**size, **arguments, "count": count}))
        return counts, statistics


def filled(shape: tuple[int, ...], dtype: str = "fp32") -> NDArray[Any]:
    """NaN everywhere."""
    return np.full(shape, 0x7FC0 if dtype == "bf16" else np.nan, DTYPES[dtype])


def stream(
    images: NDArray[np.uint8], seed: int, first_draw: int, image_ids: Sequence[int] | None, table: NDArray[np.uint64] | None,
    sigma: float,
) -> dict[str, Any]:  # fmt: skip
    """The arguments that pick the noise."""
    ids = np.array([0] * len(images) if image_ids is None else image_ids, np.int32)
    half = 1 if table is None else len(table) // 2
    return {"images": images, "image_ids": ids, "thresholds": table, "seed": seed, "first_draw": first_draw, "half": half,
            "lattice_scale": 255 * sigma if sigma else 1.0}  # fmt: skip


def bf16(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of float32 rounded to bfloat16, to nearest even (numbers only)."""
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)
