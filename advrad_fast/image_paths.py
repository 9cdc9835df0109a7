"""Which images a command line or a folder names."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from advrad_fast.checks import several
from advrad_fast.errors import ImageError, expected

StrPath: TypeAlias = str | os.PathLike[str]

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".pgm", ".ppm"}
)  #: what folders are searched for


def list_images(paths: StrPath | Iterable[StrPath]) -> list[Path]:
    """The image files that paths stand for, in the order given, sorted within each, each file once.

    A file stands for itself, whatever its suffix.  A folder stands for all files under it with a suffix in
    ``IMAGE_SUFFIXES``; hidden files and folders are skipped and links to folders are not followed.  Anything else is a
    glob pattern (``**`` crosses folders) for files with such a suffix and for folders.

    Raises:
        ImageError: no path at all, or one that stands for no image.
    """
    if not isinstance(paths, str | os.PathLike) and not several(paths):
        raise ImageError(expected("paths", "a path or several", paths))
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not given:
        raise ImageError(expected("paths", "at least one file, folder or pattern", given))
    found: dict[Path, None] = {}
    for item in given:
        if not isinstance(item, str | os.PathLike):
            raise ImageError(expected("paths", "str or pathlib paths", item))
        try:
            found.update(dict.fromkeys(_found(Path(item))))
        except (OSError, TypeError, ValueError, re.error) as error:  # a name that is too long, of bytes, with a null character
            if isinstance(error, ImageError):
                raise
            raise ImageError(f"{expected('paths', 'files, folders and patterns', item)}: {error}") from error
    return list(found)


def _found(path: Path) -> list[Path]:
    """The images that one path stands for, at least one."""
    # Existing names come first: brackets in a file's name are not a pattern.
    if path.is_file():
        images = [path]
    elif path.is_dir():
        images = _walk(path)
    elif glob.has_magic(str(path)):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207  (any pattern)
        images = sorted({p for m in matches for p in (_walk(m) if m.is_dir() else [m] if _is_image(m) else [])})
    else:
        raise ImageError(f"{path}: no such file or folder")
    if not images:
        raise ImageError(f"{path}: no image found; looked for {' '.join(sorted(IMAGE_SUFFIXES))}")
    return images


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _walk(folder: Path) -> list[Path]:
    images: list[Path] = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images += [path for path in (Path(root, name) for name in files) if _is_image(path)]
    return sorted(images)
