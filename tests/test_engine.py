"""The C++ engine: each of its operations exactly, on integers; whole networks against the reference; threads; refusals."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from advrad_fast import _native
from advrad_fast.backends.native_engine import KERNELS, build_network, physical_cores
from advrad_fast.config import UNetConfig
from advrad_fast.errors import ModelFileError
from advrad_fast.reference.unet import UNet

Array = NDArray[np.float32]
RNG = np.random.default_rng(5)


def integers(*shape: int, limit: int = 3) -> Array:
    """Small integers: bf16 holds them, and fp32 their sums, exactly."""
    return RNG.integers(-limit, limit + 1, shape).astype(np.float32)


def network(batch: int, channels: int, height: int, width: int, **options: Any) -> _native.Network:
    options = {"patch": 1, "threads": 2, "kernels": KERNELS[0], **options}
    return _native.Network(batch=batch, channels=channels, height=height, width=width, **options)


def run(net: _native.Network, x: Array) -> Array:
    """Twice, into NaN: nothing may be left out, and nothing left over."""
    out = np.full_like(x, np.nan)
    workspace = net.workspace()
    net.run(workspace, x, out)
    first = out.copy()
    out.fill(np.nan)
    net.run(workspace, x, out)
    assert first.tobytes() == out.tobytes()
    return out


def identity(net: _native.Network, tensor: int, channels: int, out: int | None = None) -> None:
    net.convolution(
        out, np.zeros(channels, np.float32), [[(tensor, np.eye(channels, dtype=np.float32)[..., None, None], 1, 0, 0, False)]]
    )


def convolved(x: Array, kernel: Array, bias: Array, stride: int = 1) -> Array:
    result: Array = F.conv2d(
        torch.from_numpy(x), torch.from_numpy(kernel), torch.from_numpy(bias), stride, kernel.shape[2] // 2
    ).numpy()
    return result


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("batch", "channels", "height", "width", "side"),
    [(1, 3, 8, 16, 3), (2, 1, 5, 7, 3), (1, 20, 3, 33, 1), (3, 48, 4, 20, 3), (1, 64, 17, 31, 3), (2, 70, 2, 1, 3)],
)
def test_convolution_is_exact(kernels: str, threads: int, batch: int, channels: int, height: int, width: int, side: int) -> None:
    x, bias = integers(batch, channels, height, width), integers(channels)
    kernel = integers(channels, channels, side, side)
    net = network(batch, channels, height, width, threads=threads, kernels=kernels)
    net.convolution(None, bias, [[(0, kernel, 1, -(side // 2), -(side // 2), False)]])
    net.finish()
    np.testing.assert_array_equal(run(net, x), convolved(x, kernel, bias))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("patch", [1, 2, 3, 4, 8])
def test_input_and_output_are_folded(kernels: str, patch: int) -> None:
    x = RNG.integers(0, 256, (2, 3, 3 * patch, 5 * patch)).astype(np.float32)
    net = network(2, 3, 3 * patch, 5 * patch, patch=patch, kernels=kernels)
    identity(net, 0, 3 * patch**2)
    net.finish()
    np.testing.assert_array_equal(run(net, x), x)
    kernel = integers(3 * patch**2, 3 * patch**2, 3, 3)
    net = network(2, 3, 3 * patch, 5 * patch, patch=patch, kernels=kernels)
    net.convolution(None, np.zeros(3 * patch**2, np.float32), [[(0, kernel, 1, -1, -1, False)]])
    net.finish()
    small = integers(*x.shape)
    folded = F.pixel_unshuffle(torch.from_numpy(small), patch).numpy()
    wanted = F.pixel_shuffle(torch.from_numpy(convolved(folded, kernel, np.zeros(3 * patch**2, np.float32))), patch).numpy()
    np.testing.assert_array_equal(run(net, small), wanted)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 8, 12), (17, 6, 34), (40, 4, 70)])
def test_down_up_sources_and_residual_are_exact(kernels: str, channels: int, height: int, width: int) -> None:
    """Stride 2; four phases; two sources, one through a 1x1 kernel; a residual: a small network of integers."""
    x, inner = RNG.integers(-1, 2, (2, channels, height, width)).astype(np.float32), 24
    kernels_ = [
        (RNG.random(s) < 1 / max(20, channels)).astype(np.float32) for s in [(inner, channels, 3, 3), (channels, inner, 3, 3)]
    ]
    wide, narrow = (RNG.random((channels, channels, side, side)) < 1 / max(20, channels) for side in (3, 1))
    zeros, bias = np.zeros(inner, np.float32), integers(channels)
    net = network(2, channels, height, width, kernels=kernels)
    down, up = net.tensor(height // 2, width // 2, inner), net.tensor(height, width, channels)
    net.convolution(down, zeros, [[(0, kernels_[0], 2, -1, -1, False)]])
    # The taps of a 3x3 kernel on the doubled input that fall on the same pixel of it add up.
    groups = [[[0], [1, 2]], [[0, 1], [2]]]
    phases: list[Any] = []
    for i in range(2):
        for j in range(2):
            kernel = np.stack(
                [np.stack([kernels_[1][:, :, a][..., b].sum(axis=(2, 3)) for b in groups[j]], -1) for a in groups[i]], -2
            )
            phases.append([(down, np.ascontiguousarray(kernel), 1, i - 1, j - 1, False)])
    net.convolution(up, bias, phases)
    last = net.tensor(height, width, channels)
    sources = [(up, wide.astype(np.float32), 1, -1, -1, False), (0, narrow.astype(np.float32), 1, 0, 0, False)]
    net.convolution(last, bias, [sources], residual=0)
    identity(net, last, channels)
    net.finish()

    small = convolved(x, kernels_[0], zeros, 2)
    large = convolved(small.repeat(2, axis=2).repeat(2, axis=3), kernels_[1], bias)
    wanted = convolved(large, wide.astype(np.float32), bias) + convolved(x, narrow.astype(np.float32), np.zeros_like(bias)) + x
    assert np.abs(large).max() <= 256 and np.abs(wanted).max() <= 256  # bf16 is exact so far
    np.testing.assert_array_equal(run(net, x), wanted)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("channels", "groups", "height", "width"), [(24, 4, 8, 16), (32, 32, 40, 33), (6, 1, 300, 40)])
def test_norm_over_two_tensors(kernels: str, silu: bool, channels: int, groups: int, height: int, width: int) -> None:
    """GroupNorm whose groups span a concatenation, at sizes that take many passes; the moments come from the writers."""
    x = RNG.standard_normal((2, channels, height, width), dtype=np.float32) + 0.5
    gain, shift = 1 + 0.2 * RNG.standard_normal(2 * channels), 0.3 * RNG.standard_normal(2 * channels)
    kernel = RNG.standard_normal((channels, 2 * channels, 3, 3)) / (18 * channels) ** 0.5
    gain, shift, kernel = (a.astype(np.float32) for a in (gain, shift, kernel))
    net = network(2, channels, height, width, kernels=kernels)
    first, second = (net.tensor(height, width, channels) for _ in range(2))
    identity(net, 0, channels, first)
    net.convolution(
        second, np.zeros(channels, np.float32), [[(0, 2 * np.eye(channels, dtype=np.float32)[..., None, None], 1, 0, 0, False)]]
    )
    halves = [np.ascontiguousarray(kernel[:, i * channels : (i + 1) * channels]) for i in range(2)]
    sources = [(t, k, 1, -1, -1, True) for t, k in zip((first, second), halves, strict=True)]
    net.convolution(None, np.zeros(channels, np.float32), [sources], norm=(gain, shift, groups, silu))
    net.finish()
    both = torch.from_numpy(np.concatenate([x, 2 * x], axis=1))
    wanted = F.group_norm(both, groups, torch.from_numpy(gain), torch.from_numpy(shift))
    wanted = convolved((F.silu(wanted) if silu else wanted).numpy(), kernel, np.zeros(channels, np.float32))
    error = np.linalg.norm(run(net, x) - wanted) / np.linalg.norm(wanted)
    assert error < 8e-3  # three roundings to bf16, of 1.7e-3 each on average; worst seen 3.9e-3


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("channels", "heads", "height", "width"), [(32, 1, 8, 16), (24, 3, 3, 5), (80, 2, 7, 20), (16, 1, 1, 1)])
def test_attention(kernels: str, channels: int, heads: int, height: int, width: int) -> None:
    x = RNG.standard_normal((2, channels, height, width), dtype=np.float32)
    kernel = (RNG.standard_normal((3 * channels, channels, 1, 1)) / channels**0.5).astype(np.float32)
    kernel[:channels] /= (channels // heads) ** 0.5
    net = network(2, channels, height, width, kernels=kernels)
    qkv, values = net.tensor(height, width, 3 * channels), net.tensor(height, width, channels)
    net.convolution(qkv, np.zeros(3 * channels, np.float32), [[(0, kernel, 1, 0, 0, False)]])
    net.attention(qkv, values, heads)
    identity(net, values, channels)
    net.finish()
    flat = convolved(x, kernel, np.zeros(3 * channels, np.float32)).reshape(2, 3, heads, channels // heads, height * width)
    q, k, v = np.moveaxis(flat.astype(np.float64), 1, 0)
    shares = np.exp(np.einsum("nhcp,nhcq->nhpq", q, k))
    wanted = np.einsum("nhpq,nhcq->nhcp", shares / shares.sum(axis=-1, keepdims=True), v).reshape(x.shape)
    error = np.linalg.norm(run(net, x) - wanted) / np.linalg.norm(wanted)
    assert error < 1.2e-2  # worst seen 5.4e-3


def make_unet(config: UNetConfig) -> UNet:
    """Every tensor random, at scales that keep activations near 1."""
    net = UNet(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in net.named_parameters():
        scale = 0.2 if parameter.ndim == 1 else float(np.prod(parameter.shape[1:])) ** -0.5
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1.0)
    return net


CONFIGS = [
    (UNetConfig(base_channels=32, channel_mult=(1, 2, 4), norm_groups=0, patch=4), 64, 96, 1),
    (UNetConfig(base_channels=16, channel_mult=(1, 2), norm_groups=0, patch=2, in_channels=1, num_res_blocks=2), 48, 40, 3),
    (UNetConfig(base_channels=32, channel_mult=(1, 1, 2), norm_groups=8, patch=1), 32, 32, 2),
    (
        UNetConfig(base_channels=24, channel_mult=(1, 2), norm_groups=3, patch=2, attention_resolutions=(2, 4), num_heads=2),
        32,
        56,
        2,
    ),
    (UNetConfig(base_channels=20, channel_mult=(1, 3), norm_groups=4, patch=1, attention_resolutions=(2,)), 24, 24, 1),
]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("config", "height", "width", "batch"), CONFIGS)
def test_network_equals_the_reference(kernels: str, config: UNetConfig, height: int, width: int, batch: int) -> None:
    net = make_unet(config)
    x = RNG.standard_normal((batch, config.in_channels, height, width), dtype=np.float32)
    with torch.inference_mode():
        wanted = net(torch.from_numpy(x), torch.full((batch,), 77)).numpy()
    weights = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    results = []
    for threads in (1, 2):
        size = {"height": height, "width": width, "batch": batch, "timestep": 77}
        engine = build_network(config, weights, threads=threads, kernels=kernels, **size)
        results.append(run(engine, x))
        error = np.linalg.norm(results[-1] - wanted) / np.linalg.norm(wanted)
        assert error < 2.5e-2  # rounding to bf16 at every layer; worst seen 9.3e-3
    if not config.norm_groups:  # the moments are summed up in parts, the number of which depends on the threads
        assert results[0].tobytes() == results[1].tobytes()


@pytest.mark.skipif("amx" not in KERNELS, reason="this processor has no AMX tiles")
@pytest.mark.parametrize(("config", "height", "width", "batch"), CONFIGS)
def test_tiles_equal_the_plain_form(config: UNetConfig, height: int, width: int, batch: int) -> None:
    """Closer to one another than either is to fp32: the same roundings, but for SiLU's approximation and the sums' order."""
    weights = {name: tensor.numpy() for name, tensor in make_unet(config).state_dict().items()}
    x = RNG.standard_normal((batch, config.in_channels, height, width), dtype=np.float32)
    size = {"height": height, "width": width, "batch": batch, "timestep": 77, "threads": 2}
    plain, tiles = (run(build_network(config, weights, kernels=kernels, **size), x) for kernels in ("portable", "amx"))
    assert np.linalg.norm(tiles - plain) / np.linalg.norm(plain) < 1e-2  # worst seen 3.2e-3


def test_threads_share_a_network_each_with_a_workspace() -> None:
    config, height, width, batch = CONFIGS[2]
    weights = {name: tensor.numpy() for name, tensor in make_unet(config).state_dict().items()}
    engine = build_network(config, weights, height=height, width=width, batch=batch, timestep=7, threads=3, kernels=KERNELS[0])
    xs = [RNG.standard_normal((batch, 3, height, width), dtype=np.float32) for _ in range(4)]
    wanted = [run(engine, x) for x in xs]
    barrier = threading.Barrier(4)

    def work(i: int) -> bool:
        barrier.wait()
        return all(run(engine, xs[i]).tobytes() == wanted[i].tobytes() for _ in range(10))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_nan_goes_through() -> None:
    """And is gone with the next input, in a workspace of its own."""
    config, height, width, batch = CONFIGS[3]
    weights = {name: tensor.numpy() for name, tensor in make_unet(config).state_dict().items()}
    engine = build_network(config, weights, height=height, width=width, batch=batch, timestep=7, threads=2, kernels=KERNELS[0])
    x = RNG.standard_normal((batch, 3, height, width), dtype=np.float32)
    wanted = run(engine, x)
    broken = x.copy()
    broken[0, 1, 3, 4] = np.nan
    assert not np.isfinite(run(engine, broken)[0]).any() and np.array_equal(run(engine, broken)[1], wanted[1])
    assert np.array_equal(run(engine, x), wanted)


def test_refusals() -> None:
    ones = np.ones((3, 3, 1, 1), np.float32)
    zeros = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="kernels: expected amx or portable, got sse"):
        network(1, 3, 8, 8, kernels="sse")
    for name in ("batch", "channels", "height", "width", "patch", "threads"):
        with pytest.raises(ValueError, match=name):
            _native.Network(
                **{"batch": 1, "channels": 3, "height": 8, "width": 8, "patch": 1, "threads": 1, "kernels": "portable", name: 0}
            )
    with pytest.raises(ValueError, match="patch must divide"):
        network(1, 3, 8, 8, patch=3)
    bad: list[tuple[Any, str]] = [
        ([], "one phase or four"),
        ([[]], "a phase has sources"),
        ([[(1, ones, 1, 0, 0, False)]], "unknown tensor"),
        ([[(0, ones, 2, 0, 0, False)]], "output's size, times the stride"),
        ([[(0, ones, 1, -2, 0, False)]], "one pixel at most"),
        ([[(0, np.ones((3, 3, 3, 3), np.float32), 1, 0, 0, False)]], "one pixel at most"),
        ([[(0, ones[:2], 1, 0, 0, False)]], "a kernel is"),
        ([[(0, ones.astype(np.float64), 1, 0, 0, False)]], "kernel: expected"),
        ([[(0, ones, 1, 0, 0, True)]], "a gain and a shift"),
        ([[(0, ones)]], "phases: expected"),
    ]
    for phases, message in bad:
        with pytest.raises(ValueError, match=message):
            network(1, 3, 8, 8).convolution(None, zeros, phases)
    with pytest.raises(ValueError, match="one bias"):
        network(1, 3, 8, 8).convolution(None, zeros[:2], [[(0, ones, 1, 0, 0, False)]])
    net = network(1, 3, 8, 8)
    with pytest.raises(ValueError, match="not finished"):
        net.workspace()
    with pytest.raises(ValueError, match="writes the output"):
        net.finish()
    identity(net, 0, 3)
    net.finish()
    with pytest.raises(ValueError, match="is finished"):
        identity(net, 0, 3)
    other = network(1, 3, 8, 8)
    identity(other, 0, 3)
    other.finish()
    x = np.zeros((1, 3, 8, 8), np.float32)
    with pytest.raises(ValueError, match="another network's"):
        net.run(other.workspace(), x, x.copy())
    for wrong in (x[0], x.astype(np.float64), x[..., ::2]):
        with pytest.raises(ValueError, match="x: expected"):
            net.run(net.workspace(), wrong, x.copy())
    config = CONFIGS[0][0]
    with pytest.raises(ModelFileError, match=r"tensor time1\.weight"):
        build_network(config, {}, height=64, width=64, batch=1, timestep=0, threads=1)


def test_physical_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardware threads of a core count once, and a container's share of time limits them."""
    assert 1 <= physical_cores() <= 1024
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert physical_cores(tmp_path) == 8
    for cpu in range(8):
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    assert physical_cores(tmp_path) == 4
    group = tmp_path / "fs/cgroup"
    (group / "cpu").mkdir(parents=True)
    for text, cores in (("max 100000\n", 4), ("250000 100000\n", 2), ("50000 100000\n", 1), ("", 4), ("nonsense\n", 4)):
        (group / "cpu.max").write_text(text)
        assert physical_cores(tmp_path) == cores, text
    (group / "cpu.max").unlink()
    (group / "cpu/cpu.cfs_quota_us").write_text("300000\n")
    (group / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert physical_cores(tmp_path) == 3
    (group / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    assert physical_cores(tmp_path) == 4


@pytest.mark.skipif("amx" not in KERNELS, reason="this processor has no AMX tiles")
def test_subnormal_numbers_are_zero_inside_and_only_there() -> None:
    """SiLU's tail: 90 / (1 + exp(90)) is subnormal in fp32, and slow; the caller's arithmetic keeps its subnormal numbers."""
    x = np.full((1, 3, 8, 16), -90.0, np.float32)
    net = network(1, 3, 8, 16, kernels="amx")
    hidden = net.tensor(8, 16, 3)
    net.convolution(
        hidden, np.zeros(3, np.float32), [[(0, np.eye(3, dtype=np.float32)[..., None, None], 1, 0, 0, False)]], silu=True
    )
    identity(net, hidden, 3)
    net.finish()
    assert np.array_equal(np.abs(run(net, x)), np.zeros_like(x))
    tiny = np.float32(1e-38)
    assert tiny * np.float32(0.01) > 0
