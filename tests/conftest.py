"""Shared by all tests: memory that nobody has written is NaN, and random examples are the same on every run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
from gpu_emulation.fixtures import cuda, driver, fake_library, make_driver  # noqa: F401  # fixtures, for every test

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=100, database=None)
hypothesis.settings.load_profile("repeatable")


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
