"""The real pycuda on the fake driver: images of every sort, functions, limits of launches, and kernels' faults."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_emulation import affine
from gpu_emulation.driver import A100, H100, L4, ORIN, RTX5090, T4, Code, DeviceSpec, FakeDriver, Launch
from gpu_emulation.driver.library import call

N = 100


def load(cuda: Any, image: bytes | str) -> Any:
    return cuda.module_from_buffer((image.encode() if isinstance(image, str) else image) + b"\0")


def packed(x: Any, out: Any, n: int = N, a: float = 2.0, b: float = 1.0) -> bytes:
    return struct.pack("@QQiffQ", int(x), int(out), n, a, b, 0)


@pytest.fixture
def function(cuda: Any) -> Any:
    module = load(cuda, affine.PTX)
    function = module.get_function("affine")
    function.module = module  # pycuda doesn't keep it
    return function


@pytest.fixture
def places(cuda: Any) -> tuple[Any, Any]:
    x, out = cuda.mem_alloc(4 * N), cuda.mem_alloc(4 * N)
    cuda.memcpy_htod(x, np.arange(N, dtype=np.float32))
    return x, out


def result(cuda: Any, out: Any) -> Any:
    back = np.zeros(N, np.float32)
    cuda.memcpy_dtoh(back, out)
    return back


def test_pycuda_s_own_call(driver: FakeDriver, cuda: Any, function: Any, places: tuple[Any, Any]) -> None:
    """Parameters as pycuda packs them."""
    x, out = places
    numbers = np.int32(N), np.float32(2), np.float32(1), np.uint64(0)
    function(x, out, *numbers, grid=(2, 1), block=(64, 1, 1), stream=cuda.Stream())
    np.testing.assert_array_equal(result(cuda, out), 2 * np.arange(N) + 1)
    assert driver.counters.launches == 1


def test_parameters_one_by_one(driver: FakeDriver, cuda: Any, function: Any, places: tuple[Any, Any]) -> None:
    """kernelParams, as C++ gives them: an array of addresses, one for each parameter."""
    handle, name = ctypes.c_uint64(), ctypes.create_string_buffer(b"affine")
    module = ctypes.c_uint64()
    image = ctypes.create_string_buffer(affine.PTX.encode())
    assert call("cuModuleLoadData", ctypes.addressof(module), ctypes.addressof(image)) == Code.SUCCESS
    assert call("cuModuleGetFunction", ctypes.addressof(handle), module.value, ctypes.addressof(name)) == Code.SUCCESS
    x, out = (ctypes.c_uint64(int(place)) for place in places)
    values = (x, out, ctypes.c_int32(N), ctypes.c_float(3), ctypes.c_float(0), ctypes.c_uint64(0))
    addresses = (ctypes.c_uint64 * 6)(*(ctypes.addressof(value) for value in values))
    launch = handle.value, 2, 1, 1, 64, 1, 1, 0, 0, ctypes.addressof(addresses), 0
    assert call("cuLaunchKernel", *launch) == Code.SUCCESS
    np.testing.assert_array_equal(result(cuda, places[1]), 3 * np.arange(N))
    assert call("cuModuleUnload", module.value) == Code.SUCCESS
    assert call("cuLaunchKernel", *launch[:9], 0, 0) == Code.INVALID_VALUE  # no parameters


LAUNCHES: dict[str, tuple[dict[str, Any], str]] = {
    "an empty grid": ({"grid": (0, 1, 1)}, "grid"),
    "a grid too high": ({"grid": (1, 65536, 1)}, "grid"),
    "too many threads": ({"block": (1025, 1, 1)}, "block"),
    "not the block that it was compiled for": ({"block": (32, 1, 1)}, "compiled for"),
    "too much shared memory": ({"shared": 49153}, "shared memory"),
    "parameters too short": ({"buffer": bytes(36)}, "36 bytes of parameters, affine has 40"),
    "parameters too long": ({"buffer": bytes(48)}, "48 bytes of parameters, affine has 40"),
}


@pytest.mark.parametrize("case", LAUNCHES)
def test_launches_that_are_refused(driver: FakeDriver, cuda: Any, function: Any, places: tuple[Any, Any], case: str) -> None:
    changed, why = LAUNCHES[case]
    arguments = {"grid": (2, 1, 1), "block": (64, 1, 1), "buffer": packed(*places), "shared": 0, **changed}
    with pytest.raises(cuda.LogicError, match="invalid argument"):
        function._launch_kernel(arguments["grid"], arguments["block"], arguments["buffer"], arguments["shared"], None)
    assert why in driver.refusals[-1]
    assert driver.launches == []


def test_attributes_of_a_function(driver: FakeDriver, cuda: Any, function: Any) -> None:
    attribute = cuda.function_attribute
    assert function.get_attribute(attribute.MAX_THREADS_PER_BLOCK) == 64
    assert function.get_attribute(attribute.BINARY_VERSION) == 80
    assert function.get_attribute(attribute.PTX_VERSION) == 80
    function.set_attribute(attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, A100.shared)
    assert function.get_attribute(attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES) == A100.shared
    with pytest.raises(cuda.LogicError, match="invalid argument"):
        function.set_attribute(attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, A100.shared + 1)


def test_an_entry_that_is_not_there(driver: FakeDriver, cuda: Any, function: Any) -> None:
    with pytest.raises(cuda.LogicError, match="named symbol not found"):
        function.module.get_function("other")


IMAGES: dict[str, tuple[DeviceSpec, int, str, Code]] = {
    "older PTX": (H100, 13000, affine.ptx("sm_75"), Code.SUCCESS),
    "PTX for a newer GPU": (T4, 13000, affine.ptx("sm_80"), Code.INVALID_PTX),
    "PTX for this GPU only": (H100, 13000, affine.ptx("sm_90a"), Code.SUCCESS),
    "PTX for another GPU only": (RTX5090, 13000, affine.ptx("sm_90a"), Code.INVALID_PTX),
    "PTX newer than the driver": (A100, 12040, affine.ptx(version="8.7"), Code.UNSUPPORTED_PTX_VERSION),
    "PTX as new as the driver": (A100, 12080, affine.ptx(version="8.7"), Code.SUCCESS),
    "an instruction that nobody knows": (A100, 13000, affine.PTX.replace("mad.lo.s32", "mud.lo.s32"), Code.INVALID_PTX),
    "half a text": (A100, 13000, affine.PTX[: len(affine.PTX) // 2], Code.INVALID_PTX),
    "no image at all": (A100, 13000, "hello", Code.INVALID_IMAGE),
}


@pytest.fixture
def on(make_driver: Callable[..., FakeDriver], request: pytest.FixtureRequest) -> Callable[..., tuple[FakeDriver, Any]]:
    """A driver of the test's choice with a current context; it goes when the test is over."""

    def begin(spec: DeviceSpec, **settings: Any) -> tuple[FakeDriver, Any]:
        import pycuda.driver

        driver = make_driver((spec,), **settings)
        pycuda.driver.init()
        context = pycuda.driver.Device(0).retain_primary_context()
        context.push()
        request.addfinalizer(lambda: (context.pop(), context.detach()))
        return driver, pycuda.driver

    return begin


