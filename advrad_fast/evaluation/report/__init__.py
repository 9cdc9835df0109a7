"""The report of an evaluation: a folder with one page, ``index.html``, and the data of each category that it was made from.

``advrad-fast evaluate MODEL DATA --report FOLDER`` writes ``DATA.report.json`` and makes the page anew from all that lie there:
run for one category after another into one folder, the page gets them all, and their mean.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from advrad_fast.evaluation.report.collect import Attack, choose, collect
from advrad_fast.evaluation.report.data import Category, load, save
from advrad_fast.evaluation.report.page import page
from advrad_fast.files import write_atomically

__all__ = ["Attack", "Category", "choose", "collect", "prepare", "write"]


def prepare(folder: str | os.PathLike[str]) -> None:
    """Make the folder, and find out before a long evaluation whether :func:`write` will take what lies there.

    Raises:
        ReportError: as :func:`write`.
        OSError: the folder can't be made, or not be written to.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    load(root)
    with tempfile.TemporaryFile(dir=root):
        pass


def write(
    folder: str | os.PathLike[str],
    category: Category,
    *,
    title: str | None = None,
    introduction: str | None = None,
    credit: str | None = None,
) -> Path:
    """Keep a category's data in ``folder``, in place of the same one's before, and make the page of all that are there.

    Args:
        title, introduction, credit: of the page, as :func:`advrad_fast.evaluation.report.page.page` has them.

    Returns:
        The page, ``index.html``.

    Raises:
        ReportError: another file of the folder is not a category's data.
        OSError: the folder can't be written.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    save(root, category)
    created = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    target = root / "index.html"
    write_atomically(target, page(load(root), title=title, created=created, introduction=introduction, credit=credit))
    return target
