"""Random damage to image files: each is refused with an ImageError, or read into a frame; quickly, and in little memory."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import edit_bytes, fuzz
from pictures import GREY, RGBA, scene
from PIL import Image

from advrad_fast.config import ImageConfig
from advrad_fast.errors import ImageError
from advrad_fast.images import check_frame, load_image, prepare

MAX_PIXELS = 1_000_000
_SIZES = [0, 1, 7, 1000, 1001, 65535, 65536, 2**24, 2**31 - 1, 2**32 - 1]
CONFIG = ImageConfig(16, 16)


def _bases() -> list[bytes]:
    """A small file of every kind that is read, with metadata where it can have some."""
    grey, colour, opaque = Image.fromarray(GREY), Image.fromarray(scene(24, 32)), Image.fromarray(RGBA)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8769] = 6, "a part", {0x9003: "2024:01:01 00:00:00"}
    palette, bits, wide = colour.quantize(16), Image.fromarray(GREY > 99), Image.fromarray(GREY.astype(np.uint16) * 257)
    real, cmyk = Image.fromarray((GREY / 255).astype(np.float32)), colour.convert("CMYK")
    saves: list[tuple[Image.Image, str, dict[str, Any]]] = [
        *((image, "PNG", {}) for image in (grey, colour, opaque, palette, bits, wide)),
        (colour, "PNG", {"exif": exif, "icc_profile": bytes(200), "dpi": (72, 72)}),
        (colour, "PNG", {"save_all": True, "append_images": [colour.rotate(90)]}),
        *((image, "JPEG", {"exif": exif}) for image in (grey, colour, cmyk)),
        (colour, "JPEG", {"progressive": True, "icc_profile": bytes(200), "restart_marker_blocks": 1}),
        *((image, "TIFF", {}) for image in (grey, colour, opaque, palette, wide, real, cmyk)),
        *((colour, "TIFF", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")),
        *((bits, "TIFF", {"compression": name}) for name in ("group3", "group4")),
        (colour, "TIFF", {"save_all": True, "append_images": [grey], "big_tiff": True}),
        *((image, "BMP", {}) for image in (grey, colour, palette, bits)),
        *((image, "WEBP", {"lossless": lossless, "exif": exif}) for image in (colour, opaque) for lossless in (True, False)),
        *((image, "PPM", {}) for image in (grey, colour, bits, wide)),
    ]
    files = [b"P3\n2 1\n255\n1 2 3 4 5 6\n", b"P2 # a comment\n2 2 9\n1 2 3 4\n", b"P1\n3 2\n1 0 1 0 1 1\n"]
    for image, kind, options in saves:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


BASES = _bases()


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def _mutate_png(rng: np.random.Generator, data: bytes) -> bytes:
    """A chunk's body changed, repeated, moved or dropped, under a right checksum; or a header of another size."""
    chunks = _png_chunks(data)
    i = int(rng.integers(len(chunks)))
    name, body = chunks[i]
    kind = rng.integers(6)
    if kind == 0:
        chunks[i] = (name, edit_bytes(rng, body) if body else rng.bytes(8))
    elif kind == 1:
        del chunks[i]
    elif kind == 2:
        chunks.insert(int(rng.integers(len(chunks) + 1)), (name, body))
    elif kind == 3:
        sizes = struct.pack(">II", *(int(rng.choice(_SIZES)) for _ in range(2)))
        chunks[0] = (chunks[0][0], sizes + chunks[0][1][8:])
    elif kind == 4:
        depth = bytes([int(rng.choice([0, 1, 2, 4, 8, 16, 255])), int(rng.integers(8)), 0, 0, int(rng.integers(3))])
        chunks[0] = (chunks[0][0], chunks[0][1][:8] + depth)
    else:  # compressed metadata that unpacks to 8 MB
        bomb = zlib.compress(bytes(8 << 20))
        extra = [(b"zTXt", b"a\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb), (b"iTXt", b"a\0\1\0\0\0" + bomb)]
        chunks.insert(1, extra[rng.integers(3)])
    packed = (struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks)
    return data[:8] + b"".join(packed)


def _mutate_tiff(rng: np.random.Generator, data: bytes) -> bytes:
    """An entry of the first directory of a little-endian classic TIFF rewritten: its tag, type, count or value."""
    if data[:4] != b"II*\0":
        return edit_bytes(rng, data)
    raw = bytearray(data)
    (start,) = struct.unpack("<I", raw[4:8])
    (count,) = struct.unpack("<H", raw[start : start + 2])
    at = start + 2 + 12 * int(rng.integers(count))
    field, form = [(0, "<H"), (2, "<H"), (4, "<I"), (8, "<I")][rng.integers(4)]
    value = int(rng.choice([*_SIZES, 2, 3, 4, 5, 8, 12, 16, 258, 259, 262, 273, 277, 278, 279, 330, 339, 34665]))
    struct.pack_into(form, raw, at + field, value & (0xFFFF if form == "<H" else 0xFFFFFFFF))
    return bytes(raw)


def _mutate_jpeg(rng: np.random.Generator, data: bytes) -> bytes:
    """A size, component count or sampling factor in the frame header, or an EXIF block of random bytes."""
    raw = bytearray(data)
    if rng.random() < 0.5:
        start = next((i for i in range(len(raw) - 9) if raw[i] == 0xFF and raw[i + 1] in (0xC0, 0xC2)), 2)
        offset, size = [(5, 2), (7, 2), (9, 1), (11, 1), (4, 1)][rng.integers(5)]
        raw[start + offset : start + offset + size] = int(rng.choice([0, 1, 2, 3, 255, 65535]) % 256**size).to_bytes(size, "big")
        return bytes(raw)
    block = b"Exif\0\0" + (b"II*\0" if rng.random() < 0.5 else b"MM\0*") + rng.bytes(int(rng.integers(4, 200)))
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]


def mutate(rng: np.random.Generator, data: bytes) -> bytes:
    """One to three mutations: of the format's own structure half of the time, else of any bytes, the header above all."""
    for _ in range(rng.integers(1, 4)):
        structured = rng.random() < 0.5
        if structured and data.startswith(b"\x89PNG") and _png_chunks(data):
            data = _mutate_png(rng, data)
        elif structured and data.startswith(b"II") and len(data) > 200:
            try:
                data = _mutate_tiff(rng, data)
            except (struct.error, ValueError):  # damaged already
                data = edit_bytes(rng, data)
        elif structured and data.startswith(b"\xff\xd8") and len(data) > 20:
            data = _mutate_jpeg(rng, data)
        else:
            data = edit_bytes(rng, data, until=128)
    return data


def run(tmp_path: Path, count: int, seed: int) -> int:
    path = tmp_path / "image"

    def attempt(rng: np.random.Generator) -> bool:
        mutant = mutate(rng, BASES[rng.integers(len(BASES))])
        path.write_bytes(mutant)
        try:
            with warnings.catch_warnings():
                # Pillow warns of odd metadata: an error in the tests, a line on standard error elsewhere.  Both have to do.
                warnings.simplefilter("error" if rng.random() < 0.5 else "ignore")
                if rng.random() < 0.5:
                    frame = load_image(path, max_pixels=MAX_PIXELS)
                else:
                    try:
                        image = Image.open(io.BytesIO(mutant))
                    except Exception:  # Pillow's, and not ours
                        return False
                    if image.width * image.height > MAX_PIXELS:
                        return False
                    frame = check_frame(image)
        except ImageError as error:
            assert not isinstance(error.__cause__, MemoryError), "too much memory"
            return False
        assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] in (1, 3)
        assert 1 <= frame.shape[0] * frame.shape[1] <= MAX_PIXELS and frame.flags.c_contiguous
        assert prepare(frame, CONFIG).image.shape == (16, 16, 3)
        return True

    return fuzz(attempt, count, seed=seed)


def test_the_bases_are_read(tmp_path: Path) -> None:
    path = tmp_path / "image"
    for base in BASES:
        path.write_bytes(base)
        assert load_image(path).size


def test_images(tmp_path: Path) -> None:
    valid = run(tmp_path, 2_000, seed=0)
    assert 200 < valid < 1_800


@pytest.mark.slow
def test_images_long(tmp_path: Path) -> None:
    run(tmp_path, 100_000, seed=1)
