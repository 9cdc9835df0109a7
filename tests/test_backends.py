"""The CPU backend against the reference, what a result may depend on, the cache, and the choice of a backend."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from advrad_fast import backends, graph
from advrad_fast.backends import base, cache
from advrad_fast.backends.cpu import CpuBackend
from advrad_fast.backends.cpu_network import choose
from advrad_fast.backends.native_engine import KERNELS
from advrad_fast.backends.reference import ReferenceBackend
from advrad_fast.config import DetectorConfig, DiffusionConfig, ImageConfig, ScoreConfig, UNetConfig
from advrad_fast.errors import BackendUnavailableError, ConfigError, ImageError, InferenceError, ModelFileError

HEIGHT, WIDTH = 48, 64
CONFIG = DetectorConfig(
    unet=UNetConfig(base_channels=16, channel_mult=(1, 2), norm_groups=4, patch=2, attention_resolutions=(4,), num_heads=2),
    diffusion=DiffusionConfig(draws=2),
    score=ScoreConfig(filter_size=7),
    image=ImageConfig(height=HEIGHT, width=WIDTH),
)
NATIVE_BF16 = "bf16" in next(status for status in backends.available() if status.name == "cpu").detail
PRECISIONS = [
    "fp32",
    pytest.param("bf16", marks=pytest.mark.skipif(not NATIVE_BF16, reason="this processor has no bf16 arithmetic")),
]


def make_weights(config: UNetConfig = CONFIG.unet) -> dict[str, NDArray[np.float32]]:
    """Random, read-only, at scales that keep activations near 1."""
    rng = np.random.default_rng(7)
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
        weights[name].flags.writeable = False
    return weights


WEIGHTS = make_weights()
MU = np.linspace(0.0, 0.2, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
INVERSE_SPREAD = np.linspace(0.5, 2.0, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
for _array in (MU, INVERSE_SPREAD):
    _array.flags.writeable = False


def frames() -> NDArray[np.uint8]:
    """Black, white, saturated red, a gradient, two of noise: uint8 (6, H, W, 3)."""
    rng = np.random.default_rng(3)
    images = np.zeros((6, HEIGHT, WIDTH, 3), dtype=np.uint8)
    images[1] = 255
    images[2, ..., 0] = 255
    images[3] = np.linspace(0, 255, WIDTH).astype(np.uint8)[None, :, None]
    images[4:] = rng.integers(0, 256, (2, HEIGHT, WIDTH, 3))
    return images


def cpu(config: DetectorConfig = CONFIG, **options: Any) -> CpuBackend:
    options = {"threads": 1, "precision": "fp32", "cache_dir": False, "weights": WEIGHTS, **options}
    return CpuBackend(config, mu=MU, inverse_spread=INVERSE_SPREAD, **options)


def reference(config: DetectorConfig = CONFIG, **options: Any) -> ReferenceBackend:
    return ReferenceBackend(config, mu=MU, inverse_spread=INVERSE_SPREAD, **{"weights": WEIGHTS, **options})


@pytest.fixture(scope="module")
def shared_cpu() -> CpuBackend:
    return cpu()


def same(first: base.Scores, second: base.Scores) -> bool:
    """Bit for bit."""
    maps = (first.maps is None and second.maps is None) or (
        first.maps is not None and second.maps is not None and first.maps.tobytes() == second.maps.tobytes()
    )
    return first.scores.tobytes() == second.scores.tobytes() and maps


# Relative difference of scores, and of maps relative to the reference map's largest value.  Worst seen over the four
# parametrisations and 10 seeds (AVX512-BF16): fp32 1.2e-6, times 4; bf16 1.7e-2 (x0; the others 0.7e-2), times 3.
BOUNDS = {"fp32": 5e-6, "bf16": 5e-2}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "edm"])
def test_cpu_equals_the_reference(precision: Any, prediction: Any) -> None:
    unet = UNetConfig.from_json({**CONFIG.unet.to_json(), "prediction": prediction})
    config = DetectorConfig(unet, CONFIG.diffusion, CONFIG.score, CONFIG.image)
    images = frames()
    got = cpu(config, precision=precision).score(images, seed=11, want_maps=True)
    wanted = reference(config).score(images, seed=11, want_maps=True)
    assert got.maps is not None and wanted.maps is not None
    assert got.scores.dtype == got.maps.dtype == np.float32 and got.maps.shape == (6, HEIGHT, WIDTH)
    np.testing.assert_allclose(got.scores, wanted.scores, rtol=BOUNDS[precision])
    error = np.abs(got.maps - wanted.maps).max(axis=(1, 2)) / wanted.maps.max(axis=(1, 2))
    assert error.max() <= BOUNDS[precision], error
    np.testing.assert_array_equal(got.scores, got.maps.max(axis=(1, 2)))


@pytest.mark.parametrize("make", [cpu, reference])
def test_result_depends_on_frame_and_seed_alone(make: Any) -> None:
    backend, images = make(), frames()
    together = backend.score(images, seed=5, want_maps=True)
    backwards = backend.score(images[::-1], seed=5, want_maps=True)
    assert same(together, base.Scores(backwards.scores[::-1], backwards.maps[::-1], {}))
    for i in range(len(images)):
        alone = backend.score(images[i : i + 1], seed=5, want_maps=True)
        assert same(alone, base.Scores(together.scores[i : i + 1], together.maps[i : i + 1], {}))
    without = backend.score(images, seed=5, want_maps=False)
    assert without.maps is None and np.array_equal(without.scores, together.scores)
    assert not np.array_equal(backend.score(images, seed=6, want_maps=False).scores, together.scores)
    assert set(together.timings) == {"noise", "network", "error"} and min(together.timings.values()) > 0.0


def test_kept_noise_is_the_noise() -> None:
    """The cpu backend keeps a seed's noise from its second frame on: the same bits, and another seed's is not mistaken for it."""
    backend, image = cpu(), frames()[:1]
    first = {seed: cpu().score(image, seed=seed, want_maps=True) for seed in (0, 1, 2**64 - 1)}
    for seed in (0, 0, 0, 1, 0, 0, 1, 1, 2**64 - 1, 2**64 - 1, 0):
        assert same(backend.score(image, seed=seed, want_maps=True), first[seed]), seed


@pytest.mark.parametrize("make", [cpu, reference])
def test_takes_any_strides_and_no_images(make: Any) -> None:
    backend, images = make(), frames()
    strided = np.zeros((6, HEIGHT, WIDTH * 2, 3), dtype=np.uint8)[:, :, ::2]
    strided[:] = images
    strided.flags.writeable = False
    for other in (strided, np.asfortranarray(images)):
        assert same(backend.score(images, seed=1, want_maps=True), backend.score(other, seed=1, want_maps=True))
    empty = backend.score(images[:0], seed=1, want_maps=True)
    assert empty.scores.shape == (0,) and empty.maps.shape == (0, HEIGHT, WIDTH)


@pytest.mark.parametrize("make", [cpu, reference])
def test_threads_share_a_backend(make: Any) -> None:
    backend, images = make(), frames()
    serial = [backend.score(images, seed=seed, want_maps=True) for seed in range(4)]
    barrier = threading.Barrier(4)

    def work(seed: int) -> list[base.Scores]:
        barrier.wait()
        return [backend.score(images, seed=seed, want_maps=True) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for wanted, results in zip(serial, pool.map(work, range(4)), strict=True):
            assert all(same(wanted, result) for result in results)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="an affinity of threads is Linux's")
def test_the_callers_thread_is_pinned_to_no_core() -> None:
    """Every process's would be pinned to the same one."""
    backend, images, caller, done = cpu(), frames(), threading.get_native_id(), threading.Event()
    before = os.sched_getaffinity(caller)
    seen: set[frozenset[int]] = set()

    def watch() -> None:
        while not done.is_set():
            seen.add(frozenset(os.sched_getaffinity(caller)))

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        for seed in range(20):
            backend.score(images, seed=seed, want_maps=False)
        done.set()
        watching.result()
    assert seen == {frozenset(before)}


