"""Compiled networks on disk: a cache that may be deleted, damaged or unwritable at any time without changing a result.

A file is a magic line, the SHA-256 of its name and of the rest, and the engine's own blob.  The hash guards against truncation,
bit rot and files under another's name, not against somebody who can write to the folder: keep it as private as the programs that
run from it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from advrad_fast.errors import ConfigError, expected
from advrad_fast.files import write_atomically

#: A folder, None for :func:`default_folder`, or False for no cache.
CacheDir = str | os.PathLike[str] | Literal[False] | None

_MAGIC = b"advrad_fast compiled network 2\n"
_log = logging.getLogger(__name__)


def default_folder() -> Path | None:
    """``$ADVRAD_CACHE``, or ``advrad_fast`` in the platform's cache folder; None where there is no home folder.

    The platform's folder is ``$XDG_CACHE_HOME`` or ``~/.cache`` on Linux, ``~/Library/Caches`` on macOS, ``%LOCALAPPDATA%`` on
    Windows.
    """
    if os.environ.get("ADVRAD_CACHE"):
        return Path(os.environ["ADVRAD_CACHE"])
    variable, fallback = "XDG_CACHE_HOME", ".cache"
    if sys.platform == "win32":
        variable, fallback = "LOCALAPPDATA", "AppData/Local"
    elif sys.platform == "darwin":
        variable, fallback = "", "Library/Caches"
    named = Path(os.environ.get(variable, ""))
    try:
        return (named if named.is_absolute() else Path.home() / fallback) / "advrad_fast"
    except RuntimeError:  # Path.home() found none
        return None


def folder(cache_dir: CacheDir) -> Path | None:
    """The folder that ``cache_dir`` asks for, or None for no cache.

    Raises:
        ConfigError: it is neither a path, None nor False.
    """
    if cache_dir is None:
        return default_folder()
    if cache_dir is False:
        return None
    if not isinstance(cache_dir, str | os.PathLike):
        raise ConfigError(expected("cache_dir", "a path, None or False", cache_dir))
    return Path(cache_dir)


def key(weights: Mapping[str, NDArray[np.float32]], **facts: Any) -> str:
    """The name for a network compiled from ``weights`` under ``facts`` (anything with a stable ``repr``): 64 hex digits."""
    digest = hashlib.sha256(repr(sorted(facts.items())).encode())
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name])
        digest.update(f"\0{name} {array.dtype.str} {array.shape}\0".encode())
        digest.update(array.data)
    return digest.hexdigest()


def load(where: Path | None, name: str) -> bytes | None:
    """The blob stored under ``name``, or None: absent, unreadable (logged at debug level) or damaged (logged as a warning)."""
    if where is None:
        return None
    path = _path(where, name)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.debug("cannot read the compiled network %s: %s", path, error)
        return None
    start = len(_MAGIC) + hashlib.sha256().digest_size
    blob = data[start:]
    if data[: len(_MAGIC)] != _MAGIC or data[len(_MAGIC) : start] != _digest(name, blob):
        _log.warning("the compiled network %s is damaged; compiling again", path)
        return None
    return blob


def store(where: Path | None, name: str, blob: bytes) -> bool:
    """Store ``blob`` under ``name``, in one step for any reader.  Where that cannot be, log it at debug level and go on.

    Returns:
        Whether it is stored.
    """
    if where is None:
        return False
    path = _path(where, name)
    try:
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, _MAGIC + _digest(name, blob) + blob)
    except OSError as error:
        _log.debug("cannot store the compiled network %s: %s", path, error)
        return False
    return True


def _digest(name: str, blob: bytes) -> bytes:
    digest = hashlib.sha256(name.encode())
    digest.update(blob)
    return digest.digest()


def _path(where: Path, name: str) -> Path:
    if not re.fullmatch(r"[0-9a-f]{64}", name):
        raise ConfigError(expected("name", "64 hex digits", name))
    return where / f"{name}.blob"
