"""The demo: the split of the cells, the detector that comes with the package, the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from advrad_fast import demo
from advrad_fast.cli import main
from advrad_fast.errors import DatasetError
from advrad_fast.evaluation.datasets import load_dataset


def test_split_keeps_the_test_cells_out_of_training() -> None:
    cells = demo.cells()
    assert (len(cells.train), len(cells.good), len(cells.defective)) == (411, 177, 313)
    assert len({*cells.train, *cells.good, *cells.defective}) == 411 + 177 + 313
    # The detector was trained on these: the order must never change.
    assert [p.name for p in cells.train[:3]] == ["cell1215.png", "cell1520.png", "cell2147.png"]


def test_prepared_folder_can_be_trained_on(tmp_path: Path) -> None:
    assert main(["demo", "--prepare", str(tmp_path)]) == 0
    dataset = load_dataset(tmp_path)
    assert len(dataset.train) == 411
    assert len(dataset.test) == 177 + 313


def test_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path), "--limit", "3", "--backend", "cpu"]) == 0
    page = (tmp_path / "index.html").read_text()
    assert page.count('<figure class="card') == 6
    assert not re.search(r'src="(?!data:)', page)  # opens from the disk alone
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["n_good"], figures["n_bad"]) == (3, 3)
    assert len(list(tmp_path.glob("*.png"))) == 6
    assert "image AUROC" in capsys.readouterr().out


def test_without_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DatasetError, match="pip install elpv-dataset"):
        demo.cells()
