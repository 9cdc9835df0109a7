"""Every exception that advrad_fast raises on purpose.

::

    AdvRADError
    ├── ConfigError             (ValueError)    a setting is out of range or of the wrong type
    ├── ImageError              (ValueError)    a frame breaks the input contract
    │   ├── ImageDecodeError                    a file is not an image, is truncated, or is not supported
    │   ├── ImageTooLargeError                  more pixels than the cap, refused before decoding
    │   └── PartNotFoundError                   the pose rule found no part: an inspection ABSTAINs
    ├── ModelFileError          (ValueError)    a model file is damaged, foreign or inconsistent
    ├── KernelFileError         (ValueError)    a folder of compiled kernels is damaged, foreign or inconsistent
    ├── CalibrationError        (ValueError)    too few normal scores for the promise asked for
    ├── DriftStateError         (ValueError)    a saved drift state is damaged, or of another test
    ├── DatasetError            (ValueError)    a folder does not hold what its layout needs
    ├── ReportError             (ValueError)    a report's folder holds a file that is not a report's data
    ├── AttackError             (RuntimeError)  an attack broke a sanity rule: its figures mean nothing
    ├── TrainingError           (RuntimeError)  training cannot start, go on or resume
    ├── SpreadError             (RuntimeError)  a cluster can't be used, or its workers died
    ├── BackendUnavailableError (RuntimeError)  no usable backend; the message has each one's reason
    ├── InferenceError          (RuntimeError)  the engine failed, or returned something not finite
    ├── SourceError             (RuntimeError)  a source of frames cannot be opened or read
    │   └── SourceStalledError                  it did not answer within the deadline
    └── SinkError               (RuntimeError)  a result could not be stored

Whatever numbers, arrays, frames, texts and paths a public function is given, it does what it says or raises one of these (or
MemoryError, where it is asked for more than there is).  Where it takes an object of this package, a
:class:`~advrad_fast.ModelFile` for example, or a function to call, any other object there is a fault of the program, and Python's
own errors (TypeError, AttributeError) say so.
"""

from __future__ import annotations

import reprlib


class AdvRADError(Exception):
    """The root: ``except AdvRADError`` catches everything this package raises on purpose."""


class ConfigError(AdvRADError, ValueError):
    """A setting is out of range or of the wrong type."""


class ImageError(AdvRADError, ValueError):
    """A frame or image file breaks the input contract of :mod:`advrad_fast.images`."""


class ImageDecodeError(ImageError):
    """A file is not an image, is truncated, or has a format that is not supported."""


class ImageTooLargeError(ImageError):
    """An image has more pixels than the cap.  Files are refused before they are decoded."""


class PartNotFoundError(ImageError):
    """The model aligns the part before it looks, and found none in this frame."""


class ModelFileError(AdvRADError, ValueError):
    """A model file is damaged, foreign or inconsistent; the message names the field."""


class KernelFileError(AdvRADError, ValueError):
    """A folder of compiled GPU kernels is damaged, foreign or inconsistent; the message names the field."""


class CalibrationError(AdvRADError, ValueError):
    """Too few normal scores for the false-alarm rate asked for, or scores that are not finite."""


class DriftStateError(AdvRADError, ValueError):
    """A saved state of the drift test is missing, damaged, or of another calibration or other settings."""


class DatasetError(AdvRADError, ValueError):
    """A folder does not hold what its layout needs."""


class ReportError(AdvRADError, ValueError):
    """A report's folder holds a file that is not a report's data, or not of this version."""


class AttackError(AdvRADError, RuntimeError):
    """An attack broke a rule that every sound attack keeps: figures of robustness made with it mean nothing."""


class TrainingError(AdvRADError, RuntimeError):
    """Training cannot start, go on or resume."""


class SpreadError(AdvRADError, RuntimeError):
    """A cluster can't be reached, or a task has killed all the workers that tried it."""


class BackendUnavailableError(AdvRADError, RuntimeError):
    """The backend asked for, or every backend, cannot be used here; the message says why."""


class InferenceError(AdvRADError, RuntimeError):
    """The engine failed or returned values that are not finite: the frame has no score."""


class SourceError(AdvRADError, RuntimeError):
    """A source of frames cannot be opened or read."""


class SourceStalledError(SourceError):
    """A source of frames did not answer within the deadline."""


class SinkError(AdvRADError, RuntimeError):
    """A result could not be stored or sent."""


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120  # a message must not carry the input, but say what came


def expected(name: str, wanted: str, got: object) -> str:
    """The one sentence all messages use: what was named, what was wanted, what came."""
    try:
        came = _short.repr(got)
    except Exception:  # an object's own code; an integer of more than 4300 digits
        came = f"<{type(got).__name__}>"
    return f"{name}: expected {wanted}, got {came}"
