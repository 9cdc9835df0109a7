"""The input contract: what a frame may be, and how it becomes the network's uint8 image.

A frame is a NumPy array, another library's array in the host's memory (a PyTorch tensor, say: through DLPack) or a Pillow image;
what lies on a GPU, see :mod:`advrad_fast.gpu_frames`.  Its scale comes from its dtype, never from its values:

=================  ==========================  =====================================
dtype              range                       becomes uint8 by
=================  ==========================  =====================================
uint8              [0, 255]                    itself
uint16             [0, 65535]                  rounding ``x / 257``
float16, 32, 64    [0, 1], finite              rounding ``255 x``
any other                                      :class:`ImageError`
=================  ==========================  =====================================

Its shape is (H, W), (H, W, 1), (H, W, 3) in RGB order, or (H, W, 4) in RGBA order.  An alpha channel that is opaque
everywhere is dropped; any other is refused, for what stands behind the part is not ours to choose.
"""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from advrad_fast import dlpack, pose
from advrad_fast.config import ImageConfig
from advrad_fast.errors import ConfigError, ImageDecodeError, ImageError, ImageTooLargeError, expected
from advrad_fast.image_paths import StrPath

if TYPE_CHECKING:
    from typing import IO

    from PIL.Image import Image as PILImage

MAX_PIXELS = 100_000_000  #: the default cap on a frame's height x width
MAX_GAIN = 4.0  #: brightness normalisation stays within [1/4, 4]

_FRAME = "a uint8, uint16 or float (in [0, 1]) array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or a PIL image"


@dataclass(frozen=True, eq=False)
class Prepared:
    """A frame on the network's pixel lattice, and the way back.

    Attributes:
        image: uint8 (height, width, C), C-contiguous.
        frame_shape: (H, W) of the frame it was made from.
        affine: (2, 3) float64 from ``image`` pixels to frame pixels, or None where the frame was only resized.
    """

    image: NDArray[np.uint8]
    frame_shape: tuple[int, int]
    affine: pose.Affine | None


def check_frame(frame: object) -> NDArray[np.uint8]:
    """Any frame the contract allows, as one kind of array.

    Strides, byte order, Fortran order and read-only flags do not matter.  The result may share memory with ``frame``.
    A PIL image is turned as its EXIF orientation says and read as :func:`load_image` reads a file.

    Returns:
        uint8 (H, W, 1) or (H, W, 3), C-contiguous.

    Raises:
        ImageError: the frame breaks the contract; the message says how.
        ImageTooLargeError: more than ``MAX_PIXELS`` pixels.
        ImageDecodeError: a PIL image that was opened lazily can't be decoded.
    """
    array = frame if isinstance(frame, np.ndarray) else _shared(frame)
    if array is None:
        from PIL import Image

        if not isinstance(frame, Image.Image):
            raise ImageError(expected("frame", _FRAME, type(frame)))
        check_size("frame", frame.height, frame.width)
        return _from_pil(frame, "frame")
    if array.ndim in (2, 3):
        check_size("frame", array.shape[0], array.shape[1])
    return _from_array(array, "frame")


def _shared(frame: object) -> NDArray[np.generic] | None:
    """An array of another library; None for what is none."""
    device = dlpack.device(frame)
    if device is None:
        return None
    if device[0] not in (dlpack.CPU, dlpack.CUDA_HOST):
        raise ImageError(expected("frame", "an array in the host's memory", f"{type(frame)} on DLPack device {device}"))
    return dlpack.host_array(frame)


