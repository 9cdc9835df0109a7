"""docs/certificates.md: the worked example prints what it says it prints, and the numbers in the text are those computed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from advrad_fast import certify

PAGE = (Path(__file__).parent.parent / "docs" / "certificates.md").read_text(encoding="utf-8")


def test_the_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (printed,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(example, "certificates.md", "exec"), {})  # noqa: S102  (our own text)
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(("alpha", "vote", "votes"), [(0.001, True, 32), (0.001, False, 5), (1e-7, True, 72)])
def test_votes_in_the_text(alpha: float, vote: bool, votes: int) -> None:
    test = certify.RobustnessTest(0.2, 0.25, alpha, pixels=256 * 256 * 3)
    test.update(np.full(1000, vote))
    assert test.votes_used == votes and re.search(rf"\b{votes}\b", PAGE)
