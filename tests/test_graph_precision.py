"""The typed graphs: their numbers in ONNX Runtime against the reference UNet, their types, and what they refuse."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_graph import SMALL, configs, random_weights, run_reference

from advrad_fast import graph_precision
from advrad_fast.backends.tensorrt_calibration import collect_ranges
from advrad_fast.config import DetectorConfig, DiffusionConfig, ImageConfig, UNetConfig
from advrad_fast.errors import ConfigError, ModelFileError
from advrad_fast.graph_precision import TYPED_PRECISIONS, TypedPrecision, build_typed_graph, quantised_tensors

SIZE: dict[str, Any] = {"height": 16, "width": 24, "timestep": 77}
Array = NDArray[np.float32]


def detector(config: UNetConfig, height: int, width: int, timestep: int) -> DetectorConfig:
    image = ImageConfig(height=height, width=width, channels=config.in_channels)
    return DetectorConfig(unet=config, image=image, diffusion=DiffusionConfig(timestep=timestep))


def typed(
    config: UNetConfig, weights: Mapping[str, Array], precision: TypedPrecision, x: Array, timestep: int = 77
) -> onnx.ModelProto:
    """The graph, calibrated on ``x`` itself where it needs that."""
    height, width = x.shape[2:]
    ranges = None
    if precision in ("int8", "fp8"):
        ranges = collect_ranges(detector(config, height, width, timestep), weights, [x])
    model = build_typed_graph(config, weights, precision=precision, height=height, width=width, timestep=timestep, ranges=ranges)
    # ONNX allows Conv in bf16 from opset 22 on, TensorRT's parser always: only its types can't be inferred here.
    onnx.checker.check_model(model, full_check=precision != "bf16")
    return model


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """bf16 for ONNX Runtime, which has no bf16 convolution: computed in fp32, every result rounded to bf16."""
    single, half, helper = onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16, onnx.helper
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == half:
            bits = np.frombuffer(tensor.raw_data, dtype=np.uint16).astype(np.uint32) << 16
            tensor.data_type, tensor.raw_data = single, bits.view(np.float32).tobytes()
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.elem_type = single
    nodes = []
    for node in graph.node:
        if node.op_type == "Cast":  # from bf16, which is fp32 now, or to it: then it rounds below
            node.attribute[0].i = single
        node_outputs = list(node.output)
        nodes.append(node)
        for i, name in enumerate(node_outputs):
            if ".norm" in name and not name.endswith(("norm1", "norm2", "norm", "silu", "sigmoid")):
                continue  # inside GroupNorm: fp32
            node.output[i] = f"{name}.exact"
            nodes.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.half"], to=half))
            nodes.append(helper.make_node("Cast", [f"{name}.half"], [name], to=single))
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def run(model: onnx.ModelProto, x: Array, precision: str) -> Array:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    # Folding the constants' quantisation and fusing it into integer kernels changes what is rounded where: not here.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = widened(model) if precision == "bf16" else model
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kind = np.float32 if precision in ("fp32", "bf16") else np.float16
    output: Array = session.run(["output"], {"x": x.astype(kind)})[0]
    assert output.dtype == kind and output.shape == x.shape
    return output.astype(np.float32)


# Relative L2 error against the reference UNet in fp32.  Worst seen of two networks over 12 seeds; the test allows twice that.
WORST: dict[TypedPrecision, float] = {"fp32": 9e-7, "fp16": 9e-4, "bf16": 1.34e-2, "int8": 3.1e-2, "fp8": 0.106}
PLAIN = dataclasses.replace(SMALL, norm_groups=0, attention_resolutions=())


@pytest.mark.parametrize("config", [SMALL, PLAIN], ids=["norms and attention", "convolutions"])
@pytest.mark.parametrize("precision", TYPED_PRECISIONS)
def test_numbers(precision: TypedPrecision, config: UNetConfig) -> None:
    weights = random_weights(config)
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 24)).astype(np.float32)
    got, wanted = run(typed(config, weights, precision, x), x, precision), run_reference(config, weights, x, 77)
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    assert error <= 2.0 * WORST[precision]
    if precision != "fp32":  # and it is that precision
        assert error > WORST[precision] / 10.0


# The same over random networks, whose random weights may amplify a rounding: worst seen in 129; the test allows 3 times that.
WORST_OF_ANY: dict[TypedPrecision, float] = {"fp32": 4.6e-6, "fp16": 1.94e-2, "bf16": 0.105, "int8": 0.37}


@settings(max_examples=5)
@given(configs(), st.integers(0, 2**32 - 1), st.integers(0, 999), st.integers(2, 3))
@pytest.mark.parametrize("precision", WORST_OF_ANY)
def test_any_network(precision: TypedPrecision, config: UNetConfig, seed: int, timestep: int, columns: int) -> None:
    weights = random_weights(config, seed)
    size = (config.size_multiple, config.size_multiple * columns)
    x = np.random.default_rng(seed).standard_normal((2, config.in_channels, *size)).astype(np.float32)
    got = run(typed(config, weights, precision, x, timestep), x, precision)
    wanted = run_reference(config, weights, x, timestep)
    assert np.linalg.norm(got - wanted) <= 3.0 * WORST_OF_ANY[precision] * np.linalg.norm(wanted)


@pytest.mark.parametrize("precision", TYPED_PRECISIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_any_batch(precision: TypedPrecision, batch: int) -> None:
    """One graph, and an image's output does not depend on its neighbours."""
    weights = random_weights(SMALL)
    x = np.random.default_rng(1).standard_normal((3, 3, 16, 24)).astype(np.float32)
    model = typed(SMALL, weights, precision, x)
    together = run(onnx.ModelProto.FromString(model.SerializeToString()), x, precision)
    np.testing.assert_array_equal(run(model, x[:batch], precision), together[:batch])


