"""Random command lines on good and hostile files: a documented exit code, no traceback, nothing done that was not asked for."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import VARIABLE, edit_bytes
from models import certifiable, small_model, without_norm
from parts import dataset, disc, scratched
from PIL import Image

HERE = Path(__file__).parent

WORDS = [
    "", "-", "--", "---", "-1", "0", "1", "2", "8", "0.5", "1e-300", "1e400", "nan", "inf", "-inf", "9" * 30, "9" * 5000,
    "0x10", "1_0",
    "\u0663", "1,2", "a,b", ",", "%s%n", "{0}", "@../in/model", "x" * 300, "\udcff", "\n", "$(touch executed)",
    "; touch executed",
    "--help", "--version", "--json", "-v", "../in/model", "../in/frames", "../in/missing", "../in", "..", "../in/frames/*",
    "../in/[", "**/*", "=", "--x=1",
]  # fmt: skip
MODELS = [
    "../in/model",
    "../in/certifiable",
    "../in/damaged",
    "../in/pickle",
    "../in/empty",
    "../in/missing",
    "../in",
    "../in/hostile.json",
]
FRAMES = [
    "../in/frames", "../in/frames/good.png", "../in/frames/bad.png", "../in/frames/*.png", "../in/frames/\udce9.png",
    "../in/damaged", "../in/pickle", "../in/empty",
    "../in/missing", "../in/hostile.json", "../in/link",
]  # fmt: skip
DATA = ["../in/data", "../in/\udce9", "../in/frames", "../in/none", "../in/missing", "../in/model", "../in"]
FILES = ["rows", "new/rows", ".", "report", "-", "/dev/full", "state", "new\n"]
NUMBERS = ["0.25", "0.1", "0.9", "0", "1", "-1", "2", "nan", "inf", "1e400", "9" * 30, "x", ""]
WHOLE = ["1", "2", "5", "20", "0", "-1", "1.5", "9" * 30, "x", ""]

#: What all that run a detector take.
RUN: dict[str, list[str]] = {
    "--backend": ["cpu", "cpu", "auto", "cuda", "x"], "--precision": ["fp32", "auto", "fp8", "x"], "--threads": WHOLE,
    "--seed": WHOLE,
    "--cache": ["cache", "../in/model", ""],
}  # fmt: skip
REGION = ["../in/region.png", "../in/dark.png", "../in/frames/good.png", "../in/damaged", "../in/missing", "../in", ""]
ROI = {"--roi": REGION, "--roi-on-part": REGION}
RAY = {"--ray": ["x", "", ":", "nowhere:x", "http://x", "auto:"]}  # none is reached, so that nothing is asked of the network
DRIFT = {
    "--no-drift": [], "--drift-state": ["new/state", *FILES, "../in/hostile.json", "../in/model"], "--drift-rate": NUMBERS,
    "--drift-contamination": NUMBERS,
}  # fmt: skip
#: Arguments, and options that each may be there or not.
COMMANDS: list[tuple[list[list[str]], dict[str, list[str]]]] = [
    (
        [["inspect"], MODELS, FRAMES, FRAMES],
        {**RUN, **ROI, **RAY, "--json": FILES, "--csv": FILES, "--overlay": FILES, "--threshold": NUMBERS,
         "--false-alarm-rate": NUMBERS},
    ),
    (
        [["certify"], ["../in/certifiable", *MODELS], FRAMES, ["--max-votes=20", *(f"--max-votes={n}" for n in WHOLE)]],
        {**RUN, **RAY, "--radius": NUMBERS, "--alpha": NUMBERS, "--sigma": NUMBERS, "--threshold": NUMBERS, "--json": FILES},
    ),
    ([["certify"], MODELS], {"--fit": ["../in/none", "../in/missing"], "--sigma": NUMBERS, "--out": FILES}),
    (
        [["evaluate"], MODELS, DATA],
        {**RUN, **ROI, **RAY, "--dataset": ["mvtec", "visa", "btad", "folder"], "--category": ["..", "../bait", "x"],
         "--json": FILES, "--report": ["report", *FILES]},
    ),
    (
        [["evaluate"], ["../in/certifiable", *MODELS], DATA, ["--certified"], ["--votes=5", *(f"--votes={n}" for n in WHOLE)]],
        {**RUN, **RAY, "--json": FILES, "--sigma": NUMBERS, "--radii": NUMBERS, "--alpha": NUMBERS, "--scores": ["state", *FILES],
         "--plot": ["a.svg", "new/a.svg"]},
    ),
    (
        [["evaluate"], MODELS, DATA, ["--robust"], ["--limit=1"], ["--attack-steps=1"], ["--eot=1"], ["--sanity=1"]],
        {**RUN, **RAY, "--budgets": ["linf 2/255", "l2 0.2", "linf 0", "l2 -1", "linf 1/0", "x 1", ",", ""],
         "--attacks": ["pgd", "square", "pgd,pgd", "transfer", "x", ""], "--queries": ["2", "0", "-1", "x"],
         "--restarts": ["1", "2", "0", "x"], "--surfaces": ["prepared", "camera", "prepared,camera", "x", ""],
         "--transfer-model": MODELS, "--results": ["new/rows", *FILES, "../in/hostile.json"], "--device": ["cpu", "x", ""],
         "--json": FILES, "--report": ["report", *FILES]},
    ),
    (
        [["stream"], MODELS, ["../in/damaged", "../in/frames/good.png", "../in/missing", "../in/empty",
         "genicam:../in/model", "genicam:"]],
        {**RUN, **ROI, **DRIFT, "--jsonl": FILES, "--sqlite": FILES, "--mqtt": ["x", "mqtt:", "http://x", "mqtt://[", "mqtt://x:99999"],
         "--policy": ["auto", "queue", "newest", "x"], "--deadline-ms": ["1000", "0", "-1", "nan", "x"], "--threshold": NUMBERS,
         "--limit": ["1", "0", "x"]},
    ),
    (
        [["stream"], MODELS, ["../in/frames"], ["--existing"], ["--limit=2"]],
        {**RUN, **ROI, **DRIFT, "--jsonl": FILES, "--sqlite": FILES},
    ),
    (
        [["watch"], MODELS, ["../in/missing", "../in/none/x"]],
        {**RUN, **ROI, **DRIFT, "--listen": ["127.0.0.1:0", "x", ":", "[::1]:99999", ""],
         "--token-file": ["../in/empty", "../in/damaged", "../in"], "--per-second": NUMBERS},
    ),
    (
        [["compile"], MODELS],
        {"--precision": ["int8", "x"], "--calibration": ["../in/missing", "../in/empty"], "--batches": WHOLE, "--out": FILES,
         "--target": ["x", "sm_1", ""], "--processes": WHOLE},
    ),
    (
        [["train"], ["../in/none", "../in/missing", "../in/damaged"]],
        {"--out": ["new/model", *FILES], "--preset": ["fast", "x"], "--size": WHOLE, "--align": ["auto", "x"], "--steps": WHOLE,
         "--tile": WHOLE, "--certify": NUMBERS, "--no-certify": [], "--dataset": ["mvtec", "visa"], "--category": ["..", "x"]},
    ),
    (
        [["bench"], ["../in/damaged", "../in/missing", "../in/empty"]],
        {"--parts": ["x", ""], "--seconds": NUMBERS, "--json": FILES, "--frames": FRAMES},
    ),
    (
        [["recalibrate"], MODELS, ["../in/data/train/good", *FRAMES]],
        {**RUN, **ROI, "--out": ["new/model", *FILES, "../in/model"], "--force": [], "--mu": [], "--false-alarm-rate": NUMBERS},
    ),
    ([["selftest"], MODELS], {**RUN, "--record": [], "--out": ["new/model", *FILES, "../in/model"], "--force": []}),
    (
        [["demo"], ["--limit=1"]],
        {"--out": ["report", *FILES], "--backend": ["cpu", "x"], "--prepare": ["cells", *FILES, "../in/model"]},
    ),
    (
        [["serve"], ["../in/damaged", "../in/missing", "../in/empty", "../in/pickle"]],
        {**RUN, **ROI, **RAY, "--host": ["127.0.0.1", "0.0.0.0", "x", ""], "--port": ["0", "-1", "99999", "x"],
         "--replicas": WHOLE, "--max-batch": WHOLE, "--wait-ms": NUMBERS, "--max-bytes": WHOLE},
    ),
    ([["backends"]], {"--json": FILES}),
    ([], {"--version": [], "--help": [], "-v": []}),
]  # fmt: skip


def command_line(rng: np.random.Generator) -> list[str]:
    """Near-valid arguments, damaged a third of the time."""

    def one(values: list[str]) -> str:
        """Any of them, the first most often."""
        return values[int(len(values) * rng.random() ** 3)]

    def word() -> str:
        return WORDS[rng.integers(len(WORDS))]

    positional, options = COMMANDS[int(len(COMMANDS) * rng.random() ** 1.5)]
    words = [[one(values)] for values in positional]
    for option, values in options.items():
        if rng.random() < 0.2:
            value = one(values) if values and rng.random() < 0.95 else word() if values else ""
            words.append([f"{option}={value}"] if values and rng.random() < 0.2 else [option, value] if values else [option])
    flat = [each for group in words for each in group]
    endless = flat[0] in ("stream", "watch", "bench", "serve", "demo") or "--robust" in flat if flat else False
    kept = len(positional) if endless else 0  # what makes them end, soon
    for _ in range(rng.integers(1, 4) if rng.random() < 0.33 else 0):
        kind = rng.integers(4)
        if kind == 0 or len(flat) == kept:
            flat.insert(int(rng.integers(kept, len(flat) + 1)), word())
        elif kind == 1:
            del flat[rng.integers(kept, len(flat))]
        elif kind == 2:
            flat[rng.integers(kept, len(flat))] = word()
        else:
            i, j = rng.integers(kept, len(flat), size=2)
            flat[i], flat[j] = flat[j], flat[i]
    return flat


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch executed",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands find: ``pristine`` becomes their input, ``prepared`` their folder; ``bait`` is none of their business."""
    root, rng = tmp_path_factory.mktemp("commands"), np.random.default_rng(0)
    for name in ("pristine/frames", "pristine/none", "prepared/report", "bait/train/good", "tmp", "home"):
        (root / name).mkdir(parents=True)
    there, model = root / "pristine", small_model()
    model.save(there / "model")
    certifiable(without_norm(model), 0.25).save(there / "certifiable")
    (there / "damaged").write_bytes(edit_bytes(rng, (there / "model").read_bytes(), until=900))
    (there / "pickle").write_bytes(pickle.dumps(Payload()))
    (there / "empty").touch()
    (there / "hostile.json").write_text('{"a":' * 2000)
    (there / "link").symlink_to("/etc/passwd")
    Image.fromarray(disc(rng, 32)).save(there / "frames" / "good.png")
    for name, value in (("region", 255), ("dark", 0)):
        Image.fromarray(np.pad(np.full((16, 16), value, np.uint8), 8)).save(there / f"{name}.png")
    Image.fromarray(scratched(rng, 32)).save(there / "frames" / "bad.png")
    Image.fromarray(disc(rng, 32)).save(there / "frames" / "\udce9.png")  # a name that is not UTF-8
    dataset(there / "data", train=2, good=2, bad=2, size=32)
    (there / "data").joinpath("test/good/000.png").rename(there / "data/test/good/\udce9.png")
    shutil.copytree(there / "data", there / "\udce9")
    (root / "bait" / "train" / "good" / "a.png").write_bytes((there / "frames" / "good.png").read_bytes())
    return root