def load_image(path: StrPath, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode an image file, turned as its EXIF orientation says.

    PNG, JPEG, TIFF, BMP, WebP and PGM/PPM, told by their first bytes, not by the name.  Of several frames the first
    is read.  16-bit grey is rounded to 8 bits (``x / 257``), 16-bit colour keeps its high byte, 1-bit becomes 0 and
    255, palettes become RGB, CMYK becomes RGB without a colour profile, float TIFF must lie in [0, 1].

    Args:
        path: the file.
        max_pixels: cap on height x width, checked on the header, before any pixel is decoded.

    Returns:
        uint8 (H, W, 1) or (H, W, 3), C-contiguous.

    Raises:
        ImageDecodeError: the file can't be opened (missing, a folder, no permission), is not an image of these
            formats, is truncated or corrupt, or has a pixel type without a defined scale.
        ImageTooLargeError: more than ``max_pixels`` pixels.
        ImageError: transparent pixels, or float pixels outside [0, 1].
        ConfigError: ``max_pixels`` is not a positive integer.
    """
    _check_cap(max_pixels)
    if not isinstance(path, str | os.PathLike):
        raise ImageDecodeError(f"{expected('path', 'a path', path)}: can't be opened")
    try:
        name = os.fsdecode(path)
        if not stat.S_ISREG(Path(name).stat().st_mode):  # before opening, as opening a pipe would wait
            raise OSError("not a regular file")
        file = _File(io.FileIO(name))  # closed below; a failure to open is told apart from one to decode
    except (OSError, TypeError, ValueError) as error:
        raise ImageDecodeError(f"{path!r}: can't be opened: {error}") from error
    with file:
        return _decode(file, name, max_pixels)


def decode_image(data: bytes, name: str = "image", *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """An image file's bytes, read as :func:`load_image` reads the file.

    Args:
        data: the whole file.
        name: what messages call it.
        max_pixels: as there.

    Raises:
        ImageError, ConfigError: as there; ``data`` is not bytes.
    """
    _check_cap(max_pixels)
    if not isinstance(name, str):
        raise ImageError(expected("name", "a string", name))
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ImageError(expected(name, "an image file's bytes", type(data)))
    with io.BytesIO(data) as file:
        return _decode(file, name, max_pixels)


def _check_cap(max_pixels: object) -> None:
    if isinstance(max_pixels, bool) or not isinstance(max_pixels, int) or max_pixels < 1:
        raise ConfigError(expected("max_pixels", "an integer of at least 1", max_pixels))


def _decode(file: IO[bytes], name: str, max_pixels: int) -> NDArray[np.uint8]:
    try:
        image = _open(file, name)
        check_size(name, image.height, image.width, max_pixels)
        with image:
            return _from_pil(image, name)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on hostile bytes
        raise ImageDecodeError(f"{name}: can't be decoded: {error}") from error


def prepare(frame: object, config: ImageConfig) -> Prepared:
    """Bring a frame to the network's size, channels, pose and brightness.

    In this order: RGB to grey (ITU-R 601); pose alignment on the frame's own pixels, or else an antialiased bicubic
    resize to (height, width), which leaves a frame of that size as it is; rounding to uint8; grey to RGB by
    repetition; brightness.  The brightness gain is ``255 * brightness / median grey level`` within [1/4, 4] (4 for
    a median of 0), the product rounded and clipped to [0, 255].

    Args:
        frame: see :func:`check_frame`.
        config: the detector's image settings.

    Raises:
        ImageError: the frame breaks the contract.
        PartNotFoundError: ``config.pose`` is set and finds no part.
    """
    from PIL import Image

    pixels = _channels_to_keep(check_frame(frame), config)
    shape = (pixels.shape[0], pixels.shape[1])
    affine = None
    if config.pose is not None:
        pixels, affine = pose.align(pixels, config.pose, config.height, config.width)
    elif shape != (config.height, config.width):
        image = Image.fromarray(_squeeze(pixels))
        # With reducing_gap a large frame is first box-reduced to three times the size: no visible change, much faster.
        resized = image.resize((config.width, config.height), Image.Resampling.BICUBIC, reducing_gap=3.0)
        pixels = np.array(resized, dtype=np.uint8).reshape(config.height, config.width, -1)
    return Prepared(_finish(pixels, config), shape, affine)


def prepare_whole(frame: object, config: ImageConfig) -> NDArray[np.uint8]:
    """A frame that is inspected in tiles: channels and brightness as :func:`prepare` makes them, its own size.

    Returns:
        uint8 (H, W, ``config.channels``), C-contiguous; may share memory with ``frame``.

    Raises:
        ImageError: the frame breaks the contract.
    """
    return _finish(_channels_to_keep(check_frame(frame), config), config)


def _channels_to_keep(pixels: NDArray[np.uint8], config: ImageConfig) -> NDArray[np.uint8]:
    return _grey(pixels)[:, :, None] if config.channels == 1 and pixels.shape[2] == 3 else pixels


def _finish(pixels: NDArray[np.uint8], config: ImageConfig) -> NDArray[np.uint8]:
    if config.brightness is not None:
        pixels = _normalise(pixels, config.brightness)
    if config.channels == 3 and pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    return pixels


def is_prepared(shape: tuple[int, ...], config: ImageConfig) -> bool:
    """Whether :func:`prepare` leaves every uint8 frame (H, W, C) of this shape as it is."""
    size = (config.height, config.width, config.channels)
    return config.pose is None and config.brightness is None and shape == size


def map_to_frame(
    values: NDArray[np.float32], prepared: Prepared, counted: NDArray[np.bool_] | None = None
) -> NDArray[np.float32]:
    """An anomaly map in the frame's coordinates: bilinear; zero where an aligned crop did not look.

    Args:
        values: float32 (h, w), the size of ``prepared.image``.
        prepared: what the map was computed from.
        counted: bool (h, w), the values that there are; None for all.  It is interpolated between these alone, neither with the
            others nor with zeros in their place; zero where none of them is near.

    Returns:
        float32 ``prepared.frame_shape``; ``values`` itself where the frame was not resized or aligned.

    Raises:
        ImageError: ``values`` is not a float32 array of that size.
    """
    from PIL import Image

    wanted = prepared.image.shape[:2]
    if not isinstance(values, np.ndarray) or values.dtype != np.float32 or values.shape != wanted:
        got = (values.dtype, values.shape) if isinstance(values, np.ndarray) else type(values)
        raise ImageError(expected("values", f"a float32 array of shape {wanted}", got))
    if counted is not None:  # a mean of those near, by their bilinear weights
        weights = map_to_frame(counted.astype(np.float32), prepared)
        sums = map_to_frame(np.where(counted, values, np.float32(0.0)), prepared)
        return np.divide(sums, weights, out=np.zeros_like(sums), where=weights > 0.0)
    if prepared.affine is not None:
        return pose.warp_back(values, prepared.affine, prepared.frame_shape)
    if values.shape == prepared.frame_shape:
        return values
    height, width = prepared.frame_shape
    image = Image.fromarray(np.ascontiguousarray(values))
    return np.array(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)


def mask_to_frame(mask: NDArray[np.bool_], prepared: Prepared) -> NDArray[np.bool_]:
    """A mask in the frame's coordinates: every frame pixel that a marked pixel touches, and at least one for each of them.

    A marked pixel beyond the frame's edge (an aligned crop can reach over it) marks the nearest pixel inside: a defect
    never loses its mask.

    Args:
        mask: bool (h, w), the size of ``prepared.image``.
        prepared: what the mask was computed from.

    Returns:
        bool ``prepared.frame_shape``; ``mask`` itself where the frame was not resized or aligned.
    """
    if mask.shape == prepared.frame_shape and prepared.affine is None:
        return mask
    marked = map_to_frame(mask.astype(np.float32), prepared) > 0.0
    height, width = prepared.frame_shape
    y, x = np.nonzero(mask)
    if prepared.affine is not None:
        x, y = prepared.affine[:, :2] @ np.stack([x, y]) + prepared.affine[:, 2:]
    else:
        x, y = (x + 0.5) * width / mask.shape[1] - 0.5, (y + 0.5) * height / mask.shape[0] - 0.5
    rows = np.clip(np.rint(y).astype(int), 0, height - 1)
    columns = np.clip(np.rint(x).astype(int), 0, width - 1)
    marked[rows, columns] = True
    return marked


def check_size(name: str, height: int, width: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raises an ImageError for no pixels, an ImageTooLargeError for more than ``max_pixels``."""
    if height < 1 or width < 1:
        raise ImageError(expected(name, "at least 1 x 1 pixels", f"{height} x {width}"))
    if height * width > max_pixels:
        raise ImageTooLargeError(f"{name}: {height} x {width} pixels, the cap is {max_pixels}")


def _from_array(array: NDArray[np.generic], name: str) -> NDArray[np.uint8]:
    if isinstance(array, np.ma.MaskedArray):
        raise ImageError(expected(name, "an array without a mask", type(array)))
    array = np.asarray(array)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(expected(name, _FRAME, f"{array.dtype} of shape {array.shape}"))
    if array.ndim == 2:
        array = array[:, :, None]
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind == "u" and size == 1:
        pixels = np.ascontiguousarray(array, dtype=np.uint8)
    elif kind == "u" and size == 2:
        # 257 is odd: x / 257 never lies halfway.
        pixels = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8, order="C")
    elif kind == "f" and size <= 8:
        pixels = _from_float(array, name)
    else:
        raise ImageError(expected(name, _FRAME, f"dtype {array.dtype}"))
    if pixels.shape[2] == 4:
        _check_opaque(pixels, name)
        pixels = np.ascontiguousarray(pixels[:, :, :3])
    return pixels


