"""Builds the C++ operations with AddressSanitizer and UndefinedBehaviorSanitizer and runs their tests on the build.

``Beside`` does it in a process of its own: it takes over two minutes, which the other tests need not wait for.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ("test_engine", "test_lattice", "test_native", "test_noise", "test_philox", "test_reconstruction_error", "test_votes")

BUILD = """
import sys
from pathlib import Path
import setuptools
sys.argv = ["setup.py", "-q", "build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[1]]
import runpy
setuptools_setup = setuptools.setup
def setup(ext_modules, **rest):
    for extension in ext_modules:
        # Baseline code only: the selection among copies for several processors runs before the sanitizers are set up.
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        extension.extra_compile_args += [*sanitize, "-O1", "-g", "-DADVRAD_CLONES="]
        extension.extra_link_args += sanitize
    setuptools_setup(ext_modules=ext_modules, **rest)
setuptools.setup = setup
runpy.run_path("setup.py", run_name="__main__")
"""

RUN = """
import importlib.util
import sys
import pytest
spec = importlib.util.spec_from_file_location("advrad_fast._native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["advrad_fast._native"] = module
import advrad_fast
advrad_fast._native = module
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def runtime() -> str | None:
    """The libraries that have to be loaded first: the sanitizer's, and the C++ one, whose exceptions it watches."""
    if shutil.which("g++") is None or sys.platform != "linux":
        return None
    names = ("libasan.so", "libstdc++.so.6")
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    ]
    return " ".join(found) if all(Path(path).is_absolute() for path in found) else None


def environment(libraries: str) -> dict[str, str]:
    # Leaks are not looked for: Python keeps memory to its end.
    options = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {**os.environ, **options, "LD_PRELOAD": libraries}


def main() -> int:
    """Ends with the tests' exit code; all that is to be known goes to standard output."""
    libraries = runtime()
    if libraries is None:
        sys.stdout.write("the sanitizers need g++ with libasan (Debian 12: apt-get install g++)\n")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", BUILD, folder], cwd=ROOT, check=True)
        (built,) = Path(folder).rglob("_native*.so")
        assert all(name in built.read_bytes() for name in (b"__asan_report", b"__ubsan_handle"))
        tests = [str(ROOT / "tests" / f"{name}.py") for name in TESTS]
        command = [sys.executable, "-c", RUN, str(built), *tests]
        return subprocess.run(command, cwd=ROOT, env=environment(libraries), check=False).returncode


class Beside:
    """:func:`main` in the background, at a low priority."""

    def __init__(self) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # closed by end()
        self._process = subprocess.Popen(
            ["nice", "-n", "10", sys.executable, __file__], stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def result(self) -> tuple[int, str]:
        """Waits for the end: the exit code and what was said."""
        code = self._process.wait()
        self._output.seek(0)
        return code, self._output.read().decode(errors="replace")

    def end(self) -> None:
        """Nothing of it runs on."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait()
        self._output.close()


if __name__ == "__main__":
    sys.exit(main())
