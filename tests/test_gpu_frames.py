"""Frames that lie on the GPU: read there without a copy, when they are written, and refused where they are none."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from device_arrays import Exported, Interface
from emulated_engine import EmulatedEngine
from gpu_emulation.driver import Code, DeviceSpec, FakeDriver
from models import certifiable, small_model
from numpy.typing import NDArray
from test_cuda import BOUNDS, engine, spent, weights_of  # noqa: F401  # a fixture
from test_detector import same

from advrad_fast import Detector, Outcome
from advrad_fast.backends.cuda_driver import Order, call
from advrad_fast.errors import ImageError, ImageTooLargeError, InferenceError
from advrad_fast.model import ModelFile

SIDE = 32
SHAPE = (SIDE, SIDE, 3)
FRAME = np.random.default_rng(8).integers(0, 256, SHAPE, dtype=np.uint8)
OTHER = FRAME[::-1].copy()
Make = Callable[..., Detector]


def model(**changes: Any) -> ModelFile:
    """The small model with other image settings."""
    made = small_model()
    channels = changes.get("channels", 3)
    unet = dataclasses.replace(made.config.unet, in_channels=channels)
    config = dataclasses.replace(made.config, unet=unet, image=dataclasses.replace(made.config.image, **changes))
    return dataclasses.replace(made, config=config, weights=made.weights if channels == 3 else weights_of(config))


@pytest.fixture
def driver(make_driver: Callable[..., FakeDriver], request: pytest.FixtureRequest) -> FakeDriver:
    """A driver with one A100, or with the GPUs of the test's parameter."""
    return make_driver(getattr(request, "param", (DeviceSpec(),)))


@pytest.fixture
def make(engine: EmulatedEngine) -> Iterator[Make]:  # noqa: F811
    """Makes detectors, and closes them."""
    made: list[Any] = []

    def build(model: ModelFile | None = None, **options: Any) -> Detector:
        options = {"backend": "cuda", "precision": "fp32", "cache_dir": False, **options}
        made.append(Detector(small_model() if model is None else model, **options))
        return made[-1]

    yield build
    for detector in made:
        detector._backend.close()


@pytest.fixture
def put(cuda: Any) -> Iterator[Callable[..., Any]]:
    """Puts an array on the GPU, ``offset`` bytes into an allocation that ends with it."""
    kept: list[Any] = []

    def there(array: NDArray[Any], offset: int = 0) -> int:
        memory = cuda.mem_alloc(array.nbytes + offset)
        cuda.memcpy_htod(int(memory) + offset, np.ascontiguousarray(array))
        kept.append(memory)
        return int(memory) + offset

    yield there
    kept.clear()
    gc.collect()


WAYS: dict[str, Callable[[int], Any]] = {
    "version 3": lambda at: Interface(at, SHAPE),
    "version 2": lambda at: Interface(at, SHAPE, version=2),
    "its strides": lambda at: Interface(at, SHAPE, strides=(3 * SIDE, 3, 1)),
    "DLPack": lambda at: Exported(at, SHAPE),
    "DLPack 0": lambda at: Exported(at - 16, SHAPE, label=b"dltensor", strides=(3 * SIDE, 3, 1), offset=16),
    "managed memory": lambda at: Exported(at, SHAPE, device=(13, 0)),
}


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_equals_the_host_path_without_a_copy(driver: FakeDriver, make: Make, put: Any, way: str, maps: bool) -> None:
    """Bit for bit; in steady state a question about the pointer, one launch, one wait, no memory, and no byte of the frame."""
    detector = make()
    wanted = [detector.inspect(frame, maps=maps, seed=5) for frame in (FRAME, OTHER)]
    arrays = [WAYS[way](put(frame)) for frame in (FRAME, OTHER)]
    for array in arrays:
        detector.inspect(array, maps=maps, seed=5)
    for _ in range(2):
        for array, inspection in zip(arrays, wanted, strict=True):
            got, calls, copied = spent(driver, lambda array=array: detector.inspect(array, maps=maps, seed=5))  # type: ignore[misc]
            assert same(got, inspection)  # type: ignore[arg-type]
            assert copied == {"dtoh": 4 + (4 * SIDE * SIDE if maps else 0)}
            assert calls == {
                # With a context of the caller's, which is current again afterwards.
                **{"cuCtxPushCurrent_v2": 2, "cuCtxPopCurrent_v2": 2, "cuPointerGetAttributes": 1},
                **{"cuGraphExecKernelNodeSetParams": 2, "cuGraphLaunch": 1, "cuStreamSynchronize": 1},
            }
    assert same(detector.inspect(OTHER, maps=maps, seed=5), wanted[1])  # and the host's frames go the old way
    assert same(make(kernels_dir=None).inspect(arrays[0], maps=maps, seed=5), wanted[0])


