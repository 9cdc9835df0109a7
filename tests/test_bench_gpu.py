"""``advrad-fast bench --gpu`` without a GPU: its rows, its gates and its refusal, with stand-ins for what needs one.

The backend is the reference under another name, PyTorch's baselines run on the CPU, and the kernels in Triton's interpreter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import small_model
from test_bench import KEYS

from advrad_fast import backends, bench
from advrad_fast.backends.base import BackendStatus, Scores
from advrad_fast.backends.reference import ReferenceBackend
from advrad_fast.bench import gpu, gpu_kernels
from advrad_fast.bench.timing import Timing
from advrad_fast.cli import main
from advrad_fast.detector import Detector
from advrad_fast.errors import BackendUnavailableError, InferenceError
from advrad_fast.model import ModelFile

PROFILE = {"copy_in": 0.01, "noise": 0.02, "network": 0.9, "error": 0.04, "copy_out": 0.03}


class Pretended(ReferenceBackend):
    """The reference with what the cuda backend has besides."""

    name = "cuda"
    precision = "fp16"
    off = 0.0

    def score(self, images: Any, *, seed: int, want_maps: bool) -> Scores:
        found = super().score(images, seed=seed, want_maps=want_maps)
        factor = np.float32(1 + self.off)
        maps = None if found.maps is None else found.maps * factor
        return Scores(found.scores * factor, maps, {"device": sum(found.timings.values())})

    def profile(self, image: Any, *, seed: int = 0, want_maps: bool = False, runs: int = 100) -> dict[str, Any]:
        assert image.dtype == np.uint8 and image.ndim == 3
        return {name: np.full(runs, value) for name, value in PROFILE.items()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    small_model().save(tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU as far as the benchmark asks for one."""
    create = backends.create

    def pretend(name: str, *arguments: Any, precision: Any = "auto", **options: Any) -> Any:
        return Pretended(*arguments) if name == "cuda" else create(name, *arguments, precision=precision, **options)

    statuses = [BackendStatus("cuda", True, "a GPU")]
    inspect, made = gpu._inspect, gpu_kernels.rows
    monkeypatch.setattr(backends, "create", pretend)
    monkeypatch.setattr(backends, "available", lambda: statuses)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretended GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(gpu, "_inspect", lambda *arguments: inspect(*arguments, device="cpu"))
    monkeypatch.setattr(gpu_kernels, "copy_rate", lambda: 1e12)
    monkeypatch.setattr(gpu_kernels, "rows", lambda copy: iter(()))
    monkeypatch.setattr(Pretended, "off", 0.0)
    yield
    assert made is not gpu_kernels.rows


def run(model: Path, *arguments: str) -> int:
    return main(["bench", "--gpu", str(model), "--seconds", "0", "--no-compile", *arguments])


