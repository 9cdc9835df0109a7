"""Regions of interest on the CUDA backend: the reference's results, for frames of the host and for frames on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from device_arrays import Exported, Interface
from gpu_emulation.driver import FakeDriver
from models import small_model
from numpy.typing import NDArray
from test_cuda import BOUNDS, engine  # noqa: F401  # a fixture
from test_detector import same
from test_gpu_frames import driver, make, put  # noqa: F401  # fixtures
from test_pose import pin
from test_tiling import texture, tiled

from advrad_fast import Detector, Inspection, Outcome
from advrad_fast.errors import ImageError, PartNotFoundError
from advrad_fast.model import ModelFile
from advrad_fast.pose import fit_pose
from advrad_fast.roi import Roi

SIDE = 32
MODEL = small_model(spread=True)


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)


def box(height: int, width: int, top: int, left: int, side: int) -> NDArray[np.bool_]:
    mask = np.zeros((height, width), np.bool_)
    mask[top : top + side, left : left + side] = True
    return mask


def aligned() -> ModelFile:
    return small_model(pose=fit_pose([pin(a, (95.5 + 0.03 * a, 95.5 - 0.02 * a)) for a in range(0, 360, 40)]))


#: A model, a frame and a region in which it is not at its worst.
CASES: dict[str, Callable[[], tuple[ModelFile, NDArray[np.uint8], Roi]]] = {
    "the network's size": lambda: (MODEL, noise(SIDE, SIDE, 3), Roi(box(SIDE, SIDE, 4, 18, 9))),
    "another size": lambda: (MODEL, noise(48, 80, 3), Roi(box(48, 80, 30, 7, 15))),
    "grey": lambda: (MODEL, noise(20, 27), Roi(box(20, 27, 2, 2, 6))),
    "a turned part": lambda: (aligned(), pin(33.0), Roi(box(192, 192, 60, 60, 40))),
    "on the part": lambda: (aligned(), pin(200.0), Roi(box(SIDE, SIDE, 10, 2, 10), "part")),
    "tiles": lambda: (tiled((40, 44)), texture(np.random.default_rng(1))[:40, :44], Roi(box(40, 44, 33, 33, 5))),
}


def assert_close(got: Inspection, wanted: Inspection) -> None:
    """Up to the bound that the backend has without a region, relative to the map's largest value."""
    assert got.anomaly_map is not None and wanted.anomaly_map is not None and got.mask is not None and wanted.mask is not None
    assert got.outcome is wanted.outcome and got.score is not None and wanted.score
    assert abs(got.score - wanted.score) <= BOUNDS["fp32"] * wanted.score
    assert np.abs(got.anomaly_map - wanted.anomaly_map).max() <= BOUNDS["fp32"] * max(wanted.score, wanted.anomaly_map.max())
    np.testing.assert_array_equal(got.mask, wanted.mask)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(driver: FakeDriver, make: Any, put: Any, case: str) -> None:  # noqa: F811
    """And a frame on the GPU gives what it gives from the host, bit for bit, read in place where the model takes it as it is."""
    model, frame, roi = CASES[case]()
    truth, whole = Detector(model, backend="reference", roi=roi, threads=1), make(model)
    detector = make(model, roi=roi)
    worst = whole.inspect(frame).score
    truth.threshold = detector.threshold = 0.9 * truth.inspect(frame).score  # type: ignore[operator]  # a DEFECT, with a mask
    wanted = truth.inspect(frame)
    assert wanted.outcome is Outcome.DEFECT and wanted.score is not None and wanted.score < worst
    for maps in (True, False):
        got = detector.inspect(frame, maps=maps)
        assert (got.anomaly_map is None) == (got.mask is None) == (not maps)
        if maps:
            assert_close(got, wanted)
            score = got.score
        assert got.score == score
        for array in (Interface(put(frame), frame.shape), Exported(put(frame), frame.shape)):
            before = driver.counters.copied_bytes.copy()
            assert same(detector.inspect(array, maps=maps), got)
            if case == "the network's size":
                assert dict(driver.counters.copied_bytes - before) == {"dtoh": 4 + 4 * SIDE * SIDE}


def test_what_is_refused_or_not_found(driver: FakeDriver, make: Any, put: Any) -> None:  # noqa: F811
    """A frame on the GPU that the region does not fit: not OK, also where the model without the region would take it as it is."""
    frame = noise(SIDE, SIDE, 3)
    for mask in (box(48, 80, 0, 0, 9), box(SIDE, SIDE + 1, 0, 0, 9)):
        detector = make(MODEL, roi=mask)
        with pytest.raises(ImageError, match="one of the region's size"):
            detector.inspect(Interface(put(frame), frame.shape))
        (result,) = detector.inspect_batch([Exported(put(frame), frame.shape)])
        assert result.outcome is Outcome.ERROR
    detector, part = make(aligned(), roi=box(192, 192, 0, 0, 4)), pin(0.0)
    result = detector.inspect(Interface(put(part), part.shape))
    assert result.outcome is Outcome.ABSTAIN and isinstance(result.error, PartNotFoundError) and result.score is None
