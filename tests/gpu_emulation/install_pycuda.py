"""Installs pycuda where there is neither a CUDA toolkit nor a driver: ``python tests/gpu_emulation/install_pycuda.py``.

pycuda comes as source only.  Its build needs two things of a CUDA installation: headers, which two small wheels of NVIDIA's have,
and a libcuda to link against: the fake driver's own library will do.  What comes out is the pycuda that any user builds: on
a machine with a driver it finds the real library.  An installed pycuda is left alone.  The wheel is kept in .wheels/.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / ".wheels"
PYCUDA = "pycuda==2026.1"
HEADERS = ("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-profiler-api==13.0.85")  # cuda.h and cudaProfiler.h: 2.3 MB


def pip(*arguments: str | Path, environment: dict[str, str] | None = None) -> None:
    """Runs pip of this interpreter.

    Raises:
        subprocess.CalledProcessError: it failed, and has said why.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, env={**os.environ, **(environment or {})}, stdout=subprocess.DEVNULL)


def cached() -> Path | None:
    """The kept wheel for this interpreter and machine."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    machine = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    found = sorted(WHEELS.glob(f"{PYCUDA.replace('==', '-')}-{python}-*{machine}.whl"))
    return found[-1] if found else None


def build() -> None:
    """Builds the wheel into WHEELS."""
    sys.path.insert(0, str(ROOT / "tests"))
    from gpu_emulation.driver import library

    with tempfile.TemporaryDirectory(prefix="pycuda-") as name:
        folder = Path(name)
        pip("download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", folder, *HEADERS)
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        (header,) = folder.rglob("cuda.h")
        library.build(folder)
        # pycuda's setup.py reads its settings from the home folder; pip's own stay where they are.
        settings = {"CUDA_INC_DIR": [str(header.parent)], "CUDADRV_LIB_DIR": [name], "CUDA_ENABLE_CURAND": False}
        settings["CXXFLAGS"] = ["-O1", "-w"]  # twice as quick to build as -O3
        (folder / ".aksetup-defaults.py").write_text("".join(f"{key} = {value!r}\n" for key, value in settings.items()))
        home = Path.home()
        environment = {"HOME": name}
        environment["XDG_CONFIG_HOME"] = os.environ.get("XDG_CONFIG_HOME", str(home / ".config"))
        environment["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME", str(home / ".cache"))
        # Not pip's cache of built wheels: one from before may be linked against nothing.
        pip(
            *("wheel", "--quiet", "--no-deps", "--no-cache-dir", "--no-binary", "pycuda", "--wheel-dir", WHEELS, PYCUDA),
            environment=environment,
        )


def main() -> int:
    if importlib.util.find_spec("pycuda") is not None:
        return 0
    try:
        if cached() is None:
            sys.stderr.write(f"building {PYCUDA}: about a minute, once\n")
            build()
        pip("install", "--quiet", cached() or PYCUDA)
    except (subprocess.CalledProcessError, RuntimeError) as error:
        sys.stderr.write(f"{PYCUDA} could not be built; tests of the GPU's launch path will be skipped: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
