"""Builds the fake ``libcuda.so.1`` and loads it into this process, before pycuda is imported.

pycuda's extension module names ``libcuda.so.1`` as a library it needs.  The dynamic linker doesn't search for a library whose
soname is loaded already, so it is enough to ``dlopen`` the fake first: no LD_LIBRARY_PATH, no new process.  A driver cannot be
unloaded again: a process has the fake one or the real one, once and for all.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_emulation.driver.codes import Code
from gpu_emulation.driver.entry_points import c_source, prototype

SONAME = "libcuda.so.1"

_loaded: ctypes.CDLL | None = None


class CannotFake(RuntimeError):
    """No fake driver can be had in this process; the message says why."""


def build(folder: Path) -> Path:
    """Compiles the fake into ``folder``: the path of ``libcuda.so.1``, and beside it ``libcuda.so`` to link against.

    Raises:
        CannotFake: there is no C compiler, or it failed.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise CannotFake("no C compiler on the path")
    source, library = folder / "fake_libcuda.c", folder / SONAME
    source.write_text(c_source())
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden", f"-Wl,-soname,{SONAME}"]
    run = subprocess.run([compiler, *flags, "-o", library, source], capture_output=True, text=True, check=False)
    if run.returncode:
        raise CannotFake(f"{compiler} failed on the fake driver:\n{run.stderr}")
    (folder / "libcuda.so").unlink(missing_ok=True)
    (folder / "libcuda.so").symlink_to(SONAME)
    return library


def load() -> ctypes.CDLL:
    """The fake, built and loaded on the first call of this process.

    Raises:
        CannotFake: it can't be built, or a real driver is loaded here already.
    """
    global _loaded
    if _loaded is None:
        if "pycuda._driver" in sys.modules or _mapped():
            raise CannotFake("a real libcuda.so.1 is loaded in this process already")
        with tempfile.TemporaryDirectory(prefix="fake-libcuda-") as folder:  # once mapped, the file may go
            _loaded = ctypes.CDLL(str(build(Path(folder))), mode=ctypes.RTLD_GLOBAL)
        _loaded.advrad_fake_register.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
        _loaded.advrad_fake_missing.argtypes = [ctypes.c_void_p]
        _loaded.advrad_fake_missing.restype = None
        _loaded.advrad_fake_nothing.restype = ctypes.c_void_p
    return _loaded


def call(name: str, *arguments: int) -> Code:
    """Calls an entry point as a C program would, for those that pycuda doesn't know.  Addresses and handles are integers."""
    function = getattr(load(), name)
    function.argtypes = list(prototype(name)._argtypes_)
    return Code(function(*arguments))


def is_loaded() -> bool:
    """Whether this process has the fake driver."""
    return _loaded is not None


def _mapped() -> bool:
    maps = Path("/proc/self/maps")
    return maps.exists() and "/libcuda.so" in maps.read_text()
