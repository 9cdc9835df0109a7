"""Regions of interest: what lies outside them counts for nothing, and what lies inside as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import certifiable, small_model, without_norm
from numpy.typing import NDArray
from PIL import Image
from test_pose import HEIGHT, SIDE, WIDTH, pin
from test_tiling import detector as tile_detector
from test_tiling import texture, tiled

from advrad_fast import Detector, ModelFile, Outcome, cli
from advrad_fast.backends.base import Scores
from advrad_fast.config import DetectorConfig, ImageConfig, PoseConfig
from advrad_fast.errors import ConfigError, DatasetError, ImageError, PartNotFoundError
from advrad_fast.images import Prepared, prepare
from advrad_fast.pose import fit_pose
from advrad_fast.recalibrate import recalibrate
from advrad_fast.roi import Roi

Mask = NDArray[np.bool_]
MODEL = small_model(spread=True)
LEFT = np.zeros((48, 80), np.bool_)
LEFT[:, :40] = True


def make(backend: str, roi: Any = None, model: Any = MODEL) -> Detector:
    options = {"cache_dir": False, "precision": "fp32"} if backend == "cpu" else {}
    return Detector(model, backend=backend, roi=roi, threads=1, **options)


@pytest.fixture
def frame(rng: np.random.Generator) -> NDArray[np.uint8]:
    return rng.integers(0, 256, (48, 80, 1), dtype=np.uint8)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_score_is_of_the_inside_and_the_map_is_zero_outside(backend: str, frame: NDArray[np.uint8]) -> None:
    whole, left, right = (make(backend, roi) for roi in (None, LEFT, ~LEFT))
    at = [d.inspect(frame) for d in (whole, left, right)]
    scores = [result.score or 0.0 for result in at]
    assert max(scores[1:]) == scores[0] > min(scores[1:]) > 0.0
    for result, region in zip(at[1:], (LEFT, ~LEFT), strict=True):
        assert result.anomaly_map is not None and result.mask is not None and at[0].anomaly_map is not None
        assert not result.anomaly_map[~region].any() and not result.mask[~region].any()
        deep = region & np.roll(region, 4, axis=1) & np.roll(region, -4, axis=1)
        np.testing.assert_array_equal(result.anomaly_map[deep], at[0].anomaly_map[deep])
    assert left.inspect(frame, maps=False).score == at[1].score
    assert left.inspect(frame, maps=False).anomaly_map is None
    everywhere = make(backend, np.ones((48, 80), np.bool_)).inspect(frame)
    assert everywhere.score == at[0].score
    np.testing.assert_array_equal(everywhere.anomaly_map, at[0].anomaly_map)
    assert not np.shares_memory(left.inspect(frame).anomaly_map, left.inspect(frame).anomaly_map)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(48, 80), (32, 32), (20, 11), (33, 97)])
def test_a_defect_in_a_region_of_one_pixel_has_a_mask(size: tuple[int, int], rng: np.random.Generator) -> None:
    """Whatever the frame's size: the pixel is looked at, and a DEFECT is marked, there and nowhere else."""
    detector = make("reference")
    frame = rng.integers(0, 256, (*size, 1), dtype=np.uint8)
    for _ in range(12):
        mask = np.zeros(size, np.bool_)
        mask[tuple(rng.integers(0, size))] = True
        detector = Detector(MODEL, backend="reference", roi=mask, threads=1)
        detector.threshold = 0.0
        result = detector.inspect(frame)
        assert result.outcome is Outcome.DEFECT and result.score is not None and result.score > 0.0
        assert result.mask is not None and np.array_equal(result.mask, mask)
        detector.threshold = -1.0  # the zeros outside are above it, and marked nowhere
        below = detector.inspect(frame).mask
        assert below is not None and np.array_equal(below, mask)


