"""The C++ operations built with AddressSanitizer and UndefinedBehaviorSanitizer, under the tests of the operations."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    libraries = runtime()
    if libraries is None:
        pytest.fail("the sanitizers need g++ with libasan (Debian 12: apt-get install g++)")
    folder = tmp_path_factory.mktemp("sanitized")
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=ROOT, check=True)
    (built,) = folder.rglob("_native*.so")
    assert all(name in built.read_bytes() for name in (b"__asan_report", b"__ubsan_handle"))
    return str(built), environment(libraries)


def test_operations_under_sanitizers(sanitized: tuple[str, dict[str, str]]) -> None:
    module, env = sanitized
    tests = [str(ROOT / "tests" / f"{name}.py") for name in TESTS]
    result = subprocess.run([sys.executable, "-c", RUN, module, *tests], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
