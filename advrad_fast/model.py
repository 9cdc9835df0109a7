"""The model file: one safetensors file that is the detector.

It holds numbers, never a graph and never code.  Layout (https://github.com/huggingface/safetensors#format):

- ``unet.<name>``: the weights, float32 or float16, named and shaped as :func:`advrad_fast.graph.expected_tensors` says;
- ``mu`` and, if ``config.score.spread``, ``spread``: float32 (H, W);
- ``calibration_scores``: float64 or float32 (n,), sorted;
- metadata ``advrad_fast``: one JSON document ``{"schema", "config", "false_alarm_rate", "threshold", "provenance"}``.

A file is untrusted until it has passed every check here.  The header is parsed under caps, and all names, types, shapes and
offsets are compared with what the configuration calls for, before the first tensor is allocated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from advrad_fast.calibrate import conformal_threshold
from advrad_fast.config import DetectorConfig
from advrad_fast.errors import ConfigError, ModelFileError, expected
from advrad_fast.files import write_atomically
from advrad_fast.graph import expected_tensors

SCHEMA = 1  #: version of the JSON document
MAX_FILE_BYTES = 4 << 30  #: largest file that is opened
MAX_HEADER_BYTES = 1 << 20  #: largest safetensors header; the largest UNet that UNetConfig allows takes a third of it
MAX_PARAMETERS = 1 << 29  #: most weights of a network
MAX_SCORES = 1 << 24  #: most calibration scores
MAX_PROVENANCE_BYTES = 1 << 16  #: provenance as JSON

_MAX_DEPTH = 8  # of JSON objects and lists; config.image.pose is at depth 4
_KEY = "advrad_fast"
_PREFIX = "unet."
_DTYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
_FIELDS = ("schema", "config", "false_alarm_rate", "threshold", "provenance")

Scalar = str | int | float | bool | None


@dataclass(frozen=True, eq=False)
class ModelFile:
    """A detector, as numbers.  Construction validates; arrays become read-only views.

    Attributes:
        config: all settings.
        weights: float32 arrays, exactly the names and shapes of ``expected_tensors(config.unet)``.
        mu: float32 (H, W), the normal map.
        spread: float32 (H, W), above 0, the standard deviation over normals; None iff not ``config.score.spread``.
        calibration_scores: float64 (n,), n >= 1, rising: scores of held-out normals (float32 is widened).
        false_alarm_rate: in (0, 1), the target that ``threshold`` stands for.
        threshold: a score above it is a DEFECT.
        provenance: where the model comes from: data hash, training settings, versions, licence note; JSON scalars.

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

    def __post_init__(self) -> None:
        if not isinstance(self.config, DetectorConfig):
            _refuse("config", "a DetectorConfig", self.config)
        if not isinstance(self.weights, Mapping):
            _refuse("weights", "a dict of arrays", self.weights)
        # Through JSON, so that 1 and 1.0 are one configuration, with one fingerprint.
        config = _config(_parse("config", _dump(self.config.to_json()).encode()))
        shapes = _weight_shapes(config)
        _same_names("weights", shapes, self.weights)
        size = (config.image.height, config.image.width)
        checked: dict[str, object] = {
            "config": config,
            "weights": {name: _float32(f"weights.{name}", self.weights[name], shape) for name, shape in shapes.items()},
            "mu": _float32("mu", self.mu, size),
        }
        if self.spread is None and config.score.spread:
            _refuse("spread", "a map, as config.score.spread is true", None)
        if self.spread is not None:
            if not config.score.spread:
                _refuse("spread", "None, as config.score.spread is false", "a map")
            spread = _float32("spread", self.spread, size)
            tiny = np.finfo(np.float32).tiny  # from here up, the inverse is finite
            if spread.min() < tiny:
                _refuse("spread", f"values >= {tiny:.3g}", float(spread.min()))
            checked["spread"] = spread
        checked["calibration_scores"] = _sorted_scores(self.calibration_scores)
        rate = checked["false_alarm_rate"] = _number("false_alarm_rate", self.false_alarm_rate)
        if not 0.0 < rate < 1.0:
            _refuse("false_alarm_rate", "a number in (0, 1)", rate)
        checked["threshold"] = _number("threshold", self.threshold)
        checked["provenance"] = _checked_provenance(self.provenance)
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @cached_property
    def inverse_spread(self) -> NDArray[np.float32]:
        """float32 (H, W): 1 / spread, or ones."""
        inverse = np.ones_like(self.mu) if self.spread is None else np.float32(1.0) / self.spread
        inverse.flags.writeable = False
        return inverse

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the configuration and all tensors; not over threshold, rate and provenance.

        The same before and after :meth:`save` and :meth:`load`, in either precision.
        """
        digest = hashlib.sha256(_dump(self.config.to_json()).encode())
        for name, array in sorted(self._tensors().items()):
            digest.update(f"\n{name} {array.shape}\n".encode())
            digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data.cast("B"))
        return digest.hexdigest()

    def with_false_alarm_rate(self, rate: float) -> ModelFile:
        """A copy with the conformal threshold for another target in (0, 1), from the stored calibration scores.

        Raises:
            CalibrationError: too few calibration scores for this rate.
            ConfigError: ``rate`` is not in (0, 1).
        """
        return dataclasses.replace(self, threshold=conformal_threshold(self.calibration_scores, rate), false_alarm_rate=rate)

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
                        _refuse(f"weights.{name}", "float16 numbers (round_to_half, then calibrate)", "other float32 numbers")
                    tensors[_PREFIX + name] = rounded
        document = {
            "schema": SCHEMA,
            "config": self.config.to_json(),
            "false_alarm_rate": self.false_alarm_rate,
            "threshold": self.threshold,
            "provenance": self.provenance,
        }
        try:
            write_atomically(Path(path), save(tensors, metadata={_KEY: _dump(document)}))
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{os.fspath(path)}: cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ModelFile:
        """Read and validate a file, which is untrusted.

        Raises:
            ModelFileError: the file is missing, unreadable, damaged, foreign or inconsistent; the message names the field.
        """
        name = Path(path)
        try:
            status = name.stat()  # before opening, as opening a pipe would wait
            if not stat.S_ISREG(status.st_mode):
                _refuse("file", "a regular file", stat.filemode(status.st_mode))
            with name.open("rb") as stream:
                return cls._read(stream, os.fstat(stream.fileno()).st_size)
        except ModelFileError as error:
            raise ModelFileError(f"{name}: {error}") from error.__cause__
        except (OSError, ValueError) as error:  # ValueError: a path with a null character
            raise ModelFileError(f"{name}: cannot be read: {error}") from error

    @classmethod
    def _read(cls, stream: BinaryIO, size: int) -> ModelFile:
        if not 8 <= size <= MAX_FILE_BYTES:
            _refuse("file size", f"8 to {MAX_FILE_BYTES} bytes", size)
        length = int.from_bytes(_take(stream, 8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            _refuse("header length", f"2 to {min(MAX_HEADER_BYTES, size - 8)} bytes", length)
        entries = _parse("header", _take(stream, length))
        document = _document(entries.pop("__metadata__", None))
        config = _config(document["config"])
        weights = {_PREFIX + name: shape for name, shape in _weight_shapes(config).items()}
        image = (config.image.height, config.image.width)
        shapes: dict[str, tuple[int, ...] | None] = {**weights, "mu": image, "calibration_scores": None}
        if config.score.spread:
            shapes["spread"] = image
        _same_names("tensors", shapes, entries)
        plan = sorted((_entry(name, entries[name], shape) for name, shape in shapes.items()), key=lambda e: e.begin)
        position = 0
        for entry in plan:
            if entry.begin != position:
                _refuse(f"{entry.name}.data_offsets", f"to begin at {position}, where the tensor before ends", entry.begin)
            position = entry.end
        if position != size - 8 - length:
            _refuse("data", f"{position} bytes, where the last tensor ends", size - 8 - length)

        tensors: dict[str, NDArray[Any]] = {}
        for entry in plan:
            raw = np.empty(entry.shape, entry.dtype)
            if stream.readinto(raw.data.cast("B")) != raw.nbytes:  # type: ignore[attr-defined]
                _refuse(entry.name, f"{raw.nbytes} bytes", "a file that was cut while it was read")
            tensors[entry.name] = raw.astype(np.float64 if entry.name == "calibration_scores" else np.float32, copy=False)
        return cls(
            config=config,
            weights={name.removeprefix(_PREFIX): tensors[name] for name in weights},
            mu=tensors["mu"],
            spread=tensors.get("spread"),
            calibration_scores=tensors["calibration_scores"],
            false_alarm_rate=document["false_alarm_rate"],
            threshold=document["threshold"],
            provenance=document["provenance"],
        )

    def _tensors(self) -> dict[str, NDArray[Any]]:
        """All tensors under their names in the file."""
        tensors: dict[str, NDArray[Any]] = {_PREFIX + name: array for name, array in self.weights.items()}
        tensors |= {"mu": self.mu, "calibration_scores": self.calibration_scores}
        if self.spread is not None:
            tensors["spread"] = self.spread
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
            _refuse(f"weights.{name}", "magnitudes up to 65504", float(np.abs(array).max()))
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
    """The header's row for a tensor of this shape; None stands for calibration_scores, (n,)."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        _refuse(name, "an object of dtype, shape and data_offsets", value)
    dtype, offsets, got = value["dtype"], value["data_offsets"], value["shape"]
    allowed = ("F32", "F64") if shape is None else ("F32", "F16") if name.startswith(_PREFIX) else ("F32",)
    if dtype not in allowed:
        _refuse(f"{name}.dtype", " or ".join(allowed), dtype)
    for part, numbers in (("shape", got), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n <= MAX_FILE_BYTES for n in numbers):
            _refuse(f"{name}.{part}", "a list of sizes in bytes or elements", numbers)
    if shape is None:
        if len(got) != 1 or not 1 <= got[0] <= MAX_SCORES:
            _refuse(f"{name}.shape", f"[n], n in 1 to {MAX_SCORES}", got)
        shape = (got[0],)
    if tuple(got) != shape:
        _refuse(f"{name}.shape", str(list(shape)), got)
    count = math.prod(shape) * _DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != count:
        _refuse(f"{name}.data_offsets", f"two, {count} bytes apart", offsets)
    return _Entry(name, _DTYPES[dtype], shape, offsets[0], offsets[1])


