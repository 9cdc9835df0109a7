"""Fixtures for tests that run the real pycuda on the fake driver, in this process."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gpu_emulation.driver import FakeDriver

REQUIRED = "ADVRAD_REQUIRE_PYCUDA"  # set where these tests must run: a missing pycuda is a failure then


def _unavailable(reason: str) -> None:
    if os.environ.get(REQUIRED):
        pytest.fail(f"{reason} ({REQUIRED} is set)")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def fake_library() -> None:
    """The fake libcuda.so.1 is loaded, and a pycuda is there to find it."""
    from gpu_emulation.driver import CannotFake, library

    if importlib.util.find_spec("pycuda") is None:
        _unavailable("pycuda is not installed: run tests/gpu_emulation/install_pycuda.py")
    try:
        library.load()
    except CannotFake as error:
        _unavailable(str(error))


@pytest.fixture
def make_driver(fake_library: None) -> Iterator[Callable[..., FakeDriver]]:
    """Makes the test's fake driver, with the settings that it wants.

    When the test is over: no faults that it didn't take, nothing leaked, and every error that it asked for came.
    """
    from gpu_emulation.driver import FakeDriver

    made: list[FakeDriver] = []

    def make(*arguments: Any, **settings: Any) -> FakeDriver:
        assert not made, "one driver a test"
        made.append(FakeDriver(*arguments, **settings).__enter__())
        return made[0]

    yield make
    for driver in made:
        leaks, faults, unused = driver.leaks(), driver.take_faults(), driver.unused_injections()
        driver.__exit__(None, None, None)
        wrong = {"leaks": leaks, "faults": faults, "errors that never came": unused}
        assert not (leaks or faults or unused), wrong


@pytest.fixture
def driver(make_driver: Callable[..., FakeDriver]) -> FakeDriver:
    """A driver with one A100, which does work as late as the API allows."""
    return make_driver()


@pytest.fixture
def cuda(driver: FakeDriver) -> Iterator[Any]:
    """pycuda.driver, with the primary context of the first GPU current."""
    import pycuda.driver

    pycuda.driver.init()
    context = pycuda.driver.Device(0).retain_primary_context()
    context.push()
    yield pycuda.driver
    context.pop()
    context.detach()


def real_gpu_reason() -> str | None:
    """Why there is no real GPU to test on in this process; None where there is one."""
    from gpu_emulation.driver import library

    if library.is_loaded():
        return "the fake driver is loaded in this process: run pytest -m gpu alone"
    if importlib.util.find_spec("pycuda") is None:
        return "pycuda is not installed"
    try:
        import pycuda.driver

        pycuda.driver.init()
    except Exception as error:  # ImportError without a driver, pycuda's own errors without a GPU
        sys.modules.pop("pycuda.driver", None)
        return f"no usable GPU: {error}"
    return None if pycuda.driver.Device.count() else "no GPU"
