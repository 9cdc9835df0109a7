"""What the tests compile: kernels to execute on four targets, and to gate on all of them."""

from __future__ import annotations

from collections.abc import Mapping

#: Executed on the PTX interpreter.
EXECUTED = ("sm_75", "sm_80", "sm_90", "sm_120")
WAYS = ("interpreter", *EXECUTED)

Variant = Mapping[str, str | int | bool]


def executed(name: str, variant: Variant) -> bool:
    if name == "noise":
        return variant["dtype"] == "fp32" or (variant["channels"] == 3 and variant["noise"] == "gaussian")
    if name == "errors":
        return variant["dtype"] == "fp32" or (variant["channels"] == 3 and variant["noise"] == "gaussian")
    return True


def gated(name: str, variant: Variant) -> bool:
    """The largest of each kind."""
    if name == "noise":
        return variant["channels"] == 3 and variant["dtype"] == "fp16" and variant["layout"] == "nchw"
    if name == "errors":
        return variant["channels"] == 3 and variant["dtype"] == "fp16"
    return True
