"""The graph of :mod:`advrad_fast.graph` with its precision in it, as engines that take types literally need it (onnx and NumPy).

=========  ===================  ==========================  =================================================================
precision  input, output        convolutions                between them
=========  ===================  ==========================  =================================================================
fp32       fp32                 fp32                        fp32
fp16       fp16                 fp16                        fp16; GroupNorm in fp32
bf16       bf16                 bf16                        bf16; GroupNorm in fp32
int8       fp16                 int8, but for the stem,     fp16; GroupNorm in fp32
                                the last block, the head
                                and the doubling ones
fp8        fp16                 E4M3, but for the same      fp16; GroupNorm in fp32
=========  ===================  ==========================  =================================================================

int8 and fp8 are symmetric, as TensorRT's are: weights by output channel, activations by tensor, with the largest magnitude seen
in calibration as the largest number that can be represented.  Weights are stored quantised, behind a DequantizeLinear;
activations pass through QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from advrad_fast.config import UNetConfig
from advrad_fast.errors import ConfigError, expected
from advrad_fast.graph import EPSILON, Array, GraphBuilder, assemble

if TYPE_CHECKING:
    import onnx

TypedPrecision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
TYPED_PRECISIONS: tuple[TypedPrecision, ...] = ("fp32", "fp16", "bf16", "int8", "fp8")

#: Names the graphs built here in cache keys, beside GRAPH_VERSION: raised whenever the same input gives another graph.
TYPED_GRAPH_VERSION = 1

_BASE = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16", "int8": "FLOAT16", "fp8": "FLOAT16"}
_LARGEST = {"int8": 127.0, "fp8": 448.0}


def build_typed_graph(
    config: UNetConfig,
    weights: Mapping[str, Array],
    *,
    precision: TypedPrecision,
    height: int,
    width: int,
    timestep: int,
    ranges: Mapping[str, float] | None = None,
) -> onnx.ModelProto:
    """The UNet at one timestep, for any batch.

    Args:
        config, weights, height, width, timestep: as for :func:`advrad_fast.graph.build_graph`.
        precision: one of :data:`TYPED_PRECISIONS`.
        ranges: for int8 and fp8: the largest magnitude of every tensor of :func:`quantised_tensors`, above 0.

    Returns:
        A model with input ``x`` and output ``output``, both (batch, in_channels, height, width) in the type of the table above.

    Raises:
        ConfigError: the precision is unknown, a range is missing or not positive, a weight is too large for fp16, or as
            ``build_graph``.
        ModelFileError: the weights are not this config's.
    """
    return assemble(_TypedGraph(config, weights, ranges, precision=precision, height=height, width=width, timestep=timestep))


def quantised_tensors(config: UNetConfig, weights: Mapping[str, Array], *, height: int, width: int, timestep: int) -> list[str]:
    """Names of the activations that int8 and fp8 quantise; tensors of the fp32 graph as well."""
    graph = _TypedGraph(config, weights, None, precision="fp32", height=height, width=width, timestep=timestep)
    assemble(graph)
    return graph.candidates


def ranges_digest(ranges: Mapping[str, float] | None) -> str | None:
    """Names a calibration in cache keys: 64 hex digits."""
    if ranges is None:
        return None
    return hashlib.sha256(json.dumps(sorted(ranges.items())).encode()).hexdigest()


class _TypedGraph(GraphBuilder):
    """Float32 or half precision by the kind of each constant, GroupNorm in float32, quantised convolutions on request."""

    opset, ir_version = 19, 9  # the first with float8

    def __init__(
        self,
        config: UNetConfig,
        weights: Mapping[str, Array],
        ranges: Mapping[str, float] | None,
        *,
        precision: TypedPrecision,
        height: int,
        width: int,
        timestep: int,
    ) -> None:
        if precision not in TYPED_PRECISIONS:
            raise ConfigError(expected("precision", f"one of {list(TYPED_PRECISIONS)}", precision))
        super().__init__(config, weights, height=height, width=width, batch=0, timestep=timestep)
        self.precision = precision
        self.kind = int(getattr(self.onnx.TensorProto, _BASE[precision]))
        self.ranges = ranges or {}
        self.candidates: list[str] = []
        self.dequantised: dict[str, str] = {}
        self.scales: dict[str, NDArray[np.float64]] = {}
        # What the score sees at once: on the demo's cells, the last block alone made two thirds of int8's error in the score.
        last = f"up.{config.levels * (config.num_res_blocks + 1) - 1}."
        self.unquantised = ("stem", "head", last)
        self.sizes = {"x": (int(height), int(width))}

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Also follows each map's size: GroupNorm's reshape back needs it."""
        if (size := self.sizes.get(inputs[0])) is not None:
            stride = attributes.get("strides", [1])[0]
            factor = {"Conv": 1 / stride, "ConvTranspose": stride}.get(op, 1.0)
            if op == "Resize":
                factor = 2.0
            elif op in ("SpaceToDepth", "DepthToSpace"):
                factor = attributes["blocksize"] ** (-1 if op == "SpaceToDepth" else 1)
            self.sizes[output] = (round(size[0] * factor), round(size[1] * factor))
        return super().node(op, inputs, output, **attributes)

    def constant(self, name: str, value: NDArray[Any], kind: int | None = None) -> str:
        """An initialiser: int64 as it is, everything else in the graph's type, or in ``kind``."""
        types = self.onnx.TensorProto
        if name in self.constants:
            return name
        if value.dtype == np.int64:
            return super().constant(name, value)
        kind = self.kind if kind is None else kind
        if kind == types.FLOAT:
            raw: NDArray[Any] = value.astype(np.float32)
        elif kind == types.FLOAT16:
            with np.errstate(over="ignore"):
                raw = value.astype(np.float16)
            if not np.isfinite(raw).all() and np.isfinite(value).all():
                raise ConfigError(f"precision: {name} reaches {np.abs(value).max():.3g}, too much for fp16; use bf16 or fp32")
        elif kind == types.BFLOAT16:
            raw = bfloat16_bits(value.astype(np.float32))
        else:
            raw = value  # already codes
        tensor = self.onnx.helper.make_tensor(name, kind, value.shape, np.ascontiguousarray(raw).tobytes(), raw=True)
        self.constants[name] = tensor
        return name

    def cast(self, x: str, name: str, kind: int) -> str:
        return x if self.kind == self.onnx.TensorProto.FLOAT else self.node("Cast", [x], name, to=kind)

    def group_norm(
        self, x: str, name: str, gain: NDArray[np.float64] | None = None, shift: NDArray[np.float64] | None = None
    ) -> str:
        """As the base's, over (N, groups, the rest): the form that TensorRT fuses; from its input on in float32."""
        single = self.onnx.TensorProto.FLOAT
        weight, bias = (self.weights[f"{name}.{part}"].astype(np.float64) for part in ("weight", "bias"))
        if gain is not None and shift is not None:
            weight, bias = weight * gain, bias * gain + shift
        column, axes = (1, len(weight), 1, 1), self.constant("group", np.array([2], dtype=np.int64))
        wide = self.cast(x, f"{name}.wide", single)
        grouped = self.node("Reshape", [wide, self.integers(0, self.config.norm_groups, -1)], f"{name}.grouped")
        centred = self.node("Sub", [grouped, self.node("ReduceMean", [grouped, axes], f"{name}.mean")], f"{name}.centred")
        squares = self.node("Mul", [centred, centred], f"{name}.squares")
        variance = self.node("ReduceMean", [squares, axes], f"{name}.variance")
        stabilised = self.node("Add", [variance, self.constant("epsilon", np.array([EPSILON]), single)], f"{name}.stabilised")
        normed = self.node("Div", [centred, self.node("Sqrt", [stabilised], f"{name}.deviation")], f"{name}.normed")
        back = self.node("Reshape", [normed, self.integers(0, len(weight), *self.sizes[x])], f"{name}.back")
        scaled = self.node("Mul", [back, self.constant(f"{name}.weight", weight.reshape(column), single)], f"{name}.scaled")
        shifted = self.constant(f"{name}.bias", bias.reshape(column), single)
        if self.kind == single:
            return self.node("Add", [scaled, shifted], name)
        return self.cast(self.node("Add", [scaled, shifted], f"{name}.single"), name, self.kind)

    def doubled(self, x: str, name: str) -> str:
        """As the base's; in bf16 as written, for TensorRT-RTX 1.7 has no transposed convolution in bf16."""
        types = self.onnx.TensorProto
        if self.kind != types.BFLOAT16:
            return super().doubled(x, name)
        scales = self.constant("doubled.scales", np.array([1.0, 1.0, 2.0, 2.0]), types.FLOAT)
        layout = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return self.convolution(self.node("Resize", [x, "", scales], f"{name}.doubled", **layout), name)

    def factors(self, x: str, name: str, weight: NDArray[Any]) -> tuple[str, str]:
        """In int8 and fp8, both factors quantised and dequantised."""
        if self.kind == self.onnx.TensorProto.BFLOAT16 or name.startswith(self.unquantised):
            return super().factors(x, name, weight)
        if x not in self.candidates:
            self.candidates.append(x)
        if self.precision not in _LARGEST:
            return super().factors(x, name, weight)
        return self.activation(x), self.quantised_weight(f"{name}.weight", weight)

    def activation(self, x: str) -> str:
        if x in self.dequantised:
            return self.dequantised[x]
        largest = self.ranges.get(x)
        if largest is None or not 0.0 < largest < float("inf"):
            raise ConfigError(expected(f"ranges[{x!r}]", f"a finite number above 0, for {self.precision}", largest))
        scale, zero = self.scale(x, np.float64(largest)), self.zero(x, ())
        codes = self.node("QuantizeLinear", [x, scale, zero], f"{x}.quantised")
        self.dequantised[x] = self.node("DequantizeLinear", [codes, scale, zero], f"{x}.dequantised")
        return self.dequantised[x]

    def quantised_weight(self, name: str, weight: NDArray[Any]) -> str:
        """By output channel: the first axis."""
        largest = np.abs(weight.astype(np.float64)).reshape(len(weight), -1).max(axis=1)
        scale = self.scale(name, largest)
        steps = self.scales[name].reshape(-1, 1, 1, 1)
        if self.precision == "int8":
            codes: NDArray[Any] = np.clip(np.rint(weight / steps), -127, 127).astype(np.int8)
        else:
            codes = e4m3_codes((weight / steps).astype(np.float64))
        stored = self.constant(name, codes, self.code_kind)
        zero = self.zero(name, (len(weight),))
        return self.node("DequantizeLinear", [stored, scale, zero], f"{name}.dequantised", axis=0)

    @property
    def code_kind(self) -> int:
        types = self.onnx.TensorProto
        return int(types.INT8 if self.precision == "int8" else types.FLOAT8E4M3FN)

    def scale(self, name: str, largest: NDArray[np.float64] | np.float64) -> str:
        """The step in fp16, rounded up so that the largest value fits; at least 2**-20, for channels that are all zero."""
        wanted = np.maximum(largest / _LARGEST[self.precision], 2.0**-20)
        rounded = np.asarray(wanted, dtype=np.float16)
        rounded = np.where(rounded < wanted, np.nextafter(rounded, np.float16(np.inf)), rounded)
        self.scales[name] = rounded.astype(np.float64)
        return self.constant(f"{name}.scale", rounded)

    def zero(self, name: str, shape: tuple[int, ...]) -> str:
        kind: Any = np.int8 if self.precision == "int8" else np.uint8
        return self.constant(f"{name}.zero", np.zeros(shape, dtype=kind), self.code_kind)


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to bfloat16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _e4m3_table() -> NDArray[np.float64]:
    """What the codes 0 to 126 stand for, ascending; 127 is NaN."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))


def e4m3_codes(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Round to FLOAT8E4M3FN, to nearest even; what is beyond 448 becomes 448, NaN stays NaN."""
    table = _e4m3_table()
    magnitude = np.abs(values)
    upper = np.clip(np.searchsorted(table, magnitude), 1, len(table) - 1)
    below, above = magnitude - table[upper - 1], table[upper] - magnitude
    down = (below < above) | ((below == above) & ((upper - 1) % 2 == 0))
    codes = np.where(down, upper - 1, upper)
    codes = np.where(np.isnan(values), 127, codes)
    return (codes | np.where(np.signbit(values), 128, 0)).astype(np.uint8)