@pytest.mark.parametrize("case", IMAGES)
def test_ptx(on: Callable[..., tuple[FakeDriver, Any]], case: str) -> None:
    spec, version, text, code = IMAGES[case]
    driver, cuda = on(spec, version=version)
    if code == Code.SUCCESS:
        load(cuda, text).get_function("affine")
        return
    with pytest.raises(cuda.Error):
        load(cuda, text)
    assert driver.refusals[-1].startswith(f"cuModuleLoadDataEx: {code.symbol}")


@pytest.mark.parametrize(
    ("made_for", "runs_on", "refused_on"),
    [
        ("sm_80", (A100, L4), (T4, ORIN, H100)),
        ("sm_87", (ORIN,), (A100, L4)),
        ("sm_89", (L4,), (A100, ORIN)),
        ("sm_90a", (H100,), (A100, RTX5090)),
    ],
)
def test_cubins(
    on: Callable[..., tuple[FakeDriver, Any]], made_for: str, runs_on: tuple[DeviceSpec, ...], refused_on: tuple[DeviceSpec, ...]
) -> None:
    """A cubin runs on its own major version, from its minor version up, but on no Tegra; one for "sm_90a" on nothing else."""
    driver, cuda = on(A100)
    binary = affine.cubin(made_for.encode())
    driver.modules.know(binary, affine.ptx(made_for), made_for)
    for spec in (*runs_on, *refused_on):
        driver.devices.specs = (spec,)
        if spec in runs_on:
            assert load(cuda, binary).get_function("affine") is not None
        else:
            with pytest.raises(cuda.Error, match="no kernel image is available"):
                load(cuda, binary)


