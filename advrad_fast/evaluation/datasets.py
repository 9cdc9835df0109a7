"""The folders a detector is trained and measured on.

Layouts, as their makers ship them; anything else is refused with what was expected and found, since a defect that slips in
among the good parts is learnt as good, silently.

- ``mvtec``: MVTec AD (Bergmann et al., CVPR 2019), a folder for each category::

      <category>/train/good/*               good parts
      <category>/test/good/*                good parts
      <category>/test/<defect>/*            bad parts
      <category>/ground_truth/<defect>/<stem>_mask.png

- ``btad``: BTAD (Mishra et al., arXiv 2104.10036), PNG and BMP mixed; categories 01, 02, 03::

      <category>/train/ok/*                 good parts
      <category>/test/ok/*, test/ko/*       good and bad parts
      <category>/ground_truth/ko/<stem>.png or .bmp

- ``visa``: VisA (Zou et al., ECCV 2022): ``split_csv/1cls.csv`` lists every image with its part in the one-class split (columns
  object, split, label, image, mask), paths are relative to the root, and a mask's values above 0 are defect::

      <category>/Data/Images/Normal/*, <category>/Data/Images/Anomaly/*
      <category>/Data/Masks/Anomaly/<stem>.png

- ``folder``: good parts, for training only: the images directly inside the folder, or inside its subfolder ``good``.
  Subfolders with images beside them make the folder ambiguous, and it is refused.

Images are the files whose suffix is in :data:`advrad_fast.image_paths.IMAGE_SUFFIXES`; names that begin with a dot are skipped.
"""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from advrad_fast.errors import DatasetError, expected
from advrad_fast.image_paths import IMAGE_SUFFIXES

Layout = Literal["auto", "mvtec", "btad", "visa", "folder"]
LAYOUTS: tuple[Layout, ...] = ("auto", "mvtec", "btad", "visa", "folder")

_RESERVED = ("train", "test", "ground_truth")
_MASK_FORMATS = ("PNG", "BMP", "TIFF")  # lossless: a JPEG's zeros are not zeros
_VISA_CSV = "split_csv/1cls.csv"
_VISA_COLUMNS = ["object", "split", "label", "image", "mask"]
_MAX_CSV_BYTES = 16 * 2**20  # VisA's own has 0.7 MB