def run(folder: Path, cases: list[list[str]]) -> list[dict[str, Any]]:
    (folder / "cases").write_text("".join(json.dumps(case) + "\n" for case in cases))
    environment = {
        **os.environ,
        "PYTHONFAULTHANDLER": "1",  # a crash says where
        "ADVRAD_CACHE": str(folder / "cache"),
        "TMPDIR": str(folder / "tmp"),
        "HOME": str(folder / "home"),
    }
    command = [sys.executable, str(HERE / "commands.py"), str(folder), str(folder / "cases")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=environment)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(results) == len(cases), (cases[len(results) :][:1], done.returncode, done.stderr[-3000:])
    assert not list(folder.rglob("executed")) and not list((folder / "home").iterdir())
    return results


@pytest.mark.parametrize("count", [pytest.param(50, id="quick"), pytest.param(5_000, id="long", marks=pytest.mark.slow)])
def test_command_lines(folder: Path, count: int) -> None:
    numbers = range(count) if VARIABLE not in os.environ else [int(os.environ[VARIABLE])]
    cases = [command_line(np.random.default_rng((3, number))) for number in numbers]
    results = run(folder, cases)
    for case, result in zip(cases, results, strict=True):
        if result["code"] == 1 and not {"inspect", "certify", "stream", "watch"} & set(case):
            result["wrong"].append("exit code 1 says that a part is not OK")
    wrong = [(n, c, r["wrong"]) for n, c, r in zip(numbers, cases, results, strict=True) if r["wrong"]]
    assert not wrong, f"{len(wrong)} cases; {VARIABLE}={wrong[0][0]} runs the first alone: {wrong[0][1:]}"
    if VARIABLE not in os.environ:
        assert {r["code"] for r in results} == {0, 1, 2}
