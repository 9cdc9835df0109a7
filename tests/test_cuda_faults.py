"""What goes wrong in the CUDA backend: every driver call, TensorRT, threads, and the ends of threads and of the interpreter."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated_engine import EmulatedEngine
from gpu_emulation.driver import Code, FakeDriver
from test_cuda import CONFIG, INVERSE_SPREAD, MU, engine, frames, make, weights_of  # noqa: F401  # fixtures

from advrad_fast import backends
from advrad_fast.backends.cuda import CudaBackend
from advrad_fast.errors import BackendUnavailableError, InferenceError

Make = Callable[..., CudaBackend]
IMAGE = frames()[4:5]

FRAME = ("cuCtxPushCurrent", "cuCtxPopCurrent", "cuGraphExecKernelNodeSetParams", "cuGraphLaunch", "cuStreamSynchronize")
PIECES = ("cuMemcpyHtoDAsync", "cuLaunchKernel", "cuMemcpyDtoHAsync")
LANE = (
    *("cuDevicePrimaryCtxRetain", "cuStreamCreate", "cuMemAlloc", "cuMemHostAlloc"),
    *("cuMemcpyHtoDAsync", "cuLaunchKernel", "cuStreamSynchronize"),
)
SESSION = ("cuInit", "cuDevicePrimaryCtxRetain", "cuModuleLoadDataEx", "cuModuleGetFunction", "cuMemAlloc", "cuMemcpyHtoD")
# Errors that end the context, as the driver's work fails.
LOST = {"kernel": Code.ILLEGAL_ADDRESS, "htod": Code.ECC_UNCORRECTABLE, "dtoh": Code.LAUNCH_FAILED}


def fails_then_works(backend: CudaBackend, wanted: Any, match: str, *, seed: int = 1) -> None:
    with pytest.raises(InferenceError, match=match):
        backend.score(IMAGE, seed=seed, want_maps=True)
    got = backend.score(IMAGE, seed=0, want_maps=True)
    assert got.scores == wanted.scores and np.array_equal(got.maps, wanted.maps)  # type: ignore[arg-type]


@pytest.mark.parametrize("code", [Code.OUT_OF_MEMORY, Code.UNKNOWN])
@pytest.mark.parametrize("call", FRAME)
def test_a_call_fails_in_a_frame(driver: FakeDriver, make: Make, call: str, code: Code) -> None:  # noqa: F811
    """An InferenceError that names it, and the next frame has its score."""
    backend = make()
    wanted = backend.score(IMAGE, seed=0, want_maps=True)
    driver.fail(call, code)
    fails_then_works(backend, wanted, f"{call}.* failed: ")


@pytest.mark.parametrize("call", PIECES)
def test_a_call_fails_in_a_frame_without_graphs(driver: FakeDriver, make: Make, call: str) -> None:  # noqa: F811
    backend = make(graphs=False)
    wanted = backend.score(IMAGE, seed=0, want_maps=True)
    for at in range(1, 4 if call == "cuLaunchKernel" else 2):
        driver.fail(call, Code.OUT_OF_MEMORY, on_call=at)
        fails_then_works(backend, wanted, f"{call} failed: out of memory")


@pytest.mark.parametrize("kind", LOST)
@pytest.mark.parametrize("graphs", [True, False])
def test_the_context_is_lost(
    driver: FakeDriver,
    make: Make,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
    kind: str,
    graphs: bool,
) -> None:
    """Everything is opened again, for every thread."""
    backend = make(graphs=graphs)
    wanted = backend.score(IMAGE, seed=0, want_maps=True)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(backend.score, IMAGE, seed=0, want_maps=True).result().scores == wanted.scores
        driver.fail_work(kind, LOST[kind])
        fails_then_works(backend, wanted, " failed: ")
        assert other.submit(backend.score, IMAGE, seed=0, want_maps=True).result().scores == wanted.scores
    capfd.readouterr()  # pycuda says of what is gone that it is gone


def test_a_lost_context_that_another_holds(driver: FakeDriver, cuda: Any, make: Make, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """As PyTorch would: there is no other way than a new process, and every frame says that it failed."""
    backend = make()
    driver.fail_work("kernel", Code.ILLEGAL_ADDRESS)
    for _ in range(3):
        with pytest.raises(InferenceError, match="illegal memory access"):
            backend.score(IMAGE, seed=0, want_maps=False)
    backend.close()
    capfd.readouterr()


@pytest.mark.parametrize("call", LANE)
def test_a_call_fails_for_a_new_thread(driver: FakeDriver, make: Make, call: str) -> None:  # noqa: F811
    """Its frame fails, the others' lanes and its next frame do not."""
    backend = make()
    wanted = backend.score(IMAGE, seed=0, want_maps=True)
    with ThreadPoolExecutor(1) as other:
        driver.fail(call, Code.OUT_OF_MEMORY, times=2 if call == "cuMemAlloc" else 1)  # pycuda asks twice for memory
        with pytest.raises(InferenceError, match=f"{call}.* failed: out of memory"):
            other.submit(backend.score, IMAGE, seed=0, want_maps=True).result()
        assert backend.score(IMAGE, seed=0, want_maps=True).scores == wanted.scores
        assert other.submit(backend.score, IMAGE, seed=0, want_maps=True).result().scores == wanted.scores