def _document(metadata: object) -> dict[str, Any]:
    """The JSON document in the metadata, with its fields there and its schema known."""
    if not isinstance(metadata, dict) or set(metadata) != {_KEY} or not isinstance(metadata[_KEY], str):
        _refuse("__metadata__", f"an object with one text, {_KEY!r}", metadata)
    document = _parse(_KEY, metadata[_KEY].encode(errors="surrogatepass"))
    schema = document.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        _refuse("schema", f"{SCHEMA} (a later one takes a later advrad_fast)", schema)
    _same_names(_KEY, _FIELDS, document)
    return document


def _config(value: object) -> DetectorConfig:
    try:
        return DetectorConfig.from_json(value, "config")
    except ConfigError as error:
        raise ModelFileError(_clip(str(error))) from error


def _parse(name: str, data: bytes) -> dict[str, Any]:
    """Strict JSON: one object, UTF-8, limited depth, no duplicate keys, no NaN or infinity, no huge numbers."""
    if _depth(data) > _MAX_DEPTH:
        raise ModelFileError(f"{name}: expected JSON nested at most {_MAX_DEPTH} deep")
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
    except ModelFileError as error:
        raise ModelFileError(f"{name}: {error}") from None
    except ValueError as error:
        raise ModelFileError(f"{name}: not JSON in UTF-8: {_clip(str(error))}") from error
    if not isinstance(value, dict):
        _refuse(name, "a JSON object", value)
    return value


