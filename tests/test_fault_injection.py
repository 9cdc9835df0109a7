"""Faults at every step: a documented error, or the result of a run without the fault, bit for bit.  Never OK."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from injection import FAULTS, Line, inject, lines
from models import small_model, tiny_model
from parts import disc, scratched
from PIL import Image
from test_detector import same

from advrad_fast import Detector, Inspection, ModelFile, Outcome, cli
from advrad_fast.backends import base, cache
from advrad_fast.backends import cpu as cpu_backend
from advrad_fast.backends import reference as reference_backend
from advrad_fast.errors import AdvRADError, InferenceError
from advrad_fast.files import write_atomically

_rng = np.random.default_rng(1)
GOOD, BAD = disc(_rng, 32), scratched(_rng, 32)
MODEL = small_model(spread=True)


def make(backend: str, **options: Any) -> Detector:
    """A detector that says DEFECT of BAD and OK of GOOD."""
    if backend == "cpu":
        options = {"cache_dir": False, "precision": "fp32", **options}
    detector = Detector(MODEL, backend=backend, **{"threads": 1, **options})
    scores = [detector.inspect(frame).score for frame in (GOOD, BAD)]
    assert scores[0] is not None and scores[1] is not None and scores[0] != scores[1]
    detector.threshold = sum(scores) / 2
    if scores[0] > scores[1]:  # random weights: which of the two is above the threshold does not matter here
        globals().update(GOOD=BAD, BAD=GOOD)
    return detector


@pytest.fixture(scope="module", params=["cpu", "reference"])
def detector(request: pytest.FixtureRequest) -> Detector:
    return make(request.param)


# Inspecting


def is_in(line: Line, *names: str) -> bool:
    return line.code.co_qualname in names


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("maps", [True, False])
def test_a_fault_at_any_line_of_inspect(detector: Detector, maps: bool, fault: type[Exception]) -> None:
    def action() -> Inspection:
        return detector.inspect(BAD, maps=maps)

    wanted, at = action(), lines(action)
    assert wanted.outcome is Outcome.DEFECT
    names = {line.code.co_qualname for line in at}
    assert {"Detector.inspect", "prepare", "check_frame", "FrameBackend.score", "checked_p_value"} <= names and len(at) > 80
    raised = 0
    for line in at:
        try:
            result = inject(action, line, fault("injected"))
        except AdvRADError as error:
            assert fault is MemoryError or isinstance(error.__cause__, fault), f"{line}: {error!r}"
            raised += 1
        except fault:
            assert fault is not MemoryError or is_in(line, "Detector.inspect", "Detector._draw_seed", "check_seed"), line
            raised += 1
        else:
            assert same(result, wanted), f"{line}: {result}"
    assert raised > 0.9 * len(at)
    assert same(action(), wanted)  # no fault has left anything behind


def test_a_fault_at_any_line_of_inspect_batch(detector: Detector) -> None:
    def action() -> list[Inspection]:
        return detector.inspect_batch([BAD, GOOD, BAD], maps=False)

    wanted = action()
    for line in lines(action):
        try:
            results = inject(action, line, MemoryError())
        except MemoryError:
            assert is_in(line, "Detector.inspect_batch", "Detector.inspect", "Detector._draw_seed", "check_seed", "several"), line
            continue
        assert len(results) == 3
        for result, good in zip(results, wanted, strict=True):
            assert same(result, good) or (result.outcome is Outcome.ERROR and isinstance(result.error, AdvRADError)), line


class FaultyEngine:
    """The engine's request, whose outputs are changed on the way."""

    def __init__(self, request: Any, change: Callable[[np.ndarray], Any]) -> None:
        self.x, self._request, self._change = request.x, request, change

    def infer(self) -> Any:
        return self._change(np.array(self._request.infer()))


