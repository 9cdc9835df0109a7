"""The model file: one safetensors file that is the detector.

It holds numbers, never a graph and never code.  Layout (https://github.com/huggingface/safetensors#format):

- ``unet.<name>``: the weights, float32 or float16, named and shaped as :func:`advrad_fast.graph.expected_tensors` says;
- ``mu`` and, if ``config.score.spread``, ``spread``: float32 (H, W), of the network's input, or of ``tiling.frame`` where set;
- ``calibration_scores``: float64 or float32 (n,), sorted;
- for each sigma that the model can certify at, the tensors ``smoothing.<i>...`` (:mod:`advrad_fast.smoothing`);
- metadata ``advrad_fast``: one JSON document ``{"schema", "config", "false_alarm_rate", "threshold", "provenance",
  "smoothing", "tiling"}``.  Schemas 1 and 2 are still read: they have no ``tiling``, and 1 no ``smoothing``.

A file is untrusted until it has passed every check here.  The header is parsed under caps, and all names, types, shapes and
offsets are compared with what the configuration calls for, before the first tensor is allocated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from advrad_fast.calibrate import conformal_threshold
from advrad_fast.config import DetectorConfig, TilingConfig
from advrad_fast.errors import ConfigError, ModelFileError
from advrad_fast.files import write_atomically
from advrad_fast.graph import expected_tensors
from advrad_fast.smoothing import Outline, Smoothing, outline
from advrad_fast.untrusted import (
    MAX_SCORES,
    clip,
    dump,
    float32,
    inverse,
    number,
    parse,
    refuse,
    same_names,
    share,
    sorted_scores,
    spread_map,
)

SCHEMA = 3  #: version of the JSON document
MAX_FILE_BYTES = 4 << 30  #: largest file that is opened
MAX_HEADER_BYTES = 1 << 20  #: largest safetensors header; the largest UNet that UNetConfig allows takes a third of it
MAX_PARAMETERS = 1 << 29  #: most weights of a network
MAX_PROVENANCE_BYTES = 1 << 16  #: provenance as JSON
MAX_SIGMAS = 8  #: most sigmas that one model can certify at

_KEY = "advrad_fast"
_PREFIX = "unet."
_DTYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
_FIELDS = ("schema", "config", "false_alarm_rate", "threshold", "provenance")  # of schema 1
_ADDED = ("smoothing", "tiling")  # by schemas 2 and 3

Scalar = str | int | float | bool | None


@dataclass(frozen=True, eq=False)
class ModelFile:
    """A detector, as numbers.  Construction validates; arrays become read-only views.

    Attributes:
        config: all settings.
        weights: float32 arrays, exactly the names and shapes of ``expected_tensors(config.unet)``.
        mu: float32 (H, W), the normal map: of the network's input, or of ``tiling.frame``.
        spread: float32 (H, W), above 0, the standard deviation over normals; None iff not ``config.score.spread``.
        calibration_scores: float64 (n,), n >= 1, rising: scores of held-out normals (float32 is widened).
        false_alarm_rate: in (0, 1), the target that ``threshold`` stands for.
        threshold: a score above it is a DEFECT.
        provenance: where the model comes from: data hash, training settings, versions, licence note; JSON scalars.
        smoothing: what it certifies with, one for each sigma, in rising order; may be empty.
        tiling: if frames are inspected in tiles, how; the calibration scores and the threshold are of whole frames, then.

    Raises:
        ModelFileError: a field is inconsistent; the message names it, what was expected and what came.
    """

    config: DetectorConfig
    weights: dict[str, NDArray[np.float32]]
    mu: NDArray[np.float32]
    spread: NDArray[np.float32] | None
    calibration_scores: NDArray[np.float64]
    false_alarm_rate: float
    threshold: float
    provenance: dict[str, Scalar] = field(default_factory=dict)
    smoothing: tuple[Smoothing, ...] = ()
    tiling: TilingConfig | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.config, DetectorConfig):
            refuse("config", "a DetectorConfig", self.config)
        if not isinstance(self.weights, Mapping):
            refuse("weights", "a dict of arrays", self.weights)
        # Through JSON, so that 1 and 1.0 are one configuration, with one fingerprint.
        config = _config(parse("config", dump(self.config.to_json()).encode()))
        shapes = _weight_shapes(config)
        same_names("weights", shapes, self.weights)
        if not isinstance(self.tiling, TilingConfig | None):
            refuse("tiling", "a TilingConfig or None", self.tiling)
        tiling = _tiling(None if self.tiling is None else self.tiling.to_json(), config)
        size = _map_size(config, tiling)
        checked: dict[str, object] = {
            "config": config,
            "weights": {name: float32(f"weights.{name}", self.weights[name], shape) for name, shape in shapes.items()},
            "mu": float32("mu", self.mu, size),
        }
        checked["spread"] = spread_map("spread", self.spread, size, used=config.score.spread)
        checked["calibration_scores"] = sorted_scores("calibration_scores", self.calibration_scores)
        checked["false_alarm_rate"] = share("false_alarm_rate", self.false_alarm_rate)
        checked["threshold"] = number("threshold", self.threshold)
        checked["provenance"] = _checked_provenance(self.provenance)
        checked["smoothing"] = _checked_smoothing(self.smoothing, config)
        if tiling is not None and self.smoothing:
            refuse("smoothing", "none, as frames are inspected in tiles", f"{len(self.smoothing)} sigmas")
        checked["tiling"] = tiling
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @cached_property
    def inverse_spread(self) -> NDArray[np.float32]:
        """float32 (H, W): 1 / spread, or ones."""
        return inverse(self.mu, self.spread)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The sigmas that the model can certify at, in [0, 1] pixel units, rising."""
        return tuple(smoothing.sigma for smoothing in self.smoothing)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the configuration, the sigmas' too, and all tensors; not over thresholds, rates and provenance.

        The same before and after :meth:`save` and :meth:`load`, in either precision.
        """
        digest = hashlib.sha256(dump(self.config.to_json()).encode())
        for smoothing in self.smoothing:
            digest.update(dump([smoothing.sigma, smoothing.score.to_json(), smoothing.draws]).encode())
        if self.tiling is not None:
            digest.update(dump(self.tiling.to_json()).encode())
        for name, array in sorted(self._tensors().items()):
            digest.update(f"\n{name} {array.shape}\n".encode())
            digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data.cast("B"))
        return digest.hexdigest()

    def with_false_alarm_rate(self, rate: float) -> ModelFile:
        """A copy with the conformal thresholds, the sigmas' too, for another target in (0, 1), from the stored scores.

        Raises:
            CalibrationError: too few calibration scores for this rate.
            ConfigError: ``rate`` is not in (0, 1).
        """
        smoothing = tuple(s.with_false_alarm_rate(rate) for s in self.smoothing)
        threshold = conformal_threshold(self.calibration_scores, rate)
        return dataclasses.replace(self, threshold=threshold, false_alarm_rate=rate, smoothing=smoothing)

    def with_threshold(self, threshold: float, false_alarm_rate: float | None = None) -> ModelFile:
        """A copy with a threshold of one's own, and the rate that it stands for (None: as stored).

        No promise of :mod:`advrad_fast.calibrate` covers such a threshold; :meth:`with_false_alarm_rate` keeps it.
        """
        rate = self.false_alarm_rate if false_alarm_rate is None else false_alarm_rate
        return dataclasses.replace(self, threshold=threshold, false_alarm_rate=rate)

    def save(self, path: str | os.PathLike[str], *, half: bool = False) -> None:
        """Write the file atomically: a reader, or a crash, sees the old one or the new one.

        Args:
            half: store the weights as float16, at half the size.  They must be float16 numbers already: rounding them
                after the calibration would void its promise.  :func:`round_to_half` rounds them before it.

        Raises:
            ModelFileError: the file cannot be written, or ``half`` would change a weight.
        """
        from safetensors.numpy import save

        tensors = self._tensors()
        if half:
            with np.errstate(over="ignore"):
                for name, array in self.weights.items():
                    rounded = array.astype(np.float16)
                    if not np.array_equal(rounded, array):
                        refuse(f"weights.{name}", "float16 numbers (round_to_half, then calibrate)", "other float32 numbers")
                    tensors[_PREFIX + name] = rounded
        document = {
            "schema": SCHEMA,
            "config": self.config.to_json(),
            "false_alarm_rate": self.false_alarm_rate,
            "threshold": self.threshold,
            "provenance": self.provenance,
            "smoothing": [smoothing.document() for smoothing in self.smoothing],
            "tiling": None if self.tiling is None else self.tiling.to_json(),
        }
        file = _path(path)
        try:
            write_atomically(file, save(tensors, metadata={_KEY: dump(document)}))
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{file}: cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ModelFile:
        """Read and validate a file, which is untrusted.

        Raises:
            ModelFileError: the file is missing, unreadable, damaged, foreign or inconsistent; the message names the field.
        """
        name = _path(path)
        try:
            status = name.stat()  # before opening, as opening a pipe would wait
            if not stat.S_ISREG(status.st_mode):
                refuse("file", "a regular file", stat.filemode(status.st_mode))
            with name.open("rb") as stream:
                return cls._read(stream, os.fstat(stream.fileno()).st_size)
        except ModelFileError as error:
            raise ModelFileError(f"{name}: {error}") from error.__cause__
        except (OSError, ValueError) as error:  # ValueError: a path with a null character
            raise ModelFileError(f"{name}: cannot be read: {error}") from error

    @classmethod
    def _read(cls, stream: BinaryIO, size: int) -> ModelFile:
        if not 8 <= size <= MAX_FILE_BYTES:
            refuse("file size", f"8 to {MAX_FILE_BYTES} bytes", size)
        length = int.from_bytes(_take(stream, 8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            refuse("header length", f"2 to {min(MAX_HEADER_BYTES, size - 8)} bytes", length)
        entries = parse("header", _take(stream, length))
        document = _document(entries.pop("__metadata__", None))
        config = _config(document["config"])
        weights = {_PREFIX + name: shape for name, shape in _weight_shapes(config).items()}
        tiling = _tiling(document.get("tiling"), config)
        image = _map_size(config, tiling)
        shapes: dict[str, tuple[int, ...] | None] = {**weights, "mu": image, "calibration_scores": None}
        if config.score.spread:
            shapes["spread"] = image
        outlines = _outlines(document.get("smoothing", []), config)
        for part in outlines:
            shapes |= part.shapes
        same_names("tensors", shapes, entries)
        plan = sorted((_entry(name, entries[name], shape) for name, shape in shapes.items()), key=lambda e: e.begin)
        position = 0
        for entry in plan:
            if entry.begin != position:
                refuse(f"{entry.name}.data_offsets", f"to begin at {position}, where the tensor before ends", entry.begin)
            position = entry.end
        if position != size - 8 - length:
            refuse("data", f"{position} bytes, where the last tensor ends", size - 8 - length)

        tensors: dict[str, NDArray[Any]] = {}
        for entry in plan:
            raw = np.empty(entry.shape, entry.dtype)
            if stream.readinto(raw.data.cast("B")) != raw.nbytes:  # type: ignore[attr-defined]
                refuse(entry.name, f"{raw.nbytes} bytes", "a file that was cut while it was read")
            tensors[entry.name] = raw.astype(np.float64 if shapes[entry.name] is None else np.float32, copy=False)
        return cls(
            config=config,
            weights={name.removeprefix(_PREFIX): tensors[name] for name in weights},
            mu=tensors["mu"],
            spread=tensors.get("spread"),
            calibration_scores=tensors["calibration_scores"],
            false_alarm_rate=document["false_alarm_rate"],
            threshold=document["threshold"],
            provenance=document["provenance"],
            smoothing=tuple(part.build(tensors) for part in outlines),
            tiling=tiling,
        )

    def _tensors(self) -> dict[str, NDArray[Any]]:
        """All tensors under their names in the file."""
        tensors: dict[str, NDArray[Any]] = {_PREFIX + name: array for name, array in self.weights.items()}
        tensors |= {"mu": self.mu, "calibration_scores": self.calibration_scores}
        if self.spread is not None:
            tensors["spread"] = self.spread
        for i, smoothing in enumerate(self.smoothing):
            tensors |= smoothing.tensors(i)
        return tensors


def round_to_half(weights: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """The weights rounded to the nearest float16 numbers, still float32: calibrate with these to save with ``half``.

    Raises:
        ModelFileError: a weight is not finite or is beyond float16's range (65504).
    """
    rounded = {}
    for name, array in weights.items():
        with np.errstate(over="ignore"):
            rounded[name] = array.astype(np.float16).astype(np.float32)
        if not np.isfinite(rounded[name]).all():
            refuse(f"weights.{name}", "magnitudes up to 65504", float(np.abs(array).max()))
    return rounded


@dataclass(frozen=True)
class _Entry:
    """One checked row of the header; ``begin`` and ``end`` count from the end of the header."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