@pytest.mark.parametrize("precision", TYPED_PRECISIONS)
def test_types(precision: TypedPrecision) -> None:
    """Input and output, GroupNorm in fp32 between half types, and which convolutions multiply quantised numbers."""
    weights = random_weights(SMALL)
    model = typed(SMALL, weights, precision, np.ones((1, 3, 16, 24), np.float32))
    types = onnx.TensorProto
    half = {"fp32": types.FLOAT, "bf16": types.BFLOAT16}.get(precision, types.FLOAT16)
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == half
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    made = {name: node for node in model.graph.node for name in node.output}
    reductions = [node for node in model.graph.node if node.op_type == "ReduceMean"]
    assert len(reductions) == 2 * sum(name.endswith(("norm.weight", "norm1.weight", "norm2.weight")) for name in weights)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in weights:
        if ".norm" in name or name.startswith("norm."):
            assert constants[name].data_type == types.FLOAT, name
    if precision != "fp32":
        wide = {name for name, node in made.items() if node.op_type == "Cast" and node.attribute[0].i == types.FLOAT}
        assert {made[node.input[0]].input[0] for node in reductions if node.input[0].endswith(".grouped")} <= wide
    quantised = {node.name for node in model.graph.node if node.op_type == "Conv" and node.input[1].endswith(".dequantised")}
    codes = {name for name, tensor in constants.items() if tensor.data_type in (types.INT8, types.FLOAT8E4M3FN)}
    if precision not in ("int8", "fp8"):
        assert not quantised and not codes
        return
    plain = {node.name for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose")} - quantised
    assert {name.split(".conv")[0].split(".skip")[0] for name in plain} == {"stem", "head", "up.3.block", "upsample.0"}
    assert codes == {f"{name}.weight" for name in quantised} | {name for name in codes if name.endswith(".zero")}
    for name in quantised:
        assert constants[f"{name}.weight"].data_type == (types.INT8 if precision == "int8" else types.FLOAT8E4M3FN)
        assert list(constants[f"{name}.weight.scale"].dims) == [constants[f"{name}.weight"].dims[0]]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_variance_does_not_cancel(precision: TypedPrecision) -> None:
    """Activations of mean 100 and deviation 1: in half precision their squares' mean would have no digit left."""
    weights = random_weights(SMALL)
    for name in weights:
        if name.endswith("conv1.bias"):
            weights[name] = weights[name] + np.float32(100.0 if precision == "fp16" else 10.0)
    x = np.random.default_rng(3).standard_normal((1, 3, 16, 24)).astype(np.float32)
    got, wanted = run(typed(SMALL, weights, precision, x), x, precision), run_reference(SMALL, weights, x, 77)
    assert np.linalg.norm(got - wanted) <= 0.1 * np.linalg.norm(wanted)  # seen: 0.024 and 0.042


def test_quantised_tensors_are_in_the_fp32_graph() -> None:
    weights = random_weights(SMALL)
    names = quantised_tensors(SMALL, weights, **SIZE)
    made = {name for node in build_typed_graph(SMALL, weights, precision="fp32", **SIZE).graph.node for name in node.output}
    assert len(names) == len(set(names)) > 10 and set(names) <= made
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 24)).astype(np.float32)
    ranges = collect_ranges(detector(SMALL, 16, 24, 77), weights, [x])
    assert list(ranges) == names
    model = build_typed_graph(SMALL, weights, precision="fp32", **SIZE)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = dict(zip(names, session.run(names, {"x": x}), strict=True))
    for name in names:
        np.testing.assert_allclose(ranges[name], np.abs(found[name]).max(), rtol=1e-4)  # OpenVINO against ONNX Runtime