@pytest.mark.parametrize("call", [*SESSION, *LANE[1:]])
def test_a_call_fails_while_opening(driver: FakeDriver, make: Make, call: str) -> None:  # noqa: F811
    """Nothing is left behind, and what is tried again works."""
    driver.fail(call, Code.OUT_OF_MEMORY, times=2 if call == "cuMemAlloc" else 1)  # pycuda asks twice for memory
    with pytest.raises(BackendUnavailableError, match=f"{call}.*: out of memory"):
        make()
    gc.collect()
    assert driver.leaks() == []
    make().score(IMAGE, seed=0, want_maps=False)


ENGINE = ("Runtime", "deserialize_cuda_engine", "create_execution_context", "set_tensor_address", "execute_async_v3")


@pytest.mark.parametrize("method", ENGINE)
@pytest.mark.parametrize("raises", [False, True])
def test_tensorrt_fails(driver: FakeDriver, engine: EmulatedEngine, make: Make, method: str, raises: bool) -> None:  # noqa: F811
    if method == "Runtime" and not raises:
        return  # a constructor can only raise
    engine.trt.fail, engine.trt.raises = method, raises
    with pytest.raises(BackendUnavailableError, match=f"raises|is broken|{method}"):
        make()
    assert driver.leaks() == []
    engine.trt.fail = ""
    backend = make()
    wanted = backend.score(IMAGE, seed=0, want_maps=False)
    if method == "execute_async_v3":
        backend.score(IMAGE, seed=0, want_maps=False)
        engine.trt.fail = method
        with pytest.raises(InferenceError, match=r"cannot run the network.*it is broken"):
            backend.score(IMAGE, seed=0, want_maps=True)
        engine.trt.fail = ""
        assert backend.score(IMAGE, seed=0, want_maps=True).scores == wanted.scores


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("maps", [False, True])
def test_what_is_not_finite_is_no_score(engine: EmulatedEngine, make: Make, value: float, maps: bool) -> None:  # noqa: F811
    backend = make()
    wanted = backend.score(IMAGE, seed=0, want_maps=maps)
    engine.broken = value
    with pytest.raises(InferenceError, match="score: expected a finite number"):
        backend.score(IMAGE, seed=0, want_maps=maps)
    engine.broken = None
    assert backend.score(IMAGE, seed=0, want_maps=maps).scores == wanted.scores


