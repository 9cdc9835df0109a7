"""No network, no other program, no code from data, no write outside the named folders: on good input and on bad."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from models import small_model
from parts import dataset, disc, scratched
from PIL import Image

HERE = Path(__file__).parent


def audited(folder: Path, *arguments: object, code: int) -> subprocess.CompletedProcess[str]:
    """The command line, run where only ``folder`` may be written; it must end with this exit code."""
    command = [sys.executable, str(HERE / "audited.py"), str(folder), *map(str, arguments)]
    home = folder.with_name(f"{folder.name}-home")  # there, and not to be written
    home.mkdir(exist_ok=True)
    environment = {**os.environ, "ADVRAD_CACHE": str(folder / "cache"), "TMPDIR": str(folder), "HOME": str(home)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment, timeout=300)
    assert done.returncode == code, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == [], done.stderr.splitlines()[-1]
    assert not list(home.iterdir())
    return done


@pytest.fixture
def model(tmp_path: Path) -> Path:
    small_model().save(tmp_path / "model")
    return tmp_path / "model"


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch executed",)


def test_inspect(tmp_path: Path, model: Path) -> None:
    """Good frames and hostile ones: damaged, a bomb, a pickle, a script, a link that leads outside, names that are patterns."""
    frames, rng = tmp_path / "frames", np.random.default_rng(0)
    frames.mkdir()
    for name, make in (("good.png", disc), ("bad.jpg", scratched), ("a[1] $(touch executed);.png", disc)):
        Image.fromarray(make(rng, 48)).save(frames / name)
    whole = (frames / "good.png").read_bytes()
    (frames / "cut.png").write_bytes(whole[:-30])
    (frames / "pickle.png").write_bytes(pickle.dumps(Payload()))
    (frames / "script.bmp").write_bytes(b"#!/bin/sh\ntouch executed\n")
    (frames / "postscript.tif").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n(executed) (w) file closefile\n")
    (frames / "svg.webp").write_bytes(b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1:1/"/></svg>')
    (frames / "link.png").symlink_to("/etc/passwd")
    before = Path("/etc/passwd").read_bytes()
    done = audited(
        tmp_path, "inspect", model, frames, "--backend", "cpu", "--json", "-", "--csv", "rows.csv", "--overlay", "maps", code=2
    )
    outcomes = {Path(row["path"]).name: row["outcome"] for row in map(json.loads, done.stdout.splitlines())}
    assert len(outcomes) == 9
    for name in ("cut.png", "pickle.png", "script.bmp", "postscript.tif", "svg.webp", "link.png"):
        assert outcomes[name] == "ERROR", name
    assert not list(tmp_path.rglob("executed")) and Path("/etc/passwd").read_bytes() == before


@pytest.mark.parametrize("kind", ["pickle", "zip", "graph"])
def test_model_files_that_would_be_code(tmp_path: Path, model: Path, kind: str) -> None:
    """What other tools load models from is executed, or has a graph in it: here it is refused."""
    content = {
        "pickle": pickle.dumps(Payload()),
        "zip": b"PK\x03\x04" + pickle.dumps(Payload()),
        "graph": b"\x08\x08\x12\x07pytorch" + bytes(200),
    }[kind]
    (tmp_path / "hostile").write_bytes(content)
    Image.fromarray(disc(np.random.default_rng(0), 32)).save(tmp_path / "a.png")
    done = audited(tmp_path, "inspect", tmp_path / "hostile", tmp_path / "a.png", code=2)
    assert "hostile: " in done.stderr and not (tmp_path / "executed").exists()


def test_evaluate(tmp_path: Path, model: Path) -> None:
    data = dataset(tmp_path / "data", train=2, good=2, bad=2, size=32)
    audited(tmp_path, "evaluate", model, data, "--backend", "cpu", "--json", tmp_path / "figures.json", code=0)
    (data / "test" / "good" / "000.png").write_bytes(pickle.dumps(Payload()))
    audited(tmp_path, "evaluate", model, data, "--backend", "cpu", code=2)


def test_demo(tmp_path: Path) -> None:
    pytest.importorskip("elpv_dataset")
    audited(tmp_path, "demo", "--out", tmp_path / "out", "--limit", "2", "--backend", "cpu", code=0)
    assert (tmp_path / "out" / "index.html").is_file()


@pytest.mark.slow
def test_int8_sends_no_telemetry(tmp_path: Path, model: Path) -> None:
    """nncf reports its use over the network unless it is told not to."""
    pytest.importorskip("nncf")
    Image.fromarray(disc(np.random.default_rng(0), 32)).save(tmp_path / "a.png")
    audited(tmp_path, "compile", model, "--calibration", tmp_path / "a.png", "--out", tmp_path / "engines", code=0)


def test_the_audit_works(tmp_path: Path) -> None:
    """The hook sees what it is there for."""
    code = (
        "import os, pickle, runpy, socket, subprocess, sys\n"
        f"sys.argv = ['audited.py', {str(tmp_path)!r}, 'backends']\n"
        "import advrad_fast.cli\n"
        "def act(arguments):\n"
        "    socket.socket().close(); subprocess.run(['true']); pickle.loads(pickle.dumps(os.getcwd))\n"
        f"    open({str(tmp_path / 'in')!r}, 'w').close(); open({str(tmp_path.parent / 'out')!r}, 'w').close(); return 0\n"
        "advrad_fast.cli.main = act\n"
        f"runpy.run_path({str(HERE / 'audited.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    seen = " ".join(json.loads(done.stderr.splitlines()[-1]))
    for event in ("socket.__new__", "subprocess.Popen", "pickle.find_class", f"writes '{tmp_path.parent / 'out'}'"):
        assert event in seen, (event, seen)
    assert "in'" not in seen