@pytest.mark.parametrize("threads", [1, 2])
def test_repeats_bit_for_bit(threads: int) -> None:
    images = frames()
    first, second = (cpu(threads=threads) for _ in range(2))
    assert same(first.score(images, seed=1, want_maps=True), second.score(images, seed=1, want_maps=True))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "tensor", ["stem.weight", "time1.bias", "down.1.attention.qkv.bias", "up.0.block.norm2.bias", "head.bias"]
)
def test_nan_weights_give_no_score(precision: Any, tensor: str) -> None:
    broken = np.array(WEIGHTS[tensor])
    broken.flat[0] = np.nan
    weights = {**WEIGHTS, tensor: broken}
    for backend in (cpu(weights=weights, precision=precision), reference(weights=weights)):
        for want_maps in (True, False):
            with pytest.raises(InferenceError, match=r"images\[0\]"):
                backend.score(frames(), seed=0, want_maps=want_maps)


@pytest.mark.parametrize(
    "images",
    [
        frames().astype(np.float32),
        frames()[0],
        frames()[:, :-1],
        frames()[..., :1],
        frames().transpose(0, 3, 1, 2),
        frames().tolist(),
    ],
)
def test_refuses_images(shared_cpu: CpuBackend, images: Any) -> None:
    with pytest.raises(ImageError, match=r"images: expected uint8 \(N, 48, 64, 3\)"):
        shared_cpu.score(images, seed=0, want_maps=False)


