"""The UNet of :mod:`advrad_fast.reference.unet` as an ONNX graph, built from a config and tensors (onnx and NumPy, no torch).

The timestep is fixed, so the time embedding and every block's scale-shift are computed here and folded into the second
GroupNorm's affine map, or into the first convolution where there is no norm: the graph has one input and no trace of the
timestep.  onnx is imported when a graph is built, not before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast.config import MAX_SIDE, UNetConfig
from advrad_fast.errors import ConfigError, ModelFileError, expected

if TYPE_CHECKING:
    import onnx

#: Names the graphs built here in cache keys: raised whenever the same config and weights give another graph (a test watches).
GRAPH_VERSION = 1

EPSILON = 1e-5  # nn.GroupNorm's
_MAX_BYTES = 2**31 - 2**20  # protobuf refuses messages of 2 GiB
#: Rows: the four taps a side of a stride-2 transposed convolution; columns: the taps of a 3-tap convolution on its input doubled
#: by repetition (pad 1) that fall on the same sample.
DOUBLED = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=np.float64)

Array = NDArray[np.float32]


def _convolution(name: str, channels_out: int, channels_in: int, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (channels_out, channels_in, size, size)
    yield f"{name}.bias", (channels_out,)


def _linear(name: str, features_out: int, features_in: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (features_out, features_in)
    yield f"{name}.bias", (features_out,)


def _norm(name: str, channels: int, groups: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    if groups:
        yield f"{name}.weight", (channels,)
        yield f"{name}.bias", (channels,)


def _block(name: str, channels_in: int, channels_out: int, embedding: int, groups: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _norm(f"{name}.norm1", channels_in, groups)
    yield from _convolution(f"{name}.conv1", channels_out, channels_in, 3)
    yield from _linear(f"{name}.embedding", 2 * channels_out, embedding)
    yield from _norm(f"{name}.norm2", channels_out, groups)
    yield from _convolution(f"{name}.conv2", channels_out, channels_out, 3)
    if channels_in != channels_out:
        yield from _convolution(f"{name}.skip", channels_out, channels_in, 1)


def _tensors(config: UNetConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    widths, base, groups = config.level_channels, config.base_channels, config.norm_groups
    folded, embedding = config.in_channels * config.patch**2, 4 * base
    attended = [config.patch << level in config.attention_resolutions for level in range(config.levels)]

    def stage(name: str, level: int, channels_in: int, channels_out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from _block(f"{name}.block", channels_in, channels_out, embedding, groups)
        if attended[level]:
            yield from _norm(f"{name}.attention.norm", channels_out, groups)
            yield from _convolution(f"{name}.attention.qkv", 3 * channels_out, channels_out, 1)
            yield from _convolution(f"{name}.attention.out", channels_out, channels_out, 1)

    yield from _linear("time1", embedding, base)
    yield from _linear("time2", embedding, embedding)
    yield from _convolution("stem", widths[0], folded, 3)
    skips, width, index = [widths[0]], widths[0], 0
    for level, out in enumerate(widths):
        for _ in range(config.num_res_blocks):
            yield from stage(f"down.{index}", level, width, out)
            width, index = out, index + 1
            skips.append(width)
        if level < config.levels - 1:
            yield from _convolution(f"downsample.{level}", width, width, 3)
            skips.append(width)
    yield from stage("middle1", config.levels - 1, width, width)
    yield from _block("middle2", width, width, embedding, groups)
    index = 0
    for level in reversed(range(config.levels)):
        for _ in range(config.num_res_blocks + 1):
            yield from stage(f"up.{index}", level, width + skips.pop(), widths[level])
            width, index = widths[level], index + 1
        if level > 0:
            yield from _convolution(f"upsample.{config.levels - 1 - level}", width, width, 3)
    yield from _norm("norm", width, groups)
    yield from _convolution("head", folded, width, 3)


def expected_tensors(config: UNetConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the UNet, from its config alone; all are float32."""
    return dict(_tensors(config))


def check_weights(config: UNetConfig, weights: Mapping[str, NDArray[Any]]) -> None:
    """Refuse weights that are not exactly this config's tensors.

    Raises:
        ModelFileError: naming the tensor that is missing, unknown, mis-shaped or not float32.
    """
    shapes = expected_tensors(config)
    for name, shape in shapes.items():
        if name not in weights:
            raise ModelFileError(f"tensor {name}: expected float32 {shape}, got nothing")
        array = weights[name]
        if array.shape != shape or array.dtype != np.float32:
            raise ModelFileError(f"tensor {name}: expected float32 {shape}, got {array.dtype} {array.shape}")
    for name in weights:
        if name not in shapes:
            raise ModelFileError(
                f"tensor {name}: expected no tensor of this name, got {weights[name].dtype} {weights[name].shape}"
            )


