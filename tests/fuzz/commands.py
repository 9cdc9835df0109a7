"""``python commands.py FOLDER CASES``: run command lines one after the other under an audit hook, and say how each ended.

``CASES`` is a file of JSON lists of arguments, one a line.  Each runs in ``FOLDER/out``, a fresh copy of ``FOLDER/prepared``, and
finds ``FOLDER/in``, one of ``FOLDER/pristine``; it may write to the former, the cache, the temporary folder and what it names.
A line of JSON on standard output for each: the exit code, the end of what it said, and what was wrong.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from audited import watch

SECONDS = 60  #: for one command, on a machine that does other things


class TooLongError(BaseException):
    pass


def ring(*_: object) -> None:
    raise TooLongError


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def main() -> None:
    root, cases = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).read_text().splitlines()
    import ray  # noqa: F401  # its own imports try for IPv6; what the command does with it is watched

    allowed: list[str] = []
    seen = watch(allowed)
    from advrad_fast.cli import main as command

    report, bait = sys.stdout, snapshot(root / "bait")
    signal.signal(signal.SIGALRM, ring)
    for line in cases:
        arguments = json.loads(line)
        allowed[:] = [str(root)]
        os.chdir(root)
        for name in ("in", "out"):
            shutil.rmtree(root / name, ignore_errors=True)
        shutil.copytree(root / "pristine", root / "in", symlinks=True)
        shutil.copytree(root / "prepared", root / "out")
        os.chdir(root / "out")
        named = [value for word in arguments for value in (word, word.partition("=")[2]) if value and "\0" not in value]
        allowed[:] = [*(str(root / name) for name in ("out", "cache", "tmp")), *map(os.path.realpath, named)]
        seen.clear()
        out, err = io.BytesIO(), io.BytesIO()
        sys.stdout = io.TextIOWrapper(out, "utf-8", "strict", write_through=True)
        sys.stderr = io.TextIOWrapper(err, "utf-8", "backslashreplace", write_through=True)
        threads = threading.active_count()
        signal.alarm(SECONDS)
        try:
            code: object = command(arguments)
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
        signal.alarm(0)
        said, wrong = err.getvalue().decode(), list(seen)
        sys.stdout, sys.stderr = report, sys.__stderr__
        if code not in (0, 1, 2) or isinstance(code, bool):
            wrong.append(f"exit code {code!r}")
        if "Traceback" in said or "which is a bug" in said:
            wrong.append(said[-3000:])
        if threading.active_count() > threads + 8:
            wrong.append(f"{threading.active_count()} threads, {threads} before")
        allowed[:] = [str(root)]
        if snapshot(root / "bait") != bait:
            wrong.append("the bait was touched")
        report.write(json.dumps({"code": code, "said": said[-300:], "wrong": wrong}) + "\n")
        report.flush()


if __name__ == "__main__":
    main()
