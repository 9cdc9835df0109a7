"""The input contract: each kind of bad or unusual input has a defined result."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image, ImageFile

from advrad_fast.config import ImageConfig, PoseConfig
from advrad_fast.errors import ConfigError, ImageDecodeError, ImageError, ImageTooLargeError, PartNotFoundError
from advrad_fast.images import Prepared, check_frame, list_images, load_image, map_to_frame, prepare

rng = np.random.default_rng(7)
GREY = rng.integers(0, 256, (12, 20), dtype=np.uint8)
RGB = rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)
RGBA = np.dstack([RGB, np.full((12, 20), 255, np.uint8)])


def scene(height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """A smooth colour image, which JPEG and resizing change little."""
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    image: NDArray[np.uint8] = np.rint(255 * np.stack([x, y, (x + y) / 2], axis=2)).astype(np.uint8)
    return image


def same(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


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


# load_image


@pytest.mark.parametrize("suffix", ["png", "tiff", "bmp", "webp", "ppm", "jpg"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    path, image = tmp_path / f"a.{suffix}", scene()
    Image.fromarray(image).save(path, lossless=True, quality=95)  # each format takes what it knows
    loaded = load_image(path)
    assert loaded.shape == image.shape
    assert loaded.dtype == np.uint8
    assert np.abs(loaded.astype(int) - image).max() <= (8 if suffix == "jpg" else 0)
    assert same(load_image(str(path)), loaded)


def test_the_content_counts_not_the_name(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert same(load_image(tmp_path / "a.jpg"), RGB)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_sixteen_bit_grey(tmp_path: Path, suffix: str) -> None:
    values = rng.integers(0, 65536, (9, 7), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    assert same(load_image(tmp_path / f"a.{suffix}"), check_frame(values))


def test_sixteen_bit_colour_keeps_the_high_byte(tmp_path: Path) -> None:
    values = rng.integers(0, 65536, (5, 4, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    (tmp_path / "a.png").write_bytes(png(4, 5, 16, 2, rows))
    assert same(load_image(tmp_path / "a.png"), (values >> 8).astype(np.uint8))


def test_palette_one_bit_cmyk_and_alpha(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    palette = Image.fromarray(RGB).quantize(16)
    palette.save(path)
    assert same(load_image(path), np.asarray(palette.convert("RGB")))
    Image.fromarray(GREY > 99).save(path)
    assert same(load_image(path), np.where(GREY > 99, 255, 0).astype(np.uint8)[:, :, None])
    Image.fromarray(RGBA).save(path)
    assert same(load_image(path), RGB)
    Image.fromarray(np.dstack([GREY, np.full_like(GREY, 255)])).save(path)
    assert same(load_image(path), GREY[:, :, None])
    cmyk = Image.fromarray(scene()).convert("CMYK")
    cmyk.save(tmp_path / "a.tiff")
    assert same(load_image(tmp_path / "a.tiff"), np.asarray(cmyk.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_files_with_transparent_pixels(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    image = Image.new("RGBA", (8, 8), (9, 9, 9, 255))
    image.putpixel((2, 2), (9, 9, 9, 0))
    if mode in ("RGBA", "LA"):
        image.convert(mode).save(path)
    else:
        image = Image.fromarray(RGB).quantize(4) if mode == "P" else Image.fromarray(RGB).convert(mode)
        image.save(path, transparency=image.getpixel((0, 0)))
    with pytest.raises(ImageError, match="transparent"):
        load_image(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "jpg"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = scene(16, 24)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, lossless=True)  # lossless: WebP only
    loaded = load_image(path)
    assert loaded.shape == upright.shape
    assert np.abs(loaded.astype(int) - upright).mean() < 4
    with Image.open(path) as image:
        assert same(check_frame(image), loaded)


def test_float_tiff_must_lie_in_0_1(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    Image.fromarray((GREY / 255.0).astype(np.float32)).save(path)
    assert same(load_image(path), GREY[:, :, None])
    Image.fromarray(GREY.astype(np.float32)).save(path)
    with pytest.raises(ImageError, match=r"in \[0, 1\]"):
        load_image(path)


def test_pixels_without_a_scale_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    Image.fromarray(GREY.astype(np.int32)).save(path)
    with pytest.raises(ImageDecodeError, match="mode I "):
        load_image(path)
    with pytest.raises(ImageDecodeError, match="mode HSV"):
        check_frame(Image.fromarray(RGB).convert("HSV"))


def tiff(bits: int, photometric: int, sample_format: int, pixels: bytes, width: int, height: int) -> bytes:
    """A little-endian uncompressed grey TIFF of one strip."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (277, 1), (278, height)]
    tags += [(279, len(pixels)), (339, sample_format)]
    offset = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = sorted([*tags, (273, offset)])
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 0) + pixels


def test_tiff_with_an_unusual_scale_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    values = np.array([[0, 257], [65535, 514]], "<u2")
    path.write_bytes(tiff(16, 1, 1, values.tobytes(), 2, 2))
    assert load_image(path)[:, :, 0].tolist() == [[0, 1], [255, 2]]
    for bits, photometric, kind, pixels in (
        (16, 0, 1, values.tobytes()),
        (12, 1, 1, bytes(6)),
        (16, 1, 2, values.tobytes()),
        (8, 1, 2, bytes(4)),
    ):
        path.write_bytes(tiff(bits, photometric, kind, pixels, 2, 2))
        with pytest.raises(ImageDecodeError, match="no defined scale"):
            load_image(path)


