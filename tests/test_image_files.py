"""Image files: each kind that is read, refused or damaged has a defined result, and so has every path."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import limited
from pictures import GREY, RGB, RGBA, same, scene
from PIL import Image, ImageFile

from advrad_fast.errors import ConfigError, ImageDecodeError, ImageError, ImageTooLargeError
from advrad_fast.image_paths import list_images
from advrad_fast.images import check_frame, load_image

rng = np.random.default_rng(7)


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


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageDecodeError, match="not a regular file"):
        load_image(tmp_path / "pipe.png")


def test_a_chunk_s_length_is_not_allocated(tmp_path: Path) -> None:
    """320 bytes whose last chunk says that it has 2 GB."""
    path, content = tmp_path / "a.png", png(20, 12, 8, 0, bytes(21 * 12))
    at = content.index(b"IDAT") - 4
    path.write_bytes(content[:at] + struct.pack(">I", 2**31 - 1) + content[at + 4 :])
    with limited(64):
        try:
            load_image(path)
        except ImageDecodeError as error:
            assert not isinstance(error.__cause__, MemoryError)


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
