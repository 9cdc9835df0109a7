"""The C++ operations built with AddressSanitizer and UndefinedBehaviorSanitizer, under the tests of the operations."""

from __future__ import annotations

from sanitized import Beside


def test_operations_under_sanitizers(under_sanitizers: Beside) -> None:
    code, said = under_sanitizers.result()
    assert code == 0, said[-4000:]
    assert " passed" in said, said[-4000:]