def test_refuses_settings(shared_cpu: CpuBackend) -> None:
    for seed in (-1, 2**64, 1.5, True):
        with pytest.raises(ConfigError, match="seed"):
            shared_cpu.score(frames(), seed=seed, want_maps=False)  # type: ignore[arg-type]
    bad_options: list[tuple[dict[str, Any], str]] = [
        ({"threads": 0}, "threads"),
        ({"threads": True}, "threads"),
        ({"threads": 1.0}, "threads"),
        ({"precision": "int4"}, "precision"),
        ({"cache_dir": 3}, "cache_dir"),
        ({"cache_dir": True}, "cache_dir"),
    ]
    for options, name in bad_options:
        with pytest.raises(ConfigError, match=f"{name}: expected"):
            cpu(**options)
    for kind in (CpuBackend, ReferenceBackend):
        with pytest.raises(ModelFileError, match=r"mu: expected float32 \(48, 64\), got float64"):
            kind(CONFIG, WEIGHTS, MU.astype(np.float64), INVERSE_SPREAD)
        with pytest.raises(ModelFileError, match=r"inverse_spread: expected float32 \(48, 64\), got float32 \(64, 48\)"):
            kind(CONFIG, WEIGHTS, MU, INVERSE_SPREAD.T)
        with pytest.raises(ModelFileError, match=r"tensor time1\.weight"):
            kind(CONFIG, {}, MU, INVERSE_SPREAD)


def test_reference_leaves_the_random_state_and_the_caller_s_arrays_alone() -> None:
    weights = {name: np.array(array) for name, array in WEIGHTS.items()}
    state = torch.get_rng_state()
    backend = reference(weights=weights)
    before = backend.score(frames(), seed=0, want_maps=False)
    for array in weights.values():
        array.fill(np.nan)
    assert same(before, backend.score(frames(), seed=0, want_maps=False))
    assert torch.equal(state, torch.get_rng_state())


# The cache


