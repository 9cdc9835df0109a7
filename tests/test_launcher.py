"""The launcher: the real pycuda, on the fake driver, whose kernels run on the PTX emulator."""

from __future__ import annotations

import ctypes
import importlib
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_emulation import affine
from gpu_emulation.driver import A100, H100, L4, ORIN, RTX5090, T4, Code, DeviceSpec, FakeDriver
from gpu_emulation.driver.graphs import GLOBAL
from gpu_emulation.driver.library import call

from advrad_fast.errors import BackendUnavailableError, ConfigError, InferenceError, KernelFileError
from advrad_fast.kernels.launcher import Gpu, Kernels, candidates, open_gpu
from advrad_fast.kernels.manifest import Manifest, read_manifest

N = 200


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cubin and PTX for sm_75, sm_80, sm_90a."""
    rows = [affine.row(tmp_path, "sm_75"), affine.row(tmp_path, "sm_80"), affine.row(tmp_path, "sm_90", specific=True)]
    return affine.write_manifest(tmp_path, rows)


def teach(driver: FakeDriver, manifest: Manifest) -> None:
    """Tells the fake what its cubins do."""
    for kernel in manifest.kernels:
        driver.modules.know(manifest.image(kernel, "cubin"), manifest.image(kernel, "ptx").decode(), kernel.arch)


class Bench:
    """The kernel on a GPU, with its data."""

    def __init__(self, gpu: Gpu, folder: Path) -> None:
        self.cuda = gpu.cuda
        self.kernel = Kernels(folder, gpu).load("noise", dtype="fp32")
        self.stream = self.cuda.Stream()
        self.x, self.out = self.cuda.mem_alloc(4 * N), self.cuda.mem_alloc(4 * N)
        self.host = self.cuda.pagelocked_empty(N, np.float32)
        self.arguments = {"x": self.x, "out": self.out, "n": N, "a": 2.0, "b": -1.0}

    def result(self) -> Any:
        self.cuda.memcpy_dtoh_async(self.host, self.out, self.stream)
        self.stream.synchronize()
        return self.host


@pytest.fixture
def gpu(driver: FakeDriver, folder: Path) -> Iterator[Gpu]:
    teach(driver, read_manifest(folder))
    with open_gpu() as opened:
        yield opened


@pytest.fixture
def bench(gpu: Gpu, folder: Path) -> Bench:
    return Bench(gpu, folder)


# The whole way


def test_a_launch_from_end_to_end(driver: FakeDriver, bench: Bench, rng: np.random.Generator) -> None:
    """Launcher, pycuda, libcuda, emulator: numbers exact, one launch of the manifest's grid, nothing allocated, no wait."""
    values = rng.standard_normal(N).astype(np.float32)
    bench.cuda.memcpy_htod(bench.x, values)
    assert bench.kernel.kind == "cubin" and bench.kernel.kernel.target == "sm_80"
    before = dict(driver.counters.calls)
    bench.kernel(bench.stream, **bench.arguments)
    calls = {name: count - before.get(name, 0) for name, count in driver.counters.calls.items() if count != before.get(name, 0)}
    assert calls == {"cuLaunchKernel": 1}
    (launch,) = driver.launches
    assert (launch.entry, launch.grid, launch.block, launch.shared) == ("affine", (4, 1, 1), (64, 1, 1), 0)
    np.testing.assert_array_equal(bench.result(), 2 * values - 1)


def test_a_prepared_launch(driver: FakeDriver, bench: Bench) -> None:
    launch = bench.kernel.prepare(bench.stream, **bench.arguments)
    assert driver.launches == []
    for value in (1, 2, 3):
        bench.cuda.memset_d32_async(bench.x, np.float32(value).view(np.uint32).item(), N, bench.stream)
        launch()
        assert (bench.result() == 2 * value - 1).all()
    assert len(driver.launches) == 3