def test_refuses() -> None:
    weights = random_weights(SMALL)
    names = quantised_tensors(SMALL, weights, **SIZE)
    with pytest.raises(ConfigError, match=r"precision: expected one of \['fp32', 'fp16', 'bf16', 'int8', 'fp8'\], got 'tf32'"):
        build_typed_graph(SMALL, weights, precision="tf32", **SIZE)  # type: ignore[arg-type]
    good = dict.fromkeys(names, 4.0)
    for precision in ("int8", "fp8"):
        for bad in (None, {}, {**good, names[3]: 0.0}, {**good, names[3]: float("nan")}, {**good, names[3]: float("inf")}):
            with pytest.raises(ConfigError, match=rf"ranges\['.*'\]: expected a finite number above 0, for {precision}, got"):
                build_typed_graph(SMALL, weights, precision=precision, ranges=bad, **SIZE)  # type: ignore[arg-type]
    with pytest.raises(ModelFileError, match=r"stem\.bias"):
        build_typed_graph(SMALL, {k: v for k, v in weights.items() if k != "stem.bias"}, precision="fp16", **SIZE)
    with pytest.raises(ConfigError, match="height"):
        build_typed_graph(SMALL, weights, precision="fp16", **{**SIZE, "height": 17})
    large = {**weights, "head.bias": weights["head.bias"] + np.float32(7e4)}
    with pytest.raises(ConfigError, match=r"head.bias reaches 7e\+04, too much for fp16; use bf16 or fp32"):
        build_typed_graph(SMALL, large, precision="fp16", **SIZE)
    build_typed_graph(SMALL, large, precision="bf16", **SIZE)


def test_bad_calibration_is_refused() -> None:
    weights, config = random_weights(SMALL), detector(SMALL, 16, 24, 77)
    good = np.zeros((1, 3, 16, 24), np.float32)
    bad: list[Any] = [good.astype(np.float64), good[0], good[:, :, :8], good[:0], good + np.float32(np.nan)]
    with pytest.raises(ConfigError, match="calibration: expected at least one network input, got 0"):
        collect_ranges(config, weights, [])
    for x in bad:
        with pytest.raises(ConfigError, match=r"calibration\[1\]: expected finite float32 \(n, 3, 16, 24\), got float"):
            collect_ranges(config, weights, [good, x])
    poisoned = {**weights, "stem.bias": weights["stem.bias"] * np.float32(np.nan)}
    with pytest.raises(ConfigError, match=r"activation .*: expected a finite number, got nan"):
        collect_ranges(config, poisoned, [good])


