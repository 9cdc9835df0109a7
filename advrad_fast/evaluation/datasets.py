"""The folders a detector is trained and measured on.

Two layouts are known; anything else is refused with what was found, since a defect that slips in among the good parts is
learnt as good, silently.

- MVTec AD (Bergmann et al., CVPR 2019)::

      root/train/good/*               good parts
      root/test/good/*                good parts
      root/test/<defect>/*            bad parts
      root/ground_truth/<defect>/<stem>_mask.png

- a folder of good parts, for training only: the images directly inside ``root``, or inside ``root/good``.  Subfolders with
  images beside them make the folder ambiguous, and it is refused.

Images are the files whose suffix is in :data:`advrad_fast.images.IMAGE_SUFFIXES`; names that begin with a dot are skipped.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from advrad_fast.errors import DatasetError, expected
from advrad_fast.images import IMAGE_SUFFIXES

_RESERVED = ("train", "test", "ground_truth")
_MASK_FORMATS = ("PNG", "BMP", "TIFF")  # lossless: a JPEG's zeros are not zeros


@dataclass(frozen=True)
class Sample:
    """One test image.

    Attributes:
        path: the image file.
        label: 0 (good) or 1 (bad).
        defect: the folder's name: ``good``, or the kind of defect.
        mask: the file of the pixels that are defect; None for good parts, and for bad ones that have none.
    """

    path: Path
    label: int
    defect: str
    mask: Path | None


@dataclass(frozen=True)
class Dataset:
    """The files of one data set, each list in order of name.

    Attributes:
        name: the root folder's name.
        train: images of good parts.
        test: test images; empty for a plain folder of good parts.
    """

    name: str
    train: list[Path]
    test: list[Sample]

    @property
    def missing_masks(self) -> int:
        """How many bad test images have no mask: pixel metrics must leave them out."""
        return sum(sample.label == 1 and sample.mask is None for sample in self.test)


def load_dataset(root: str | os.PathLike[str]) -> Dataset:
    """List a data set; no image is opened.

    Raises:
        DatasetError: ``root`` is not a folder, cannot be read, holds no images, or has neither layout of this module.
    """
    folder = Path(root)
    try:
        if not folder.is_dir():
            raise DatasetError(expected(str(folder), "a folder", "no such folder" if not folder.exists() else "a file"))
        if any((folder / name).is_dir() for name in _RESERVED):
            return _mvtec(folder)
        return Dataset(folder.resolve().name, _plain(folder), [])
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{folder}: cannot be read: {error}") from error


def load_mask(path: str | os.PathLike[str], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The defect pixels of an image: bool (H, W), True where the mask is not zero (in any colour channel).

    Args:
        path: PNG, BMP or TIFF.
        shape: (H, W) of the image that the mask belongs to.

    Raises:
        DatasetError: the mask has another size (found before it is decoded), or cannot be read.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_MASK_FORMATS) as image:
                size = (image.height, image.width)
                if size != tuple(shape):
                    raise DatasetError(expected(f"{os.fspath(path)}: mask size (H, W)", f"the image's {tuple(shape)}", size))
                if image.mode in ("P", "PA", "LA", "RGBA", "CMYK"):  # the palette's colours, and no alpha
                    pixels = np.asarray(image.convert("RGB"))
                else:
                    pixels = np.asarray(image)
    except DatasetError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DatasetError(f"{os.fspath(path)}: not a readable mask: {error}") from error
    defect = pixels != 0
    return np.asarray(defect.any(axis=2) if defect.ndim == 3 else defect)


def _mvtec(root: Path) -> Dataset:
    found = sorted(f"{path.name}/" for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not (root / "train" / "good").is_dir() or not (root / "test").is_dir():
        raise DatasetError(expected(str(root), "train/good and test (MVTec AD), or a folder of good parts alone", found))
    others = [name for name, count in _image_folders(root / "train").items() if name != "good" and count]
    if others:
        raise DatasetError(expected(f"{root / 'train'}", "images in good/ only", others))
    train = _images(root / "train" / "good")
    if not train:
        raise DatasetError(expected(f"{root / 'train' / 'good'}", "images", "none"))
    if _images(root / "test"):
        raise DatasetError(expected(f"{root / 'test'}", "images in good/ and <defect>/ only", "images directly inside"))
    test = []
    for defect in _image_folders(root / "test"):
        for path in _images(root / "test" / defect):
            mask = root / "ground_truth" / defect / f"{path.stem}_mask.png"
            bad = defect != "good"
            test.append(Sample(path, int(bad), defect, mask if bad and mask.is_file() else None))
    if not test:
        raise DatasetError(expected(f"{root / 'test'}", "images in good/ and <defect>/", "none"))
    return Dataset(root.resolve().name, train, test)


def _plain(root: Path) -> list[Path]:
    direct = _images(root)
    folders = {name: count for name, count in _image_folders(root).items() if count}
    if not folders and direct:
        return direct
    if set(folders) == {"good"} and not direct:
        if inner := [name for name, count in _image_folders(root / "good").items() if count]:
            raise DatasetError(expected(f"{root / 'good'}", "images, and no subfolders with images", sorted(inner)))
        return _images(root / "good")
    if not folders:
        raise DatasetError(expected(str(root), f"images ({', '.join(sorted(IMAGE_SUFFIXES))})", "none"))
    found = ", ".join([f"{len(direct)} images"] * bool(direct) + [f"{name}/ ({count} images)" for name, count in folders.items()])
    raise DatasetError(
        f"{root}: expected images of good parts directly inside, or in good/ alone, or train/good and test (MVTec AD); "
        f"found {found}: give the folder that holds the good parts"
    )


def _image_folders(root: Path) -> dict[str, int]:
    """The subfolders, in order of name, and how many images each holds at any depth."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {folder.name: sum(_is_image(path) for path in folder.rglob("*")) for folder in folders}


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _is_image(path))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