def _depth(data: bytes) -> int:
    """How deep the brackets outside strings nest, in one linear pass: the parser's recursion is bounded before it starts.

    Up to the first error of syntax, strings are found where a JSON parser finds them.
    """
    text = np.frombuffer(re.sub(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', b"", data, flags=re.DOTALL), np.uint8)
    opened = (text == ord("{")) | (text == ord("["))
    closed = (text == ord("}")) | (text == ord("]"))
    return int(np.cumsum(opened.astype(np.int32) - closed.astype(np.int32)).max(initial=0))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ModelFileError(f"duplicate key {_clip(repr(twice))}")
    return result


def _no_constant(text: str) -> NoReturn:
    raise ModelFileError(f"expected finite numbers, got {text}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ModelFileError(f"expected finite numbers, got {_clip(text)}")
    return value


def _integer(text: str) -> int:
    if len(text) > 20:  # more than 64 bits; also, int() takes quadratic time
        raise ModelFileError(f"expected integers of at most 64 bits, got {_clip(text)}")
    return int(text)


def _dump(value: object) -> str:
    """Canonical ASCII JSON."""
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _take(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        _refuse("file", f"{count} more bytes", len(data))
    return data


def _weight_shapes(config: DetectorConfig) -> dict[str, tuple[int, ...]]:
    shapes = expected_tensors(config.unet)
    count = sum(math.prod(shape) for shape in shapes.values())
    if count > MAX_PARAMETERS:
        _refuse("config.unet", f"a network of at most {MAX_PARAMETERS} weights", count)
    return shapes


def _same_names(field_name: str, wanted: Mapping[str, object] | tuple[str, ...], got: Mapping[str, object]) -> None:
    missing, unknown = sorted(set(wanted) - set(got)), sorted(map(str, set(got) - set(wanted)))
    if missing or unknown:
        raise ModelFileError(f"{field_name}: missing {_clip(str(missing))}, unknown {_clip(str(unknown))}")


def _float32(name: str, value: object, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A contiguous, read-only view of a finite float32 array of this shape, or a copy where it takes one."""
    if not isinstance(value, np.ndarray) or value.dtype != np.float32 or value.shape != shape:
        _refuse(name, f"a float32 array {shape}", _kind(value))
    if not np.isfinite(value).all():
        _refuse(name, "finite values", f"{np.count_nonzero(~np.isfinite(value))} that are not")
    view = np.ascontiguousarray(value).view()
    view.flags.writeable = False
    return view


def _kind(value: object) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def _sorted_scores(value: object) -> NDArray[np.float64]:
    name = "calibration_scores"
    if not isinstance(value, np.ndarray) or value.dtype not in (np.float32, np.float64) or value.ndim != 1:
        _refuse(name, "a float32 or float64 array (n,)", _kind(value))
    if not 1 <= value.size <= MAX_SCORES:
        _refuse(name, f"1 to {MAX_SCORES} scores", value.size)
    if not np.isfinite(value).all() or (value[1:] < value[:-1]).any():
        _refuse(name, "finite scores in rising order", "others")
    scores = value.astype(np.float64)
    scores.flags.writeable = False
    return scores


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, float | int | np.floating):
        _refuse(name, "a finite number", value)
    too_large = isinstance(value, int) and abs(value) > sys.float_info.max  # float() would overflow
    if too_large or not math.isfinite(value):
        _refuse(name, "a finite number", value)
    return float(value)


def _checked_provenance(value: object) -> dict[str, Scalar]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        _refuse("provenance", "a dict with text keys", value)
    for key, item in value.items():
        good = math.isfinite(item) if type(item) is float else type(item) in (str, bool, int, type(None))
        if not good or (type(item) is int and abs(item) >= 2**63):
            _refuse(f"provenance[{key!r}]", "text, a finite number of at most 64 bits, a truth value or None", item)
    if len(_dump(value)) > MAX_PROVENANCE_BYTES:
        _refuse("provenance", f"at most {MAX_PROVENANCE_BYTES} bytes of JSON", len(_dump(value)))
    return dict(value)


def _clip(text: str) -> str:
    """At most 300 characters: a message must not carry the file."""
    return text if len(text) <= 300 else f"{text[:300]}..."


def _refuse(name: str, wanted: str, got: object) -> NoReturn:
    raise ModelFileError(_clip(expected(_clip(name), wanted, got)))