@pytest.mark.parametrize("fixed", [False, True])
def test_tiles(fixed: bool, rng: np.random.Generator) -> None:
    model, frame = tiled((96, 120) if fixed else None), texture(rng)
    region = np.zeros((96, 120), np.bool_)
    region[10:40, 60:90] = True
    whole = tile_detector(model).inspect(frame)
    detector = Detector(model, backend="cpu", precision="fp32", cache_dir=False, threads=1, roi=region)
    calls, score = [], detector._backend.score
    detector._backend.score = lambda *a, **k: calls.append(1) or score(*a, **k)  # type: ignore[method-assign,func-returns-value]
    result = detector.inspect(frame)
    assert whole.anomaly_map is not None and result.anomaly_map is not None
    np.testing.assert_array_equal(result.anomaly_map, np.where(region, whole.anomaly_map, 0.0))
    assert result.score == whole.anomaly_map[region].max()
    assert 0 < len(calls) <= 9  # of 20
    with pytest.raises(ImageError, match="size"):
        detector.inspect(frame[:-1])


@pytest.fixture(scope="module")
def aligned() -> Any:
    rule: PoseConfig = fit_pose([pin(a, (95.5 + 0.03 * a, 95.5 - 0.02 * a)) for a in range(0, 360, 40)])
    return small_model(pose=rule)


