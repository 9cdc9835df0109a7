"""For tests on a real GPU: its kernels, and an engine that runs there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_emulation.fixtures import real_gpu_reason

BUILD = "import sys; from pathlib import Path; from advrad_fast.kernels import aot; aot.build(Path(sys.argv[1]), [sys.argv[2]])"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function: a real GPU's target -> a folder of kernels for it, compiled once, in a new process."""
    folders: dict[str, Path] = {}

    def build(target: str) -> Path:
        if "ADVRAD_KERNELS" in os.environ:
            return Path(os.environ["ADVRAD_KERNELS"])
        pytest.importorskip("triton")
        if target not in folders:
            folders[target] = tmp_path_factory.mktemp(target)
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            command = [sys.executable, "-c", BUILD, str(folders[target]), target]
            run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stderr
        return folders[target]

    return build


@pytest.fixture(params=["tensorrt", "pytorch"])
def real_engine(request: pytest.FixtureRequest, compiled: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """What runs the network on the real GPU: a TensorRT that is installed, and PyTorch in its place."""
    reason = real_gpu_reason()
    if reason is not None:
        pytest.skip(reason)
    from advrad_fast.backends import tensorrt_engine

    device = tensorrt_engine.this_device()
    monkeypatch.setenv("ADVRAD_KERNELS", str(compiled(device.target)))
    if request.param == "pytorch":
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("PyTorch finds no GPU")
        from torch_engine import TorchEngine

        TorchEngine(monkeypatch)
    elif not any(lib.usable and builds_for(lib.name, device.target) for lib in tensorrt_engine.libraries()):
        pytest.skip(f"no TensorRT that builds for {device.target} is installed")
    return str(request.param)


def builds_for(library: str, target: str) -> bool:
    from advrad_fast.backends.tensorrt_library import RTX_TARGETS

    return library == "tensorrt" or target in RTX_TARGETS