def test_kernels_of_another_version(executable: Any, tmp_path: Path, make: Make) -> None:  # noqa: F811
    text = (executable.folder / "manifest.json").read_text()
    for path in executable.folder.glob("*/*"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        (tmp_path / path.parent.name / path.name).symlink_to(path)
    with pytest.raises(BackendUnavailableError, match=r"manifest.json: cannot be read.*advrad-fast compile --kernels"):
        make(kernels_dir=tmp_path)
    (tmp_path / "manifest.json").write_text(text.replace('"lattice_scale"', '"lattice_step"'))
    with pytest.raises(BackendUnavailableError, match=r"another version.*lattice_step.*advrad-fast compile --kernels"):
        make(kernels_dir=tmp_path)
    (tmp_path / "manifest.json").write_text(text.replace('"noise": "gaussian"', '"noise": "brown"'))
    with pytest.raises(BackendUnavailableError, match=r"cannot be used: .*no kernel noise"):
        make(kernels_dir=tmp_path)


# Threads


def test_threads(driver: FakeDriver, make: Make) -> None:  # noqa: F811
    """Each has its own lane, and the same results; what it had goes with it."""
    backend, images = make(), frames()
    wanted = [backend.score(images[i : i + 1], seed=i, want_maps=True) for i in range(5)]
    gate, wrong = threading.Barrier(3), []

    def work(first: int) -> None:
        gate.wait()
        for k in range(5):
            i = (first + k) % 5
            got = backend.score(images[i : i + 1], seed=i, want_maps=True)
            if got.scores != wanted[i].scores or not np.array_equal(got.maps, wanted[i].maps):  # type: ignore[arg-type]
                wrong.append(i)

    before = driver.leaks()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(driver.leaks()) == len(before)


def test_closing(driver: FakeDriver, make: Make) -> None:  # noqa: F811
    """Other threads' lanes too; later frames are refused; twice is fine."""
    backend = make()
    with ThreadPoolExecutor(1) as other:
        other.submit(backend.score, IMAGE, seed=0, want_maps=False).result()
        backend.close()
        backend.close()
        assert driver.leaks() == []
        for call in (backend.score, lambda *a, **k: other.submit(backend.score, *a, **k).result()):
            with pytest.raises(InferenceError, match="the detector was closed"):
                call(IMAGE, seed=0, want_maps=False)
        assert driver.leaks() == []


def test_a_backend_that_is_forgotten(driver: FakeDriver, engine: EmulatedEngine) -> None:  # noqa: F811
    backend = CudaBackend(CONFIG, weights_of(CONFIG), MU, INVERSE_SPREAD, precision="fp32", cache_dir=False)
    backend.score(IMAGE, seed=0, want_maps=False)
    del backend
    gc.collect()
    assert driver.leaks() == []


def test_the_context_of_the_caller_stays(driver: FakeDriver, make: Make) -> None:  # noqa: F811
    """A frame leaves the thread's own context current, also where it fails."""
    import pycuda.driver

    backend = make()
    mine = pycuda.driver.Device(0).make_context()
    backend.score(IMAGE, seed=0, want_maps=False)
    driver.fail("cuGraphLaunch", Code.UNKNOWN)
    with pytest.raises(InferenceError):
        backend.score(IMAGE, seed=0, want_maps=False)
    assert pycuda.driver.Context.get_current().handle == mine.handle
    mine.pop()
    mine.detach()


EXIT = """
import atexit, sys, threading
def last():
    sys.stdout.write(f"leaks {{driver.leaks()}} faults {{driver.take_faults()}}")
    sys.stdout.flush()
atexit.register(last)  # runs after what is registered later
sys.path.insert(0, {tests!r})
import pytest
from emulated_engine import EmulatedEngine, teach
from gpu_emulation.driver import FakeDriver
from test_cuda import CONFIG, INVERSE_SPREAD, MU, frames, weights_of
from advrad_fast.backends.cuda import CudaBackend
from advrad_fast.kernels.manifest import read_manifest
folder = {folder!r}
driver = FakeDriver().__enter__()
teach(driver, read_manifest(__import__("pathlib").Path(folder)))
EmulatedEngine(driver, pytest.MonkeyPatch())
backend = CudaBackend(CONFIG, weights_of(CONFIG), MU, INVERSE_SPREAD, precision="fp32", cache_dir=False, kernels_dir=folder)
backend.score(frames()[:1], seed=0, want_maps=True)
def forever():
    while True:
        backend.score(frames()[:1], seed=1, want_maps=False)
started = threading.Thread(target=forever, daemon=True)
{start}
"""


@pytest.mark.parametrize("start", ["", "started.start(); import time; time.sleep(1.0)", "sys.exit(3)"])
def test_the_interpreter_ends(fake_library: None, executable: Any, start: str) -> None:
    """Everything is given back, also under a thread that is in the middle of a frame."""
    code = EXIT.format(tests=str(Path(__file__).parent), folder=str(executable.folder), start=start)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert run.stdout == "leaks [] faults []", run.stderr
    assert run.returncode == (3 if "exit" in start else 0)
    assert "InferenceError" not in run.stderr or "the detector was closed" in run.stderr
    assert "PyCUDA" not in run.stderr


def test_auto_goes_on_to_the_next(
    driver: FakeDriver,
    make: Make,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first choice where it works; what cannot be opened is said in the log."""
    arguments = (CONFIG, weights_of(CONFIG), MU, INVERSE_SPREAD)
    status = backends.available()[0]
    assert status.usable and status.detail == "NVIDIA A100 (fake) (sm_80), TensorRT 10.3.0, fp16"
    chosen = backends.create("auto", *arguments, precision="fp32", cache_dir=False)
    assert chosen.name == "cuda" and isinstance(chosen, CudaBackend)
    chosen.close()
    driver.fail("cuMemAlloc", Code.OUT_OF_MEMORY, times=4)
    with pytest.raises(BackendUnavailableError, match="cuMemAlloc failed: out of memory"):
        backends.create("cuda", *arguments, precision="fp32", cache_dir=False)
    assert backends.create("auto", *arguments, precision="fp32", cache_dir=False).name == "cpu"
    assert "backend cuda: cuda: cuMemAlloc failed: out of memory" in caplog.text
