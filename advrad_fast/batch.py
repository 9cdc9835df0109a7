"""Image files, inspected or certified here or over a Ray cluster (:mod:`advrad_fast.spread`): the same results and order.

>>> setup = partial(Detector.load, "part.safetensors", threads=1)
>>> for path, inspection, _ in inspect_files(setup, list_images("in/"), ray="auto"):
...     print(path, inspection.outcome)

Files are read here and sent as they are, so that workers need not see this machine's disk, and decode them side by side.
"""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from advrad_fast.certify import Certificate
from advrad_fast.detector import Detector, Inspection, Outcome
from advrad_fast.errors import AdvRADError, ConfigError, ImageDecodeError
from advrad_fast.images import decode_image, load_image
from advrad_fast.spread import in_order, map_tasks

#: Larger files, in bytes, are decoded here, as a header can be refused before the rest is read.
LARGE = 1 << 25

#: Of an inspection's row, in order; stable.
ROW_KEYS = ("path", "outcome", "score", "threshold", "p_value", "backend", "ms")

R = TypeVar("R")


def row(path: Path | str | None, inspection: Inspection) -> dict[str, Any]:
    """What is written of an inspection, with the keys ``ROW_KEYS``; JSON can hold all of it."""
    total = inspection.timings.get("total")
    values = (
        None if path is None else str(path),
        str(inspection.outcome),
        inspection.score,
        inspection.threshold,
        inspection.p_value,
        inspection.backend,
        None if total is None else round(total, 3),
    )
    return dict(zip(ROW_KEYS, values, strict=True))


class FileInspection(NamedTuple):
    """A file's inspection, without map and mask; an ERROR where the file is no image or could not be inspected."""

    path: Path
    inspection: Inspection
    overlay: bytes | None  #: the heat map as PNG, if asked for


class FileCertificate(NamedTuple):
    """A file's certificate, or why there is none."""

    path: Path
    certificate: Certificate | None
    error: AdvRADError | None


def inspect_files(
    setup: Callable[[], Detector], paths: Iterable[Path], *, overlay: bool = False, ray: str | None = None
) -> Iterator[FileInspection]:
    """Inspect image files, each as :meth:`Detector.inspect` does, in the order of ``paths``.

    Args:
        setup: makes the detector, here or in each worker.  Give it a seed, and one thread where there is a worker a core.
        overlay: also draw heat maps (:func:`advrad_fast.overlay.overlay`).
        ray: the address of a cluster, as for :func:`advrad_fast.spread.map_tasks`.

    Raises:
        SpreadError: the cluster can't be used, or a file has killed all the workers that tried it.
        AdvRADError: what ``setup`` raises.
    """
    return _over_files(partial(_inspect, overlay), setup, paths, ray)


def certify_files(
    setup: Callable[[], Detector],
    paths: Iterable[Path],
    radius: float | None = None,
    *,
    seed: int | None = None,
    ray: str | None = None,
    on_votes: Callable[[Path, int, int], None] | None = None,
    **settings: Any,
) -> Iterator[FileCertificate]:
    """Certify image files, each as :meth:`Detector.certify` does, in the order of ``paths``.

    Args:
        setup, ray: as for :func:`inspect_files`.
        radius, settings: as for :meth:`Detector.certify`.
        seed: of all files; None draws one for each from the operating system, which stays the file's when its worker dies.
        on_votes: called after every batch with the path, the votes so far and how many are for DEFECT; not with ``ray``.

    Raises:
        ConfigError: as :meth:`Detector.certify`: a setting that no file can be certified with.
        SpreadError, AdvRADError: as for :func:`inspect_files`.
    """
    show = on_votes if ray is None else None
    return _over_files(partial(_certify, radius, settings, show), setup, paths, ray, lambda: _draw(seed))


def _draw(seed: int | None) -> int:
    return secrets.randbits(64) if seed is None else seed


@dataclass(frozen=True)
class _File:
    """One file: its name; its bytes, its frame or why there is neither, or None to be read where the work is done; a seed."""

    path: Path
    content: bytes | NDArray[np.uint8] | AdvRADError | None
    seed: int | None

    def frame(self) -> NDArray[np.uint8]:
        """Decode it.

        Raises:
            ImageError: as :func:`advrad_fast.images.load_image`.
        """
        if isinstance(self.content, AdvRADError):
            raise self.content
        if self.content is None:
            return load_image(self.path)
        return decode_image(self.content, str(self.path)) if isinstance(self.content, bytes) else self.content


def _over_files(
    function: Callable[[Detector, _File], R],
    setup: Callable[[], Detector],
    paths: Iterable[Path],
    ray: str | None,
    seed: Callable[[], int] | None = None,
) -> Iterator[R]:
    files = (_File(path, None if ray is None else _content(path), seed and seed()) for path in paths)
    with closing(in_order(map_tasks(function, files, setup=setup, ray=ray))) as results:
        yield from results


def _content(path: Path) -> bytes | NDArray[np.uint8] | AdvRADError:
    try:
        if path.is_file() and path.stat().st_size <= LARGE:
            return path.read_bytes()
        return load_image(path)  # which says what is wrong with anything but a file
    except AdvRADError as error:
        return error
    except OSError as error:
        return ImageDecodeError(f"{path!r}: can't be opened: {error}")


def _inspect(overlay: bool, detector: Detector, file: _File) -> FileInspection:
    picture = None
    try:
        frame = file.frame()
        result = detector.inspect(frame, maps=overlay)
        if overlay:
            picture = _png(frame, result)
    except AdvRADError as error:
        result = Inspection(Outcome.ERROR, None, detector.threshold, None, None, None, detector.backend, {}, error)
    # Without its maps, which are large, and with timings that travel.
    return FileInspection(file.path, replace(result, anomaly_map=None, mask=None, timings=dict(result.timings)), picture)


def _png(frame: NDArray[np.uint8], result: Inspection) -> bytes:
    from advrad_fast.overlay import overlay

    buffer = io.BytesIO()
    overlay(frame, result).save(buffer, "PNG")
    return buffer.getvalue()


def _certify(
    radius: float | None,
    settings: dict[str, Any],
    on_votes: Callable[[Path, int, int], None] | None,
    detector: Detector,
    file: _File,
) -> FileCertificate:
    show = None if on_votes is None else partial(on_votes, file.path)
    try:
        found = detector.certify(file.frame(), radius, seed=file.seed, on_votes=show, **settings)
    except ConfigError:  # the same for every file
        raise
    except AdvRADError as error:
        return FileCertificate(file.path, None, error)
    return FileCertificate(file.path, found, None)