def _from_float(array: NDArray[np.generic], name: str) -> NDArray[np.uint8]:
    values = array.astype(np.promote_types(array.dtype.newbyteorder("="), np.float32))
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):  # min and max carry a NaN on
        raise ImageError(expected(name, "finite values", "NaN or infinity"))
    if low < 0.0 or high > 1.0:
        raise ImageError(expected(name, f"{array.dtype} values in [0, 1]", f"values in [{low:g}, {high:g}]"))
    return np.rint(values * 255.0).astype(np.uint8, order="C")


class _File(io.BufferedReader):
    """A file that allocates no more than it holds, whatever length a header asks to be read."""

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self._size = os.fstat(raw.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def _open(file: IO[bytes], name: str) -> PILImage:
    """Read the header with the plugin that the first bytes call for.

    ``Image.open`` would warn, or raise, by a process-wide pixel cap of its own, and tries many more formats.
    """
    from PIL.BmpImagePlugin import BmpImageFile
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile
    from PIL.PpmImagePlugin import PpmImageFile
    from PIL.TiffImagePlugin import TiffImageFile
    from PIL.WebPImagePlugin import WebPImageFile

    head = file.read(16)
    file.seek(0)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile(file, name)
    if head.startswith(b"\xff\xd8\xff"):
        return JpegImageFile(file, name)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return TiffImageFile(file, name)
    if head.startswith(b"BM"):
        return BmpImageFile(file, name)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return WebPImageFile(file, name)
    if head[:2] in (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"):
        return PpmImageFile(file, name)
    raise ImageDecodeError(f"{name}: not a PNG, JPEG, TIFF, BMP, WebP or PGM file (it begins with {head[:8]!r})")


def _from_pil(image: PILImage, name: str) -> NDArray[np.uint8]:
    """A PIL image, decoded and upright, as check_frame's array."""
    from PIL import ImageOps
    from PIL.PpmImagePlugin import PpmImageFile

    try:
        image.load()
        scale = _unusual_scale(image)
        pgm16 = isinstance(image, PpmImageFile)  # Pillow gives it as mode I, in [0, 65535]
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "1":
            upright = upright.convert("L")
        mode = upright.mode
        if scale is not None or (mode == "I" and not pgm16):
            raise ImageDecodeError(f"{name}: pixels of mode {mode}{scale or ''} have no defined scale")
        if mode == "I":
            array: NDArray[np.generic] = np.asarray(upright).astype(np.uint16)
        elif mode.startswith("I;16") or mode == "F":
            array = np.asarray(upright)
        elif mode in ("L", "RGB", "P", "LA", "La", "PA", "RGBA", "RGBa"):
            if upright.has_transparency_data:
                array = np.asarray((upright.convert("LA") if mode == "La" else upright).convert("RGBA"))
                _check_opaque(array, name)
                if mode in ("L", "LA", "La"):
                    array = array[:, :, 0]
            else:
                array = np.asarray(upright.convert("RGB") if mode == "P" else upright)
        elif mode in ("CMYK", "YCbCr", "RGBX"):
            array = np.asarray(upright.convert("RGB"))
        else:
            raise ImageDecodeError(f"{name}: pixels of mode {mode} have no defined scale")
    except ImageError:
        raise
    except Exception as error:  # as in load_image: a lazily opened image decodes here
        raise ImageDecodeError(f"{name}: can't be decoded: {error}") from error
    return _from_array(array, name)


def _unusual_scale(image: PILImage) -> str | None:
    """What TIFF says of pixels that Pillow hands over unscaled: 12 bits in 16, white at zero, signed."""
    from PIL.TiffImagePlugin import TiffImageFile

    if not isinstance(image, TiffImageFile):
        return None
    tags = image.tag_v2
    bits, photometric, kinds = tags.get(258, (1,)), tags.get(262, 1), tags.get(339, (1,))
    if 2 in kinds:
        return " (signed)"
    if image.mode.startswith("I;16") and (bits[0] != 16 or photometric != 1):
        return f" ({bits[0]} bits, photometric interpretation {photometric})"
    return None


def _check_opaque(rgba: NDArray[np.generic], name: str) -> None:
    alpha = rgba[:, :, 3]
    if alpha.min() < 255:
        raise ImageError(
            expected(name, "no transparent pixels (composite it on its background first)", f"alpha {alpha.min()} of 255")
        )


def _squeeze(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return pixels[:, :, 0] if pixels.shape[2] == 1 else pixels


def _grey(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """ITU-R 601 luma of uint8 (H, W, 1 or 3) as uint8 (H, W)."""
    from PIL import Image

    return pixels[:, :, 0] if pixels.shape[2] == 1 else np.array(Image.fromarray(pixels).convert("L"))


def _normalise(pixels: NDArray[np.uint8], brightness: float) -> NDArray[np.uint8]:
    median = float(np.median(_grey(pixels)))
    gain = MAX_GAIN if median == 0.0 else min(max(255.0 * brightness / median, 1.0 / MAX_GAIN), MAX_GAIN)
    table = np.clip(np.rint(np.arange(256) * gain), 0, 255).astype(np.uint8)
    normalised: NDArray[np.uint8] = table[pixels]
    return normalised