def test_one_after_another(driver: FakeDriver, make: Make, put: Any) -> None:
    detector, arrays = make(), [Interface(put(FRAME), SHAPE), OTHER, Exported(put(OTHER), SHAPE), FRAME, "no frame"]
    wanted = detector.inspect_batch([FRAME, OTHER, OTHER, FRAME])
    *got, wrong = detector.inspect_batch(arrays)
    assert all(same(a, b) for a, b in zip(got, wanted, strict=True)) and wrong.outcome is Outcome.ERROR


def test_without_graphs(driver: FakeDriver, make: Make, put: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = make()
    wanted = detector.inspect(FRAME)
    monkeypatch.setattr("advrad_fast.backends.cuda_lane.Lane._captured", lambda *_: None)
    assert same(make().inspect(Interface(put(FRAME), SHAPE)), wanted)


@pytest.mark.parametrize("offset", [8, 1])
def test_an_address_that_kernels_cannot_read(driver: FakeDriver, make: Make, put: Any, offset: int) -> None:
    """A frame in the middle of something else is copied, on the GPU."""
    detector, array = make(), Exported(put(FRAME, offset), SHAPE)
    wanted = detector.inspect(FRAME)
    before = driver.counters.copied_bytes.copy()
    assert same(detector.inspect(array), wanted)
    assert dict(driver.counters.copied_bytes - before) == {"dtod": FRAME.nbytes, "dtoh": 4 + 4 * SIDE * SIDE}


# What writes the frame


class Late:
    """A frame that a stream writes when somebody waits for it; before, it is another."""

    def __init__(self, cuda: Any, put: Any) -> None:
        self.source = cuda.pagelocked_empty(SHAPE, np.uint8)
        self.source[:] = FRAME
        self.address = put(OTHER)

    def write(self, stream: int) -> None:
        call("cuMemcpyHtoDAsync_v2", self.address, self.source.ctypes.data, self.source.nbytes, stream)


@pytest.mark.parametrize("default", [1, 2, None])
def test_waits_for_the_stream_that_writes_it(driver: FakeDriver, cuda: Any, make: Make, put: Any, default: int | None) -> None:
    """And does not where there is none to wait for; the host waits for nothing but its result."""
    late, detector, own = Late(cuda, put), make(), cuda.Stream(1)  # which no other stream waits for
    wanted = [detector.inspect(frame) for frame in (FRAME, OTHER)]
    stream = default or own.handle
    for _ in range(2):
        late.write(stream)
        assert same(detector.inspect(Interface(late.address, SHAPE, stream=stream)), wanted[0])
    call("cuMemcpyDtoDAsync_v2", late.address, put(OTHER), FRAME.nbytes, own.handle)
    own.synchronize()
    late.write(stream)
    waits = driver.counters.synchronisations
    assert same(detector.inspect(Interface(late.address, SHAPE)), wanted[1])
    assert driver.counters.synchronisations == waits + 1
    cuda.Context.synchronize()


@pytest.mark.parametrize("label", [b"dltensor", b"dltensor_versioned"])
def test_dlpack_waits_and_gives_back(driver: FakeDriver, cuda: Any, make: Make, put: Any, label: bytes) -> None:
    """The library lets the detector's stream wait for its own, and gets its memory back when it has been read."""
    late, detector, own, order = Late(cuda, put), make(), cuda.Stream(1), Order()
    wanted = detector.inspect(FRAME)

    def export(stream: int) -> None:
        late.write(own.handle)
        order.wait(stream, own.handle)

    read: list[bool] = []
    given_back = lambda: read.append(call("cuStreamQuery", array.streams[-1]) is None)  # noqa: E731  # raises where it is busy
    array = Exported(late.address, SHAPE, label=label, export=export, delete=given_back)
    for maps in (True, False):
        assert detector.inspect(array, maps=maps).score == wanted.score
    assert array.deleted == 2 and read == [True, True] and min(array.streams) > 2
    order.close()


def test_memory_that_goes_with_the_frame(driver: FakeDriver, cuda: Any, make: Make) -> None:
    """Is there until it was read; the fake driver knows what is read too late."""
    detector = make()
    wanted = detector.inspect(FRAME)

    def frame() -> Any:
        memory = cuda.mem_alloc(FRAME.nbytes)
        cuda.memcpy_htod(memory, FRAME)
        return Interface(memory, SHAPE)

    for _ in range(3):
        frees = driver.counters.frees
        assert same(detector.inspect(frame()), wanted)
        assert driver.counters.frees == frees + 1


# What has to be prepared


@pytest.mark.parametrize(
    ("settings", "frame"),
    [
        ({}, FRAME[:24, :28]),
        ({}, np.repeat(np.repeat(FRAME, 2, 0), 2, 1)),
        ({}, FRAME[:, :, 1]),
        ({"brightness": 0.5}, FRAME),
        ({"channels": 1}, FRAME),
    ],
)
@pytest.mark.parametrize("kind", [Interface, Exported])
def test_is_copied_to_the_host_once(
    driver: FakeDriver, make: Make, put: Any, kind: Any, settings: Any, frame: NDArray[np.uint8]
) -> None:
    detector = make(model(**settings))
    wanted, array = detector.inspect(frame), kind(put(frame), frame.shape)
    before = driver.counters.copied_bytes.copy()
    assert same(detector.inspect(array), wanted)
    channels = settings.get("channels", 3)
    moved = {"dtoh": frame.nbytes + 4 + 4 * SIDE * SIDE, "htod": SIDE * SIDE * channels}
    assert dict(driver.counters.copied_bytes - before) == moved


@pytest.mark.parametrize("shape", [(SIDE, SIDE), (SIDE, SIDE, 1)])
def test_grey(driver: FakeDriver, make: Make, put: Any, shape: tuple[int, ...]) -> None:
    detector = make(model(channels=1))
    wanted, array = detector.inspect(FRAME[:, :, 0]), Interface(put(FRAME[:, :, 0]), shape)
    before = driver.counters.copied_bytes["htod"]
    assert same(detector.inspect(array), wanted)
    assert driver.counters.copied_bytes["htod"] == before


def test_grey_frames_as_on_a_cpu(make: Make) -> None:
    """A grey model takes the same frames on both backends, and refuses the same."""
    grey = model(channels=1)
    here, there = make(grey), Detector(grey, backend="cpu", threads=1, cache_dir=False, precision="fp32")
    one = FRAME[:, :, 1]
    for frame in (one, one[:, :, None], FRAME, one.astype(np.uint16) * 257, one[:20], np.asfortranarray(one)):
        got, wanted = here.inspect(frame), there.inspect(frame)
        assert got.score is not None and got.outcome is wanted.outcome
        assert got.score == pytest.approx(wanted.score, rel=BOUNDS["fp32"])
        assert got.anomaly_map is not None and got.anomaly_map.shape == frame.shape[:2]
    for wrong in (FRAME[:, :, :2], one.astype(np.int32)):
        errors = [detector.inspect_batch([wrong])[0].error for detector in (here, there)]
        assert str(errors[0]) == str(errors[1]) and isinstance(errors[0], ImageError)


def test_certify(driver: FakeDriver, make: Make, put: Any) -> None:
    detector, array = make(certifiable(small_model(), 0.25)), Exported(put(FRAME), SHAPE)
    wanted = detector.smoothed_scores(FRAME, 3, seed=1)
    np.testing.assert_array_equal(detector.smoothed_scores(array, 3, seed=1), wanted)
    certified = [detector.certify(frame, 0.1, max_votes=32, seed=2) for frame in (FRAME, array)]
    assert certified[0] == certified[1] and array.deleted == 2
    for votes in detector._smoothed.values():
        votes.close()  # type: ignore[attr-defined]


# What is refused

REFUSED: dict[str, tuple[Callable[[int], Any], str]] = {
    "float32": (lambda at: Interface(at, SHAPE, typestr="<f4"), r"\['typestr'\]: expected '\|u1', uint8, got '<f4'"),
    "float32 in DLPack": (lambda at: Exported(at, SHAPE, dtype=(2, 32, 1)), r"expected uint8, .* got 'DLPack type \(2, 32, 1\)'"),
    "int8 in DLPack": (lambda at: Exported(at, SHAPE, dtype=(0, 8, 1)), "expected uint8"),
    "lanes": (lambda at: Exported(at, SHAPE, dtype=(1, 8, 4)), "expected uint8"),
    "four channels": (lambda at: Interface(at, (SIDE, SIDE, 4)), r"expected a GPU array of shape \(H, W\), .*\(32, 32, 4\)"),
    "a batch": (lambda at: Exported(at, (1, *SHAPE)), r"expected a GPU array of shape .*\(1, 32, 32, 3\)"),
    "nothing": (lambda at: Interface(at, (0, 4, 3)), "expected at least 1 x 1 pixels"),
    "padded rows": (lambda at: Interface(at, SHAPE, strides=(128, 3, 1)), r"strides \(96, 3, 1\), got 'strides \(128, 3, 1\)'"),
    "planes": (lambda at: Exported(at, SHAPE, strides=(32, 1, 1024)), "expected a GPU array in C order .*; make it contiguous"),
    "null": (lambda at: Interface(0, SHAPE), "expected an address of GPU memory, got 'a null pointer'"),
    "null in DLPack": (lambda at: Exported(0, SHAPE), "got 'a null pointer'"),
    "the host's": (lambda at: Interface(FRAME.ctypes.data, SHAPE), "expected an address of GPU memory, got '0x.*, which is none"),
    "too short": (lambda at: Interface(at + 16, SHAPE), "3072 bytes of GPU memory, got .* which 3056 bytes are left"),
    "version": (lambda at: Interface(at, SHAPE, version=1), r"\['version'\]: expected 2 or 3, got 1"),
    "mask": (lambda at: Interface(at, SHAPE, mask=1), r"\['mask'\]: expected no mask"),
    "stream 0": (lambda at: Interface(at, SHAPE, stream=0), r"\['stream'\]: expected None, or a stream's handle .* got 0"),
    "no stream": (lambda at: Interface(at, SHAPE, stream=0x5AD0), r"\['stream'\]: expected a stream of the detector's GPU"),
    "shape": (lambda at: Interface(at, list(SHAPE)), r"\['shape'\]: expected a tuple of integers"),
    "real shape": (lambda at: Interface(at, (32.0, 32, 3)), r"\['shape'\]: expected a tuple of integers"),
    "strides": (lambda at: Interface(at, SHAPE, strides=(3, 1)), r"\['strides'\]: expected None or one a dimension"),
    "data": (lambda at: Interface(at, SHAPE, data=at), r"\['data'\]: expected \(address, read-only\)"),
    "no data": (lambda at: Interface(at, SHAPE, data=None), r"\['data'\]: expected"),
    "another GPU": (lambda at: Exported(at, SHAPE, device=(2, 1)), "an array on GPU 0, where the detector is, got '.* on GPU 1"),
    "another maker": (lambda at: Exported(at, SHAPE, device=(10, 0)), r"on an NVIDIA GPU, got 'DLPack device \(10, 0\)'"),
    "a capsule of what": (lambda at: Exported(at, SHAPE, label=b"dlpack"), "expected a capsule named dltensor"),
    "version 2": (lambda at: Exported(at, SHAPE, major=2), "expected DLPack 1, got 'version 2.0'"),
    "dimensions": (lambda at: Exported(at, ()), "expected a GPU array of shape"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_refused(driver: FakeDriver, make: Make, put: Any, why: str) -> None:
    """Said precisely; what was lent is given back, and the lane is fit for the next frame as it is."""
    detector, address = make(), put(FRAME)
    wanted = detector.inspect(FRAME)
    made, message = REFUSED[why]
    array = made(address)
    before = driver.counters.allocations, driver.counters.graph_launches
    with pytest.raises(ImageError, match=message):
        detector.inspect(array)
    assert (driver.counters.allocations, driver.counters.graph_launches) == before
    if isinstance(array, Exported) and array.label.startswith(b"dltensor"):
        assert array.deleted == len(array.streams)
    assert same(detector.inspect(Interface(address, SHAPE)), wanted)
    assert driver.counters.allocations == before[0]


def test_refused_by_its_size(make: Make) -> None:
    with pytest.raises(ImageTooLargeError, match="20000 x 20000 pixels"):
        make().inspect(Interface(4096, (20000, 20000)))


def test_freed_memory(driver: FakeDriver, cuda: Any, make: Make) -> None:
    detector, memory = make(), cuda.mem_alloc(FRAME.nbytes)
    address = int(memory)
    memory.free()
    with pytest.raises(ImageError, match="which is none, or was freed"):
        detector.inspect(Interface(address, SHAPE))


def test_pinned_memory_of_the_host(driver: FakeDriver, cuda: Any, make: Make) -> None:
    """Which a GPU can read where it lies."""
    pinned = cuda.pagelocked_empty(SHAPE, np.uint8, mem_flags=cuda.host_alloc_flags.DEVICEMAP)
    pinned[:] = FRAME
    detector, array = make(), Interface(pinned.base.get_device_pointer(), SHAPE)
    before = driver.counters.copied_bytes["htod"]
    got = detector.inspect(array)
    assert driver.counters.copied_bytes["htod"] == before
    assert same(got, detector.inspect(FRAME))


@pytest.mark.parametrize("driver", [(DeviceSpec(), DeviceSpec())], indirect=True)
@pytest.mark.parametrize("kind", [Interface, Exported])
def test_memory_of_another_gpu(driver: FakeDriver, cuda: Any, make: Make, kind: Any) -> None:
    """Whatever the frame says of itself."""
    detector, other = make(), cuda.Device(1).retain_primary_context()
    other.push()
    memory = cuda.mem_alloc(FRAME.nbytes)
    other.pop()
    with pytest.raises(ImageError, match="expected memory of GPU 0, where the detector is, got 'memory of GPU 1'"):
        detector.inspect(kind(int(memory), SHAPE))
    other.push()
    memory.free()
    other.detach()


class Broken:
    @property
    def __cuda_array_interface__(self) -> Any:
        raise RuntimeError("the tensor was moved")


def test_a_library_that_fails(driver: FakeDriver, make: Make, put: Any) -> None:
    def export(stream: int) -> None:
        raise BufferError("not now")

    detector = make()
    with pytest.raises(ImageError, match=r"Exported.__dlpack__\(\) failed: not now"):
        detector.inspect(Exported(put(FRAME), SHAPE, export=export))
    with pytest.raises(ImageError, match=r"Broken.__cuda_array_interface__ failed: the tensor was moved"):
        detector.inspect(Broken())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", [Interface, Exported])
def test_other_backends_say_what_to_do(backend: str, kind: Any) -> None:
    detector = Detector(certifiable(small_model(), 0.25), backend=backend, threads=1, cache_dir=False, precision="fp32")
    frame = kind(4096, SHAPE)
    message = (
        rf"expected an array in the host's memory for the {backend} backend, got .*{kind.__name__} on .*GPU.*asnumpy.*cpu\(\)"
    )
    for use in (detector.inspect, detector.certify, lambda frame: detector.smoothed_scores(frame, 1)):
        with pytest.raises(ImageError, match=message):
            use(frame)
    (inspection,) = detector.inspect_batch([frame])
    assert inspection.outcome is Outcome.ERROR and isinstance(inspection.error, ImageError)


# Faults

CALLS = {
    "cuPointerGetAttributes": FRAME,
    "cuEventCreate": FRAME,
    "cuEventRecord": FRAME,
    "cuStreamWaitEvent": FRAME,
    "cuMemcpyDtoHAsync": FRAME[:24],
    "cuStreamSynchronize": FRAME,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_fails(driver: FakeDriver, cuda: Any, make: Make, put: Any, name: str) -> None:
    """An InferenceError that names it, and the next frame has its score."""
    detector, stream, frame = make(), cuda.Stream(), CALLS[name]
    array = Interface(put(frame), frame.shape, stream=stream.handle)
    wanted = detector.inspect(frame)
    driver.fail(name, Code.OUT_OF_MEMORY)
    with pytest.raises(InferenceError, match=f"{name}.* failed: out of memory"):
        detector.inspect(array)
    assert same(detector.inspect(array), wanted)


@pytest.mark.parametrize("kind", [Interface, Exported])
def test_tensorrt_fails(driver: FakeDriver, engine: EmulatedEngine, make: Make, put: Any, kind: Any) -> None:  # noqa: F811
    detector, array = make(), kind(put(FRAME), SHAPE)
    wanted = detector.inspect(FRAME)
    for broken in (np.nan, np.inf):
        engine.broken = broken
        with pytest.raises(InferenceError, match="expected a finite number"):
            detector.inspect(array)
        engine.broken = None
        assert same(detector.inspect(array), wanted)
    if kind is Exported:
        assert array.deleted == 4
