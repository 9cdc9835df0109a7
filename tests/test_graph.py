"""The ONNX graph against the reference UNet, and what it refuses."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from advrad_fast import graph
from advrad_fast.config import UNetConfig
from advrad_fast.errors import ConfigError, ModelFileError
from advrad_fast.reference.unet import UNet

SMALL = UNetConfig(
    in_channels=3, base_channels=8, channel_mult=(1, 2), norm_groups=4, patch=2, attention_resolutions=(4,), num_heads=2
)
SIZE = {"height": 16, "width": 24, "batch": 2, "timestep": 77}


def random_weights(config: UNetConfig, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Every tensor random, the zero-initialised ones too, at scales that keep activations near 1."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in graph.expected_tensors(config).items():
        values = rng.standard_normal(shape)
        if len(shape) > 1:
            values /= np.sqrt(np.prod(shape[1:]))
        elif "norm" in name and name.endswith("weight"):
            values = 1.0 + 0.3 * values
        else:
            values *= 0.2
        weights[name] = values.astype(np.float32)
    return weights


def run_reference(config: UNetConfig, weights: dict[str, NDArray[np.float32]], x: NDArray[np.float32], timestep: int) -> Any:
    network = UNet(config).eval()
    network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    with torch.inference_mode():
        return network(torch.from_numpy(x), torch.full((len(x),), timestep)).numpy()


def run_onnx(model: onnx.ModelProto, x: NDArray[np.float32]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(["output"], {"x": x})[0]


@st.composite
def configs(draw: st.DrawFn) -> UNetConfig:
    groups, heads = draw(st.sampled_from([0, 1, 2, 3])), draw(st.sampled_from([1, 2, 3]))
    patch = draw(st.sampled_from([1, 2, 4]))
    mult = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    factors = [patch << level for level in range(len(mult))]
    return UNetConfig(
        in_channels=draw(st.sampled_from([1, 3])),
        base_channels=max(groups, 1) * heads * draw(st.integers(1, 3)),
        channel_mult=mult,
        num_res_blocks=draw(st.integers(1, 2)),
        # Attention over more than the two coarsest levels would be slow in the test, not different.
        attention_resolutions=tuple(draw(st.sets(st.sampled_from(factors[-2:])))),
        num_heads=heads,
        norm_groups=groups,
        patch=patch,
    )


# Relative error: L2, and maximum over the largest output.  Worst seen in 400 configs at 2 sizes: 6.9e-6 and 1.1e-5; times 4.
TOLERANCE = 4e-5


@settings(max_examples=15)
@given(configs(), st.integers(0, 2**32 - 1), st.integers(0, 999), st.integers(1, 3), st.integers(2, 3))
def test_equals_the_reference(config: UNetConfig, seed: int, timestep: int, batch: int, columns: int) -> None:
    weights = random_weights(config, seed)
    size = (config.size_multiple, config.size_multiple * columns)  # PyTorch refuses a norm over a single value
    x = np.random.default_rng(seed).standard_normal((batch, config.in_channels, *size)).astype(np.float32)
    model = graph.build_graph(config, weights, height=size[0], width=size[1], batch=batch, timestep=timestep)
    onnx.checker.check_model(model, full_check=True)
    wanted, got = run_reference(config, weights, x, timestep), run_onnx(model, x)
    assert got.shape == x.shape and got.dtype == np.float32
    assert np.linalg.norm(got - wanted) <= TOLERANCE * np.linalg.norm(wanted)
    assert np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max()


@settings(max_examples=50)
@given(configs())
def test_expected_tensors_are_the_state_dict(config: UNetConfig) -> None:
    with torch.device("meta"):
        state = UNet(config).state_dict()
    assert graph.expected_tensors(config) == {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize(
    "config", [UNetConfig(), UNetConfig(attention_resolutions=(8, 16), num_heads=4), UNetConfig(patch=16, channel_mult=(1,) * 8)]
)
def test_expected_tensors_of_full_size_networks(config: UNetConfig) -> None:
    with torch.device("meta"):
        state = UNet(config).state_dict()
    assert graph.expected_tensors(config) == {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_variance_does_not_cancel(offset: float) -> None:
    """Activations of mean 100 and deviation 1: E[x^2] - E[x]^2 in fp32 would lose three digits."""
    weights = random_weights(SMALL)
    for name in weights:
        if name.endswith("conv1.bias"):
            weights[name] = weights[name] + np.float32(offset)
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 24)).astype(np.float32)
    wanted = run_reference(SMALL, weights, x, 77)
    got = run_onnx(graph.build_graph(SMALL, weights, **SIZE), x)
    # Seen 5.0e-7 and 9.8e-6 (the rounding of the activations themselves, 100 * 2**-24); times 4.
    assert np.linalg.norm(got - wanted) <= (2e-6 if offset == 0.0 else 4e-5) * np.linalg.norm(wanted)


def test_a_constant_image_has_no_variance() -> None:
    weights = random_weights(SMALL)
    x = np.zeros((2, 3, 16, 24), dtype=np.float32)
    got = run_onnx(graph.build_graph(SMALL, weights, **SIZE), x)
    np.testing.assert_allclose(got, run_reference(SMALL, weights, x, 77), rtol=0, atol=2e-5)


def test_polygraphy_finds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "unet.onnx"
    onnx.save(graph.build_graph(SMALL, random_weights(SMALL), **SIZE), str(path))
    tool = Path(sys.executable).parent / "polygraphy"
    for command in (["check", "lint"], ["inspect", "model"]):
        done = subprocess.run([sys.executable, str(tool), *command, str(path)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "[E]" not in done.stdout + done.stderr
    assert "x [dtype=float32, shape=(2, 3, 16, 24)]" in done.stdout
    assert "output [dtype=float32, shape=(2, 3, 16, 24)]" in done.stdout


def test_same_arguments_same_bytes() -> None:
    first, second = (graph.build_graph(SMALL, random_weights(SMALL), **SIZE).SerializeToString() for _ in range(2))
    assert first == second


def test_graph_version_names_this_graph() -> None:
    """When this fails, the graph has changed: raise GRAPH_VERSION, which makes old cache entries miss, and pin the new digest."""
    weights = {
        name: (np.arange(np.prod(shape)).reshape(shape) % 7 / 8).astype(np.float32)
        for name, shape in graph.expected_tensors(SMALL).items()
    }
    model = graph.build_graph(SMALL, weights, **SIZE)
    digest = hashlib.sha256()
    for node in model.graph.node:
        attributes = sorted((a.name, repr(onnx.helper.get_attribute_value(a))) for a in node.attribute)
        digest.update(repr((node.op_type, list(node.input), list(node.output), attributes)).encode())
    for tensor in model.graph.initializer:
        # Four digits: the fold's last bits are the platform's exp, cos and sin.
        digest.update(repr((tensor.name, np.round(onnx.numpy_helper.to_array(tensor), 4).ravel()[:64].tolist())).encode())
    assert (graph.GRAPH_VERSION, digest.hexdigest()[:16]) == (1, "3bb461dbf63ee159")


@pytest.mark.parametrize("name", ["height", "width"])
@pytest.mark.parametrize("value", [0, -8, 12, 4096 + 8, 16.0, True, "16"])
def test_refuses_sizes(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected a multiple of 8"):
        graph.build_graph(SMALL, random_weights(SMALL), **{**SIZE, name: value})


@pytest.mark.parametrize(("name", "value"), [("batch", 0), ("batch", 1.0), ("timestep", -1), ("timestep", True), ("batch", None)])
def test_refuses_batch_and_timestep(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected an integer"):
        graph.build_graph(SMALL, random_weights(SMALL), **{**SIZE, name: value})


def test_refuses_foreign_weights() -> None:
    weights = random_weights(SMALL)
    stem = weights["stem.weight"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({k: v for k, v in weights.items() if k != "head.bias"}, r"tensor head.bias: expected float32 \(12,\), got nothing"),
        ({**weights, "extra": stem}, r"tensor extra: expected no tensor .* got float32 \(8, 12, 3, 3\)"),
        ({**weights, "stem.weight": stem[:, :3]}, r"stem.weight: expected float32 \(8, 12, 3, 3\), got float32 \(8, 3, 3, 3\)"),
        ({**weights, "stem.weight": stem.astype(np.float64)}, r"stem.weight: expected float32 .* got float64"),
        ({**weights, "stem.weight": stem.astype(np.float16)}, r"stem.weight: expected float32 .* got float16"),
    ]
    for bad, message in cases:
        with pytest.raises(ModelFileError, match=message):
            graph.build_graph(SMALL, bad, **SIZE)


def test_takes_read_only_and_strided_weights() -> None:
    weights = random_weights(SMALL)
    odd = {}
    for name, array in weights.items():
        odd[name] = np.asfortranarray(array)
        odd[name].flags.writeable = False
    wanted = graph.build_graph(SMALL, weights, **SIZE).SerializeToString()
    assert graph.build_graph(SMALL, odd, **SIZE).SerializeToString() == wanted


def test_refuses_what_onnx_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_MAX_BYTES", 1000)
    with pytest.raises(ConfigError, match="2 GiB"):
        graph.build_graph(SMALL, random_weights(SMALL), **SIZE)


def test_importing_loads_neither_onnx_nor_torch() -> None:
    code = "import sys, advrad_fast.graph; print([m for m in ('onnx', 'torch', 'openvino') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
