"""Public functions with anything as an argument: a result without NaN, or an error of this package.

Each parameter draws from values that make sense for its name and, a third of the time, from values that make none.  Every public
name of the torch-free core is in a table here: called, or with the reason why not.  A new one belongs to one of them.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from limits import limited
from models import certifiable, small_model, tiny_model, without_norm
from pictures import POSE, part
from test_house import MODULES, is_in

from advrad_fast import Detector, Inspection, ModelFile, config, images
from advrad_fast.certify import DecisionTest, RadiusSequence, RobustnessTest
from advrad_fast.errors import AdvRADError
from advrad_fast.recalibrate import recalibrate
from advrad_fast.roi import Roi
from advrad_fast.tiling import fit_tiling

#: Modules that are not the torch-free core, or are tested elsewhere.
OTHERS = {
    ("reference", "training", "evaluation.attacks", "evaluation.attacker", "evaluation.baselines"): "PyTorch's",
    ("backends", "kernels", "bench"): "called with what a Detector, or the command line, has checked",
    ("cli", "demo", "__main__"): "test_fuzz_commands.py",
    ("evaluation.report", "evaluation.robust", "evaluation.certified_attack"): "the command line's own",
    ("spread", "batch", "serving"): "a cluster's: tests/test_spread*.py",
    ("line",): "test_fuzz_line.py",
}

MODEL = certifiable(without_norm(tiny_model()), 0.125, 0.25)
PLAIN = replace(MODEL, config=replace(MODEL.config, image=replace(MODEL.config.image, pose=None)))
FRAME = part()

# Integers are small, or too large for anything: how long an honest million takes is not the question here.
whole = st.integers(-3, 300) | st.sampled_from([2**40, 2**53, 2**62, 2**63, 2**64, 2**70, 10**400, -(2**31), -(2**63), -(2**70)])
numbers = st.one_of(
    st.floats(), whole, st.sampled_from([0.0, -0.0, 1e-320, 1.0, 0.5, np.float32(0.25), np.int8(3), np.float64("nan")])
)
texts = st.sampled_from(["", "a", "0.5", "\0", "\ud800", "x" * 5000, "[", "**[", "nan"])
anything = st.one_of(
    st.sampled_from([None, True, False, object(), Path("nowhere"), 1j, b"a", {}, {"a": 1}, [[1], [2, 3]], [None], (), int]),
    st.just(5000).map(lambda digits: 10**digits),
    numbers,
    texts,
    st.lists(numbers | texts, max_size=4),
    arrays.arrays(
        st.sampled_from(["f2", "f4", "f8", "i8", "u8", "u1", "?", "c8", "O", "U3", "M8[s]"]),
        arrays.array_shapes(min_dims=0, max_dims=4, max_side=4),
    ),
)
unit = st.floats(0.0, 1.0)
small = st.integers(-2, 70)
scores = arrays.arrays("f8", arrays.array_shapes(max_dims=2, max_side=12), elements=unit)
rising = st.lists(unit | st.floats(), max_size=12).map(sorted)
votes = arrays.arrays(bool, st.integers(0, 40))
frames = st.sampled_from(
    [
        FRAME,
        np.dstack([FRAME] * 3),
        FRAME[:8, :16],
        FRAME.astype(np.float32) / 255,
        np.zeros((0, 4), np.uint8),
        FRAME[:9, :8, None],
    ]
)
maps = arrays.arrays("f4", arrays.array_shapes(min_dims=2, max_dims=3, max_side=6), elements=st.floats(-2, 2, width=32))
masks = arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=6))

#: What makes sense, by the parameter's name.
SENSE: dict[str, st.SearchStrategy[Any]] = {
    "aligned": st.booleans(),
    "alpha": unit | st.just(0.001),
    "at_radius": st.none() | unit,
    "calibration": rising,
    "category": st.none() | st.just("bottle"),
    "claims": small,
    "count": st.integers(-3, 300),
    "data": st.binary(max_size=9) | st.sampled_from([b'{"a": [1, 2.5, null]}', b"[" * 60_000, b'{"a": 1e999}', b"9" * 60_000]),
    "name": texts,
    "defects": small,
    "delta": unit,
    "draw": small,
    "draws": st.integers(-2, 2000),
    "false_alarm_rate": unit,
    "frame": frames,
    "frames": st.lists(frames, max_size=3),
    "height": st.sampled_from([0, 8, 16, 64]),
    "image": frames,
    "on": st.sampled_from(["frame", "part"]),
    "roi": st.none() | frames.map(lambda frame: np.squeeze(frame) > 99),
    "image_id": small,
    "images": st.lists(frames.map(np.atleast_3d), max_size=4),
    "backend": st.just("cpu"),
    "block": small,
    "labels": arrays.arrays("i8", st.integers(0, 12), elements=st.integers(0, 1)),
    "layout": st.sampled_from(["auto", "mvtec", "btad", "visa", "folder"]),
    "level": unit,
    "limit": unit,
    "maps": st.lists(maps, max_size=3),
    "masks": st.lists(masks, max_size=3),
    "max_pixels": small,
    "max_votes": st.integers(1, 60),
    "n": st.integers(-2, 3000),
    "overlap": st.none() | small,
    "p_lower": unit | scores,
    "path": st.just(Path("nowhere")),
    "paths": texts | st.lists(texts, max_size=2) | st.just(Path(__file__).parent / "*.png"),
    "pixels": st.integers(-2, 200_000),
    "precision": st.sampled_from(["auto", "fp32", "none"]),
    "radii": st.lists(unit, max_size=4),
    "radius": unit,
    "root": st.sampled_from([Path("nowhere"), Path(__file__).parent, ".", "\0"]),
    "scores": scores,
    "seed": st.none() | st.integers(-2, 2**64),
    "shape": st.tuples(small, small),
    "sigma": st.sampled_from([0.05, 0.125, 0.25, 1.0]),
    "sigma01": unit,
    "successes": st.integers(-2, 300),
    "text": st.sampled_from(["linf 2/255", "l2 0.2", "l2 1/0", "l2 " + "9" * 400, "linf 9/0.0"]),
    "threads": st.integers(-1, 2),
    "threshold": numbers,
    "trials": st.integers(-2, 300),
    "value": scores | texts,
    "values": maps,
    "votes": votes | small,
    "width": st.sampled_from([0, 8, 16, 64]),
}


@cache
def detector() -> Detector:
    return Detector(PLAIN, backend="cpu", threads=1)


def robustness_test(radius: Any, sigma: Any, alpha: Any, pixels: Any, votes: Any) -> None:
    RobustnessTest(radius, sigma, alpha, pixels=pixels).update(votes)


def decision_test(radius: Any, sigma: Any, alpha: Any, pixels: Any, votes: Any, threshold: Any) -> Any:
    test = DecisionTest(radius, sigma, alpha, pixels=pixels)
    test.update(votes)
    return test.certificate(threshold)


def radius_sequence(sigma: Any, alpha: Any, pixels: Any, votes: Any) -> Any:
    return RadiusSequence(sigma, alpha, pixels=pixels).update(votes)


def align(image: Any, height: Any, width: Any) -> Any:
    return importlib.import_module("advrad_fast.pose").align(image, POSE, height, width)


def prepare(frame: Any, values: Any) -> Any:
    image = MODEL.config.image
    return images.map_to_frame(values, images.prepare(frame, replace(image, pose=None)))


def timestep_for_sigma(sigma01: Any) -> Any:
    return importlib.import_module("advrad_fast.schedule").timestep_for_sigma(config.DiffusionConfig(), sigma01)


def budget(text: Any) -> Any:
    size = importlib.import_module("advrad_fast.evaluation.rows").Budget.parse(text).size
    assert 0.0 <= size < math.inf


def parse(data: bytes) -> Any:
    return importlib.import_module("advrad_fast.untrusted").parse("x", data if isinstance(data, bytes) else b"")


def of_a_file(function: str) -> Callable[[Any], Any]:
    def call(value: Any) -> Any:
        return getattr(importlib.import_module("advrad_fast.untrusted"), function)("x", value)

    return call


def overlay(frame: Any) -> Any:
    return importlib.import_module("advrad_fast.overlay").overlay(frame, detector().inspect(FRAME, maps=True))


def tiled(frames: Any, overlap: Any, false_alarm_rate: Any) -> Any:
    return fit_tiling(
        replace(PLAIN, smoothing=()), calibration=frames, overlap=overlap, false_alarm_rate=false_alarm_rate, threads=1
    )


def made(backend: Any, seed: Any, threads: Any, precision: Any, roi: Any) -> Any:
    return Detector(PLAIN, backend=backend, seed=seed, threads=threads, precision=precision, roi=roi)


def region(roi: Any, on: Any) -> Any:
    return Roi(roi, on)


def recalibrated(frames: Any, false_alarm_rate: Any, aligned: Any, seed: Any, roi: Any) -> Any:
    recalibrate(PLAIN, frames, false_alarm_rate=false_alarm_rate, mu=aligned, seed=seed, roi=roi, backend="cpu", threads=1)


def inspect_one(frame: Any, aligned: Any, seed: Any) -> None:
    result: Inspection = detector().inspect(frame, maps=aligned, seed=seed)
    assert result.outcome in ("OK", "DEFECT") and (result.outcome == "DEFECT") == (result.score > result.threshold)


def inspect_batch(frames: Any, seed: Any) -> None:
    assert all((r.outcome == "ERROR") == (r.error is not None) for r in detector().inspect_batch(frames, seed=seed))


def set_threshold(threshold: Any) -> None:
    before = detector().threshold
    try:
        detector().threshold = threshold
        assert math.isfinite(detector().threshold)
    finally:
        detector().threshold = before


def certify(frame: Any, at_radius: Any, sigma: Any, alpha: Any, max_votes: Any, seed: Any, threshold: Any) -> None:
    found = detector().certify(frame, at_radius, sigma=sigma, alpha=alpha, max_votes=max_votes, seed=seed, threshold=threshold)
    assert found.outcome in ("OK", "DEFECT", "ABSTAIN") and 0.0 <= found.radius < math.inf


def smoothed_scores(frame: Any, max_votes: Any, sigma: Any, seed: Any) -> Any:
    return detector().smoothed_scores(frame, max_votes, sigma=sigma, seed=seed)


#: What is called as it is, by module.
FUNCTIONS = {
    "calibrate": ("p_value", "conformal_threshold", "attainable_rate", "normals_needed", "training_conditional_bound"),
    "certify.betting": ("anytime_lower_bound",),
    "certify.bounds": ("lower_bound", "upper_bound", "allowance", "radius", "vote_probability", "split_alpha"),
    "certify.certificate": ("fixed_certificate",),
    "certify.scores": ("certified_rank", "certified_scores", "least_ok_threshold", "certified_auroc"),
    "evaluation.datasets": ("load_dataset", "load_mask"),
    "evaluation.metrics": ("auroc", "auroc_interval", "roc_curve", "f1_max", "pixel_auroc", "aupro"),
    "image_paths": ("list_images",),
    "images": ("check_frame", "load_image", "decode_image"),
    "lattice": ("thresholds", "integers", "distance"),
    "overlay": ("legend",),
    "philox": ("integers", "normals"),
    "pose": ("fit_pose",),
    "voting": ("least_votes",),
}

#: What takes an object of this package, or is a class: a function of this file that calls it.
CALLED: dict[str, tuple[Callable[..., Any], ...]] = {
    "certify.betting.RobustnessTest": (robustness_test,),
    "certify.betting.DecisionTest": (decision_test,),
    "certify.betting.RadiusSequence": (radius_sequence,),
    "detector.Detector": (made, inspect_one, inspect_batch, set_threshold, certify, smoothed_scores),
    "evaluation.rows.Budget": (budget,),
    "images.prepare": (prepare,),
    "overlay.overlay": (overlay,),
    "pose.align": (align,),
    "roi.Roi": (region,),
    "recalibrate.recalibrate": (recalibrated,),
    "schedule.timestep_for_sigma": (timestep_for_sigma,),
    "tiling.fit_tiling": (tiled,),
    "untrusted.parse": (parse,),
    "untrusted.number": (of_a_file("number"),),
    "untrusted.share": (of_a_file("share"),),
    "untrusted.sorted_scores": (of_a_file("sorted_scores"),),
}

#: Why a public name of the core is not called here; names of one module in one text.
REASONS: dict[str, dict[str, str]] = {
    "a result or an enumeration": {
        "certify.betting": "Claim",
        "certify.certificate": "Certificate",
        "detector": "Inspection Outcome",
        "dlpack": "Tensor",
        "evaluation.certified": "CertifiedScores",
        "evaluation.datasets": "Dataset Sample",
        "evaluation.evaluate": "Evaluation",
        "evaluation.metrics": "RocCurve",
        "evaluation.rows": "AttackRow RobustSummary",
        "gpu_frames": "GpuFrame Pixels",
        "images": "Prepared",
        "selftest": "Expected SelfTest",
        "schedule": "Coefficients",
        "template": "Pose",
    },
    "test_any_settings, test_settings": {
        "config": "UNetConfig DiffusionConfig ScoreConfig PoseConfig ImageConfig TilingConfig DetectorConfig"
    },
    "test_any_model, test_model_files": {"model": "ModelFile", "smoothing": "Smoothing"},
    "what the functions above check with": {
        "certify.betting": "check_votes log_wealth",
        "certify.bounds": "check_counts check_radius",
        "checks": "finite share integer truth number text path several array floats",
        "errors": "expected",
        "images": "check_size",
        "lattice": "check_sigma",
        "philox": "check_seed",
        "recalibrate": "frames_needed",
        "voting": "check_votes",
    },
    "a part of inspecting a frame": {
        "dlpack": "device host_array take",
        "roi": "fitting warn_of_another without_region",
        "template": "measure_profile local_contrast worth search same outside",
        "gpu_frames": "find",
        "images": "prepare_whole is_prepared map_to_frame mask_to_frame",
    },
    "takes what was checked before": {
        "calibrate": "checked_p_value",
        "files": "write_atomically",
        "graph": "expected_tensors check_weights time_embedding GraphBuilder build_graph assemble",
        "graph_precision": "build_typed_graph quantised_tensors ranges_digest bfloat16_bits e4m3_codes",
        "model": "round_to_half",
        "overlay": "colours",
        "philox": "philox4x32",
        "pose": "warp_back",
        "selftest": "frames compare parse",
        "selftest_record": "with_self_test",
        "schedule": "betas alpha_bar sigma coefficients error_coefficients",
        "smoothing": "folded Outline outline",
        "tiles": "default_overlap starts weights blend cut tile_seed",
        "untrusted": "dump same_names float32 inverse spread_map kind clip refuse",
        "voting": "batches at_radius largest_radius",
    },
    "the command line's own": {
        "evaluation.certified": "draw_scores figures curve_svg",
        "evaluation.evaluate": "evaluate table labels_of sample_name check_backend worker_setup",
        "evaluation.rows": "to_line read_rows read_summaries append_row append_line worst auroc_of robust_figures",
    },
}
ELSEWHERE = {f"{module}.{name}" for rows in REASONS.values() for module, names in rows.items() for name in names.split()}

CASES = {
    **{
        f"{module}.{name}": getattr(importlib.import_module(f"advrad_fast.{module}"), name)
        for module, names in FUNCTIONS.items()
        for name in names
    },
    **{f"{name}:{i}": function for name, functions in CALLED.items() for i, function in enumerate(functions)},
}


def public() -> Iterator[str]:
    """The functions and classes, but for exceptions, of the core's modules."""
    others = tuple(name for names in OTHERS for name in names)
    for name in MODULES:
        if is_in(name, others):
            continue
        module = importlib.import_module(".".join(filter(None, ("advrad_fast", name))))
        for key, value in vars(module).items():
            ours = getattr(value, "__module__", None) == module.__name__ and not key.startswith("_")
            if ours and (inspect.isfunction(value) or (inspect.isclass(value) and not issubclass(value, Exception))):
                yield f"{name}.{key}"


