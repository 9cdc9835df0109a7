"""Building, loading and running engines with each library's interface, and every way in which that can fail."""

from __future__ import annotations

import inspect
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import tensorrt_names
from fake_tensorrt import DataType, FakeTensorRT, Severity
from gpu_emulation.driver import FakeDriver
from test_graph import SMALL, random_weights

from advrad_fast.backends import tensorrt_engine as engines
from advrad_fast.backends.tensorrt_library import Toolkit, _look
from advrad_fast.config import DetectorConfig, ImageConfig
from advrad_fast.errors import BackendUnavailableError, ConfigError, InferenceError

CONFIG = DetectorConfig(unet=SMALL, image=ImageConfig(height=16, width=24))
WEIGHTS = random_weights(SMALL)
KINDS = {"10": ("tensorrt", "10.3.0"), "11": ("tensorrt", "11.4.0.106"), "rtx": ("tensorrt_rtx", "1.7.1.116")}


@pytest.fixture(autouse=True)
def no_toolkits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Toolkit, "_loaded", {})
    yield


@pytest.fixture(params=KINDS)
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """Each library alone: the other is not installed."""
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    return FakeTensorRT(*KINDS[request.param]).install(monkeypatch)


def make(fake: FakeTensorRT, precision: Any = "fp16", batches: tuple[int, ...] = (1, 16), **options: Any) -> bytes:
    (library,) = [library for library in engines.libraries() if library.usable]
    options = {"target": "sm_89" if fake.rtx else "here", "library": library, **options}
    return engines.build(CONFIG, WEIGHTS, precision=precision, batches=batches, **options)


def load(fake: FakeTensorRT, blob: bytes, **options: Any) -> engines.Engine:
    return engines.Engine(blob, _look(fake.name), **options)


# What is installed


def test_libraries(fake: FakeTensorRT) -> None:
    found = {library.name: library for library in engines.libraries()}
    assert list(found) == ["tensorrt", "tensorrt_rtx"]
    mine = found.pop(fake.name)
    assert mine.usable and mine.version == fake.version and fake.version in mine.detail
    (other,) = found.values()
    assert not other.usable and "not installed: pip install" in other.detail


def test_libraries_that_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    lean = FakeTensorRT("tensorrt", "11.4.0.106").install(monkeypatch)
    del lean.module.Builder
    assert "TensorRT 11.4.0.106 has no Builder: it cannot build engines" in _look("tensorrt").detail
    FakeTensorRT("tensorrt", "8.6.1").install(monkeypatch)
    assert "8.6.1 is too old: 10 and 11 are supported" in _look("tensorrt").detail
    del lean.module.__version__
    lean.install(monkeypatch)
    assert "cannot be loaded: AttributeError" in _look("tensorrt").detail
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendUnavailableError, match=r"TensorRT is not installed: .*; TensorRT-RTX is not installed"):
        engines.choose("here")
    with pytest.raises(BackendUnavailableError, match="no library can build an engine for sm_89: TensorRT-RTX is not installed"):
        engines.build(CONFIG, WEIGHTS, target="sm_89", precision="fp16", batches=(1,))
    with pytest.raises(BackendUnavailableError, match="TensorRT is not installed"):
        engines.Engine(b"", _look("tensorrt"))


def test_importing_loads_no_library() -> None:
    code = "import sys, advrad_fast.backends.tensorrt_engine as e; e.RTX_TARGETS; import json"
    code += "; sys.stdout.write(str([m for m in ('tensorrt', 'tensorrt_rtx', 'pycuda', 'openvino', 'onnx') if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]"


# Building


