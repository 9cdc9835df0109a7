"""The input contract: each kind of bad or unusual input has a defined result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pictures import GREY, POSE, RGB, RGBA, part, same, scene
from PIL import Image

from advrad_fast.config import ImageConfig
from advrad_fast.errors import ImageError, ImageTooLargeError, PartNotFoundError
from advrad_fast.images import Prepared, check_frame, map_to_frame, mask_to_frame, prepare

# check_frame: what is accepted


@pytest.mark.parametrize(
    ("frame", "wanted"),
    [
        (GREY, GREY[:, :, None]),
        (GREY[:, :, None], GREY[:, :, None]),
        (RGB, RGB),
        (RGBA, RGB),
        (RGB[::2, ::-1], RGB[::2, ::-1]),
        (RGB[:, :, ::-1], RGB[:, :, ::-1]),
        (np.asfortranarray(RGB), RGB),
        (GREY.T, GREY.T[:, :, None]),
        (np.broadcast_to(GREY[:, :, None], (12, 20, 3)), GREY[:, :, None].repeat(3, axis=2)),
        (GREY.astype(np.uint16) * 257, GREY[:, :, None]),
        ((RGB.astype(np.uint16) * 257).astype(">u2"), RGB),
        (RGB / 255.0, RGB),
        ((RGB / 255.0).astype(np.float32), RGB),
        ((RGB / 255.0).astype(np.float16), RGB),
        ((RGB / 255.0).astype(">f4"), RGB),
        (RGBA / 255.0, RGB),
        (GREY[:1, :1], GREY[:1, :1, None]),
        (Image.fromarray(GREY), GREY[:, :, None]),
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(RGBA), RGB),
        (Image.fromarray(GREY.astype(np.uint16) * 257), GREY[:, :, None]),
        (Image.fromarray((GREY / 255.0).astype(np.float32)), GREY[:, :, None]),
    ],
)
def test_accepted(frame: Any, wanted: NDArray[np.uint8]) -> None:
    result = check_frame(frame)
    assert same(result, wanted)
    assert result.flags.c_contiguous


def test_read_only_frames_are_accepted_and_frames_are_not_written() -> None:
    frame = RGB.copy()
    frame.flags.writeable = False
    assert same(check_frame(frame), RGB)
    assert same(
        prepare(frame, ImageConfig(16, 24, 3, brightness=0.5)).image, prepare(RGB, ImageConfig(16, 24, 3, brightness=0.5)).image
    )


def test_the_scale_comes_from_the_dtype_not_from_the_values() -> None:
    ones = np.ones((8, 8), np.uint8)
    assert int(check_frame(ones).max()) == 1
    assert int(check_frame(ones.astype(np.uint16)).max()) == 0
    assert int(check_frame(ones.astype(np.float32)).max()) == 255


def test_uint16_is_rounded_over_its_whole_range() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert (check_frame(values)[:, :, 0] == np.floor(values / 257.0 + 0.5)).all()


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(st.sampled_from([np.float32, np.float64, np.float16]), (3, 5), elements=st.floats(0, 1, width=16)))
def test_floats_are_rounded(values: NDArray[Any]) -> None:
    assert np.abs(check_frame(values)[:, :, 0] - 255.0 * values.astype(np.float64)).max() <= 0.5 + 1e-4


# check_frame: what is refused


@pytest.mark.parametrize(
    ("frame", "got"),
    [
        (GREY > 9, "bool"),
        (GREY.astype(np.int8), "int8"),
        (GREY.astype(np.int32), "int32"),
        (GREY.astype(np.int64), "int64"),
        (GREY.astype(np.uint32), "uint32"),
        (GREY.astype(np.uint64), "uint64"),
        (GREY.astype(np.complex64), "complex64"),
        (GREY.astype(object), "object"),
        (GREY.astype(np.longdouble) / 255, np.dtype(np.longdouble).name),
        (np.array([["a"]]), "<U1"),
        (np.zeros((2, 2), "M8[s]"), "datetime64"),
        (np.zeros((2, 2), [("r", "u1")]), "dtype"),
        (np.uint8(3), "uint8"),
        (np.array(3, np.uint8), r"shape \(\)"),
        (GREY[0], r"shape \(20,\)"),
        (RGB[None], r"shape \(1, 12, 20, 3\)"),
        (RGB.transpose(2, 0, 1), r"shape \(3, 12, 20\)"),
        (RGB[:, :, :2], r"shape \(12, 20, 2\)"),
        (np.zeros((4, 4, 0), np.uint8), r"shape \(4, 4, 0\)"),
        (np.zeros((0, 0), np.uint8), "0 x 0"),
        (np.zeros((0, 5, 3), np.uint8), "0 x 5"),
        (np.zeros((5, 0), np.float32), "5 x 0"),
        (np.ma.masked_array(GREY, GREY > 9), "MaskedArray"),
        ([[1, 2], [3, 4]], "list"),
        (None, "NoneType"),
        (b"\x00", "bytes"),
        ("frame.png", "str"),
        (Image.new("L", (0, 4)), "4 x 0"),
    ],
)
def test_refused_frames_name_what_came(frame: object, got: str) -> None:
    with pytest.raises(ImageError, match=rf"^frame: expected .*{got}"):
        check_frame(frame)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -0.001, 1.001, 255.0])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_outside_their_range(bad: float, dtype: type) -> None:
    frame: NDArray[Any] = np.full((8, 8, 3), 0.5, dtype)
    frame[3, 4, 1] = bad
    wanted = r"in \[0, 1\]" if np.isfinite(bad) else "finite"
    with pytest.raises(ImageError, match=f"frame: expected .*{wanted}"):
        check_frame(frame)


@pytest.mark.parametrize("as_pil", [False, True])
def test_transparent_pixels_are_refused(as_pil: bool) -> None:
    frame = RGBA.copy()
    frame[2, 3, 3] = 254
    with pytest.raises(ImageError, match="alpha 254"):
        check_frame(Image.fromarray(frame) if as_pil else frame)


def test_too_many_pixels_are_refused_before_they_are_touched() -> None:
    huge = np.broadcast_to(np.uint8(0), (20_000, 20_000))
    with pytest.raises(ImageTooLargeError, match="20000 x 20000"):
        check_frame(huge)


# prepare


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("frame", [GREY, RGB, RGBA, GREY.astype(np.uint16), RGB / 255.0])
@pytest.mark.parametrize("size", [(8, 8), (16, 40), (128, 64)])
def test_prepared_images_have_the_networks_shape(channels: int, frame: NDArray[Any], size: tuple[int, int]) -> None:
    prepared = prepare(frame, ImageConfig(*size, channels))
    assert prepared.image.shape == (*size, channels)
    assert prepared.image.dtype == np.uint8
    assert prepared.image.flags.c_contiguous
    assert prepared.frame_shape == (12, 20)
    assert prepared.affine is None


def test_a_frame_of_the_right_size_is_left_as_it_is() -> None:
    frame = scene(48, 64)
    assert same(prepare(frame, ImageConfig(48, 64, 3)).image, frame)
    assert same(prepare(frame[:, :, 0], ImageConfig(48, 64, 1)).image, frame[:, :, :1])
    assert same(prepare(frame[:, :, 0], ImageConfig(48, 64, 3)).image, frame[:, :, :1].repeat(3, axis=2))


def test_grey_is_itu_r_601() -> None:
    frame = scene(48, 64)
    grey = prepare(frame, ImageConfig(48, 64, 1)).image[:, :, 0]
    assert np.abs(grey - frame @ [0.299, 0.587, 0.114]).max() <= 0.51


def test_downsizing_is_antialiased() -> None:
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 255
    image = prepare(stripes, ImageConfig(32, 32, 1)).image
    assert np.abs(image.astype(int) - 128).max() <= 12
    assert np.abs(image[:, 4:-4].astype(int) - 128).max() <= 1


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.uint8, (16, 24, 3)), st.floats(0.05, 0.95))
def test_brightness(frame: NDArray[np.uint8], brightness: float) -> None:
    plain = prepare(frame, ImageConfig(16, 24, 3)).image
    image = prepare(frame, ImageConfig(16, 24, 3, brightness)).image
    median = float(np.median(np.asarray(Image.fromarray(plain).convert("L"))))
    gain = 4.0 if median == 0 else float(np.clip(255 * brightness / median, 0.25, 4.0))
    assert same(image, np.clip(np.rint(plain * gain), 0, 255).astype(np.uint8))


def test_brightness_of_black_white_and_dim_frames() -> None:
    config = ImageConfig(16, 16, 1, brightness=0.5)
    assert int(prepare(np.zeros((16, 16), np.uint8), config).image.max()) == 0
    assert np.unique(prepare(np.full((16, 16), 255, np.uint8), config).image).tolist() == [128]
    assert np.unique(prepare(np.full((16, 16), 10, np.uint8), config).image).tolist() == [40]
    speck = np.zeros((16, 16), np.uint8)
    speck[0, 0] = 50
    assert int(prepare(speck, config).image.max()) == 200


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("colour", [False, True])
def test_prepare_with_a_pose(channels: int, colour: bool) -> None:
    frame = part()[:, :, None].repeat(3, axis=2) if colour else part()
    prepared = prepare(frame, ImageConfig(32, 64, channels, brightness=0.5, pose=POSE))
    assert prepared.image.shape == (32, 64, channels)
    assert prepared.affine is not None
    assert prepared.frame_shape == (100, 120)
    dark = (prepared.image[:, :, 0] < 90).sum(axis=0)
    assert dark[:14].max() > 1.8 * dark[30:50].max()  # the head is on the left
    assert np.median(prepared.image) == pytest.approx(128, abs=1)
    with pytest.raises(PartNotFoundError):
        prepare(np.full((100, 120), 200, np.uint8), ImageConfig(32, 64, channels, pose=POSE))


@pytest.mark.parametrize("frame", [None, RGB.astype(int), np.full((8, 8), np.nan), np.zeros((0, 0), np.uint8)])
def test_prepare_refuses_what_check_frame_refuses(frame: object) -> None:
    with pytest.raises(ImageError, match="frame: expected"):
        prepare(frame, ImageConfig())


# map_to_frame


@pytest.mark.parametrize("shape", [(16, 24), (48, 72), (5, 7), (1, 1)])
def test_maps_go_back_to_the_frames_size(shape: tuple[int, int]) -> None:
    prepared = prepare(np.zeros(shape, np.uint8), ImageConfig(16, 24, 1))
    values = np.full((16, 24), 3.5, np.float32)
    back = map_to_frame(values, prepared)
    assert back.dtype == np.float32
    assert back.shape == shape
    assert back == pytest.approx(np.full(shape, 3.5))
    assert np.shares_memory(back, values) == (shape == (16, 24))  # nothing to do: nothing is copied


def test_a_spot_goes_back_where_it_was() -> None:
    prepared = prepare(np.zeros((64, 96), np.uint8), ImageConfig(16, 24, 1))
    values = np.zeros((16, 24), np.float32)
    values[4, 20] = 1.0
    back = map_to_frame(values, prepared)
    rows, cols = np.mgrid[:64, :96]
    assert (rows * back).sum() / back.sum() == pytest.approx(4 * 4 + 1.5, abs=0.01)
    assert (cols * back).sum() / back.sum() == pytest.approx(20 * 4 + 1.5, abs=0.01)


def test_maps_of_aligned_parts_are_turned_back() -> None:
    prepared = prepare(part(), ImageConfig(32, 64, 1, pose=POSE))
    values = np.where(prepared.image[:, :, 0] < 120, 1.0, 0.0).astype(np.float32)
    back = map_to_frame(values, prepared)
    assert back.shape == (100, 120)
    assert ((back > 0.5) == (part() < 120)).mean() > 0.97


@pytest.mark.parametrize(
    "values", [np.zeros((16, 24)), np.zeros((24, 16), np.float32), np.zeros((16, 24, 1), np.float32), [[0.0]], None]
)
def test_maps_of_another_shape_or_type_are_refused(values: Any) -> None:
    prepared = Prepared(np.zeros((16, 24, 1), np.uint8), (16, 24), None)
    with pytest.raises(ImageError, match="values: expected a float32 array"):
        map_to_frame(values, prepared)


@pytest.mark.parametrize("shape", [(16, 16), (50, 30), (64, 64), (200, 300)])
def test_masks_keep_every_defect(shape: tuple[int, int]) -> None:
    """One marked pixel marks the frame around its place, however coarse the frame is."""
    prepared = prepare(np.zeros((*shape, 3), np.uint8), ImageConfig(64, 64))
    for y, x in ((0, 0), (63, 63), (17, 40)):
        mask = np.zeros((64, 64), dtype=bool)
        mask[y, x] = True
        marked = np.argwhere(mask_to_frame(mask, prepared))
        wanted = (np.array([y, x]) + 0.5) * shape / np.array([64, 64]) - 0.5
        assert len(marked) > 0
        assert np.abs(marked - wanted).max() <= max(1.5, 1.5 * max(shape) / 64)


def test_masks_of_a_crop_that_reaches_over_the_edge() -> None:
    affine = np.array([[0.0, -2.0, 3.0], [2.0, 0.0, -9.0]])  # turned by a right angle, twice as coarse, partly outside
    prepared = Prepared(np.zeros((64, 64, 1), np.uint8), (32, 32), affine)
    for y, x in ((0, 0), (5, 9), (63, 63)):
        mask = np.zeros((64, 64), dtype=bool)
        mask[y, x] = True
        assert mask_to_frame(mask, prepared).any()
    assert not mask_to_frame(np.zeros((64, 64), dtype=bool), prepared).any()
