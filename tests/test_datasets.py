"""evaluation/datasets.py: what each layout gives, and that everything doubtful is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advrad_fast.errors import DatasetError
from advrad_fast.evaluation.datasets import load_dataset, load_mask


def _image(path: Path, size: tuple[int, int] = (12, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 30)).save(path)
    return path


def _mask(path: Path, mode: str = "L", size: tuple[int, int] = (12, 8)) -> Path:
    """The pixel x = 3, y = 2 is defect."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size, 0)
    values: dict[str, int | tuple[int, ...]] = {
        "1": 1,
        "L": 1,
        "P": 5,
        "I": 7,
        "I;16": 300,
        "RGB": (0, 1, 0),
        "RGBA": (0, 0, 9, 0),
    }
    image.putpixel((3, 2), values[mode])
    if mode == "P":
        image.putpalette([0, 0, 0] * 5 + [200, 0, 0])
    image.save(path)
    return path


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    root = tmp_path / "widget"
    for name in ("train/good/001.png", "train/good/000.jpg", "test/good/000.png", "test/dent/000.png", "test/dent/001.png"):
        _image(root / name)
    _image(root / "test" / "crack" / "7.BMP")
    _mask(root / "ground_truth" / "dent" / "000_mask.png")
    return root


def test_mvtec_layout(mvtec: Path) -> None:
    (mvtec / "train" / "good" / "Thumbs.db").write_bytes(b"x")
    (mvtec / "train" / "good" / "._001.png").write_bytes(b"x")
    (mvtec / "licence.txt").write_text("x")
    data = load_dataset(str(mvtec))
    assert data.name == "widget"
    assert data.train == [mvtec / "train" / "good" / "000.jpg", mvtec / "train" / "good" / "001.png"]
    rows = [(s.path.relative_to(mvtec / "test").as_posix(), s.label, s.defect, s.mask) for s in data.test]
    assert rows == [
        ("crack/7.BMP", 1, "crack", None),
        ("dent/000.png", 1, "dent", mvtec / "ground_truth" / "dent" / "000_mask.png"),
        ("dent/001.png", 1, "dent", None),
        ("good/000.png", 0, "good", None),
    ]
    assert data.missing_masks == 2


def test_a_good_image_never_has_a_mask(mvtec: Path) -> None:
    _mask(mvtec / "ground_truth" / "good" / "000_mask.png")
    assert all(s.mask is None for s in load_dataset(mvtec).test if s.label == 0)


@pytest.mark.parametrize("inside", ["", "good/"])
def test_folder_of_good_parts(tmp_path: Path, inside: str) -> None:
    paths = [_image(tmp_path / f"{inside}{name}") for name in ("a.png", "b.JPG", "c.tif")]
    (tmp_path / "notes").mkdir()
    data = load_dataset(tmp_path)
    assert (data.name, data.train, data.test, data.missing_masks) == (tmp_path.name, paths, [], 0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["good/a.png", "bad/b.png", "bad/c.png"], r"found bad/ \(2 images\), good/ \(1 images\): give the folder"),
        (["good/a.png", "b.png"], r"found 1 images, good/ \(1 images\)"),
        (["a.png", "scratch/deep/b.png"], r"found 1 images, scratch/ \(1 images\)"),
        (["monday/a.png"], r"found monday/ \(1 images\)"),
        (["good/a.png", "good/bad/b.png"], r"no subfolders with images, got \['bad'\]"),
        (["train/good/a.png"], r"train/good and test .* got \['train/'\]"),
        (["train/a.png", "test/good/b.png"], r"train/good and test .* got \['test/', 'train/'\]"),
        (["train/good/a.png", "train/bad/b.png", "test/good/c.png"], r"images in good/ only, got \['bad'\]"),
        (["train/good/a.png", "test/b.png"], "images directly inside"),
        (["train/good/notes.txt", "test/good/b.png"], "good: expected images, got 'none'"),
        (["train/good/a.png", "test/good/notes.txt"], "test: expected images"),
        (["notes.txt"], r"expected images \(.*\.png.*\), got 'none'"),
    ],
)
def test_other_layouts_are_refused(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not read")
    with pytest.raises(DatasetError, match=message):
        load_dataset(tmp_path)


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        load_dataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="a file"):
        load_dataset(_image(tmp_path / "a.png"))
    with pytest.raises(DatasetError):
        load_dataset("nul\0l")


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("1", "png"), ("L", "png"), ("P", "png"), ("I;16", "png"), ("RGB", "png"), ("RGBA", "png"), ("I", "tif"), ("L", "bmp")],
)
def test_mask(tmp_path: Path, mode: str, suffix: str) -> None:
    mask = load_mask(_mask(tmp_path / f"m.{suffix}", mode), (8, 12))
    assert mask.dtype == np.bool_
    assert mask.shape == (8, 12)
    np.testing.assert_array_equal(np.argwhere(mask), [[2, 3]])


def test_mask_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"image's \(12, 8\), got \(8, 12\)"):
        load_mask(_mask(tmp_path / "m.png"), (12, 8))


def test_mask_size_is_checked_before_decoding(tmp_path: Path) -> None:
    """A header that claims 60000 x 60000 pixels costs nothing."""
    path = _mask(tmp_path / "m.png")
    data = bytearray(path.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    path.write_bytes(data)
    with pytest.raises(DatasetError):
        load_mask(path, (8, 12))


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_unreadable_mask(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.png"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="not a readable mask"):
        load_mask(path, (8, 12))


def test_truncated_lossy_and_missing_masks(tmp_path: Path) -> None:
    path = _mask(tmp_path / "m.png", size=(200, 200))
    path.write_bytes(path.read_bytes()[:70])
    with pytest.raises(DatasetError, match="not a readable mask"):
        load_mask(path, (200, 200))
    with pytest.raises(DatasetError, match="not a readable mask"):
        load_mask(_image(tmp_path / "m.jpg"), (8, 12))
    with pytest.raises(DatasetError, match="not a readable mask"):
        load_mask(tmp_path / "none.png", (8, 12))
