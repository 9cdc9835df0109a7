"""docs/edge.md and what it installs: commands parse, messages exist, systemd reads the unit, the service serves."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from models import small_model
from PIL import Image

from advrad_fast.cli import _parser

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "edge.md").read_text(encoding="utf-8")
UNIT = ROOT / "docs" / "edge" / "advrad.service"
BLOCKS = re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)


def test_every_command_of_ours_parses() -> None:
    found = 0
    for line in "".join(BLOCKS).splitlines():
        for part in re.split(r"&&|;", line.partition("    #")[0]):
            words = shlex.split(part, comments=True)
            ours = [i for i, word in enumerate(words) if word.endswith("advrad-fast")]
            if ours:
                _parser().parse_args(words[ours[0] + 1 :])
                found += 1
    assert found == 8


def test_every_shell_block_is_shell() -> None:
    for block in BLOCKS:
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_every_message_is_one_of_ours() -> None:
    """But for those of the driver, TensorRT and NumPy, which no source here has."""
    foreign = {"FP32 GEMM is not supported", "out of memory", "expected a finite number, got nan"}
    sources = [
        path.read_text(encoding="utf-8") for folder in ("advrad_fast", "kernels") for path in (ROOT / folder).rglob("*.py")
    ]
    text = "\n".join(re.sub(r'"\s*\n\s*f?"', "", source) for source in sources)  # strings over several lines
    plain = re.sub(r"\{[^{}]*\}", "X", text)
    messages = re.findall(r"^\| (`.*?`) \| ", GUIDE.partition("## When something is wrong")[2], re.MULTILINE)
    quoted = [message for cell in messages for message in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 20 and foreign <= set(quoted)
    assert [message for message in quoted if message not in foreign and message not in plain and message not in text] == []


def test_memory_is_as_computed() -> None:
    """Weights and activations from benchmarks/tensorrt.md; the rest by the formula."""
    built = (ROOT / "benchmarks" / "tensorrt.md").read_text(encoding="utf-8").split("## Engines")[1:3]
    rows = re.findall(r"^\| .*? \| ([\d.]+) MB \| ([\d.]+) MB \| ([\d.]+) MB \| (\d+) MB \| (\d+) MB \|$", GUIDE, re.MULTILINE)
    for row, text, channels in zip(rows, built, (1, 3), strict=True):
        (stated,) = re.findall(r"^\| fp16 \| sm_89 \| [\d.]+ \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
        weights, activations, buffers, one, further = map(float, row)
        assert weights == pytest.approx(float(stated[0]), abs=0.5) and activations == pytest.approx(float(stated[1]), abs=0.5)
        thread, once = 256 * 256 * (channels + 4 * channels + 8) / 1e6, 8 * 256 * 256 / 1e6
        assert buffers == pytest.approx(thread + once, abs=0.06)
        assert one == pytest.approx(float(stated[0]) + float(stated[1]) + thread + once, abs=0.51)
        assert further == pytest.approx(float(stated[1]) + thread, abs=0.51)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    """With programs of this machine in the place of those of the device."""
    text = UNIT.read_text(encoding="utf-8").replace("/opt/advrad/venv/bin/python", sys.executable)
    (tmp_path / "advrad.service").write_text(text.replace("/usr/bin/nvidia-modprobe", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / "advrad.service"], capture_output=True, text=True, check=False, timeout=60
    )
    ours = [line for line in done.stderr.splitlines() if "advrad" in line]
    assert ours == []


def test_the_service(tmp_path: Path) -> None:
    """Ready, two parts and a broken image, alive meanwhile, and a clean end; on the CPU."""
    small_model().save(tmp_path / "part.safetensors")
    folder, results = tmp_path / "in", tmp_path / "results.jsonl"
    folder.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(60)
        environment = {**os.environ, "ADVRAD_BACKEND": "cpu", "ADVRAD_CACHE": str(tmp_path / "cache")}
        environment["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        command = [sys.executable, ROOT / "docs" / "edge" / "service.py", tmp_path / "part.safetensors", folder, results]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            assert [notified.recv(64) for _ in range(2)] == [b"READY=1", b"WATCHDOG=1"]
            for i in range(2):
                picture = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(picture).save(tmp_path / "part.tmp", format="png")
                (tmp_path / "part.tmp").rename(folder / f"{i}.png")
            (folder / "2.png").write_bytes(b"no image")
            while any(folder.iterdir()):
                assert notified.recv(64) == b"WATCHDOG=1" and process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            notified.settimeout(0.01)
            while process.poll() is None:
                with suppress(TimeoutError):
                    notified.recv(64)
        finally:
            process.kill()
            errors = process.communicate()[1]
    assert process.returncode == 0, errors
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert sorted(line["path"] for line in lines) == ["0.png", "1.png", "2.png"]
    for line in lines:
        if line["path"] == "2.png":
            assert line["outcome"] == "ERROR" and "2.png" in line["error"]
        else:
            assert line["outcome"] in ("OK", "DEFECT") and line["score"] > 0 and line["ms"] > 0