def test_a_prepared_launch_with_other_arguments(driver: FakeDriver, bench: Bench) -> None:
    """Each launch has what was set before it; what the grid follows from stays."""
    bench.cuda.memset_d32(bench.x, 0, N)
    launch = bench.kernel.prepare(bench.stream, **bench.arguments)
    for b in (3.0, 4.0):
        launch.set(b=b, x=int(bench.x))
        launch()
    assert (bench.result() == 4.0).all()
    assert [struct.unpack_from("f", each.parameters, 24)[0] for each in driver.launches] == [3.0, 4.0]
    assert [ctypes.c_float.from_address(launch.addresses[4]).value, len(launch.addresses)] == [4.0, 6]
    with pytest.raises(ConfigError, match="b: expected a number"):
        launch.set(b="2")
    for name in ("n", "scratch", "c"):
        with pytest.raises(ConfigError, match=rf"argument to change: expected one of \['a', 'b', 'out', 'x'\], got '{name}'"):
            launch.set(**{name: 1})


def test_launches_are_captured(driver: FakeDriver, bench: Bench) -> None:
    """Called or prepared, a launch is a node of a graph: nothing in it that a capture forbids."""
    graph, executable = ctypes.c_uint64(), ctypes.c_uint64()
    launch = bench.kernel.prepare(bench.stream, **{**bench.arguments, "x": bench.out, "b": 5.0})
    assert call("cuStreamBeginCapture_v2", bench.stream.handle, GLOBAL) == Code.SUCCESS
    bench.kernel(bench.stream, **bench.arguments)
    launch()
    assert call("cuStreamEndCapture", bench.stream.handle, ctypes.addressof(graph)) == Code.SUCCESS
    assert call("cuGraphInstantiateWithFlags", ctypes.addressof(executable), graph.value, 0) == Code.SUCCESS
    bench.cuda.memset_d32_async(bench.x, 0, N, bench.stream)
    assert call("cuGraphLaunch", executable.value, bench.stream.handle) == Code.SUCCESS
    assert (bench.result() == 2 * -1 + 5).all()
    assert call("cuGraphExecDestroy", executable.value) == call("cuGraphDestroy", graph.value) == Code.SUCCESS


def test_pointers_of_every_sort(driver: FakeDriver, bench: Bench) -> None:
    """What knows its device address: allocations, pooled ones, addresses, and arrays of other libraries."""

    class Array:
        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            return {"data": (int(bench.x), False), "shape": (N,), "typestr": "<f4", "version": 3}

    class Tensor:
        def data_ptr(self) -> int:
            return int(bench.x)

    bench.cuda.memset_d32(bench.x, 0, N)
    for x in (bench.x, int(bench.x), np.uint64(int(bench.x)), Array(), Tensor()):
        bench.kernel(bench.stream, **{**bench.arguments, "x": x})
    assert len({launch.parameters for launch in driver.launches}) == 1
    bench.stream.synchronize()


def test_integers_of_numpy(driver: FakeDriver, bench: Bench) -> None:
    bench.cuda.memset_d32(bench.x, 0, N)
    bench.kernel(bench.stream, **{**bench.arguments, "n": np.int64(N), "a": np.float32(2), "b": -1})
    bench.kernel(bench.stream, **bench.arguments)
    assert driver.launches[0].parameters == driver.launches[1].parameters
    bench.stream.synchronize()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"c": 1}, r"unknown arguments \['c'\], missing arguments \[\]"),
    "null pointers aren't given": ({"scratch": 0}, r"unknown arguments \['scratch'\]"),
    "no integer": ({"n": 1.5}, "n: expected an integer, got 1.5"),
    "a truth value": ({"n": True}, "n: expected an integer, got True"),
    "an array": ({"n": np.array([3])}, "n: expected an integer"),
    "over 32 bits": ({"n": 2**31}, "n: expected an integer in"),
    "an empty grid": ({"n": 0}, "grid: expected 1 to"),
    "a text": ({"a": "2"}, "a: expected a number"),
    "NaN": ({"b": float("nan")}, "b: expected a number of fp32, got nan"),
    "beyond fp32": ({"a": 1e39}, "a: expected a number of fp32"),
    "no pointer": ({"x": 1.5}, "x: expected a device pointer"),
    "host memory": ({"x": np.zeros(N, np.float32)}, "x: expected a device pointer"),
    "one element of host memory": ({"x": np.zeros(1, np.int64)}, "x: expected a device pointer"),
    "None": ({"x": None}, "x: expected a device pointer"),
    "zero": ({"x": 0}, "x: expected a device address"),
    "misaligned": ({"x": 4096 + 8}, "x: expected a device address that is a multiple of 16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(driver: FakeDriver, bench: Bench, case: str) -> None:
    changed, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        bench.kernel(bench.stream, **{**bench.arguments, **changed})
    assert driver.launches == []


def test_a_missing_argument(bench: Bench) -> None:
    del bench.arguments["n"]
    with pytest.raises(ConfigError, match=r"missing arguments \['n'\]"):
        bench.kernel(bench.stream, **bench.arguments)


def test_a_tensor_of_the_host(bench: Bench) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ConfigError, match="x: expected a device pointer"):
        bench.kernel(bench.stream, **{**bench.arguments, "x": torch.zeros(N)})


