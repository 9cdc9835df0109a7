"""Frames with known results: that the same come out everywhere, and that faults are found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import small_model, tiny_model
from numpy.typing import NDArray
from streams import frames

from advrad_fast import Detector, Outcome, cli, selftest
from advrad_fast.backends import Scores
from advrad_fast.errors import InferenceError, ModelFileError, SelfTestError
from advrad_fast.line import InspectionStream
from advrad_fast.model import ModelFile
from advrad_fast.selftest_record import with_self_test


def detector(model: ModelFile, **options: Any) -> Detector:
    return Detector(model, backend="cpu", cache_dir=False, threads=1, **{"precision": "fp32", **options})


@pytest.fixture(scope="module")
def model() -> ModelFile:
    return with_self_test(small_model(), cache_dir=False, threads=1)


def test_the_frames_are_integers_of_their_own(model: ModelFile) -> None:
    made = selftest.frames(model.config.image)
    assert made.shape == (selftest.FRAMES, 32, 32, 3) and made.dtype == np.uint8
    assert (made[0, :8, :8] == made[0, 0, 0]).all() and not (made[0] == made[0, 0, 0]).all()
    # Known answers: these frames are in model files.
    assert [int(made[i].astype(np.int64).sum()) for i in range(2)] == KNOWN
    odd = selftest.frames(tiny_model().config.image)
    assert odd.shape == (2, 8, 16, 1)


KNOWN = [395072, 360381]


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize(("backend", "precision"), [("cpu", "fp32"), ("cpu", "bf16"), ("reference", "fp32")])
def test_every_backend_passes(spread: bool, backend: str, precision: str) -> None:
    model = with_self_test(small_model(spread=spread), cache_dir=False)
    options: dict[str, Any] = {"cache_dir": False} if backend == "cpu" else {}
    passed = Detector(model, backend=backend, precision=precision, threads=1, **options).self_test()
    assert passed is not None and passed.precision == precision
    assert passed.deviation <= passed.bound / 3.5  # the factors that BOUNDS states, less what another processor may do


def test_it_survives_the_file_and_older_files_have_none(model: ModelFile, tmp_path: Path) -> None:
    model.save(tmp_path / "m")
    loaded = ModelFile.load(tmp_path / "m")
    assert loaded.self_test == model.self_test and loaded.fingerprint == model.fingerprint
    for schema, gone in ((3, {"self_test"}), (2, {"self_test", "tiling"}), (1, {"self_test", "tiling", "smoothing"})):

        def older(document: dict[str, Any], schema: int = schema, gone: set[str] = gone) -> dict[str, Any]:
            return {**{key: value for key, value in document.items() if key not in gone}, "schema": schema}

        old = ModelFile.load(rewrite(tmp_path / "m", older))
        assert old.self_test is None
        assert detector(old).self_test() is None


def rewrite(path: Path, change: Any) -> Path:
    """The file with another document."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["advrad_fast"] = json.dumps(change(json.loads(header["__metadata__"]["advrad_fast"])))
    text = json.dumps(header).encode()
    out = path.with_suffix(".changed")
    out.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return out


HOSTILE: list[Any] = [{}, [], 3, {"scores": [1.0], "means": [1.0]}, {"scores": "ab", "means": None}]
HOSTILE += [{"scores": [1.0, 0.0], "means": [1.0, 1.0]}]


@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_document_is_refused(model: ModelFile, tmp_path: Path, value: Any) -> None:
    model.save(tmp_path / "m")
    with pytest.raises(ModelFileError, match="self_test"):
        ModelFile.load(rewrite(tmp_path / "m", lambda document: {**document, "self_test": value}))
    with pytest.raises(ModelFileError, match="self_test"):
        dataclasses.replace(model, self_test=value)


def flipped(model: ModelFile, name: str, index: int, bit: int) -> ModelFile:
    weights = dict(model.weights)
    changed = np.array(weights[name])
    changed.reshape(-1).view(np.uint32)[index] ^= np.uint32(1 << bit)
    weights[name] = changed
    return dataclasses.replace(model, weights=weights)


def test_a_flipped_bit_in_the_file_is_found(model: ModelFile, tmp_path: Path) -> None:
    """The file's format has no checksum: such a file is read without complaint."""
    name = next(name for name in model.weights if name.endswith("conv1.weight"))
    flipped(model, name, 5, 29).save(tmp_path / "m")
    assert ModelFile.load(tmp_path / "m").self_test == model.self_test
    with pytest.raises(SelfTestError, match=r"self-test: frame 0: expected a score within 0\.01% of "):
        Detector.load(tmp_path / "m", backend="cpu", precision="fp32", threads=1, cache_dir=False)
    assert Detector.load(tmp_path / "m", backend="cpu", precision="fp32", threads=1, cache_dir=False, self_test=False)


