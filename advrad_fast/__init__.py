"""Adversarially robust industrial anomaly detection with a one-shot diffusion model (AdvRAD, arXiv 2408.04839).

Importing this package loads no torch, no CUDA and no OpenVINO; a detector loads what its backend needs.
"""

from __future__ import annotations

from advrad_fast.certify import Certificate
from advrad_fast.config import DetectorConfig
from advrad_fast.detector import Detector, Inspection, Outcome
from advrad_fast.errors import (
    AdvRADError,
    BackendUnavailableError,
    CalibrationError,
    ConfigError,
    ImageError,
    InferenceError,
    ModelFileError,
)
from advrad_fast.model import ModelFile

__version__ = "0.1.0"

__all__ = [
    "AdvRADError",
    "BackendUnavailableError",
    "CalibrationError",
    "Certificate",
    "ConfigError",
    "Detector",
    "DetectorConfig",
    "ImageError",
    "InferenceError",
    "Inspection",
    "ModelFile",
    "ModelFileError",
    "Outcome",
    "__version__",
]