def test_every_public_name_has_its_place() -> None:
    called = {*(f"{module}.{name}" for module, names in FUNCTIONS.items() for name in names), *CALLED}
    assert not called & ELSEWHERE
    there = set(public())
    assert there == called | ELSEWHERE, there ^ (called | ELSEWHERE)


@contextmanager
def only_our_errors() -> Iterator[None]:
    """A result, or the package's error; on little memory, and without a warning."""
    with warnings.catch_warnings(), limited(512):
        warnings.simplefilter("error")
        try:
            yield
        except AdvRADError as error:
            assert 0 < len(str(error)) < 20_000


def finite(result: object) -> None:
    """No NaN comes out as a figure."""
    if isinstance(result, float):
        assert not math.isnan(result)
    elif isinstance(result, np.ndarray) and result.dtype.kind == "f":
        assert not np.isnan(result).any()
    elif isinstance(result, tuple):
        for item in result:
            finite(item)


QUICK = settings(
    max_examples=20,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
LONG = settings(QUICK, max_examples=2_000, derandomize=True)


def call(function: Callable[..., Any], data: st.DataObject, sense: dict[str, st.SearchStrategy[Any]] = SENSE) -> None:
    positional, named = [], {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is not parameter.empty and data.draw(st.booleans()):
            continue
        value = data.draw(sense[parameter.name] if data.draw(st.integers(0, 2)) else anything, label=parameter.name)
        if parameter.kind is parameter.KEYWORD_ONLY or parameter.default is not parameter.empty:
            named[parameter.name] = value
        else:
            positional.append(value)
    with only_our_errors():
        finite(function(*positional, **named))


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "advrad_fast")


@pytest.mark.parametrize("depth", [pytest.param(QUICK, id="quick"), pytest.param(LONG, id="long", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_functions(name: str, depth: settings) -> None:
    detector()
    depth(given(st.data())(lambda data: call(CASES[name], data)))()


@pytest.mark.parametrize("depth", [pytest.param(QUICK, id="quick"), pytest.param(LONG, id="long", marks=pytest.mark.slow)])
def test_any_model(depth: settings) -> None:
    """A field of a model, or of what it certifies with, is anything: a model, or a ModelFileError."""
    fields, inner = sorted(vars(small_model()).keys() - {"inverse_spread"}), sorted(vars(MODEL.smoothing[0]))

    def attempt(data: st.DataObject) -> None:
        value = data.draw(anything)
        with only_our_errors():
            if data.draw(st.booleans()):
                replace(MODEL, **{data.draw(st.sampled_from(fields)): value})
            else:
                replace(MODEL, smoothing=(replace(MODEL.smoothing[0], **{data.draw(st.sampled_from(inner)): value}),))
        with only_our_errors():
            ModelFile.load(value)

    depth(given(st.data())(attempt))()


@pytest.mark.parametrize("depth", [pytest.param(QUICK, id="quick"), pytest.param(LONG, id="long", marks=pytest.mark.slow)])
def test_any_settings(depth: settings) -> None:
    """A setting, given as an argument, is anything: a configuration that goes through JSON unchanged, or a ConfigError."""
    made = (
        config.UNetConfig(),
        config.DiffusionConfig(),
        config.ScoreConfig(),
        POSE,
        config.ImageConfig(),
        config.TilingConfig(),
    )

    def attempt(data: st.DataObject) -> None:
        before = data.draw(st.sampled_from(made))
        with only_our_errors():
            after = replace(before, **{data.draw(st.sampled_from(sorted(vars(before)))): data.draw(anything)})
            assert type(after).from_json(after.to_json()) == after

    depth(given(st.data())(attempt))()
