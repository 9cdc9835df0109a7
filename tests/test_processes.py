"""Threads, fork and spawn: one detector for all of them, or a typed error; nothing hangs."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from models import small_model
from streams import frames

from advrad_fast import Detector, Inspection
from advrad_fast.backends.native_engine import KERNELS

HERE = Path(__file__).parent
forks = pytest.mark.skipif(sys.platform != "linux", reason="what a fork does is told for Linux")


def bits(inspection: Inspection) -> tuple[object, ...]:
    assert inspection.anomaly_map is not None and inspection.mask is not None
    return inspection.outcome, inspection.score, inspection.anomaly_map.tobytes(), inspection.mask.tobytes()


@pytest.mark.parametrize("precision", ["fp32", "auto"])
@pytest.mark.parametrize("threads", [1, 2])
def test_eight_threads_share_one_detector_bit_for_bit(precision: Any, threads: int) -> None:
    detector = Detector(small_model(), backend="cpu", cache_dir=False, threads=threads, precision=precision)
    work = [(frame, seed) for seed in (0, 1, 2**63) for frame in frames(16)]

    def inspect(job: Any) -> tuple[object, ...]:
        return bits(detector.inspect(job[0], seed=job[1]))

    serial = [inspect(job) for job in work]
    assert len(set(serial)) == len(work)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(inspect, work * 3)) == serial * 3


def _load_and_inspect(path: str) -> list[tuple[object, ...]]:
    detector = Detector.load(path, backend="cpu", cache_dir=False, threads=1, precision="fp32")
    return [bits(detector.inspect(frame)) for frame in frames(3)]


def test_spawned_processes_give_the_same_results(tmp_path: Path) -> None:
    path = str(tmp_path / "model")
    small_model().save(tmp_path / "model")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(_load_and_inspect, [path, path], chunksize=1)
    assert first == second == _load_and_inspect(path)


def run(script: str, *arguments: object) -> None:
    """In a process of its own, which has no other threads; each child has 20 seconds, then SIGALRM ends it."""
    start = "import gc, logging, os, signal, sys, threading\n"
    start += "import numpy as np\nfrom streams import detector, frames\nlogging.disable()\n"
    line = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", start + script, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


_INHERITED = """
from advrad_fast.errors import BackendUnavailableError, InferenceError
model, frame, busy = detector(), frames(1)[0], sys.argv[1] == "busy"
score, over = model.inspect(frame).score, threading.Event()
def work():
    while not over.is_set():
        model.inspect(frame)
thread = threading.Thread(target=work, daemon=True)
if busy:
    thread.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        for attempt, error in ((lambda: model.inspect(frame), InferenceError), (detector, BackendUnavailableError)):
            try:
                attempt()
                sys.exit(1)
            except error as failure:
                if "forked" not in str(failure):
                    sys.exit(2)
        (result,) = model.inspect_batch([frame])
        if result.outcome != "ERROR":
            sys.exit(3)
        del model, attempt
        gc.collect()
        sys.exit(7)
    status = os.waitpid(child, 0)[1]
    if status != 7 << 8:
        sys.exit(f"a child ended with status {status}")
over.set()
if busy:
    thread.join()
if model.inspect(frame).score != score:
    sys.exit("the parent has changed")
"""


@forks
@pytest.mark.parametrize("parent", ["idle", "busy"])
def test_a_child_forked_after_openvino_was_loaded_gets_a_typed_error_and_ends(parent: str) -> None:
    run(_INHERITED, parent)


_LATER = """
path = sys.argv[1]
for _ in range(3):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        from advrad_fast import Detector
        if Detector.load(path, backend="cpu", cache_dir=False, threads=2).inspect(frames(1)[0]).score is None:
            sys.exit(1)
        sys.exit(7)
    status = os.waitpid(child, 0)[1]
    if status != 7 << 8:
        sys.exit(f"a child ended with status {status}")
"""


@forks
def test_children_may_load_detectors_of_their_own(tmp_path: Path) -> None:
    small_model().save(tmp_path / "model")
    run(_LATER, tmp_path / "model")


_NATIVE = """
from models import small_model
from advrad_fast import _native
from advrad_fast.backends.native_engine import NativeEngine
model = small_model()
request = NativeEngine(model.config, model.weights, batch=1, threads=2, kernels=sys.argv[1]).request()
image = np.ascontiguousarray(frames(1)[0][None])
def compute():
    _native.noise(image, 1, 5, 0.5, 0.5, 1.0, request.x, threads=2)
    return request.x.tobytes() + request.infer().tobytes()
wanted = compute()
for _ in range(5):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        sys.exit(7 if all(compute() == wanted for _ in range(3)) else 1)
    status = os.waitpid(child, 0)[1]
    if status != 7 << 8:
        sys.exit(f"a child ended with status {status}")
"""


@forks
@pytest.mark.parametrize("kernels", KERNELS)
def test_our_own_engine_and_operations_go_on_in_a_forked_child(kernels: str) -> None:
    run(_NATIVE, kernels)