def put(index: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(outputs: np.ndarray) -> np.ndarray:
        outputs.flat[index] = value
        return outputs

    return change


def fails(error: Exception) -> Callable[[np.ndarray], np.ndarray]:
    def change(outputs: np.ndarray) -> np.ndarray:
        raise error

    return change


ENGINE_FAULTS: dict[str, Callable[[np.ndarray], Any]] = {
    **{f"{value} at {i}": put(i, value) for value in (np.nan, np.inf, -np.inf) for i in (0, 31, 1000, -32, -1)},
    "all NaN": lambda outputs: np.full_like(outputs, np.nan),
    "too large to square": put(7, 1e30),
    "cut": lambda outputs: outputs[:, :, :-1],
    "transposed": lambda outputs: outputs.transpose(0, 2, 3, 1),
    "no batch": lambda outputs: outputs[0],
    "empty": lambda outputs: outputs[:0],
    "twice": lambda outputs: np.concatenate([outputs, outputs]),
    "float64": lambda outputs: outputs.astype(np.float64),
    "bits": lambda outputs: outputs.view(np.int32),
    "raises": fails(InferenceError("the engine failed")),
    "no memory": fails(MemoryError()),
}


@pytest.mark.parametrize("maps", [True, False])
@pytest.mark.parametrize("name", ENGINE_FAULTS)
def test_a_fault_of_the_engine(name: str, maps: bool) -> None:
    detector = make("cpu")
    queue = detector._backend._requests  # type: ignore[attr-defined]
    queue.put(FaultyEngine(queue.get(), ENGINE_FAULTS[name]))
    with pytest.raises(InferenceError):
        detector.inspect(BAD, maps=maps)
    assert detector.inspect(BAD, maps=maps).outcome is Outcome.DEFECT  # the faulty request is not used again


@pytest.mark.parametrize("words", ["could not create a primitive", "can't allocate memory\nat frame 1", ""])
def test_a_fault_of_pytorch(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch says everything with RuntimeError, memory that ran out too."""

    def forward(*_: object) -> None:
        raise RuntimeError(words)

    detector = make("reference")
    monkeypatch.setattr("advrad_fast.reference.unet.UNet.forward", forward)
    with pytest.raises(InferenceError, match="PyTorch failed: " + words.partition("\n")[0]) as info:
        detector.inspect(BAD)
    assert "\n" not in str(info.value)


BACKEND_FAULTS: dict[str, Callable[[base.Scores], base.Scores]] = {
    "NaN": lambda r: base.Scores(r.scores * np.float32(np.nan), r.maps, r.timings),
    "no score": lambda r: base.Scores(r.scores[:0], r.maps, r.timings),
    "two scores": lambda r: base.Scores(np.repeat(r.scores, 2), r.maps, r.timings),
    "float64": lambda r: base.Scores(r.scores.astype(np.float64), r.maps, r.timings),  # type: ignore[arg-type]
    "a list": lambda r: base.Scores([0.0], r.maps, r.timings),  # type: ignore[arg-type]
    "a lower score than its map": lambda r: base.Scores(r.scores / 2, r.maps, r.timings),
    "a map of another size": lambda r: base.Scores(r.scores, r.maps[:, 1:], r.timings),  # type: ignore[index]
    "a map without a batch": lambda r: base.Scores(r.scores, r.maps[0], r.timings),  # type: ignore[index]
    "no map": lambda r: base.Scores(r.scores, None, r.timings),
    "a map of another type": lambda r: base.Scores(r.scores, r.maps.astype(np.float64), r.timings),  # type: ignore[union-attr]
    "a NaN in the map": lambda r: base.Scores(r.scores, np.where(r.maps == r.maps.min(), np.float32(np.nan), r.maps), r.timings),  # type: ignore[union-attr]
}


@pytest.mark.parametrize("name", BACKEND_FAULTS)
def test_a_backend_s_result_that_is_none(monkeypatch: pytest.MonkeyPatch, detector: Detector, name: str) -> None:
    whole = detector._backend

    class Wrong:
        name, precision = whole.name, whole.precision

        def score(self, images: Any, *, seed: int, want_maps: bool) -> base.Scores:
            return BACKEND_FAULTS[name](whole.score(images, seed=seed, want_maps=want_maps))

    monkeypatch.setattr(detector, "_backend", Wrong())
    with pytest.raises(InferenceError, match="expected"):
        detector.inspect(BAD)
    assert detector.inspect_batch([BAD])[0].outcome is Outcome.ERROR


@pytest.mark.parametrize("clock", [[0.0], [1e9, -1e9], [5.0, 4.0, 3.0], [0.0, float("inf")], [float("nan")]])
def test_a_clock_that_jumps(monkeypatch: pytest.MonkeyPatch, detector: Detector, clock: list[float]) -> None:
    wanted = [detector.inspect(frame) for frame in (GOOD, BAD)]
    readings = itertools.cycle(clock)
    for module, name in ((time, "perf_counter"), (time, "time"), (time, "monotonic")):
        monkeypatch.setattr(module, name, lambda: next(readings))
    for module in (base, cpu_backend, reference_backend):
        monkeypatch.setattr(module, "now", lambda: next(readings))
    assert all(same(detector.inspect(frame), good) for frame, good in zip((GOOD, BAD), wanted, strict=True))


# Loading


def test_a_fault_at_any_line_of_loading_a_model(tmp_path: Path) -> None:
    whole = tiny_model()
    whole.save(tmp_path / "a")

    def action() -> str:
        return ModelFile.load(tmp_path / "a").fingerprint

    at = lines(action)
    assert len(at) > 150
    for line, fault in zip(at, itertools.cycle(FAULTS), strict=False):
        with suppress(AdvRADError, fault):
            assert inject(action, line, fault("injected")) == whole.fingerprint, line


@pytest.mark.parametrize("every", [pytest.param(60, id="quick"), pytest.param(1, id="long", marks=pytest.mark.slow)])
def test_a_fault_at_any_line_of_starting_a_detector(tmp_path: Path, every: int) -> None:
    """With an engine from the cache, and with one that is compiled and put there."""
    MODEL.save(tmp_path / "model")
    wanted = make("cpu").inspect(BAD)
    folder = tmp_path / "cache"

    def action() -> Inspection:
        detector = Detector.load(tmp_path / "model", backend="cpu", precision="fp32", threads=1, cache_dir=folder)
        detector.threshold = wanted.threshold
        return detector.inspect(BAD)

    cold, warm = lines(action), lines(action)
    for at, empty in ((cold, True), (warm, False)):
        for line, fault in zip(at[::every], itertools.cycle(FAULTS)):
            if empty:
                for blob in folder.glob("*"):
                    blob.unlink()
            with suppress(AdvRADError, fault):
                assert same(inject(action, line, fault("injected")), wanted), line
    assert same(action(), wanted)


# Writing


def test_a_fault_at_any_line_of_saving_a_model(tmp_path: Path) -> None:
    """The old file or the new one is there, whole, and nothing beside it."""
    old, new, path = tiny_model(), tiny_model(threshold=7.0), tmp_path / "model"

    def action() -> None:
        new.save(path)

    at = lines(action)
    assert any("write_atomically" in str(line) for line in at)
    for line in at:
        for fault in (OSError(errno.ENOSPC, "No space left on device"), MemoryError(), KeyboardInterrupt()):
            old.save(path)
            try:
                inject(action, line, fault)
            except (AdvRADError, type(fault)):
                assert ModelFile.load(path).threshold in (old.threshold, new.threshold), line
            else:
                assert ModelFile.load(path).threshold == new.threshold, line
            assert [p.name for p in tmp_path.iterdir()] == ["model"], line


CALLS = ("open", "fdopen", "fsync", "write", "replace")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("call", CALLS)
def test_a_disk_that_fails_at_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    real = os.fdopen

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    class HalfWritten:
        """Takes half of the data before it fails."""

        def __init__(self, descriptor: int, mode: str) -> None:
            self._file = real(descriptor, mode)

        def __enter__(self) -> HalfWritten:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def write(self, data: bytes) -> int:
            self._file.write(data[: len(data) // 2])
            fail()
            return 0

    with monkeypatch.context() as patch:
        if call == "replace":
            patch.setattr(Path, "replace", fail)
        elif call == "write":
            patch.setattr(os, "fdopen", HalfWritten)
        else:
            patch.setattr(os, call, fail)
        with pytest.raises(OSError, match=os.strerror(code)):
            write_atomically(path, b"new " * 1000)
        assert not cache.store(tmp_path, "0" * 64, b"blob")
        assert cache.load(tmp_path, "0" * 64) is None
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


_SAVING = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from models import small_model
path, models = Path(sys.argv[2]), [small_model(threshold=1.0), small_model(threshold=2.0)]
models[0].save(path)
sys.stdout.write("ready\\n")
sys.stdout.flush()
while True:
    for model in models:
        model.save(path)
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    """kill -9 at a random moment, five times: one of the two models is there, whole."""
    moments, path = random.Random(0), tmp_path / "model"
    for _ in range(5):
        command = [sys.executable, "-c", _SAVING, str(Path(__file__).parent), str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(moments.uniform(0.0, 0.05))
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert ModelFile.load(path).threshold in (1.0, 2.0)
        assert all(p.name == "model" or p.name.startswith(".model.") for p in tmp_path.iterdir())


_LIMITED = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from models import small_model
from advrad_fast.errors import ModelFileError
path = Path(sys.argv[2])
small_model(threshold=1.0).save(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, resource.RLIM_INFINITY))
try:
    small_model(threshold=2.0).save(path)
except ModelFileError as error:
    sys.stdout.write(str(error))
"""


def test_a_disk_that_is_full_half_way(tmp_path: Path) -> None:
    """A real limit on the size of files, which the kernel enforces."""
    path = tmp_path / "model"
    command = [sys.executable, "-c", _LIMITED, str(Path(__file__).parent), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cannot be written" in done.stdout and ModelFile.load(path).threshold == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# Memory

_STARVED = """
import itertools, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
import test_fault_injection as t
detector = t.make(sys.argv[2])
large = t.BAD.repeat(64, 0).repeat(64, 1).astype(np.uint16) * 257
for kilobytes, maps, frame in itertools.product([0, 16, 256, 4096, 16384, 65536, 1048576], [True, False], [large, t.BAD]):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + kilobytes * 1024, resource.RLIM_INFINITY))
    try:
        said = str(detector.inspect(frame, maps=maps).outcome)
    except t.AdvRADError as error:
        said = type(error).__name__
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sys.stdout.write(said + "\\n")
"""


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_out_of_memory(backend: str) -> None:
    """Frames with less address space than they need, and with more: an error or the right outcome; no crash, never OK."""
    command = [sys.executable, "-c", _STARVED, str(Path(__file__).parent), backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 28 and set(said) == {"DEFECT", "InferenceError"}, said


# The command line


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # a file that was opened on the line of the fault
def test_a_fault_at_any_line_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A defective part: never exit code 0, nor 1 without the row that says so, and never a row that says OK."""
    detector, path, rows = make("cpu"), tmp_path / "bad.png", tmp_path / "rows.jsonl"
    Image.fromarray(BAD).save(path)
    monkeypatch.setattr("advrad_fast.cli.inspection.detector_maker", lambda _: lambda: detector)

    def action() -> int:
        return cli.main(["inspect", "model", str(path), "--json", str(rows), "--overlay", str(tmp_path / "maps")])

    assert action() == 1
    for line, fault in zip(lines(action), itertools.cycle(FAULTS), strict=False):
        try:
            code = inject(action, line, fault("injected"))
        except (fault, SystemExit):  # before the command itself has begun
            assert not is_in(line, "_inspect"), line
            continue
        assert code in (1, 2), line
        if code == 1:
            assert '"outcome": "DEFECT"' in rows.read_text(), line
        assert '"OK"' not in rows.read_text()
    assert "OK " not in capsys.readouterr().out
    gc.collect()
