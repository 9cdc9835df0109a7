"""MVTec AD, BTAD and VisA as their makers ship them, in miniature; and whatever departs from that is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from models import small_model
from parts import dataset, disc, scratched
from PIL import Image

from advrad_fast.cli import main
from advrad_fast.errors import DatasetError
from advrad_fast.evaluation.datasets import LAYOUTS, Layout, load_dataset, load_mask

HEADER = "object,split,label,image,mask"


def write(path: Path, image: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 12), np.uint8) if image is None else image).save(path)
    return path


@pytest.fixture
def btad(tmp_path: Path) -> Path:
    root = tmp_path / "BTech"
    for name in ("train/ok/0000.bmp", "train/ok/0001.png", "test/ok/0002.bmp", "test/ko/0000.png", "test/ko/0003.bmp"):
        write(root / "01" / name)
        write(root / "03" / name)
    write(root / "01/ground_truth/ko/0000.png")
    write(root / "03/ground_truth/ko/0003.bmp")
    return root


VISA = [
    "candle,train,normal,candle/Data/Images/Normal/0001.JPG,",
    "pcb1,train,normal,pcb1/Data/Images/Normal/0004.JPG,",
    "pcb1,train,normal,pcb1/Data/Images/Normal/0001.JPG,",
    "pcb1,test,normal,pcb1/Data/Images/Normal/0002.JPG,",
    "pcb1,test,anomaly,pcb1/Data/Images/Anomaly/000.JPG,pcb1/Data/Masks/Anomaly/000.png",
]


def split(root: Path, rows: list[str], header: str = HEADER) -> Path:
    (root / "split_csv").mkdir(exist_ok=True)
    (root / "split_csv/1cls.csv").write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    return root


@pytest.fixture
def visa(tmp_path: Path) -> Path:
    root = tmp_path / "VisA"
    for row in VISA:
        for name in row.split(",")[3:]:
            if name:
                write(root / name)
    return split(root, VISA)


def test_a_category_of_mvtec(tmp_path: Path) -> None:
    root = dataset(tmp_path / "mvtec/disc", train=2, good=1, bad=1, size=8).parent
    (root / "licence").mkdir()
    found = load_dataset(root, "mvtec", "disc")
    assert found == load_dataset(root / "disc") == load_dataset(root / "disc", "mvtec")
    assert (found.name, len(found.train), [s.defect for s in found.test], found.missing_masks) == (
        "disc",
        2,
        ["good", "scratch"],
        0,
    )
    with pytest.raises(DatasetError, match=r"category: expected one of those in .*: disc, got None"):
        load_dataset(root, "mvtec")
    with pytest.raises(DatasetError, match=r"train/good and test .* got \['disc/', 'licence/'\]|disc/ \(5 images\)"):
        load_dataset(root)


def test_btad(btad: Path) -> None:
    found = load_dataset(btad, "btad", "01")
    assert found.name == "btad/01"
    assert [path.name for path in found.train] == ["0000.bmp", "0001.png"]
    assert [(s.path.name, s.label, s.defect, s.mask) for s in found.test] == [
        ("0000.png", 1, "ko", btad / "01/ground_truth/ko/0000.png"),
        ("0003.bmp", 1, "ko", None),
        ("0002.bmp", 0, "good", None),
    ]
    assert found.missing_masks == 1
    assert load_dataset(btad / "03", "btad").test[1].mask == btad / "03/ground_truth/ko/0003.bmp"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: write(root / "train/ko/0009.png"), r"images in ok/ only, got \['ko'\]"),
        (lambda root: write(root / "train/0009.png"), "images in ok/ only, got 'images directly inside'"),
        (lambda root: write(root / "test/scratch/0009.png"), r"images in ok/ and ko/ only, got \['scratch'\]"),
        (lambda root: write(root / "test/0009.png"), "images in ok/ and ko/ only, got 'images directly inside'"),
        (lambda root: write(root / "ground_truth/ko/0000.bmp"), r"for this image alone, got \['0000.bmp', '0000.png'\]"),
        (lambda root: write(root / "test/ko/0000.bmp"), r"for this image alone, got \['0000.png'\]"),
        (lambda root: (root / "test").rename(root / "tests"), r"no test/ok, got \['ground_truth/', 'tests/', 'train/'\]"),
        (lambda root: [p.unlink() for p in (root / "train/ok").iterdir()], "ok: expected images, got 'none'"),
        (lambda root: [p.unlink() for p in (root / "test").rglob("*.*")], "images in ok/ and ko/, got 'none'"),
    ],
)
def test_what_is_not_btad(btad: Path, change: Callable[[Path], object], message: str) -> None:
    change(btad / "01")
    with pytest.raises(DatasetError, match=message):
        load_dataset(btad, "btad", "01")
    load_dataset(btad, "btad", "03")


def test_a_hint_to_the_other_layout(btad: Path) -> None:
    with pytest.raises(DatasetError, match=r"layout btad$"):
        load_dataset(btad / "01")


@pytest.mark.parametrize("layout", ["mvtec", "btad", "visa"])
@pytest.mark.parametrize("category", ["04", "..", "../BTech/01", ".", "", "/", "0\0"])
def test_categories_that_are_not_there(btad: Path, visa: Path, layout: Layout, category: str) -> None:
    with pytest.raises(DatasetError, match=r"category: expected one of those in|cannot be read"):
        load_dataset(visa if layout == "visa" else btad, layout, category)


@pytest.mark.parametrize("layout", ["auto", "folder"])
def test_layouts_without_categories(btad: Path, layout: Layout) -> None:
    with pytest.raises(DatasetError, match=f"category: expected none with layout {layout}, got '01'"):
        load_dataset(btad, layout, "01")


def test_the_layouts_are_listed() -> None:
    with pytest.raises(DatasetError, match=f"layout: expected one of {', '.join(LAYOUTS)}, got 'coco'"):
        load_dataset(".", "coco")  # type: ignore[arg-type]


def test_a_folder_is_taken_as_one_on_request(btad: Path) -> None:
    assert len(load_dataset(btad / "01/train/ok", "folder").train) == 2
    with pytest.raises(DatasetError, match="give the folder"):
        load_dataset(btad / "01", "folder")


def test_visa(visa: Path) -> None:
    found = load_dataset(visa, "visa", "pcb1")
    assert found.name == "visa/pcb1"
    normal = visa / "pcb1/Data/Images/Normal"
    assert found.train == [normal / "0001.JPG", normal / "0004.JPG"]
    assert [(s.path, s.label, s.defect, s.mask) for s in found.test] == [
        (visa / "pcb1/Data/Images/Anomaly/000.JPG", 1, "anomaly", visa / "pcb1/Data/Masks/Anomaly/000.png"),
        (normal / "0002.JPG", 0, "good", None),
    ]


def test_visa_masks_are_label_maps(visa: Path) -> None:
    labels = np.zeros((8, 12), np.uint8)
    labels[2, 3], labels[4, 5] = 1, 7
    (sample, _) = load_dataset(visa, "visa", "pcb1").test
    assert sample.mask is not None
    write(sample.mask, labels)
    assert np.argwhere(load_mask(sample.mask, (8, 12))).tolist() == [[2, 3], [4, 5]]


def test_a_spreadsheets_csv_is_read(visa: Path) -> None:
    text = "\ufeff" + "\r\n".join([HEADER, *VISA, ""])
    (visa / "split_csv/1cls.csv").write_bytes(text.encode())
    assert len(load_dataset(visa, "visa", "pcb1").train) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("pcb1,train,anomaly,pcb1/Data/Images/Anomaly/000.JPG,x", "line 7: expected .*, got 'train,anomaly'"),
        ("pcb1,val,normal,pcb1/Data/Images/Normal/0001.JPG,", "got 'val,normal'"),
        ("pcb1,test,bad,pcb1/Data/Images/Normal/0001.JPG,", "got 'test,bad'"),
        ("pcb1,test,normal,pcb1/Data/Images/Normal/0001.JPG,", "image: expected every image once"),
        ("pcb1,test,anomaly,pcb1/Data/Images/Normal/0005.JPG,", "mask: expected a file, got ''"),
        ("pcb1,test,normal,pcb1/Data/Images/Normal/0005.JPG,pcb1/m.png", "mask: expected none for a normal image"),
        ("pcb1,test,normal,pcb1/Data/Images/Normal/0005.JPG,", "image: expected a file in .*, which is not there"),
        ("pcb1,test,normal", "line 7: expected 5 fields, got 3"),
        ('pcb1,test,normal,"pcb1/Data', "not CSV"),
        ("pcb1,train,normal,pcb1/notes.txt,", r"image: expected an image \("),
        # Ways out of the folder.
        ("pcb1,train,normal,pcb1/../../secret.png,", r"a path below pcb1/, without \.\."),
        ("pcb1,train,normal,../VisA/pcb1/Data/Images/Normal/0001.JPG,", r"a path below pcb1/, without \.\."),
        ("pcb1,train,normal,/etc/hostname,", "a path below pcb1/"),
        ("pcb1,train,normal,//etc/hostname,", "a path below pcb1/"),
        ("pcb1,train,normal,C:/pcb1/0001.JPG,", "a path below pcb1/"),
        (r"pcb1,train,normal,pcb1\..\..\secret.png,", "a path below pcb1/"),
        ("pcb1,train,normal,candle/Data/Images/Normal/0001.JPG,", "a path below pcb1/"),
        ("pcb1,train,normal,,", "a path below pcb1/"),
        ("pcb1,test,anomaly,pcb1/Data/Images/Normal/0003.JPG,pcb1/../../secret.png", r"mask: expected a path below pcb1/"),
    ],
)
def test_rows_that_are_refused(visa: Path, row: str, message: str) -> None:
    write(visa.parent / "secret.png")
    write(visa / "pcb1/Data/Images/Normal/0003.JPG")
    (visa / "pcb1/notes.txt").write_text("x")
    split(visa, [*VISA, row])
    with pytest.raises(DatasetError, match=message):
        load_dataset(visa, "visa", "pcb1")


@pytest.mark.parametrize("name", ["..", "a/b", r"a\b", "."])
def test_an_object_is_no_path(visa: Path, name: str) -> None:
    write(visa.parent / "x.png")
    split(visa, [f"{name},train,normal,{name}/x.png,", f"{name},test,normal,{name}/x.png,"])
    with pytest.raises(DatasetError, match="objects named as their folders"):
        load_dataset(visa, "visa", name)


def test_files_that_are_no_split(visa: Path) -> None:
    file = visa / "split_csv/1cls.csv"
    for content, message in (
        (b"", f"columns: expected {HEADER}, got ''"),
        (b"image,label,mask\n", "columns: expected"),
        (b"object,split,label,image,mask\n", "category: expected one of those in"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"object,split,label,image,mask\n" + b"x" * 200_000, "not CSV: field larger"),
        (b"\0" * 17 * 2**20, "expected at most 16777216 bytes, got 17825792"),
    ):
        file.write_bytes(content)
        with pytest.raises(DatasetError, match=message):
            load_dataset(visa, "visa", "pcb1")
    split(visa, VISA[:3])
    with pytest.raises(DatasetError, match="pcb1: expected train and test rows, got '2 of train, 0 of test'"):
        load_dataset(visa, "visa", "pcb1")
    file.unlink()
    with pytest.raises(DatasetError, match=r"expected split_csv/1cls.csv \(VisA\), got \['candle/', 'pcb1/', 'split_csv/'\]"):
        load_dataset(visa, "visa", "pcb1")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train on VisA and evaluate on BTAD, each by name; the folder alone goes on working (tests/test_cli.py)."""
    monkeypatch.setenv("ADVRAD_CACHE", str(tmp_path / "cache"))
    rng, visa, btad = np.random.default_rng(0), tmp_path / "VisA", tmp_path / "BTech"
    rows = [f"pcb1,train,normal,pcb1/Data/Images/Normal/{i}.JPG," for i in range(12)]
    for row in rows:
        write(visa / row.split(",")[3], disc(rng, 32))
    rows.append("pcb1,test,normal,pcb1/Data/Images/Normal/0.PNG,")
    write(visa / "pcb1/Data/Images/Normal/0.PNG", disc(rng, 32))
    split(visa, rows)
    for name, make in (("train/ok", disc), ("test/ok", disc), ("test/ko", scratched)):
        for file in ("0.bmp", "1.png"):
            write(btad / "02" / name / file, make(rng, 32))

    out = str(tmp_path / "pcb1.safetensors")
    options = ["--size", "32", "--steps", "2", "--batch-size", "2", "--align", "off"]
    assert main(["train", "--dataset", "visa", "--root", str(visa), "--category", "pcb1", "--out", out, *options]) == 0
    capsys.readouterr()
    common = ["--backend", "reference", "--json", "-"]
    assert main(["evaluate", out, "--dataset", "btad", "--root", str(btad), "--category", "02", *common]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["data"], figures["n_good"], figures["n_bad"], figures["aupro"]) == ("btad/02", 2, 2, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "as DATA or as --root, got neither"),
        (["data", "--root", "data"], "as DATA or as --root, got both"),
        (["--root", "nowhere", "--dataset", "visa"], "no such folder"),
        ([".", "--category", "pcb1"], "category: expected none with layout auto"),
    ],
)
def test_wrong_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    small_model().save(tmp_path / "m.safetensors")
    for command in (["evaluate", str(tmp_path / "m.safetensors")], ["train", "--out", str(tmp_path / "out")]):
        assert main([*command, *arguments]) == 2
        assert message in capsys.readouterr().err
