"""docs/reliability.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text()


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    there = {name for path in TESTS.rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    assert len(named) > 20 and named <= there, named - there


def test_the_page_leaves_no_test_of_its_files_out() -> None:
    files = [*(TESTS / "fuzz").glob("test_*.py"), *(TESTS / f"test_{name}.py" for name in ("fault_injection", "audit"))]
    there = {name for path in files for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    assert there - set(re.findall(r"`(test_\w+)`", PAGE)) <= {"test_the_bases_are_read"}
