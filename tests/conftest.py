"""Shared by all tests: memory that nobody has written is NaN, and random examples are the same on every run."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from gpu_emulation.fixtures import cuda, driver, fake_library, make_driver  # noqa: F401  # fixtures, for every test
from real_gpu import compiled, real_engine  # noqa: F401
from sanitized import Beside

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=100, database=None)
hypothesis.settings.load_profile("repeatable")

BESIDE = pytest.StashKey[Beside]()


@pytest.hookimpl(tryfirst=True)  # before the choice by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's interpreter takes seconds a case, the PTX ones a tenth: of its cases of a test every fourth is not ``slow``."""
    seen: Counter[str] = Counter()
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and callspec.params.get("way") == "interpreter":
            test = item.nodeid.partition("[")[0]
            if seen[test] % 4:
                item.add_marker("slow")
            seen[test] += 1


def pytest_collection_finish(session: pytest.Session) -> None:
    """What takes minutes in a process of its own begins first, and runs beside the other tests."""
    if not session.config.option.collectonly and any(item.path.name == "test_sanitizers.py" for item in session.items):
        session.config.stash[BESIDE] = Beside()


def pytest_unconfigure(config: pytest.Config) -> None:
    if BESIDE in config.stash:
        config.stash[BESIDE].end()


@pytest.fixture
def under_sanitizers(pytestconfig: pytest.Config) -> Beside:
    return pytestconfig.stash[BESIDE]


@pytest.fixture(scope="session", autouse=True)
def poisoned_scratch() -> Iterator[None]:
    """``np.empty`` gives NaN in every floating array, so that a value left unwritten is seen."""
    empty = np.empty

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        array = empty(*args, **kwargs)
        if array.dtype.kind == "f":
            array.fill(np.nan)
        return array

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "empty", poisoned)
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240804)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Any]:
    """The Triton kernels in Triton's interpreter."""
    from interpreted import Interpreter

    made = Interpreter()
    yield made
    made.close()


@pytest.fixture(scope="session")
def executable(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The manifest of kernels compiled for the PTX interpreter."""
    from kernel_builds import EXECUTED, executed

    from advrad_fast.kernels.aot import build

    return build(tmp_path_factory.mktemp("executable"), EXECUTED, wanted=executed, processes=2)


@pytest.fixture(scope="session")
def emulators() -> dict[str, Any]:
    return {}


@pytest.fixture(params=["interpreter", "sm_75", "sm_80", "sm_90", "sm_120"])
def way(request: pytest.FixtureRequest, emulators: dict[str, Any]) -> Any:
    """A way to run the Triton kernels: in Triton's interpreter, or as the PTX of a target on the PTX interpreter."""
    if request.param == "interpreter":
        return request.getfixturevalue("interpreter")
    from emulated import Emulator

    if request.param not in emulators:
        emulators[request.param] = Emulator(request.getfixturevalue("executable"), request.param)
    return emulators[request.param]


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """A Ray cluster of two workers on this machine; they import the tests' modules."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
        yield "local"
        ray.shutdown()
