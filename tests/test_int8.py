"""int8: calibrated once, kept in the cache, close to fp32, and refused with a reason where it isn't there."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from models import small_model
from PIL import Image
from test_backends import CONFIG, WEIGHTS, cpu, frames, reference

from advrad_fast import Detector
from advrad_fast.backends import cpu_network
from advrad_fast.cli import main
from advrad_fast.errors import BackendUnavailableError, ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # nncf's own dependencies


def test_int8_is_close_to_the_reference(tmp_path: Path) -> None:
    cpu_network.calibrate_int8(CONFIG, WEIGHTS, frames(), cache_dir=tmp_path)
    first, second = (cpu(precision="int8", cache_dir=tmp_path) for _ in range(2))  # compiled, then from the cache
    assert first.precision == "int8"
    got, again = (backend.score(frames(), seed=11, want_maps=True) for backend in (first, second))
    wanted = reference().score(frames(), seed=11, want_maps=True)
    np.testing.assert_array_equal(got.scores, again.scores)
    np.testing.assert_allclose(got.scores, wanted.scores, rtol=0.15)  # random weights; worst seen 4.9e-2, times 3
    assert not np.array_equal(got.scores, cpu().score(frames(), seed=11, want_maps=True).scores)


def test_int8_by_the_command_line(tmp_path: Path) -> None:
    model = tmp_path / "m.safetensors"
    small_model().save(model)
    size = small_model().config.image
    (tmp_path / "good").mkdir()
    for i in range(3):
        picture = np.random.default_rng(i).integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "good" / f"{i}.png")
    with pytest.raises(BackendUnavailableError, match=r"no int8 network of this model in .* advrad-fast compile MODEL"):
        Detector.load(model, precision="int8", cache_dir=tmp_path / "cache")
    arguments = ["compile", str(model), "--calibration", str(tmp_path / "good"), "--cache", str(tmp_path / "cache")]
    assert main(arguments) == 0
    detector = Detector.load(model, precision="int8", cache_dir=tmp_path / "cache")
    assert detector.backend == "cpu (int8)" and np.isfinite(detector.inspect(picture).score)


def test_int8_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cache_dir"):
        cpu_network.calibrate_int8(CONFIG, WEIGHTS, frames(), cache_dir=False)
    with pytest.raises(ConfigError, match="images"):
        cpu_network.calibrate_int8(CONFIG, WEIGHTS, frames()[:0], cache_dir=tmp_path)
    with pytest.raises(BackendUnavailableError, match="no int8 network"):
        cpu(precision="int8")
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(BackendUnavailableError, match=r"needs nncf: pip install 'advrad-fast\[int8\]'"):
        cpu_network.calibrate_int8(CONFIG, WEIGHTS, frames(), cache_dir=tmp_path)