def test_build(fake: FakeTensorRT, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        blob = make(fake)
    assert blob.startswith(f"engine {fake.version} 1,3,16,24;16,3,16,24 ".encode())
    assert f"{fake.name}: a warning" in caplog.text
    shapes = [(1, 3, 16, 24), (16, 3, 16, 24)]
    assert fake.named("set_shape") == [("set_shape", "x", shape, shape, shape) for shape in shapes]
    assert fake.named("clear_flag") == [("clear_flag", "TF32")]
    flags = 1 << 1 if fake.version.startswith("10.") else 0  # strongly typed: asked for, or the only kind
    assert fake.named("create_network") == [("create_network", flags)]
    assert fake.named("set_compute_capability") == ([("set_compute_capability", "SM89")] if fake.rtx else [])


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("method", ["parse", "add_optimization_profile", "build_serialized_network", "set_compute_capability"])
def test_build_fails(fake: FakeTensorRT, method: str, raises: bool) -> None:
    if method == "set_compute_capability" and not fake.rtx:
        pytest.skip("only TensorRT-RTX has it")
    fake.fail, fake.raises = method, raises
    with pytest.raises(BackendUnavailableError) as caught:
        make(fake)
    message = str(caught.value)
    assert message.startswith(("TensorRT", "TensorRT-RTX")) and fake.version in message
    assert ("node 3 is unknown" if method == "parse" and not raises else "Error Code 1: it is broken") in message
    assert message.count("it is broken") <= 1
    fake.fail = ""
    make(fake)  # the failure has left nothing behind


def test_build_refuses(fake: FakeTensorRT) -> None:
    wanted = r"batches: expected 1 to 16 ascending integers in \[1, 4096\]"
    for batches in ((), (2, 1), (1, 1), (0,), (4097,), (True,), (1.0,), "12", tuple(range(1, 18))):
        with pytest.raises(ConfigError, match=wanted):
            make(fake, batches=batches)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="precision: expected one of"):
        make(fake, "tf32")
    for precision in ("int8", "fp8"):
        with pytest.raises(ConfigError, match=f"calibration: expected network inputs of normals, which {precision} needs"):
            make(fake, precision)
    for target in ("sm_87", "sm_90", "sm_110"):
        with pytest.raises(ConfigError, match="does not build for it, and TensorRT builds only for the GPU of its own machine"):
            make(fake, target=target)
    for target in ("rtx4090", "", None, 89):
        with pytest.raises(ConfigError, match=r"target: expected 'here' or one of \['sm_75'.*\], got"):
            make(fake, target=target)
    for precision, target, first in (("bf16", "sm_75", 80), ("fp8", "sm_86", 89)):
        with pytest.raises(ConfigError, match=f"precision: {precision} needs a GPU of sm_{first} or newer, got {target}"):
            make(fake, precision, target=target)
    if not fake.rtx:
        with pytest.raises(ConfigError, match=r"target: expected 'here', which is all that TensorRT 1.* builds for, got 'sm_89'"):
            make(fake, target="sm_89")
    assert not fake.named("build_serialized_network")


# Running


@pytest.mark.parametrize("dtype", ["FLOAT", "HALF", "BF16"])
def test_an_engine_runs(fake: FakeTensorRT, cuda: Any, dtype: str) -> None:
    fake.dtype = DataType[dtype]
    engine = load(fake, make(fake))
    assert engine.batches == (1, 16)
    assert engine.input_dtype == engine.output_dtype == {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}[dtype]
    for index, batch in enumerate(engine.batches):
        execution = engine.execution(batch)
        assert execution.device_memory_bytes == 1000 * batch
        assert fake.named("create_execution_context")[-1] == ("create_execution_context", "ON_PROFILE_CHANGE")
        chosen = fake.named("set_optimization_profile_async")[-1]
        assert chosen[1] == index and chosen[2] != 0  # not the legacy stream: another thread may be capturing
        assert fake.named("set_input_shape")[-1] == ("set_input_shape", "x", (batch, 3, 16, 24))
        execution.set_addresses(0x1000, 0x2000)
        assert fake.calls[-2:] == [("set_tensor_address", "x", 0x1000), ("set_tensor_address", "output", 0x2000)]
        fake.calls.clear()
        for _ in range(3):
            execution.enqueue(77)
        assert fake.calls == [("execute_async_v3", 77)] * 3  # and nothing else
    with pytest.raises(ConfigError, match=r"batch: expected one of \[1, 16\], got 2"):
        engine.execution(2)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize(
    "method",
    [
        "create_execution_context",
        "set_optimization_profile_async",
        "set_input_shape",
        "set_tensor_address",
        "execute_async_v3",
    ],
)
def test_running_fails(fake: FakeTensorRT, cuda: Any, method: str, raises: bool) -> None:
    engine = load(fake, make(fake))
    fake.fail, fake.raises = method, raises
    with pytest.raises(InferenceError, match=r"^cuda: TensorRT .*it is broken"):
        execution = engine.execution(1)
        execution.set_addresses(0x1000, 0x2000)
        execution.enqueue(77)
    fake.fail = ""
    execution = engine.execution(1)  # what failed, as for want of memory, may be tried again
    execution.set_addresses(0x1000, 0x2000)
    execution.enqueue(77)