def test_a_silent_channel_and_a_silent_activation() -> None:
    """Zeros have no range: they stay zeros, and no scale is 0 or NaN."""
    weights = random_weights(SMALL)
    weights["down.0.block.conv1.weight"][1] = 0.0
    for part in ("weight", "bias"):
        weights[f"down.0.block.norm2.{part}"] = weights[f"down.0.block.norm2.{part}"] * np.float32(0.0)
    for part in ("weight", "bias"):  # the shift of the timestep, too
        weights[f"down.0.block.embedding.{part}"] = weights[f"down.0.block.embedding.{part}"] * np.float32(0.0)
    x = np.random.default_rng(0).standard_normal((1, 3, 16, 24)).astype(np.float32)
    assert collect_ranges(detector(SMALL, 16, 24, 77), weights, [x])["down.0.block.norm2.silu"] == 1.0
    for precision in ("int8", "fp8"):
        got = run(typed(SMALL, weights, precision, x), x, precision)  # type: ignore[arg-type]
        assert np.isfinite(got).all()
        wanted = run_reference(SMALL, weights, x, 77)
        assert np.linalg.norm(got - wanted) <= 3.0 * WORST[precision] * np.linalg.norm(wanted)  # type: ignore[index]


# Rounding, against ml_dtypes


def test_bfloat16_bits() -> None:
    bits = np.arange(0, 2**32, 65_521, dtype=np.uint64).astype(np.uint32)  # a prime apart: all exponents, many ties
    edges = np.array([0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x3F808000, 0x3F818000, 0x80000000], dtype=np.uint32)
    values = np.concatenate([bits, edges]).view(np.float32)
    values = values[~np.isnan(values)]
    np.testing.assert_array_equal(graph_precision.bfloat16_bits(values), values.astype(ml_dtypes.bfloat16).view(np.uint16))
    nan = graph_precision.bfloat16_bits(np.array([np.nan], np.float32))
    assert np.isnan(nan.view(ml_dtypes.bfloat16).astype(np.float32)).all()


def test_e4m3_codes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    finite = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    finite = np.sort(finite[np.isfinite(finite)])
    ties = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)  # ml_dtypes rounds float64 twice, by way of float32
    up, down = np.nextafter(ties, np.float32(1e9)), np.nextafter(ties, np.float32(-1e9))
    rng = np.random.default_rng(0)
    values = np.concatenate([finite.astype(np.float32), ties, up, down, rng.standard_normal(5000, dtype=np.float32) * 40])
    wanted = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(graph_precision.e4m3_codes(values.astype(np.float64)), wanted)
    assert graph_precision.e4m3_codes(np.array([1e9, -1e9, np.inf, np.nan])).tolist() == [126, 254, 126, 127]


def test_the_version_names_the_graphs() -> None:
    """A change here gives other engines: raise TYPED_GRAPH_VERSION, or GRAPH_VERSION, with it."""
    weights = {name: np.ones(array.shape, np.float32) for name, array in random_weights(SMALL).items()}
    digest = hashlib.sha256()
    ranges = dict.fromkeys(quantised_tensors(SMALL, weights, **SIZE), 4.0)
    for precision in TYPED_PRECISIONS:
        model = build_typed_graph(SMALL, weights, precision=precision, ranges=ranges, **SIZE)
        for node in model.graph.node:
            digest.update(node.SerializeToString(deterministic=True))
        for tensor in model.graph.initializer:
            digest.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}".encode())
    assert (graph_precision.TYPED_GRAPH_VERSION, digest.hexdigest()[:16]) == (1, "90c318305014fd8b")