@dataclass(frozen=True)
class Sample:
    """One test image.

    Attributes:
        path: the image file.
        label: 0 (good) or 1 (bad).
        defect: ``good``, or the kind of defect: the folder's name (MVTec AD), ``ko`` (BTAD) or ``anomaly`` (VisA).
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
        name: the folder's name; ``btad/<category>`` or ``visa/<category>`` for these two.
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


def load_dataset(root: str | os.PathLike[str], layout: Layout = "auto", category: str | None = None) -> Dataset:
    """List a data set; no image is opened.

    Args:
        root: the folder.
        layout: one of this module's; ``auto``: ``mvtec`` where ``root`` holds train, test or ground_truth, else ``folder``.
        category: with ``mvtec`` and ``btad`` the folder below ``root`` (None: ``root`` itself is the category's), with
            ``visa`` the object, always needed.

    Raises:
        DatasetError: ``root`` is not a folder, cannot be read, holds no images, or does not have that layout; or ``layout`` or
            ``category`` is not one there is.
    """
    if not isinstance(root, str | os.PathLike):
        raise DatasetError(expected("root", "a path", root))
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise DatasetError(expected("layout", f"one of {', '.join(LAYOUTS)}", layout))
    if not isinstance(category, str | None):
        raise DatasetError(expected("category", "a name or None", category))
    if category is not None and layout in ("auto", "folder"):
        raise DatasetError(expected("category", f"none with layout {layout}", category))
    try:
        folder = _folder(Path(root))
        if layout == "visa":
            return _visa(folder, category)
        if layout in ("mvtec", "btad"):
            folder = _category(folder, category)
            return _mvtec(folder) if layout == "mvtec" else _btad(folder)
        if layout == "auto" and any((folder / name).is_dir() for name in _RESERVED):
            return _mvtec(folder)
        return Dataset(folder.resolve().name, _plain(folder), [])
    except (OSError, TypeError, ValueError) as error:  # a path with a null character, or of bytes
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{root}: cannot be read: {error}") from error


def load_mask(path: str | os.PathLike[str], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The defect pixels of an image: bool (H, W), True where the mask is not zero (in any colour channel).

    Args:
        path: PNG, BMP or TIFF.
        shape: (H, W) of the image that the mask belongs to.

    Raises:
        DatasetError: the mask has another size (found before it is decoded), or cannot be read.
    """
    from PIL import Image

    if not isinstance(path, str | os.PathLike):
        raise DatasetError(expected("path", "a path", path))
    try:
        name = os.fspath(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(name, formats=_MASK_FORMATS) as image:
                size = (image.height, image.width)
                if size != tuple(shape):
                    raise DatasetError(expected(f"{name}: mask size (H, W)", f"the image's {tuple(shape)}", size))
                if image.mode in ("P", "PA", "LA", "RGBA", "CMYK"):  # the palette's colours, and no alpha
                    pixels = np.asarray(image.convert("RGB"))
                else:
                    pixels = np.asarray(image)
    except DatasetError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on hostile bytes
        raise DatasetError(f"{path}: not a readable mask: {error}") from error
    defect = pixels != 0
    return np.asarray(defect.any(axis=2) if defect.ndim == 3 else defect)


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise DatasetError(expected(str(path), "a folder", "no such folder" if not path.exists() else "a file"))
    return path


def _category(root: Path, category: str | None) -> Path:
    """The category's folder: below ``root``, or ``root`` itself."""
    known = sorted(path.name for path in root.iterdir() if (path / "train").is_dir() and not path.name.startswith("."))
    if category is None:
        if known and not (root / "train").is_dir():
            raise DatasetError(expected("category", f"one of those in {root}: {', '.join(known)}", None))
        return root
    if category not in known:  # an entry of the folder, so no path that leads elsewhere
        raise DatasetError(expected("category", f"one of those in {root}: {', '.join(known) or 'none there'}", category))
    return root / category


def _mvtec(root: Path) -> Dataset:
    def mask(defect: str, stem: str) -> Path | None:
        path = root / "ground_truth" / defect / f"{stem}_mask.png"
        return path if path.is_file() else None

    if not (root / "train" / "good").is_dir() or not (root / "test").is_dir():
        hint = "; train/ok and test/ok are BTAD's: layout btad" if (root / "train" / "ok").is_dir() else ""
        raise DatasetError(
            expected(str(root), "train/good and test (MVTec AD), or a folder of good parts alone", _subfolders(root)) + hint
        )
    train = _good_parts(root, "good")
    if _images(root / "test"):
        raise DatasetError(expected(f"{root / 'test'}", "images in good/ and <defect>/ only", "images directly inside"))
    test = []
    for defect in _image_folders(root / "test"):
        for path in _images(root / "test" / defect):
            bad = defect != "good"
            test.append(Sample(path, int(bad), defect, mask(defect, path.stem) if bad else None))
    if not test:
        raise DatasetError(expected(f"{root / 'test'}", "images in good/ and <defect>/", "none"))
    return Dataset(root.resolve().name, train, test)


def _btad(root: Path) -> Dataset:
    for name in ("train/ok", "test/ok", "test/ko"):
        if not (root / name).is_dir():
            raise DatasetError(expected(str(root), f"train/ok, test/ok and test/ko (BTAD); no {name}", _subfolders(root)))
    train = _good_parts(root, "ok")
    others = [name for name, count in _image_folders(root / "test").items() if name not in ("ok", "ko") and count]
    if others or _images(root / "test"):
        raise DatasetError(expected(f"{root / 'test'}", "images in ok/ and ko/ only", others or "images directly inside"))
    test = [Sample(path, 1, "ko", None) for path in _images(root / "test" / "ko")]
    masks: dict[str, list[Path]] = {}
    if (folder := root / "ground_truth" / "ko").is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in (".png", ".bmp") and not path.name.startswith("."):
                masks.setdefault(path.stem, []).append(path)
    for i, sample in enumerate(test):
        found = masks.get(sample.path.stem, [])
        twins = sum(other.path.stem == sample.path.stem for other in test)
        if len(found) > 1 or (found and twins > 1):
            names = [path.name for path in found]
            raise DatasetError(expected(f"{sample.path}: mask in {folder}", "one .png or .bmp, for this image alone", names))
        test[i] = Sample(sample.path, 1, "ko", found[0] if found else None)
    test += [Sample(path, 0, "good", None) for path in _images(root / "test" / "ok")]
    if not test:
        raise DatasetError(expected(f"{root / 'test'}", "images in ok/ and ko/", "none"))
    return Dataset(f"btad/{root.resolve().name}", train, test)


def _visa(root: Path, category: str | None) -> Dataset:
    rows = list(_visa_rows(root))
    objects = sorted({row[0] for _, row in rows})
    if category is None or category not in objects:
        raise DatasetError(expected("category", f"one of those in {root / _VISA_CSV}: {', '.join(objects)}", category))
    if category in (".", "..") or "/" in category or "\\" in category:
        raise DatasetError(expected(str(root / _VISA_CSV), "objects named as their folders", category))
    train: list[Path] = []
    test: list[Sample] = []
    seen: set[str] = set()
    for where, (name, split, label, image, mask) in rows:
        if name != category:
            continue
        bad = label == "anomaly"
        if (split, label) not in (("train", "normal"), ("test", "normal"), ("test", "anomaly")):
            raise DatasetError(expected(where, "train,normal or test,normal or test,anomaly", f"{split},{label}"))
        if bad != bool(mask):
            raise DatasetError(expected(f"{where}: mask", "a file" if bad else "none for a normal image", mask))
        if image in seen:
            raise DatasetError(expected(f"{where}: image", "every image once", image))
        seen.add(image)
        path = _visa_file(root, category, image, f"{where}: image")
        if not _is_image(path):
            raise DatasetError(expected(f"{where}: image", f"an image ({', '.join(sorted(IMAGE_SUFFIXES))})", image))
        if split == "train":
            train.append(path)
        else:
            file = _visa_file(root, category, mask, f"{where}: mask") if bad else None
            test.append(Sample(path, int(bad), label if bad else "good", file))
    if not train or not test:
        raise DatasetError(
            expected(f"{root / _VISA_CSV}: {category}", "train and test rows", f"{len(train)} of train, {len(test)} of test")
        )
    return Dataset(f"visa/{category}", sorted(train), sorted(test, key=lambda sample: sample.path))


def _visa_rows(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(where it stands, its five fields) of every row of the split."""
    path = root / _VISA_CSV
    if not path.is_file():
        raise DatasetError(expected(str(root), f"{_VISA_CSV} (VisA)", _subfolders(root)))
    if (size := path.stat().st_size) > _MAX_CSV_BYTES:
        raise DatasetError(expected(str(path), f"at most {_MAX_CSV_BYTES} bytes", size))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if header != _VISA_COLUMNS:
                raise DatasetError(expected(f"{path}: columns", ",".join(_VISA_COLUMNS), ",".join(header)))
            for row in reader:
                where = f"{path}: line {reader.line_num}"
                if len(row) != len(_VISA_COLUMNS):
                    raise DatasetError(expected(where, f"{len(_VISA_COLUMNS)} fields", len(row)))
                yield where, row
        except csv.Error as error:
            raise DatasetError(f"{path}: line {reader.line_num}: not CSV: {error}") from error


def _visa_file(root: Path, category: str, name: str, where: str) -> Path:
    """A file that the split names: below the category's folder, whatever the text says, and there."""
    parts = PurePosixPath(name).parts
    if ".." in parts or parts[:1] != (category,) or "\\" in name or ":" in name or "\0" in name:
        raise DatasetError(expected(where, f"a path below {category}/, without ..", name))
    path = root.joinpath(*parts)
    if not path.is_file():
        raise DatasetError(expected(where, f"a file in {root}", f"{name}, which is not there"))
    return path


def _good_parts(root: Path, good: str) -> list[Path]:
    """The images of train/<good>, which must be all there are in train."""
    others = [name for name, count in _image_folders(root / "train").items() if name != good and count]
    if others or _images(root / "train"):
        raise DatasetError(expected(f"{root / 'train'}", f"images in {good}/ only", others or "images directly inside"))
    train = _images(root / "train" / good)
    if not train:
        raise DatasetError(expected(f"{root / 'train' / good}", "images", "none"))
    return train


def _subfolders(root: Path) -> list[str]:
    return sorted(f"{path.name}/" for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


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
