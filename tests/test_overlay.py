"""Heat maps: one colour scale for all images, the threshold in its middle."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from pictures import GREY, RGB, scene
from PIL import Image

from advrad_fast import ImageError, Inspection, Outcome
from advrad_fast.errors import PartNotFoundError
from advrad_fast.overlay import FULL_SCALE, colours, legend, overlay

BLACK = np.zeros((16, 20, 3), np.uint8)


def inspection(values: NDArray[np.float32], threshold: float = 0.5, mask: NDArray[np.bool_] | None = None) -> Inspection:
    """With a map; without a mask given, nothing is outlined."""
    outline = np.zeros(values.shape, bool) if mask is None else mask
    return Inspection(Outcome.DEFECT, float(values.max()), threshold, 0.1, values.astype(np.float32), outline, "stub", {})


def painted(values: NDArray[np.float32], threshold: float = 0.5, frame: NDArray[np.uint8] = BLACK) -> NDArray[np.uint8]:
    return np.asarray(overlay(frame, inspection(values, threshold)))


def uniform(value: float) -> NDArray[np.float32]:
    return np.full((16, 20), value, np.float32)


def test_one_value_has_one_colour_whatever_the_maximum() -> None:
    frame = scene(16, 20)
    values = np.linspace(0, 1, 320, dtype=np.float32).reshape(16, 20)
    quiet, loud = painted(values, frame=frame), values.copy()
    loud[0, 0] = 1e6
    changed = (painted(loud, frame=frame) != quiet).any(axis=2)
    assert changed[0, 0] and changed.sum() == 1


def test_the_threshold_stands_at_half_scale() -> None:
    assert FULL_SCALE == 2.0
    for threshold in (0.01, 0.5, 300.0):
        at, below, above = (painted(uniform(share * threshold), threshold)[0, 0].astype(int) for share in (1.0, 0.97, 1.03))
        # At the threshold three quarters of the colour lie on the black frame.
        assert np.abs(at - 0.75 * colours(np.float32([0.5]))[0]).max() <= 1
        assert below[2] > below[0] + 40, "below the threshold: blue"
        assert above[0] > above[2] + 40, "above the threshold: yellow"
        end = painted(uniform(FULL_SCALE * threshold), threshold)
        assert np.array_equal(painted(uniform(50 * threshold), threshold), end)
        assert not np.array_equal(painted(uniform(0.9 * FULL_SCALE * threshold), threshold), end)


def test_the_scale_of_colours() -> None:
    ramp = colours(np.linspace(-1, 3, 401, dtype=np.float32))
    assert ramp.dtype == np.uint8 and ramp.shape == (401, 3)
    assert ramp[0].tolist() == ramp[100].tolist() == [13, 8, 135]
    assert ramp[200].tolist() == ramp[400].tolist() == [200, 10, 20]
    assert len(np.unique(ramp[100:201], axis=0)) > 95  # nearly every level can be told from the next


def test_quiet_parts_leave_the_frame_visible() -> None:
    grey = np.asarray(Image.fromarray(scene(16, 20)).convert("L"), dtype=float)
    quiet = painted(uniform(0.0), frame=scene(16, 20)).astype(float)
    assert np.abs(quiet - (0.85 * grey[..., None] + 0.15 * np.array([13, 8, 135]))).max() <= 1


def test_the_outline_is_the_masks_border() -> None:
    mask = np.zeros((16, 20), bool)
    mask[4:10, 6:13] = True
    picture = np.asarray(overlay(BLACK, inspection(uniform(0.9), mask=mask)))
    border = mask.copy()
    border[5:9, 7:12] = False
    assert np.array_equal((picture == 255).all(axis=2), border)
    speck = np.zeros((16, 20), bool)
    speck[3, 3] = True
    assert ((np.asarray(overlay(BLACK, inspection(uniform(0.9), mask=speck))) == 255).all(axis=2) == speck).all()


def test_a_mask_at_the_frames_edge_is_outlined_inside_only() -> None:
    mask = np.zeros((16, 20), bool)
    mask[:, :5] = True
    picture = np.asarray(overlay(BLACK, inspection(uniform(0.9), mask=mask)))
    wanted = np.zeros((16, 20), bool)
    wanted[:, 4] = True
    assert np.array_equal((picture == 255).all(axis=2), wanted)


@pytest.mark.parametrize("frame", [GREY, GREY[:, :, None], RGB, GREY.astype(np.uint16) * 257, RGB / 255.0, Image.fromarray(RGB)])
def test_the_picture_has_the_frames_size(frame: object) -> None:
    picture = overlay(frame, inspection(np.zeros((12, 20), np.float32)))
    assert (picture.mode, picture.size) == ("RGB", (20, 12))


def test_without_a_map_the_frame_is_plain() -> None:
    for outcome, error in ((Outcome.OK, None), (Outcome.ABSTAIN, PartNotFoundError("none"))):
        bare = Inspection(outcome, None, 0.5, None, None, None, "stub", {}, error)
        assert np.array_equal(np.asarray(overlay(RGB, bare)), RGB)
        assert np.array_equal(np.asarray(overlay(GREY, bare)), GREY[:, :, None].repeat(3, axis=2))


@pytest.mark.parametrize("threshold", [0.0, -0.0, -1.0, 1e-50, 5e-324])
def test_thresholds_without_a_scale(threshold: float) -> None:
    """All or nothing: what is above such a threshold is red, the rest is blue.  Warnings are errors here."""
    values = uniform(threshold - 1.0)
    values[0, 0] = threshold + 1.0
    picture = painted(values, threshold)
    assert np.abs(picture[0, 0] - 0.75 * colours(np.float32([1.0]))[0]).max() <= 1
    assert np.abs(picture[1:] - 0.15 * colours(np.float32([0.0]))[0]).max() <= 1


def test_bad_frames_are_refused() -> None:
    with pytest.raises(ImageError, match="frame: expected"):
        overlay(None, inspection(uniform(0.0)))


def test_legend() -> None:
    ramp = np.asarray(legend(101, 5))
    assert ramp.shape == (5, 101, 3)
    assert (ramp == ramp[0]).all()
    assert np.array_equal(ramp[0], colours(np.linspace(0, 1, 101, dtype=np.float32)))