def test_an_engine_is_refused(fake: FakeTensorRT) -> None:
    with pytest.raises(BackendUnavailableError, match="does not load the engine: Error Code 6: the engine is of another version"):
        load(fake, b"engine 9.9.9 1,3,16,24")
    for method in ("deserialize_cuda_engine", "Runtime"):
        fake.fail, fake.raises = method, True
        with pytest.raises(BackendUnavailableError, match="it is broken"):
            load(fake, make(fake))
    fake.fail, fake.dtype = "", DataType.INT8
    with pytest.raises(BackendUnavailableError, match="of a type that no kernel here has"):
        load(fake, make(fake))


def test_kernels_are_kept(fake: FakeTensorRT, cuda: Any) -> None:
    blob, kept = make(fake), []
    engine = load(fake, blob, keep=kept.append)
    engine.execution(1)
    engine.keep_kernels()
    assert kept == ([b"kernels of 1.7.1.116"] if fake.rtx else [])
    fake.calls.clear()
    load(fake, blob, kernels=b"kernels")
    assert fake.named("deserialize") == ([("deserialize", b"kernels")] if fake.rtx else [])
    fake.fail = "deserialize"  # of another driver: compiled again
    load(fake, blob, kernels=b"foreign").execution(1)


def test_another_version_is_loaded(fake: FakeTensorRT) -> None:
    library = _look(fake.name)
    blob = make(fake)
    fake.module.__version__ = "12.0"
    with pytest.raises(BackendUnavailableError, match=rf"{fake.version} was asked for, and 12.0 is loaded"):
        engines.Engine(blob, library)


def test_the_log(fake: FakeTensorRT, caplog: pytest.LogCaptureFixture) -> None:
    """TensorRT's levels are the log's; its errors are quoted in the exception of the call that they belong to, once each."""
    make(fake)
    toolkit = Toolkit.of(_look(fake.name))
    with caplog.at_level(1), toolkit.errors() as first:
        with toolkit.errors() as second:
            for severity in Severity:
                fake.logger.log(severity, f"a line at {severity.name}")
        fake.logger.log(Severity.ERROR, "later")
    assert second == ["a line at INTERNAL_ERROR", "a line at ERROR"] and first == [*second, "later"]
    levels = {record.message.split()[-1]: record.levelno for record in caplog.records if "a line at" in record.message}
    with caplog.at_level(1):
        caplog.clear()
        fake.logger.log(Severity.WARNING, "a line at WARNING")  # once a build is enough
    assert [record.levelno for record in caplog.records] == [10]
    assert levels == {"INTERNAL_ERROR": 40, "ERROR": 40, "WARNING": 30, "INFO": 10, "VERBOSE": 5}


@pytest.mark.parametrize("kind", KINDS)
def test_the_fake_has_what_the_real_library_has(kind: str) -> None:
    """Every method of the fake with exactly the arguments of one overload, and every member of an enumeration."""
    name, version = KINDS[kind]
    real, fake = json.loads(tensorrt_names.TABLE.read_text())[f"{name} {version}"], FakeTensorRT(name, version)
    wrong = []
    for class_name, fake_class in fake.interface.items():
        members = {key: value for base in fake_class.__mro__[:-1] for key, value in vars(base).items()}
        for member, value in members.items():
            key = f"{class_name}.{member}"
            if callable(value) and not member.startswith("_"):
                arguments = list(inspect.signature(value).parameters)[1:]
                if arguments not in (real.get(key) or []):
                    wrong.append(f"{key}({', '.join(arguments)}): {real.get(key)}")
            elif not member.startswith("_") and (key not in real or real[key] is not None):
                wrong.append(key)
    for enumeration in tensorrt_names.ENUMERATIONS:
        members = [member.name for member in getattr(fake.module, enumeration, ())]
        wrong += [f"{enumeration}.{member}" for member in members if member not in real.get(enumeration, ())]
    assert wrong == []


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_the_table_of_names_is_that_of_the_installed_library(name: str) -> None:
    module = pytest.importorskip(name)
    known = json.loads(tensorrt_names.TABLE.read_text()).get(f"{name} {module.__version__}")
    if known is None:
        pytest.skip(f"{name} {module.__version__} is not in the table; tests/tensorrt_names.py writes it")
    assert tensorrt_names.describe(module) == known


def test_this_device(driver: FakeDriver) -> None:
    device = engines.this_device()
    assert device == engines.Device("NVIDIA A100 (fake)", (8, 0), engines.driver_version(13000)) and device.target == "sm_80"


def test_no_device(make_driver: Any) -> None:
    make_driver(devices=())
    with pytest.raises(BackendUnavailableError, match="cuda: there is no GPU"):
        engines.this_device()
