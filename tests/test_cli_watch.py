"""``advrad-fast watch``: what it takes, what it says, and that it is ``stream`` with a page."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from models import small_model
from PIL import Image
from streams import frames

from advrad_fast import cli
from advrad_fast.cli import watch
from advrad_fast.errors import ConfigError

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADVRAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(watch.TOKEN, raising=False)
    made = tmp_path / "camera"
    made.mkdir()
    for i, frame in enumerate(frames(3)):
        Image.fromarray(frame).save(made / f"{i}.png")
    small_model().save(tmp_path / "small.safetensors")
    return made


def arguments(folder: Path, *options: object) -> list[str]:
    model = folder.parent / "small.safetensors"
    common = ("--backend", "cpu", "--precision", "fp32", "--threads", 1, "--existing", "--settle-ms", 0, "--threshold", 1e9)
    return list(map(str, ("watch", model, folder, *common, "--listen", "127.0.0.1:0", *options)))


def test_it_is_stream_with_a_page(folder: Path, capsys: Capture) -> None:
    assert cli.main(arguments(folder, "--limit", 3, "--jsonl", "-")) == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["outcome"] for line in captured.out.splitlines()] == ["OK"] * 3
    assert re.search(r"the page is at http://127\.0\.0\.1:\d+/\n", captured.err) and "3 OK" in captured.err
    assert cli.main(arguments(folder, "--limit", 3, "--threshold", -1)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--listen", "8765"), "--listen: expected HOST:PORT, got '8765'"),
        (("--listen", "127.0.0.1:99999"), "port: expected"),
        (("--listen", "192.0.2.1:8765"), "page 192.0.2.1:8765"),
        (("--token-file", "none.txt"), "none.txt"),
        (("--per-second", "0"), "per_second: expected"),
        (("--limit", "0"), "--limit: expected"),
    ],
)
def test_what_cannot_be_done(folder: Path, capsys: Capture, options: Any, message: str) -> None:
    assert cli.main(arguments(folder, *options)) == 2
    assert message in capsys.readouterr().err


def test_a_weak_token_is_refused_and_not_shown(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "token").write_text("hunter2\n")
    assert cli.main(arguments(folder, "--token-file", tmp_path / "token")) == 2
    captured = capsys.readouterr()
    assert "token: expected 16 to 512" in captured.err and "hunter2" not in captured.err + captured.out


def test_tokens_from_a_file_the_environment_or_made(
    folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("  from-the-file-0123456789\n")
    monkeypatch.setenv(watch.TOKEN, "from-the-environment-01")
    assert watch._token(tmp_path / "token") == "from-the-file-0123456789"
    assert watch._token(None) == "from-the-environment-01"
    assert cli.main(arguments(folder, "--limit", 1)) == 0
    assert "from-the-environment" not in capsys.readouterr().err
    monkeypatch.delenv(watch.TOKEN)
    assert cli.main(arguments(folder, "--limit", 1, "--listen", "0.0.0.0:0")) == 0
    assert len(re.findall(r"\?token=[\w-]{43}\n", capsys.readouterr().err)) == 1  # printed once, where it is needed


@pytest.mark.parametrize(
    ("text", "address"), [("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:8080", ("::1", 8080)), ("line7:1", ("line7", 1))]
)
def test_addresses(text: str, address: Any) -> None:
    assert watch._address(text) == address
    for wrong in (f"{text}x", f"http://{text}", f"a@{text}", text.rpartition(":")[0], ":80", "::1:80"):
        with pytest.raises(ConfigError):
            watch._address(wrong)


def test_a_missing_library_names_its_extra(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("starlette", "uvicorn"):
        for name in [name for name in sys.modules if name.startswith("advrad_fast.line.watch.")]:
            monkeypatch.delitem(sys.modules, name)
        with monkeypatch.context() as patch:
            for name in [name for name in sys.modules if name.split(".")[0] == module]:
                patch.delitem(sys.modules, name)
            patch.setitem(sys.modules, module, None)
            assert cli.main(arguments(folder, "--limit", 1)) == 2
            assert "pip install 'advrad-fast[watch]'" in capsys.readouterr().err


def test_it_takes_all_that_stream_takes(capsys: Capture) -> None:
    def options(command: str) -> set[str]:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        return set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))

    assert options("watch") - {"--listen", "--token-file", "--host", "--per-second"} == options("stream")


def test_the_page_of_a_process_that_a_signal_ends(folder: Path) -> None:
    line = [sys.executable, "-m", "advrad_fast.cli", *arguments(folder)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    url = process.stderr.readline().split()[-1]
    assert process.stdout.readline().startswith("OK")
    with urllib.request.urlopen(f"{url}events", timeout=60) as events:
        process.send_signal(signal.SIGTERM)
        text = events.read().decode()
    assert '"ended":true' in text.rpartition("event: state")[2]
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors, errors