def _entry(name: str, value: object, shape: tuple[int, ...] | None) -> _Entry:
    """The header's row for a tensor of this shape; None stands for calibration scores, (n,)."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        refuse(name, "an object of dtype, shape and data_offsets", value)
    dtype, offsets, got = value["dtype"], value["data_offsets"], value["shape"]
    allowed = ("F32", "F64") if shape is None else ("F32", "F16") if name.startswith(_PREFIX) else ("F32",)
    if dtype not in allowed:
        refuse(f"{name}.dtype", " or ".join(allowed), dtype)
    for part, numbers in (("shape", got), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n <= MAX_FILE_BYTES for n in numbers):
            refuse(f"{name}.{part}", "a list of sizes in bytes or elements", numbers)
    if shape is None:
        if len(got) != 1 or not 1 <= got[0] <= MAX_SCORES:
            refuse(f"{name}.shape", f"[n], n in 1 to {MAX_SCORES}", got)
        shape = (got[0],)
    if tuple(got) != shape:
        refuse(f"{name}.shape", str(list(shape)), got)
    count = math.prod(shape) * _DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != count:
        refuse(f"{name}.data_offsets", f"two, {count} bytes apart", offsets)
    return _Entry(name, _DTYPES[dtype], shape, offsets[0], offsets[1])


def _document(metadata: object) -> dict[str, Any]:
    """The JSON document in the metadata, with its fields there and its schema known."""
    if not isinstance(metadata, dict) or set(metadata) != {_KEY} or not isinstance(metadata[_KEY], str):
        refuse("__metadata__", f"an object with one text, {_KEY!r}", metadata)
    document = parse(_KEY, metadata[_KEY].encode(errors="surrogatepass"))
    schema = document.get("schema")
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        refuse("schema", f"1 to {SCHEMA} (a later one takes a later advrad_fast)", schema)
    same_names(_KEY, (*_FIELDS, *_ADDED[: schema - 1]), document)
    return document


def _outlines(value: object, config: DetectorConfig) -> list[Outline]:
    if not isinstance(value, list) or len(value) > MAX_SIGMAS:
        refuse("smoothing", f"a list of at most {MAX_SIGMAS}", value)
    return [outline(i, entry, config) for i, entry in enumerate(value)]


def _checked_smoothing(value: object, config: DetectorConfig) -> tuple[Smoothing, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_SIGMAS or not all(isinstance(s, Smoothing) for s in value):
        refuse("smoothing", f"a tuple of at most {MAX_SIGMAS} Smoothing", value)
    checked = tuple(smoothing.checked(f"smoothing[{i}]", config) for i, smoothing in enumerate(value))
    sigmas = [smoothing.sigma for smoothing in checked]
    if sigmas != sorted(set(sigmas)):
        refuse("smoothing", "sigmas in rising order", sigmas)
    return checked


def _path(value: object) -> Path:
    try:
        return Path(value)  # type: ignore[arg-type]
    except TypeError:
        refuse("path", "a path", value)


def _config(value: object) -> DetectorConfig:
    try:
        return DetectorConfig.from_json(value, "config")
    except ConfigError as error:
        raise ModelFileError(clip(str(error))) from error


def _tiling(value: object, config: DetectorConfig) -> TilingConfig | None:
    if value is None:
        return None
    try:
        tiling = TilingConfig.from_json(value, "tiling")
    except ConfigError as error:
        raise ModelFileError(clip(str(error))) from error
    tile = (config.image.height, config.image.width)
    if config.image.pose is not None:
        refuse("tiling", "null, as the part is aligned", tiling)
    if tiling.overlap > min(tile) // 2:
        refuse("tiling.overlap", f"at most half a tile's shorter side, {min(tile) // 2}", tiling.overlap)
    if tiling.frame is not None and (tiling.frame[0] < tile[0] or tiling.frame[1] < tile[1]):
        refuse("tiling.frame", f"at least a tile, {tile}", tiling.frame)
    return tiling


def _map_size(config: DetectorConfig, tiling: TilingConfig | None) -> tuple[int, int]:
    if tiling is not None and tiling.frame is not None:
        return tiling.frame
    return (config.image.height, config.image.width)


def _take(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        refuse("file", f"{count} more bytes", len(data))
    return data


def _weight_shapes(config: DetectorConfig) -> dict[str, tuple[int, ...]]:
    shapes = expected_tensors(config.unet)
    count = sum(math.prod(shape) for shape in shapes.values())
    if count > MAX_PARAMETERS:
        refuse("config.unet", f"a network of at most {MAX_PARAMETERS} weights", count)
    return shapes


def _checked_provenance(value: object) -> dict[str, Scalar]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        refuse("provenance", "a dict with text keys", value)
    for key, item in value.items():
        good = math.isfinite(item) if type(item) is float else type(item) in (str, bool, int, type(None))
        if not good or (type(item) is int and abs(item) >= 2**63):
            refuse(f"provenance[{key!r}]", "text, a finite number of at most 64 bits, a truth value or None", item)
    if len(dump(value)) > MAX_PROVENANCE_BYTES:
        refuse("provenance", f"at most {MAX_PROVENANCE_BYTES} bytes of JSON", len(dump(value)))
    return dict(value)
