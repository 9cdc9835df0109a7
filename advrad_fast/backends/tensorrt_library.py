"""Which TensorRT is installed here: TensorRT 10 or 11, TensorRT-RTX, both or none; and where their Python interfaces differ."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Library:
    """One of NVIDIA's two engine libraries, as it is, or is not, installed here.

    Attributes:
        name: ``tensorrt`` or ``tensorrt_rtx``, the module's name.
        version: such as ``11.0.0.114``; empty where it is not installed.
        usable: whether engines can be built with it.
        detail: what it is, or the reason why it cannot be used.
    """

    name: str
    version: str
    usable: bool
    detail: str


def libraries() -> list[Library]:
    """TensorRT and TensorRT-RTX in the order in which they are tried, usable or with the reason why not.  Never raises."""
    raise NotImplementedError