def test_no_stream(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="stream: expected a pycuda Stream or None"):
        bench.kernel(0, **bench.arguments)


def test_the_kernel_s_own_faults_reach_the_caller(driver: FakeDriver, bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    """x is half as long as n says: the emulator finds it, the wait reports it, and the next launch is an InferenceError."""
    short = bench.cuda.mem_alloc(2 * N)
    bench.cuda.memset_d32(short, 0, N // 2)
    bench.kernel(bench.stream, **{**bench.arguments, "x": short})
    with pytest.raises(bench.cuda.Error, match="illegal memory access"):
        bench.stream.synchronize()
    with pytest.raises(InferenceError, match="noise: cuLaunchKernel failed: an illegal memory access"):
        bench.kernel(bench.stream, **bench.arguments)
    (fault,) = driver.take_faults()
    assert "out of bounds" in fault and "ld.global.f32" in fault
    capfd.readouterr()


def test_a_missing_synchronisation_is_found(driver: FakeDriver, bench: Bench) -> None:
    bench.cuda.memset_d32_async(bench.x, 0, N, bench.stream)
    bench.kernel(bench.stream, **bench.arguments)
    bench.cuda.memcpy_dtoh_async(bench.host, bench.out, bench.stream)
    assert np.isnan(bench.host).all()
    bench.stream.synchronize()
    assert (bench.host == -1).all()


def test_two_threads_share_kernels(driver: FakeDriver, gpu: Gpu, folder: Path, bench: Bench) -> None:
    results = []

    def work() -> None:
        with open_gpu() as mine:
            stream, host = mine.cuda.Stream(), mine.cuda.pagelocked_empty(N, np.float32)
            mine.cuda.memset_d32_async(int(bench.x), 0, N, stream)
            bench.kernel(stream, **{**bench.arguments, "x": int(bench.x), "out": int(bench.out)})
            mine.cuda.memcpy_dtoh_async(host, int(bench.out), stream)
            stream.synchronize()
            results.append(host.copy())
            del stream, host

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (results[0] == -1).all()
    assert driver.contexts.retained() == ["primary context of device 0, retained 1 times"]


# Which image for which GPU

CHOICES = {
    T4: ("sm_75", "cubin"),
    A100: ("sm_80", "cubin"),
    L4: ("sm_80", "cubin"),  # of the same major version
    ORIN: ("sm_80", "ptx"),  # the driver of a Tegra takes no other GPU's cubin
    H100: ("sm_90", "cubin"),
    RTX5090: ("sm_80", "ptx"),  # sm_90a is for nothing else
}


@pytest.mark.parametrize("spec", CHOICES, ids=lambda spec: spec.name)
def test_the_image_for_a_gpu(make_driver: Callable[..., FakeDriver], folder: Path, spec: DeviceSpec) -> None:
    manifest = read_manifest(folder)
    driver = make_driver((spec,))
    teach(driver, manifest)
    assert candidates(manifest, "noise", spec.capability, dtype="fp32")[0] == manifest.find(
        "noise", spec.capability, dtype="fp32"
    )
    with open_gpu() as gpu:
        bench = Bench(gpu, folder)
        assert (bench.kernel.kernel.target, bench.kernel.kind) == CHOICES[spec]
        bench.cuda.memset_d32_async(bench.x, 0, N, bench.stream)
        bench.kernel(bench.stream, **bench.arguments)
        assert (bench.result() == -1).all()
        del bench


def test_the_order_of_candidates(folder: Path) -> None:
    found = [(kernel.arch, kind) for kernel, kind in candidates(read_manifest(folder), "noise", (9, 0), dtype="fp32")]
    assert found == [("sm_90a", "cubin"), ("sm_90a", "ptx"), ("sm_80", "ptx"), ("sm_75", "ptx")]


def test_a_cubin_that_the_driver_refuses(driver: FakeDriver, folder: Path) -> None:
    """The driver isn't told of the cubins: PTX is the way out."""
    with open_gpu() as gpu:
        kernel = Kernels(folder, gpu).load("noise", dtype="fp32")
        assert (kernel.kernel.target, kernel.kind) == ("sm_80", "ptx")
    assert any("NO_BINARY_FOR_GPU" in refusal for refusal in driver.refusals)


def test_a_driver_that_is_too_old(make_driver: Callable[..., FakeDriver], tmp_path: Path) -> None:
    make_driver((A100,), version=12040)
    affine.write_manifest(tmp_path, [affine.row(tmp_path, "sm_75", "8.7"), affine.row(tmp_path, "sm_80", "9.0")])
    with open_gpu() as gpu, pytest.raises(BackendUnavailableError) as caught:
        Kernels(tmp_path, gpu).load("noise", dtype="fp32")
    lines = str(caught.value).splitlines()
    assert (
        lines[0]
        == "NVIDIA A100 (fake) (compute capability 8.0, driver for CUDA 12.4): the driver takes no image of the kernel noise:"
    )
    assert [line.split(": ")[0] for line in lines[1:]] == [
        "  sm_80 cubin",
        "  sm_80 ptx (needs a driver that reads PTX 9.0)",
        "  sm_75 ptx (needs a driver that reads PTX 8.7)",
    ]
    assert "unsupported toolchain" in lines[2]


def test_a_gpu_that_is_too_old(make_driver: Callable[..., FakeDriver], folder: Path) -> None:
    make_driver((DeviceSpec("GeForce GTX 1080 (fake)", (6, 1)),))
    with (
        open_gpu() as gpu,
        pytest.raises(BackendUnavailableError, match=r"6\.1.*compiled for sm_75, sm_80, sm_90a, for nothing older"),
    ):
        Kernels(folder, gpu).load("noise", dtype="fp32")


def test_a_kernel_that_is_not_there(gpu: Gpu, folder: Path) -> None:
    with pytest.raises(KernelFileError, match="no kernel noise"):
        Kernels(folder, gpu).load("noise", dtype="fp16")


def test_kernels_are_loaded_once(driver: FakeDriver, gpu: Gpu, folder: Path) -> None:
    kernels = Kernels(folder, gpu)
    assert kernels.load("noise", dtype="fp32") is kernels.load("noise", dtype="fp32")
    assert driver.counters.calls["cuModuleLoadDataEx"] == 1


def test_shared_memory_beyond_the_default(make_driver: Callable[..., FakeDriver], tmp_path: Path) -> None:
    """Is asked for when the kernel is loaded; the GPU that hasn't as much is told apart."""
    driver = make_driver((ORIN, T4))
    affine.write_manifest(tmp_path, [affine.row(tmp_path, "sm_75", shared=100 << 10)])
    with open_gpu(0) as gpu:
        kernel = Kernels(tmp_path, gpu).load("noise", dtype="fp32")
        out = gpu.cuda.mem_alloc(64)
        gpu.cuda.memset_d32(out, 0, 16)
        kernel(None, x=out, out=out, n=16, a=1.0, b=0.0)
        gpu.cuda.Context.synchronize()
        assert driver.launches[0].shared == 100 << 10
        del out, kernel
    with open_gpu(1) as gpu, pytest.raises(BackendUnavailableError, match="cuFuncSetAttribute failed: invalid argument"):
        Kernels(tmp_path, gpu).load("noise", dtype="fp32")


# What goes wrong on the way

OPENING = ("cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceComputeCapability", "cuDriverGetVersion")


@pytest.mark.parametrize("call", [*OPENING, "cuDevicePrimaryCtxRetain"])
def test_an_error_while_opening(driver: FakeDriver, call: str) -> None:
    driver.fail(call, Code.SYSTEM_DRIVER_MISMATCH)
    with pytest.raises(BackendUnavailableError, match=f"GPU 0: the NVIDIA driver says: {call} failed: system driver mismatch"):
        open_gpu()
    assert driver.contexts.retained() == []


def test_an_error_while_entering(driver: FakeDriver) -> None:
    driver.fail("cuCtxPushCurrent", Code.OUT_OF_MEMORY)
    gpu = open_gpu()
    with pytest.raises(InferenceError, match="its context cannot be made current: cuCtxPushCurrent failed: out of memory"):
        gpu.push()
    gpu.close()
    assert driver.contexts.retained() == []


@pytest.mark.parametrize("call", ["cuModuleLoadDataEx", "cuModuleGetFunction"])
@pytest.mark.parametrize("code", [Code.INVALID_IMAGE, Code.NO_BINARY_FOR_GPU, Code.INVALID_PTX, Code.UNKNOWN])
def test_an_error_while_loading(driver: FakeDriver, gpu: Gpu, folder: Path, call: str, code: Code) -> None:
    """Once: the next image is taken.  Always: every image and what the driver said of it."""
    driver.fail(call, code)
    assert Kernels(folder, gpu).load("noise", dtype="fp32").kind == "ptx"
    driver.fail(call, code, times=3)
    with pytest.raises(BackendUnavailableError, match=f"(?s)sm_80 cubin: {call}.*sm_80 ptx.*{call}.*sm_75 ptx.*{call}"):
        Kernels(folder, gpu).load("noise", dtype="fp32")


def test_no_memory_for_a_kernel(driver: FakeDriver, gpu: Gpu, folder: Path) -> None:
    driver.fail("cuModuleLoadDataEx", Code.OUT_OF_MEMORY)
    with pytest.raises(InferenceError, match="no memory to load the kernel noise"):
        Kernels(folder, gpu).load("noise", dtype="fp32")


@pytest.mark.parametrize("code", [Code.LAUNCH_OUT_OF_RESOURCES, Code.INVALID_VALUE, Code.OUT_OF_MEMORY, Code.LAUNCH_FAILED])
def test_an_error_at_the_launch(driver: FakeDriver, bench: Bench, code: Code) -> None:
    driver.fail("cuLaunchKernel", code, on_call=2)
    bench.kernel(bench.stream, **bench.arguments)
    with pytest.raises(InferenceError, match="noise: cuLaunchKernel failed"):
        bench.kernel(bench.stream, **bench.arguments)
    bench.cuda.memset_d32(bench.x, 0, N)
    driver.launches.clear()


def test_no_such_gpu(driver: FakeDriver) -> None:
    with pytest.raises(BackendUnavailableError, match="GPU 1: there are 1 GPUs here"):
        open_gpu(1)
    with pytest.raises(ConfigError, match="ordinal"):
        open_gpu(-1)


def test_no_gpu(make_driver: Callable[..., FakeDriver]) -> None:
    make_driver(())
    with pytest.raises(BackendUnavailableError, match="no CUDA-capable device"):
        open_gpu()


def test_closing_twice_and_use_after_closing(driver: FakeDriver) -> None:
    gpu = open_gpu()
    gpu.close()
    gpu.close()
    with pytest.raises(InferenceError, match="was closed"):
        gpu.push()


def test_closing_leaves_the_stack_of_contexts(driver: FakeDriver) -> None:
    """Whoever closes it, and whatever is current there."""
    gpus = [open_gpu() for _ in range(3)]
    gpus.pop().close()
    assert driver.contexts.stack == []
    mine = gpus[0].cuda.Device(0).make_context()
    gpus.pop().close()
    assert [context.handle for context in driver.contexts.stack] == [mine.handle]
    mine.pop()
    mine.detach()
    thread = threading.Thread(target=gpus.pop().close)
    thread.start()
    thread.join()
    assert driver.contexts.stack == driver.contexts.retained() == []


def test_no_pycuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name="pycuda")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(BackendUnavailableError, match="GPU 0: pycuda is not installed"):
        open_gpu()


def new_process(code: str) -> str:
    """What a new interpreter, to which nobody has given the fake, writes to standard error."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr


def test_no_driver(fake_library: None) -> None:
    """The real pycuda finds no libcuda."""
    said = new_process("from advrad_fast.kernels.launcher import open_gpu\nopen_gpu()")
    if not said or "no CUDA-capable device" in said:
        pytest.skip("this machine has a driver")
    (last,) = said.splitlines()[-1:]
    assert last.startswith("advrad_fast.errors.BackendUnavailableError: GPU 0: pycuda cannot be loaded: libcuda.so.1:")


def test_the_launcher_loads_neither_pycuda_nor_triton() -> None:
    loaded = "{'pycuda', 'triton', 'torch'} & set(sys.modules)"
    assert new_process(f"import sys\nimport advrad_fast.kernels.launcher\nsys.exit(' '.join({loaded}))").strip() == ""
