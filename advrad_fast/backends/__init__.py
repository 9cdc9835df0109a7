"""Backends: what can run a detector here, and why not.  Importing this loads no OpenVINO, no torch and no CUDA."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

from advrad_fast.backends.base import Array, Backend, BackendStatus, Precision, Scores, Votes, check_precision
from advrad_fast.backends.cache import CacheDir
from advrad_fast.config import DetectorConfig
from advrad_fast.errors import BackendUnavailableError, ConfigError, expected

__all__ = ["BACKENDS", "Backend", "BackendStatus", "Scores", "Votes", "available", "create"]

#: Every backend, in the order in which ``auto`` tries them.
BACKENDS = ("cuda", "cpu", "reference")

_log = logging.getLogger(__name__)


def available() -> list[BackendStatus]:
    """Every backend in the order of :data:`BACKENDS`, usable or with the reason why not.  Never raises."""
    return [_status(name) for name in BACKENDS]


def create(
    name: str,
    config: DetectorConfig,
    weights: Mapping[str, Array],
    mu: Array,
    inverse_spread: Array,
    *,
    threads: int | None = None,
    precision: Precision = "auto",
    cache_dir: CacheDir = None,
    kernels_dir: str | PathLike[str] | None = None,
) -> Backend:
    """A backend for one detector.

    Args:
        name: one of :data:`BACKENDS`, or ``auto`` for the first of them that is usable.
        config: the detector's settings.
        weights: float32, exactly :func:`advrad_fast.graph.expected_tensors` of ``config.unet``.
        mu, inverse_spread: float32 (H, W), the normal map and one over its spread (ones where unused).
        threads: of the network on a CPU; None for the library's choice.
        precision: ``fp32``, ``bf16``, ``int8`` (once it has been calibrated), and ``fp16`` and ``fp8`` on GPUs; ``auto`` for
            ``fp16`` on GPUs, elsewhere for the faster of ``fp32`` and ``bf16``.
        cache_dir: where compiled networks are kept; None for the platform's cache folder, False for nowhere.
        kernels_dir: where the GPU's compiled kernels are; None for ``$ADVRAD_KERNELS``, else the platform's cache folder.

    Raises:
        BackendUnavailableError: the backend asked for, or every one, is unusable here; the message has each one's reason.
        ConfigError: the name is unknown, or an option is out of range or not to be had from this backend.
        ModelFileError: a tensor is missing, unknown, mis-shaped or not float32.
    """
    known = ("auto", *BACKENDS)
    if not isinstance(name, str) or name not in known:
        raise ConfigError(expected("backend", f"one of {list(known)}", name))
    check_precision(precision)
    options = {"precision": precision, "cache_dir": cache_dir, "threads": threads, "kernels_dir": kernels_dir}
    failed = []
    for candidate in BACKENDS if name == "auto" else (name,):
        status = _status(candidate, kernels_dir)
        if not status.usable:
            failed.append(status)
            continue
        try:
            backend = _create(candidate, config, weights, mu, inverse_spread, options)
        except BackendUnavailableError as error:
            if name != "auto" or candidate != "cuda":
                raise
            # That a GPU cannot be used may only show when it is tried; processors come next.
            _log.warning("backend %s: %s", candidate, error)
            failed.append(BackendStatus(candidate, False, str(error)))
            continue
        _log.info("backend %s: %s", status.name, status.detail)
        return backend
    failed += [status for status in available() if status.name not in {each.name for each in failed}]
    reasons = "".join(f"\n  {s.name}: {'usable: ' if s.usable else ''}{s.detail}" for s in failed)
    raise BackendUnavailableError(f"backend {name!r} cannot be used here:{reasons}")


def _create(
    name: str, config: DetectorConfig, weights: Mapping[str, Array], mu: Array, inverse_spread: Array, options: dict[str, Any]
) -> Backend:
    takes = {"cuda": ("precision", "cache_dir", "kernels_dir"), "cpu": ("threads", "precision", "cache_dir")}
    chosen = {key: options[key] for key in takes.get(name, ("threads",))}
    if name == "cuda":
        from advrad_fast.backends.cuda import CudaBackend

        return CudaBackend(config, weights, mu, inverse_spread, **chosen)
    if name == "cpu":
        from advrad_fast.backends.cpu import CpuBackend

        return CpuBackend(config, weights, mu, inverse_spread, **chosen)
    if options["precision"] not in ("auto", "fp32"):
        raise ConfigError(expected("precision", "'auto' or 'fp32' for the reference backend", options["precision"]))
    from advrad_fast.backends.reference import ReferenceBackend

    return ReferenceBackend(config, weights, mu, inverse_spread, **chosen)


def _status(name: str, kernels_dir: str | PathLike[str] | None = None) -> BackendStatus:
    checks: dict[str, Callable[[], BackendStatus]] = {"cuda": lambda: _cuda(kernels_dir), "cpu": _cpu, "reference": _reference}
    try:
        return checks[name]()
    except Exception as error:  # a broken installation can raise anything at import
        return BackendStatus(name, False, f"{type(error).__name__}: {error}")


def _cpu() -> BackendStatus:
    missing = [module for module in ("openvino", "onnx") if not _installed(module)]
    if missing:
        return BackendStatus("cpu", False, "; ".join(f"{module} is not installed" for module in missing))
    from advrad_fast.backends import cpu

    return cpu.status()


def _cuda(kernels_dir: str | PathLike[str] | None) -> BackendStatus:
    from advrad_fast.backends import cuda

    return cuda.status(kernels_dir)


def _reference() -> BackendStatus:
    if not _installed("torch"):
        return BackendStatus("reference", False, "torch is not installed")
    return BackendStatus("reference", True, f"CPU, PyTorch {importlib.metadata.version('torch')}, fp32")


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