def test_flipped_signs_are_found_or_hardly_matter(model: ModelFile) -> None:
    """Any one sign: either it is found, or no frame's score is off by more than a tenth of a per cent."""
    rng = np.random.default_rng(0)
    whole = [detector(model).inspect(frame, maps=False).score for frame in frames(4)]
    names = [name for name in model.weights if name.endswith("weight") and model.weights[name].ndim == 4][::4]
    found = 0
    for name in names:
        damaged = flipped(model, name, int(rng.integers(model.weights[name].size)), 31)
        try:
            passed = detector(damaged)
        except SelfTestError:
            found += 1
            continue
        off = [passed.inspect(frame, maps=False).score for frame in frames(4)]
        np.testing.assert_allclose(off, whole, rtol=1e-3)  # type: ignore[arg-type]
    assert found >= len(names) // 2


class Faulty:
    """A backend whose results are changed."""

    def __init__(self, backend: Any, change: Any) -> None:
        self.backend, self.change = backend, change
        self.name, self.precision = backend.name, backend.precision

    def score(self, images: NDArray[np.uint8], *, seed: int, want_maps: bool) -> Scores:
        return self.change(self.backend.score(images, seed=seed, want_maps=want_maps))  # type: ignore[no-any-return]


def garbage(result: Scores) -> Scores:
    rng = np.random.default_rng(1)
    if result.maps is None:
        return dataclasses.replace(result, scores=rng.random(len(result.scores), dtype=np.float32))
    maps = rng.random(result.maps.shape, dtype=np.float32)
    return Scores(maps.max(axis=(1, 2)), maps, result.timings)


FAULTS: dict[str, Any] = {
    "garbage": garbage,
    "zeros": lambda r: Scores(r.scores * 0, None if r.maps is None else r.maps * 0, r.timings),
    "NaN": lambda r: Scores(r.scores * np.float32(np.nan), r.maps, r.timings),
    "the score alone": lambda r: dataclasses.replace(r, scores=r.scores * np.float32(0.99)) if r.maps is None else r,
    "a shuffled map": lambda r: r if r.maps is None else Scores(r.scores, np.where(r.maps < r.maps.max(), 0, r.maps), r.timings),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_that_fails_is_found_and_a_stream_says_error_until_it_is_well(model: ModelFile, fault: str) -> None:
    inspecting = detector(model)
    whole = inspecting._backend
    inspecting._backend = Faulty(whole, FAULTS[fault])
    with pytest.raises(InferenceError):
        inspecting.self_test()
    inspecting.threshold = 1e9  # everything would be OK
    with InspectionStream(inspecting, frames(4), maps=False) as stream:
        results = [next(stream), next(stream)]
        inspecting._backend = whole
        results += list(stream)
    assert [r.outcome for r in results] == [Outcome.ERROR] * 2 + [Outcome.OK] * 2
    assert all(isinstance(r.error, InferenceError) for r in results[:2])


def test_a_stream_tests_once_and_can_be_told_not_to(model: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    inspecting = detector(model)
    calls: list[int] = []
    monkeypatch.setattr(inspecting, "self_test", lambda: calls.append(1))
    with InspectionStream(inspecting, frames(3)) as stream:
        list(stream)
    assert len(calls) == 1
    with InspectionStream(inspecting, frames(3), self_test=False) as stream:
        list(stream)
    assert len(calls) == 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVRAD_CACHE", str(tmp_path / "cache"))
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    small_model().save(old, half=True)
    run = ("--backend", "cpu", "--precision", "fp32")
    assert cli.main(["selftest", str(old), *run]) == 2
    assert "got a model without" in capsys.readouterr().err
    assert cli.main(["selftest", str(old), "--record"]) == 2
    assert cli.main(["selftest", str(old), "--record", "--out", str(new)]) == 0
    assert new.stat().st_size < old.stat().st_size * 1.1
    assert cli.main(["selftest", str(old), "--record", "--out", str(new)]) == 2
    capsys.readouterr()
    assert cli.main(["selftest", str(new), *run]) == 0
    assert "cpu (fp32): passed" in capsys.readouterr().err
    model = ModelFile.load(new)
    flipped(model, next(iter(model.weights)), 0, 30).save(new)
    assert cli.main(["selftest", str(new), *run]) == 2
    assert cli.main(["inspect", str(new), str(tmp_path), *run]) == 2