def test_cache_hit_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "folder"
    wanted = cpu().score(frames(), seed=2, want_maps=True)
    assert same(wanted, cpu(cache_dir=folder).score(frames(), seed=2, want_maps=True))
    (blob,) = folder.iterdir()
    assert blob.suffix == ".blob"
    with monkeypatch.context() as patch:
        patch.setattr("advrad_fast.backends.openvino_engine.build_graph", None)  # a hit builds nothing
        assert same(wanted, cpu(cache_dir=str(folder)).score(frames(), seed=2, want_maps=True))
    changed = {**WEIGHTS, "head.bias": WEIGHTS["head.bias"] + np.float32(1.0)}
    other = cpu(cache_dir=folder, weights=changed).score(frames(), seed=2, want_maps=True)
    assert not same(wanted, other) and len(list(folder.iterdir())) == 2
    cpu(cache_dir=folder, threads=2)
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "text"])
def test_cache_damage_is_repaired(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    wanted = cpu(cache_dir=tmp_path).score(frames(), seed=2, want_maps=True)
    (blob,) = tmp_path.iterdir()
    good = blob.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    blob.write_bytes({"truncated": good[:-100], "empty": b"", "flipped": bytes(flipped), "text": b"hello"}[damage])
    with caplog.at_level(logging.WARNING):
        assert same(wanted, cpu(cache_dir=tmp_path).score(frames(), seed=2, want_maps=True))
    assert "damaged" in caplog.text
    assert cache.load(tmp_path, blob.stem) is not None  # repaired


def test_cache_blob_that_openvino_refuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = cpu(cache_dir=tmp_path).score(frames(), seed=2, want_maps=True)
    (blob,) = tmp_path.iterdir()
    cache.store(tmp_path, blob.stem, b"whole, and no network")
    with caplog.at_level(logging.WARNING):
        assert same(wanted, cpu(cache_dir=tmp_path).score(frames(), seed=2, want_maps=True))
    assert "OpenVINO refuses" in caplog.text


def test_cache_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file where the folder should be: unlike missing permissions, this stops root too."""
    (tmp_path / "file").write_text("")
    wanted = cpu().score(frames(), seed=2, want_maps=True)
    with caplog.at_level(logging.DEBUG):
        for folder in (tmp_path / "file", tmp_path / "file" / "below"):
            assert same(wanted, cpu(cache_dir=folder).score(frames(), seed=2, want_maps=True))
    assert "cannot store" in caplog.text
    assert all(record.levelno == logging.DEBUG for record in caplog.records if record.name.startswith("advrad_fast"))


def test_cache_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise PermissionError(30, "Read-only file system", str(path))

    monkeypatch.setattr(cache, "write_atomically", refuse)
    assert same(cpu().score(frames(), seed=2, want_maps=True), cpu(cache_dir=tmp_path).score(frames(), seed=2, want_maps=True))
    assert list(tmp_path.iterdir()) == []


def test_cache_is_shared_by_processes(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_backends as t
print(t.cpu(cache_dir={str(tmp_path)!r}).score(t.frames(), seed=2, want_maps=True).maps.tobytes().hex())
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    maps = cpu(cache_dir=tmp_path).score(frames(), seed=2, want_maps=True).maps
    assert maps is not None and outputs == [maps.tobytes().hex()] * 2
    (blob,) = tmp_path.iterdir()  # one entry, no temporary file left
    assert cache.load(tmp_path, blob.stem) is not None


def test_cache_folder_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("ADVRAD_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    assert cache.folder(None) == tmp_path / ".cache" / "advrad_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache.folder(None) == tmp_path / ".cache" / "advrad_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder(None) == tmp_path / "xdg" / "advrad_fast"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.folder(None) == tmp_path / "Library" / "Caches" / "advrad_fast"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache.folder(None) == tmp_path / "local" / "advrad_fast"
    monkeypatch.setenv("ADVRAD_CACHE", str(tmp_path / "mine"))
    assert cache.folder(None) == tmp_path / "mine"
    assert cache.folder("there") == Path("there") and cache.folder(False) is None


def test_cache_key_separates_what_differs() -> None:
    one = np.zeros((2, 3), dtype=np.float32)
    keys = {
        cache.key({"a": one}, threads=1),
        cache.key({"a": one}, threads=2),
        cache.key({"a": one}, threads=None),
        cache.key({"b": one}, threads=1),
        cache.key({"a": one.T}, threads=1),
        cache.key({"a": one + 1}, threads=1),
        cache.key({"a": one, "b": one}, threads=1),
    }
    assert len(keys) == 7
    assert cache.key({"a": np.asfortranarray(one)}, threads=1) in keys


def test_cache_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="64 hex digits"):
        cache.store(tmp_path, "../" + "0" * 61, b"")


# The choice


def test_available_names_every_backend() -> None:
    statuses = backends.available()
    assert tuple(status.name for status in statuses) == backends.BACKENDS
    by_name = {status.name: status for status in statuses}
    assert by_name["cpu"].usable and ("native engine (AMX)" if "amx" in KERNELS else "OpenVINO") in by_name["cpu"].detail
    assert by_name["reference"].usable and torch.__version__ in by_name["reference"].detail
    assert not by_name["cuda"].usable and "advrad-fast compile --kernels" in by_name["cuda"].detail


def test_available_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libtbb.so.12: cannot open shared object file")

    monkeypatch.setattr("importlib.util.find_spec", broken)
    assert all(not status.usable and "libtbb" in status.detail for status in backends.available())
    with pytest.raises(BackendUnavailableError, match="libtbb"):
        backends.create("auto", CONFIG, WEIGHTS, MU, INVERSE_SPREAD)


def test_create_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = backends.create("auto", CONFIG, WEIGHTS, MU, INVERSE_SPREAD, cache_dir=False)
    assert (chosen.name, chosen.precision) == ("cpu", "bf16" if NATIVE_BF16 else "fp32")
    assert backends.create("reference", CONFIG, WEIGHTS, MU, INVERSE_SPREAD).name == "reference"
    monkeypatch.setitem(sys.modules, "openvino", None)
    fallen_back = backends.create("auto", CONFIG, WEIGHTS, MU, INVERSE_SPREAD)
    assert (fallen_back.name, fallen_back.precision) == ("reference", "fp32")


def test_create_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"backend: expected one of \['auto', 'cuda', 'cpu', 'reference'\], got 'tpu'"):
        backends.create("tpu", CONFIG, WEIGHTS, MU, INVERSE_SPREAD)
    with pytest.raises(BackendUnavailableError) as caught:
        backends.create("cuda", CONFIG, WEIGHTS, MU, INVERSE_SPREAD)
    message = str(caught.value)
    assert "'cuda' cannot be used here" in message and "cuda: " in message and "cpu: usable" in message
    assert "reference: usable" in message
    for precision in ("fp16", "fp8"):
        with pytest.raises(ConfigError, match=rf"precision: expected .* for the cpu backend, got '{precision}'"):
            backends.create("cpu", CONFIG, WEIGHTS, MU, INVERSE_SPREAD, precision=precision)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="precision"):
        backends.create("reference", CONFIG, WEIGHTS, MU, INVERSE_SPREAD, precision="bf16")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendUnavailableError, match="cpu: openvino is not installed"):
        backends.create("cpu", CONFIG, WEIGHTS, MU, INVERSE_SPREAD)


@pytest.mark.parametrize(
    ("kernels", "openvino_bf16", "choices"),
    [
        (("amx", "portable"), True, {"auto": ("native", "bf16"), "bf16": ("native", "bf16"), "fp32": ("openvino", "fp32")}),
        (("portable",), True, {"auto": ("openvino", "bf16"), "bf16": ("openvino", "bf16"), "fp32": ("openvino", "fp32")}),
        (("portable",), False, {"auto": ("openvino", "fp32"), "bf16": None, "fp32": ("openvino", "fp32")}),
    ],
)
def test_engine_and_precision(
    monkeypatch: pytest.MonkeyPatch, kernels: tuple[str, ...], openvino_bf16: bool, choices: dict[Any, Any]
) -> None:
    """bf16 only where it would not be emulated, and by our own engine where there are tiles for it."""
    monkeypatch.setattr("advrad_fast.backends.cpu_network.KERNELS", kernels)
    monkeypatch.setattr("advrad_fast.backends.openvino_engine.computes_bf16", lambda: openvino_bf16)
    for precision, wanted in choices.items():
        if wanted is None:
            with pytest.raises(BackendUnavailableError, match="has no bf16 arithmetic; use precision='fp32'"):
                choose(precision)
        else:
            assert choose(precision) == wanted
    for precision in ("auto", "bf16"):
        if "amx" not in kernels:
            with pytest.raises(BackendUnavailableError, match="needs a processor with AMX"):
                choose(precision, "native")
        if openvino_bf16:
            assert choose(precision, "openvino") == ("openvino", "bf16")
    with pytest.raises(BackendUnavailableError, match="computes in bf16"):
        choose("fp32", "native")


def test_importing_loads_no_engine() -> None:
    code = "import sys, advrad_fast.backends; print([m for m in ('onnx', 'torch', 'openvino') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"
    code = "import sys, advrad_fast.backends.cpu; print('torch' in sys.modules or 'openvino' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=dict(os.environ)
    )
    assert done.stdout.strip() == "False"