def test_a_cubin_is_known_by_its_bytes(driver: FakeDriver, cuda: Any) -> None:
    binary = affine.cubin(b"sm_80")
    driver.modules.know(binary, affine.PTX, "sm_80")
    load(cuda, binary)
    with pytest.raises(cuda.Error, match="no kernel image is available"):
        load(cuda, affine.cubin(b"sm_81"))


def test_a_cubin_of_a_newer_toolkit(on: Callable[..., tuple[FakeDriver, Any]]) -> None:
    """Within a major version of CUDA an older driver takes it."""
    driver, cuda = on(A100, version=12040)
    for version, taken in (("8.7", True), ("9.0", False)):
        binary = affine.cubin(version.encode())
        driver.modules.know(binary, affine.ptx(version=version), "sm_80")
        if taken:
            load(cuda, binary)
        else:
            with pytest.raises(cuda.Error, match="device kernel image is invalid"):
                load(cuda, binary)


def test_a_module_from_a_file(driver: FakeDriver, cuda: Any, tmp_path: Path) -> None:
    (tmp_path / "affine.ptx").write_text(affine.PTX)
    assert cuda.module_from_file(str(tmp_path / "affine.ptx")).get_function("affine") is not None
    with pytest.raises(cuda.RuntimeError, match="file not found"):
        cuda.module_from_file(str(tmp_path / "none.ptx"))


def test_modules_leak(driver: FakeDriver, cuda: Any) -> None:
    module = load(cuda, affine.PTX)
    assert "module with affine" in driver.leaks()
    del module
    assert "module with affine" not in driver.leaks()


FAULTS: dict[str, tuple[tuple[str, str], Code, str]] = {
    "over the end": (("%r4, 4;", "%r4, 8;"), Code.ILLEGAL_ADDRESS, "out of bounds"),
    "misaligned": (("ld.global.f32 %f3, [%rd4]", "ld.global.f32 %f3, [%rd4+2]"), Code.MISALIGNED_ADDRESS, "Misaligned"),
    "unwritten": (("[%rd4];", "[%rd5];"), Code.LAUNCH_FAILED, "UninitialisedRead"),
    "trap": (("DONE:\n    ret;", "DONE:\n    trap;"), Code.LAUNCH_FAILED, "Trap"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_a_kernel(
    driver: FakeDriver, cuda: Any, places: tuple[Any, Any], capfd: pytest.CaptureFixture[str], case: str
) -> None:
    """What the emulator finds is what the wait reports, and stands among the driver's faults with the instruction."""
    (old, new), code, word = FAULTS[case]
    text = affine.PTX.replace(old, new)
    assert text != affine.PTX
    module = load(cuda, text)
    module.get_function("affine")._launch_kernel((2, 1, 1), (64, 1, 1), packed(*places), 0, None)
    with pytest.raises(cuda.Error):
        cuda.Context.synchronize()
    assert call("cuCtxSynchronize") == code
    (fault,) = driver.take_faults()
    assert word in fault and "in entry affine" in fault
    capfd.readouterr()


def test_kernels_of_a_test_s_own(on: Callable[..., tuple[FakeDriver, Any]]) -> None:
    """``execute`` takes the emulator's place."""
    seen: list[Launch] = []
    _, cuda = on(A100, execute=seen.append)
    module, x = load(cuda, affine.PTX), cuda.mem_alloc(16)
    module.get_function("affine")._launch_kernel((1, 1, 1), (64, 1, 1), packed(x, x), 0, None)
    assert seen == []
    cuda.Context.synchronize()
    assert [(launch.entry, launch.parameters) for launch in seen] == [("affine", packed(x, x))]
