"""What can be asked of the pipeline on NVIDIA GPUs: precisions, and where its compiled kernels are."""

from __future__ import annotations

import os
from pathlib import Path

from advrad_fast.backends import cache
from advrad_fast.errors import BackendUnavailableError, ConfigError, expected
from advrad_fast.graph_precision import TYPED_PRECISIONS, TypedPrecision

PRECISIONS: tuple[str, ...] = ("auto", *TYPED_PRECISIONS)


def typed_precision(precision: object) -> TypedPrecision:
    """The engine's precision that is asked for, or a ConfigError."""
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ConfigError(expected("precision", f"one of {list(PRECISIONS)} for the cuda backend", precision))
    return "fp16" if precision == "auto" else precision  # type: ignore[return-value]


def kernels_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Where the compiled kernels are looked for: ``folder``, else ``$ADVRAD_KERNELS``, else ``kernels`` in the platform's cache
    folder, where ``advrad-fast compile --kernels`` puts them.

    Raises:
        ConfigError: it is no path.
        BackendUnavailableError: nothing says where, and there is no home folder.
    """
    if folder is not None:
        if not isinstance(folder, str | os.PathLike):
            raise ConfigError(expected("kernels_dir", "a path or None", folder))
        return Path(folder)
    if os.environ.get("ADVRAD_KERNELS"):
        return Path(os.environ["ADVRAD_KERNELS"])
    default = cache.default_folder()
    if default is None:
        raise BackendUnavailableError("cuda: there is no home folder to look for compiled GPU kernels in: set ADVRAD_KERNELS")
    return default / "kernels"