def test_on_the_part_it_turns_with_the_part(aligned: Any) -> None:
    size = aligned.config.image.height, aligned.config.image.width
    head = np.zeros(size, np.bool_)
    head[:, : size[1] // 3] = True
    detector = make("reference", Roi(head, "part"), aligned)
    detector.threshold = 0.0
    for angle in (20.0, 200.0):
        result = detector.inspect(pin(angle))
        assert result.outcome is Outcome.DEFECT and result.mask is not None and result.anomaly_map is not None
        y, x = np.nonzero(result.mask)
        c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        assert ((x - 95.5) * c + (y - 95.5) * s).max() < 0.0  # the head's side
        assert not result.anomaly_map[~result.mask].any()


def test_on_the_frame_with_an_aligned_part(aligned: Any) -> None:
    """The region stays where it is, and the part turns under it; one that lies outside is ABSTAIN, not OK."""
    top = np.zeros((SIDE, SIDE), np.bool_)
    top[: SIDE // 2] = True
    detector = make("reference", top, aligned)
    detector.threshold = 0.0
    for angle in (90.0, 270.0, 30.0):
        result = detector.inspect(pin(angle))
        assert result.mask is not None and result.mask.any() and not result.mask[~top].any()
    corner = np.zeros((SIDE, SIDE), np.bool_)
    corner[:4, :4] = True
    detector = make("reference", corner, aligned)
    detector.threshold = 1e6
    missed = detector.inspect(pin(0.0))
    assert missed.outcome is Outcome.ABSTAIN and isinstance(missed.error, PartNotFoundError) and missed.score is None


@pytest.mark.parametrize(
    ("on", "size"), [("frame", (48, 80)), ("frame", (20, 11)), ("frame", (33, 97)), ("frame", None), ("part", None)]
)
def test_the_map_up_to_the_region_s_edge(aligned: Any, on: Any, size: tuple[int, int] | None, rng: np.random.Generator) -> None:
    """Where the inside is 1 everywhere and the outside is not, the inside is 1 in the frame's coordinates, too."""
    model = MODEL if size is not None else aligned
    frame = pin(33.0) if size is None else rng.integers(0, 256, (*size, 1), dtype=np.uint8)
    network = model.config.image.height, model.config.image.width
    mask = rng.random(network if on == "part" else frame.shape[:2]) < 0.02
    mask[5:11, 3:9] = True
    roi, whole = Roi(mask, on), make("reference", None, model)
    prepared = prepare(frame, model.config.image)
    counted = roi.on_image(prepared)
    seen = []
    for detector, outside in ((whole, 1.0), (make("reference", roi, model), 0.0), (make("reference", roi, model), 1e3)):
        maps = np.where(counted, 1.0, outside).astype(np.float32)[None]
        detector._backend.score = lambda *_, maps=maps, **__: Scores(maps.max(axis=(1, 2)), maps, {})  # type: ignore[method-assign]
        result = detector.inspect(frame)
        assert result.score == 1.0 and result.anomaly_map is not None
        seen.append(result.anomaly_map)
    np.testing.assert_array_equal(seen[1] > 0.0, (seen[0] > 0.0) & roi.on_frame(prepared))
    for found in seen[1:]:
        np.testing.assert_allclose(found[found > 0.0], 1.0, rtol=1e-6)


def test_every_counted_pixel_meets_the_region_and_every_pixel_of_it_counts(aligned: Any, rng: np.random.Generator) -> None:
    config: ImageConfig = DetectorConfig(image=aligned.config.image).image
    prepared: Prepared = prepare(pin(33.0), config)
    assert prepared.affine is not None
    for _ in range(10):
        mask = np.zeros((SIDE, SIDE), np.bool_)
        y, x = 95 + int(rng.integers(-3, 4)), 95 + int(rng.integers(-3, 4))
        mask[y, x] = True
        counted = Roi(mask).on_image(prepared)
        back = prepared.affine[:, :2] @ np.stack(np.nonzero(counted)[::-1]) + prepared.affine[:, 2:]
        step = np.hypot(*prepared.affine[:, 0])
        assert counted.sum() >= 1 and np.hypot(*(back - [[x], [y]])).max() <= 0.75 * max(step, 1.0)


def test_what_is_refused(aligned: Any, frame: NDArray[np.uint8]) -> None:
    for bad in (np.zeros((4, 4), np.bool_), np.ones((4, 4), np.uint8), np.ones((4, 4, 1), np.bool_), "mask.png", 1):
        with pytest.raises(ConfigError, match="roi"):
            make("reference", bad)
    with pytest.raises(ConfigError, match="part"):
        Roi(LEFT, "camera")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="does not align"):
        make("reference", Roi(LEFT, "part"))
    with pytest.raises(ConfigError, match="aligned part's size"):
        make("reference", Roi(np.ones((HEIGHT + 1, WIDTH), np.bool_), "part"), aligned)
    with pytest.raises(ConfigError, match="size of the model's frames"):
        tile = tiled((96, 120))
        make("reference", LEFT, tile)
    detector = make("reference", LEFT, certifiable(small_model(), 0.25))
    with pytest.raises(ImageError, match="size"):
        detector.inspect(frame[:40])
    assert detector.inspect_batch([frame[:40]])[0].outcome is Outcome.ERROR
    with pytest.raises(ConfigError, match="region of interest"):
        detector.certify(frame, 0.1)


def test_a_threshold_of_the_region(aligned: Any, rng: np.random.Generator, caplog: pytest.LogCaptureFixture) -> None:
    """Calibrated on scores of the inside it is lower, and holds; other regions are warned of, certificates of whole images."""
    good = list(rng.integers(100, 156, (20, 48, 80, 3), dtype=np.uint8))
    region = np.zeros((48, 80), np.bool_)
    region[20:24, 30:34] = True
    model = certifiable(without_norm(small_model()), 0.25)
    options: Any = {"backend": "reference", "threads": 1}
    whole, inside = (recalibrate(model, good, false_alarm_rate=0.1, roi=roi, **options) for roi in (None, region))
    assert 0.0 < inside.threshold < whole.threshold
    detector = Detector(inside, roi=region.copy(), **options)
    scores = [detector.inspect(frame, maps=False).score for frame in good]
    np.testing.assert_array_equal(inside.calibration_scores, np.sort(scores))  # type: ignore[arg-type]
    assert sum(detector.inspect(frame).outcome is Outcome.DEFECT for frame in good) <= 2
    np.testing.assert_array_equal(inside.smoothing[0].calibration_scores, whole.smoothing[0].calibration_scores)
    assert inside.smoothing[0].threshold == whole.smoothing[0].threshold
    assert inside.provenance["recalibrated_roi"] == Roi(region).digest and whole.provenance["recalibrated_roi"] is None
    assert len({Roi(mask, on).digest for mask in (LEFT, ~LEFT, LEFT.T) for on in ("frame", "part")}) == 6  # type: ignore[arg-type]
    again = recalibrate(inside, good, **options)
    assert again.threshold == whole.threshold and again.provenance == whole.provenance
    assert not caplog.records  # nothing so far that the region does not belong to
    for roi in (None, ~region, Roi(np.ones((48, 80), np.bool_))):
        Detector(inside, roi=roi, **options)
        assert "does not have" in caplog.messages[-1]
    assert len(caplog.records) == 3
    Detector(whole, roi=region, **options)
    assert len(caplog.records) == 3
    with pytest.raises(ImageError, match="frame 9: frame: expected one of the region's size"):
        recalibrate(model, [*good[:9], good[9][1:]], roi=region, **options)
    with pytest.raises(DatasetError, match="no part was found in the region of interest in 9 of 9 frames"):
        corner = np.zeros((SIDE, SIDE), np.bool_)
        corner[:4, :4] = True
        recalibrate(aligned, [pin(0.0)] * 9, roi=corner, **options)


def test_a_threshold_of_tiles_or_on_the_part(aligned: Any, rng: np.random.Generator) -> None:
    region = np.zeros((96, 120), np.bool_)
    region[10:40, 60:90] = True
    on_part = np.zeros((aligned.config.image.height, aligned.config.image.width), np.bool_)
    on_part[:, :10] = True
    cases: Any = [
        (tiled((96, 120)), [texture(rng)] * 9, Roi(region), "cpu"),
        (aligned, [pin(40.0 * i) for i in range(9)], Roi(on_part, "part"), "reference"),
    ]
    for model, good, roi, backend in cases:
        options: Any = {"cache_dir": False, "precision": "fp32"} if backend == "cpu" else {}
        made = recalibrate(model, good, roi=roi, backend=backend, threads=1, **options)
        detector = Detector(model, roi=roi, backend=backend, threads=1, **options)
        scores = [detector.inspect(frame, maps=False).score for frame in good]
        np.testing.assert_array_equal(made.calibration_scores, np.sort(scores))


def test_the_command(tmp_path: Path, frame: NDArray[np.uint8], capsys: pytest.CaptureFixture[str]) -> None:
    MODEL.save(tmp_path / "m.safetensors")
    Image.fromarray(frame[:, :, 0]).save(tmp_path / "f.png")
    for name, mask in (("left", LEFT), ("empty", np.zeros_like(LEFT)), ("small", LEFT[:8])):
        Image.fromarray(np.where(mask, 255, 20).astype(np.uint8)).save(tmp_path / f"{name}.png")
    call = ["inspect", str(tmp_path / "m.safetensors"), str(tmp_path / "f.png"), "--backend", "reference", "--json", "-"]
    assert cli.main([*call, "--roi", str(tmp_path / "left.png")]) in (0, 1)
    assert f'"score": {make("reference", LEFT).inspect(frame).score}' in capsys.readouterr().out
    made = [str(tmp_path / "new.safetensors"), str(tmp_path / "good")]
    (tmp_path / "good").mkdir()
    for i in range(9):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (48, 80), dtype=np.uint8)).save(tmp_path / "good" / f"{i}.png")
    again = ["recalibrate", call[1], made[1], "--out", made[0], "--backend", "reference", "--roi", str(tmp_path / "left.png")]
    assert cli.main(again) == 0
    assert "give the same" in capsys.readouterr().err
    model = ModelFile.load(made[0])
    assert model.provenance["recalibrated_roi"] == Roi(LEFT).digest and len(model.calibration_scores) == 9
    capsys.readouterr()
    for more, said in ((["--roi", "empty"], "empty mask"), (["--roi", "small"], "size"), (["--roi-on-part", "left"], "align")):
        assert cli.main([*call, more[0], str(tmp_path / f"{more[1]}.png")]) == 2
        out = capsys.readouterr()
        assert said in out.err + out.out