def test_the_first_of_several_frames_is_read(tmp_path: Path) -> None:
    for suffix in ("tiff", "webp", "png"):
        path = tmp_path / f"a.{suffix}"
        first, second = Image.fromarray(scene()), Image.new("RGB", (64, 48))
        first.save(path, save_all=True, append_images=[second], lossless=True)
        assert same(load_image(path), scene())


@pytest.mark.parametrize("suffix", ["png", "tiff", "bmp", "webp", "pgm", "jpg"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_truncated_files(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ImageDecodeError, match=r"a\."):
        load_image(path)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "TIFF", "BMP", "WEBP", "PPM", "JPEG"]), st.data())
def test_damaged_files_decode_or_raise_the_documented_error(tmp_path_factory: Any, kind: str, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    Image.fromarray(scene(16, 16)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "a"
    path.write_bytes(bytes(content))
    try:
        image = load_image(path, max_pixels=100_000)
    except ImageError:
        return
    assert image.dtype == np.uint8
    assert image.shape[2] in (1, 3)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x89PNG\r\n\x1a\n", b"hello", b"\xff\xd8\xff", b"BM", b"GIF89a" + bytes(50), b"%PDF-1.4", b"P5\n-1 4\n255\n"],
)
def test_files_that_are_no_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ImageDecodeError, match=r"a\.png"):
        load_image(path)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.png", tmp_path, "a\0b", 3, None):
        with pytest.raises(ImageDecodeError, match="can't be opened"):
            load_image(path)  # type: ignore[arg-type]


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (100_000_001, 1), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_on_their_header(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height, 8, 0, b"\0"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageTooLargeError, match=r"bomb\.png.*the cap is 100000000"):
            load_image(path)


def test_the_cap_is_the_callers(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(GREY).save(path)
    assert load_image(path, max_pixels=GREY.size).shape == (12, 20, 1)
    with pytest.raises(ImageTooLargeError):
        load_image(path, max_pixels=GREY.size - 1)
    for bad in (0, -1, 1.5, True, None):
        with pytest.raises(ConfigError, match="max_pixels: expected"):
            load_image(path, max_pixels=bad)  # type: ignore[arg-type]


def test_pillows_own_cap_does_not_interfere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    Image.fromarray(GREY).save(tmp_path / "a.png")
    assert same(load_image(tmp_path / "a.png"), GREY[:, :, None])


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


def part() -> NDArray[np.uint8]:
    frame = np.full((100, 120), 200, np.uint8)
    frame[45:55, 20:100] = 50
    frame[35:65, 88:100] = 50
    return frame


POSE = PoseConfig(min_contrast=0.3, length=0.8, min_length=0.5, crop_length=1.0, crop_width=0.5)


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
    assert not np.shares_memory(back, values)


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


# list_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG", "sub/c.tiff", "sub/deep/d.bmp", ".hidden.png", ".git/e.png", "notes.txt", "sub/x[1].png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    return tmp_path


def names(paths: list[Path], folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def test_folders_are_searched_in_order(folder: Path) -> None:
    everything = ["a.JPG", "b.png", "sub/c.tiff", "sub/deep/d.bmp", "sub/x[1].png"]
    assert names(list_images(folder), folder) == everything
    assert names(list_images(str(folder)), folder) == everything
    assert names(list_images([folder / "sub", folder]), folder) == [*everything[2:], *everything[:2]]


def test_files_and_patterns(folder: Path) -> None:
    assert names(list_images([folder / "notes.txt"]), folder) == ["notes.txt"]
    assert names(list_images(folder / "sub" / "x[1].png"), folder) == ["sub/x[1].png"]
    assert names(list_images(str(folder / "*.png")), folder) == ["b.png"]
    assert names(list_images(str(folder / "**" / "*.png")), folder) == ["b.png", "sub/x[1].png"]
    assert names(list_images(str(folder / "s*")), folder) == ["sub/c.tiff", "sub/deep/d.bmp", "sub/x[1].png"]
    assert names(list_images([folder / "b.png", str(folder / "*")]), folder)[:2] == ["b.png", "a.JPG"]


def test_links_to_folders_are_not_followed(folder: Path) -> None:
    (folder / "sub" / "loop").symlink_to(folder, target_is_directory=True)
    assert len(list_images(folder)) == 5


@pytest.mark.parametrize("name", ["empty", "missing", "missing.png", "*.webp", "sub/*.txt"])
def test_paths_without_images(folder: Path, name: str) -> None:
    with pytest.raises(ImageError, match=r"no image found|no such file"):
        list_images([folder / "a.JPG", str(folder / name)])


@pytest.mark.parametrize("paths", [[], b"a.png", [3], [None]])
def test_paths_that_are_no_paths(paths: Any) -> None:
    with pytest.raises(ImageError, match="paths: expected"):
        list_images(paths)