def _silu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / (1.0 + np.exp(-x))


def time_embedding(config: UNetConfig, weights: Mapping[str, Array], timestep: int) -> NDArray[np.float64]:
    """SiLU of the time MLP's output, which every block's ``embedding`` layer sees: float64 (4 * base_channels,)."""
    half = config.base_channels // 2
    # The reference rounds k * frequency to fp32 (up to 3e-5 rad at k = 999) and was trained so: do the same; the rest is float64.
    frequencies = np.exp(np.float32(-math.log(10_000.0)) * np.arange(half, dtype=np.float32) / np.float32(max(half, 1)))
    angles = (np.float32(timestep) * frequencies).astype(np.float64)
    features = np.concatenate([np.cos(angles), np.sin(angles), np.zeros(config.base_channels - 2 * half)])
    hidden = _silu(weights["time1.weight"].astype(np.float64) @ features + weights["time1.bias"])
    return _silu(weights["time2.weight"].astype(np.float64) @ hidden + weights["time2.bias"])


class GraphBuilder:
    """Nodes and initialisers as they are added; every method takes and returns tensor names.

    This one builds in float32; :mod:`advrad_fast.graph_precision` has one for the other types.

    Args:
        config, weights, height, width, timestep: as for :func:`build_graph`.
        batch: images a call; 0 for any.

    Raises:
        ConfigError, ModelFileError: as :func:`build_graph`.
    """

    opset, ir_version = 18, 8

    def __init__(
        self, config: UNetConfig, weights: Mapping[str, Array], *, height: int, width: int, batch: int, timestep: int
    ) -> None:
        for name, value, low, high in (("batch", batch, 0, 65_536), ("timestep", timestep, 0, 10**6)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
                raise ConfigError(expected(name, f"an integer in [{low}, {high}]", value))
        step = config.size_multiple
        for name, value in (("height", height), ("width", width)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= MAX_SIDE or value % step:
                raise ConfigError(expected(name, f"a multiple of {step} up to {MAX_SIDE} for this UNet", value))
        check_weights(config, weights)
        import onnx

        self.onnx = onnx
        self.kind: int = onnx.TensorProto.FLOAT  # of the input and the output
        self.config, self.weights, self.shape = config, weights, (int(batch), config.in_channels, int(height), int(width))
        self.timestep = int(timestep)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """An initialiser: int64 as it is, everything else as float32."""
        if name not in self.constants:
            kind = np.int64 if value.dtype == np.int64 else np.float32
            self.constants[name] = self.onnx.numpy_helper.from_array(np.ascontiguousarray(value, dtype=kind), name)
        return name

    def integers(self, *values: int) -> str:
        return self.constant("shape_" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def convolution(
        self,
        x: str,
        name: str,
        weight: NDArray[Any] | None = None,
        bias: NDArray[Any] | None = None,
        stride: int = 1,
        output: str = "",
    ) -> str:
        """A convolution with "same" padding, by its own tensors or those given in their place."""
        weight = self.weights[f"{name}.weight"] if weight is None else weight
        bias = self.weights[f"{name}.bias"] if bias is None else bias
        side = weight.shape[-1]
        inputs = [*self.factors(x, name, weight), self.constant(f"{name}.bias", bias)]
        layout = {"kernel_shape": [side, side], "pads": [side // 2] * 4, "strides": [stride, stride]}
        return self.node("Conv", inputs, output or name, **layout)

    def factors(self, x: str, name: str, weight: NDArray[Any]) -> tuple[str, str]:
        """A convolution's input and weight as it multiplies them."""
        return x, self.constant(f"{name}.weight", weight)

    def doubled(self, x: str, name: str) -> str:
        """Nearest doubling, then a 3x3 convolution: as the equal 4x4 transposed convolution of stride 2, at 4/9 of the work."""
        weight = np.einsum("yk,xl,oikl->ioyx", DOUBLED, DOUBLED, self.weights[f"{name}.weight"].astype(np.float64), optimize=True)
        inputs = [x, self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", self.weights[f"{name}.bias"])]
        return self.node("ConvTranspose", inputs, name, kernel_shape=[4, 4], pads=[1] * 4, strides=[2, 2])

    def silu(self, x: str) -> str:
        return self.node("Mul", [x, self.node("Sigmoid", [x], f"{x}.sigmoid")], f"{x}.silu")

    def group_norm(
        self, x: str, name: str, gain: NDArray[np.float64] | None = None, shift: NDArray[np.float64] | None = None
    ) -> str:
        """GroupNorm; with ``gain`` and ``shift`` (C,), its result times ``gain`` plus ``shift``, as one affine map."""
        weight, bias = (self.weights[f"{name}.{part}"].astype(np.float64) for part in ("weight", "bias"))
        if gain is not None and shift is not None:
            weight, bias = weight * gain, bias * gain + shift
        # Pooled statistics in two passes, not InstanceNormalization: for that, OpenVINO reorders to planar layout and back.
        column = (1, len(weight), 1, 1)
        mean = self.group_mean(x, f"{name}.mean", len(weight))
        centred = self.node("Sub", [x, mean], f"{name}.centred")
        variance = self.group_mean(self.node("Mul", [centred, centred], f"{name}.squares"), f"{name}.variance", len(weight))
        epsilon = self.constant("epsilon", np.array([EPSILON]))
        deviation = self.node("Sqrt", [self.node("Add", [variance, epsilon], f"{name}.stabilised")], f"{name}.deviation")
        factor = self.node("Div", [self.constant(f"{name}.weight", weight.reshape(column)), deviation], f"{name}.factor")
        scaled = self.node("Mul", [centred, factor], f"{name}.scaled")
        return self.node("Add", [scaled, self.constant(f"{name}.bias", bias.reshape(column))], name)

    def group_mean(self, x: str, name: str, channels: int) -> str:
        """Each group's mean, repeated for its channels: (N, C, H, W) -> (N, C, 1, 1)."""
        groups = self.config.norm_groups
        size = channels // groups
        pooled = self.node("GlobalAveragePool", [x], name if size == 1 else f"{name}.channels")
        if size == 1:
            return pooled
        average = self.constant(f"average_{channels}", np.full((channels, size, 1, 1), 1.0 / size))
        return self.node("Conv", [pooled, average], name, kernel_shape=[1, 1], group=groups)

    def block(self, x: str, name: str) -> str:
        weight, bias = self.weights[f"{name}.embedding.weight"].astype(np.float64), self.weights[f"{name}.embedding.bias"]
        scale, shift = np.split(weight @ self.embedding + bias, 2)
        if self.config.norm_groups:
            h = self.convolution(self.silu(self.group_norm(x, f"{name}.norm1")), f"{name}.conv1")
            h = self.group_norm(h, f"{name}.norm2", 1.0 + scale, shift)
        else:
            gain, conv = 1.0 + scale, f"{name}.conv1"
            kernel = self.weights[f"{conv}.weight"] * gain[:, None, None, None]
            h = self.convolution(x, conv, kernel, self.weights[f"{conv}.bias"] * gain + shift)
        h = self.convolution(self.silu(h), f"{name}.conv2")
        skip = self.convolution(x, f"{name}.skip") if f"{name}.skip.weight" in self.weights else x
        return self.node("Add", [skip, h], name)

    def attention(self, x: str, name: str, height: int, width: int) -> str:
        channels, heads, n = self.weights[f"{name}.out.bias"].shape[0], self.config.num_heads, self.shape[0]
        # The 1/sqrt(d) of the scores goes into the queries' weights.
        scale = np.ones(3 * channels)
        scale[:channels] /= math.sqrt(channels // heads)
        weight, bias = self.weights[f"{name}.qkv.weight"], self.weights[f"{name}.qkv.bias"]
        normed = self.group_norm(x, f"{name}.norm") if self.config.norm_groups else x
        h = self.convolution(normed, f"{name}.qkv", weight * scale[:, None, None, None], bias * scale)
        h = self.node("Reshape", [h, self.integers(n, 3 * heads, channels // heads, height * width)], f"{name}.heads")
        parts = [f"{name}.{part}" for part in ("q", "k", "v")]
        self.nodes.append(
            self.onnx.helper.make_node("Split", [h, self.integers(heads, heads, heads)], parts, name=f"{name}.split", axis=1)
        )
        q, k, v = parts
        q, v = (self.node("Transpose", [part], f"{part}.transposed", perm=[0, 1, 3, 2]) for part in (q, v))
        p = self.node("Softmax", [self.node("MatMul", [q, k], f"{name}.scores")], f"{name}.softmax", axis=-1)
        h = self.node("Transpose", [self.node("MatMul", [p, v], f"{name}.values")], f"{name}.transposed", perm=[0, 1, 3, 2])
        h = self.node("Reshape", [h, self.integers(n, channels, height, width)], f"{name}.merged")
        return self.node("Add", [x, self.convolution(h, f"{name}.out")], name)

    def stage(self, x: str, name: str, level: int) -> str:
        x = self.block(x, f"{name}.block")
        factor = self.config.patch << level
        if factor not in self.config.attention_resolutions:
            return x
        return self.attention(x, f"{name}.attention", self.shape[2] // factor, self.shape[3] // factor)

    def stem(self, x: str) -> str:
        config, weight = self.config, self.weights["stem.weight"]
        if config.patch == 1:
            return self.convolution(x, "stem")
        # SpaceToDepth puts the channel last of (row, column, channel), pixel_unshuffle first: reorder the weights instead.
        weight = weight.reshape(len(weight), config.in_channels, config.patch**2, 3, 3).swapaxes(1, 2).reshape(weight.shape)
        return self.convolution(self.node("SpaceToDepth", [x], "folded", blocksize=config.patch), "stem", weight)

    def unet(self) -> None:
        config = self.config
        self.embedding = time_embedding(config, self.weights, self.timestep)
        h = self.stem("x")
        skips, index = [h], 0
        for level in range(config.levels):
            for _ in range(config.num_res_blocks):
                h, index = self.stage(h, f"down.{index}", level), index + 1
                skips.append(h)
            if level < config.levels - 1:
                h = self.convolution(h, f"downsample.{level}", stride=2)
                skips.append(h)
        h = self.block(self.stage(h, "middle1", config.levels - 1), "middle2")
        index = 0
        for level in reversed(range(config.levels)):
            for _ in range(config.num_res_blocks + 1):
                h = self.node("Concat", [h, skips.pop()], f"up.{index}.concat", axis=1)
                h, index = self.stage(h, f"up.{index}", level), index + 1
            if level > 0:
                h = self.doubled(h, f"upsample.{config.levels - 1 - level}")
        if config.norm_groups:
            h = self.silu(self.group_norm(h, "norm"))
        if config.patch == 1:
            self.convolution(h, "head", output="output")
        else:  # CRD is pixel_shuffle's channel order
            self.node("DepthToSpace", [self.convolution(h, "head")], "output", blocksize=config.patch, mode="CRD")


def build_graph(
    config: UNetConfig, weights: Mapping[str, Array], *, height: int, width: int, batch: int, timestep: int
) -> onnx.ModelProto:
    """The UNet at one timestep, with static shapes.

    Args:
        config: the UNet.
        weights: float32 arrays, exactly those of :func:`expected_tensors`.
        height, width: of the image in pixels, multiples of ``config.size_multiple``.
        batch: images a call, at least 1.
        timestep: k, 0-based.

    Returns:
        A model with input ``x`` and output ``output``, both float32 (batch, in_channels, height, width).

    Raises:
        ConfigError: a size, the batch or the timestep is out of range, or the graph would not fit ONNX's 2 GiB.
        ModelFileError: the weights are not this config's.
    """
    if batch == 0:
        raise ConfigError(expected("batch", "an integer in [1, 65536]", batch))
    return assemble(GraphBuilder(config, weights, height=height, width=width, batch=batch, timestep=timestep))


def assemble(graph: GraphBuilder) -> onnx.ModelProto:
    """The model that a builder builds.

    Raises:
        ConfigError: it would not fit ONNX's 2 GiB.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # damaged weights show as a non-finite score, not as a warning
        graph.unet()
    if sum(constant.ByteSize() for constant in graph.constants.values()) > _MAX_BYTES:
        raise ConfigError("unet: expected weights below 2 GiB, the most an ONNX graph can hold")
    helper, shape = graph.onnx.helper, [size or "batch" for size in graph.shape]
    inputs, outputs = ([helper.make_tensor_value_info(name, graph.kind, shape)] for name in ("x", "output"))
    proto = helper.make_graph(graph.nodes, "unet", inputs, outputs, list(graph.constants.values()))
    opset = helper.make_opsetid("", graph.opset)
    model: onnx.ModelProto = helper.make_model(
        proto, opset_imports=[opset], ir_version=graph.ir_version, producer_name="advrad_fast"
    )
    return model