def test_rows(pretended: None, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--json", str(tmp_path / "rows.jsonl")) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["inspect small", "inspect small with map"]
    for row in rows:
        assert list(row) == [*KEYS, "details"] and row["backend"] == "cuda" and row["precision"] == "fp16"
        assert row["machine"].startswith("Pretended GPU, ")
        details = row["details"]
        assert details["steps_ms"] == PROFILE and details["host_ms"] >= 0 and details["python_ms"] > 0
        shares = details["steps_share"]
        assert shares["network"] == 0.9 and shares["noise"] == 0.02 and shares["copies"] == 0.04
        assert details["parity"]["score_worst"] <= gpu.BOUNDS["fp16"] and details["copy_GB_s"] == 1000.0
    score, mapped = rows
    assert set(score["details"]["baselines_ms"]) == {"eager fp32", "eager float16"} == set(score["details"]["baselines_parity"])
    best = min(timing["p50"] for timing in score["details"]["baselines_ms"].values())
    assert score["ratio_eager"] == score["ratio_best_torch"] == pytest.approx(best / score["p50_ms"], rel=0.01)
    assert mapped["ratio_eager"] is None and mapped["ratio_best_torch"] is None
    printed = capsys.readouterr().out
    assert "on the GPU noise 2.0 %, network 90.0 %, error 4.0 %, copies 4.0 %; host " in printed and "p99" in printed


def test_rates_of_the_kernels() -> None:
    """By hand: 16 x 24 pixels of 3 channels, fp16, one draw, 1e9 bytes a second being 1e6 a millisecond."""
    config = small_model()
    image = config.config.image
    plane = image.height * image.width
    frame = plane * image.channels
    inspect, profile = Timing(1.0, 1.5, 2.0, 3.0), {name: np.full(3, value) for name, value in PROFILE.items()}
    draws = config.config.diffusion.draws
    for precision, size in (("fp16", 2), ("int8", 2), ("fp32", 4)):
        for maps in (False, True):
            found = gpu.steps(profile, inspect, [{"total": 1.5, "device": 1.25}], config, precision, 1e9, maps)
            assert found["kernels_share_of_copy"]["noise"] == round((frame + draws * frame * size) / 0.02 / 1e6, 4)
            error = frame + draws * frame * size + plane * 4 * (4 + maps)
            assert found["kernels_share_of_copy"]["error"] == round(error / 0.04 / 1e6, 4)
            assert found["host_ms"] == 0.5 and found["python_ms"] == 0.25


def test_no_figure_without_parity(
    pretended: None, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Pretended, "off", 0.03)
    assert run(model) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and "small, fp16" in streams.err and "nothing is timed" in streams.err
    monkeypatch.setattr(Pretended, "precision", "int8")
    assert run(model) == 0  # what int8 may be


@pytest.mark.parametrize("name", ["eager fp32", "eager float16"])
def test_no_ratio_to_a_baseline_that_computes_something_else(
    pretended: None,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    check, kind = gpu.Baseline.check, {"eager fp32": torch.float32, "eager float16": torch.float16}[name]

    def wrong(self: gpu.Baseline, *arguments: Any, **options: Any) -> float:
        return check(self, *arguments, **options) * (1.1 if self._dtype == kind else 1.0)

    monkeypatch.setattr(gpu.Baseline, "check", wrong)
    assert run(model, "--json", "-") == (2 if name == "eager fp32" else 0)
    streams = capsys.readouterr()
    assert f"PyTorch, {name}: 0." in streams.err + caplog.text
    if name == "eager fp32":
        assert streams.out == "" and "nothing is timed" in streams.err
    else:
        assert "left out" in caplog.text
        assert set(json.loads(streams.out.splitlines()[0])["details"]["baselines_ms"]) == {"eager fp32"}


def test_a_baseline_draws_its_own_noise() -> None:
    """Its scores differ from frame to frame by the noise alone, and lie around the reference's."""
    loaded = small_model()
    image = loaded.config.image
    frame = np.random.default_rng(0).integers(0, 256, (image.height, image.width, image.channels), dtype=np.uint8)
    baseline = gpu.Baseline(loaded, device="cpu", dtype=torch.float32)
    reference = Detector(loaded, backend="reference")._backend
    wanted = [float(reference.score(frame[None], seed=seed, want_maps=False).scores[0]) for seed in range(8)]
    torch.manual_seed(0)
    drawn = [baseline(frame) for _ in range(8)]
    assert len(set(drawn)) == 8 and min(wanted) / 2 < np.median(drawn) < max(wanted) * 2
    assert baseline.check(frame, seed=3) == pytest.approx(wanted[3], rel=1e-5)


def test_without_a_gpu(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "available", lambda: [BackendStatus("cuda", False, "no driver here")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(model) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and "bench --gpu needs an NVIDIA GPU: no driver here; PyTorch" in streams.err
    monkeypatch.setattr(backends, "available", lambda: [BackendStatus("cuda", True, "an L4")])
    with pytest.raises(BackendUnavailableError, match=r"needs an NVIDIA GPU: PyTorch .*, which is measured against, is "):
        gpu.check_usable()


def test_refuses_options(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(model), "--precision", "fp16"]) == 2
    assert "--precision: expected --gpu with it, got 'fp16'" in capsys.readouterr().err


def test_the_fastest() -> None:
    slow, middle, quick = (Timing(1, p50, 9, 9) for p50 in (5.0, 4.0, 3.0))
    timings = {"cuda": Timing(1, 1, 1, 1), "eager fp32": slow, "eager float16": middle, "compiled": quick}
    assert gpu.fastest(timings, "eager") is middle and gpu.fastest(timings, "") is quick
    assert gpu.fastest({"cuda": slow}, "") is None


# The kernels alone


class Twins(gpu_kernels.Work):
    """What the kernels should give, without them."""

    def __init__(self, device: str, **size: int) -> None:
        super().__init__("cpu", batch=2, side=16, scores=300)
        self.wrong = ""
        inputs, scores = np.empty_like(self.outputs), np.empty(2, np.float32)
        c, config, native = gpu_kernels._C, gpu_kernels._CONFIG, gpu_kernels._native
        native.noise(self.images, 1, 1, c.signal, c.noise, c.input_scale, inputs)
        native.reconstruction_error(
            self.images, inputs, self.outputs, 1, *gpu_kernels.schedule.error_coefficients(c), config.scale_weights,
            config.filter_size, self.mu, self.inverse_spread, None, scores,
        )  # fmt: skip
        self.made = {"noise": inputs, "error": scores, "votes": native.votes(self.votes_of, self.thresholds, np.zeros(0, int))[0]}

    def _fill(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.made[name] + (1 if name == self.wrong else 0))

    def noise(self) -> None:
        self.inputs.copy_(self._fill("noise"))

    def error(self) -> None:
        self.scores.copy_(self._fill("error"))

    def votes(self) -> torch.Tensor:
        return self._fill("votes")


def test_rows_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "Work", Twins)
    monkeypatch.setattr(gpu_kernels, "timed", lambda call: Timing(0.9, 1.0, 1.1, 2.0))
    rows = list(gpu_kernels.rows(1e9))
    assert [row["name"] for row, _ in rows] == ["noise", "reconstruction_error", "votes"]
    plane = 2 * 16 * 16
    wanted = {"noise": plane * 3 * 3, "reconstruction_error": plane * 3 * 3 + 8 * plane + 2 * 4 * 256 + 8}
    for row, details in rows:
        assert list(row) == KEYS and row["backend"] == "cuda" and row["ratio_eager"] is None
        if row["name"] in wanted:  # bytes in a millisecond, and 1e6 of them in a copy's
            assert row["peak_share"] == round(wanted[row["name"]] / 1e6, 4)
        assert details.keys() == {"GB_s"}
    assert "%" in bench.table([row for row, _ in rows])


@pytest.mark.parametrize("wrong", ["noise", "error", "votes"])
def test_no_figure_of_a_kernel_without_parity(wrong: str) -> None:
    work = Twins("cpu")
    work.check()
    work.wrong = wrong
    with pytest.raises(InferenceError, match=r"differs from its C\+\+ twin by .*: nothing is timed"):
        work.check()


def test_without_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert list(gpu_kernels.rows(1e9)) == [] and "the kernels alone are left out" in caplog.text


def check_in_the_interpreter() -> None:
    """In the interpreter's process."""
    gpu_kernels.Work("cpu", batch=1, side=16, scores=300).check()


def test_the_real_kernels_pass(interpreter: Any) -> None:
    interpreter.call(check_in_the_interpreter)


# The cuda backend itself, on the fake driver


def test_the_real_backend_on_the_fake_driver(
    driver: Any, executable: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps and timings have the names that the rows are made of.  What it takes here says nothing about a GPU."""
    from emulated_engine import EmulatedEngine, teach

    teach(driver, executable)
    EmulatedEngine(driver, monkeypatch)
    monkeypatch.setenv("ADVRAD_KERNELS", str(executable.folder))
    monkeypatch.setenv("ADVRAD_CACHE", str(tmp_path / "cache"))
    inspect = gpu._inspect
    monkeypatch.setattr(gpu, "RUNS", 2)
    monkeypatch.setattr(gpu, "alternate", lambda calls, seconds: {name: made(call) for name, call in calls.items()})
    rows = list(
        inspect(
            "small", ModelFile.load(model), Detector.load(model, backend="cuda", precision="fp32"), {}, 1e9, 0.0, False, "cpu"
        )
    )
    for row, details in rows:
        assert row["precision"] == "fp32" and row["backend"] == "cuda"
        assert details["parity"]["flips"] == 0 and details["parity"]["score_worst"] <= gpu.BOUNDS["fp32"]
        assert set(details["steps_ms"]) == set(gpu.STEPS) and all(value >= 0 for value in details["steps_ms"].values())
        assert sum(details["steps_share"][name] for name in gpu.STEPS) == pytest.approx(1.0, abs=1e-3)


def made(call: Any) -> Timing:
    call()
    return Timing(1.0, 1.0, 1.0, 1.0)
