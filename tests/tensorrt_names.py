"""What :mod:`fake_tensorrt` stands in for: names and arguments in NVIDIA's real Python bindings, kept in tensorrt_names.json.

``python tests/tensorrt_names.py WHEEL...`` writes that file anew, from the installed TensorRT-RTX and from wheels of TensorRT's
bindings (``pip download --no-deps tensorrt_cu12_bindings==10.3.0 tensorrt_cu13_bindings==11.4.0.106``).  The libraries behind
the bindings, which take gigabytes, are not needed: for each an empty one is made, with gcc, that only lets them load.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_suffix(".json")

CLASSES = {
    "Builder": ("create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"),
    "OnnxParser": ("parse", "get_error", "num_errors"),
    "IBuilderConfig": ("clear_flag", "add_optimization_profile", "num_compute_capabilities", "set_compute_capability"),
    "IOptimizationProfile": ("set_shape",),
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": (
        "create_execution_context", "create_runtime_config", "get_device_memory_size_for_profile_v2", "get_tensor_dtype",
        "get_tensor_profile_shape", "num_optimization_profiles",
    ),
    "IExecutionContext": ("set_optimization_profile_async", "set_input_shape", "set_tensor_address", "execute_async_v3"),
    "IRuntimeConfig": (
        "create_runtime_cache", "set_runtime_cache", "set_execution_context_allocation_strategy",
        "dynamic_shapes_kernel_specialization_strategy",
    ),
    "IRuntimeCache": ("serialize", "deserialize"),
}  # fmt: skip
ENUMERATIONS = (
    "BuilderFlag", "ComputeCapability", "DataType", "DynamicShapesKernelSpecializationStrategy",
    "ExecutionContextAllocationStrategy", "NetworkDefinitionCreationFlag",
)  # fmt: skip


def describe(module: Any) -> dict[str, Any]:
    """Overloads' argument names of each method, None for an attribute, members of an enumeration; without what is missing."""
    found: dict[str, Any] = {}
    for class_name, members in CLASSES.items():
        for member in members:
            value = getattr(getattr(module, class_name, None), member, None)
            if value is not None:
                found[f"{class_name}.{member}"] = None if isinstance(value, property) else overloads(member, value.__doc__ or "")
    for name in ENUMERATIONS:
        if hasattr(module, name):
            found[name] = sorted(getattr(module, name).__members__)
    return found


def overloads(name: str, documentation: str) -> list[list[str]]:
    """pybind11 writes each signature on a line of its own: ``1. name(self: T, a: int, b: str = None) -> R``."""
    lines = re.findall(rf"^(?:\d+\. )?{name}\(self(.*)\) -> ", documentation, re.MULTILINE)
    return [re.findall(r", (\w+): ", line) for line in lines]


def load(wheel: Path, folder: Path) -> Any:
    """The bindings in a wheel, as a module."""
    zipfile.ZipFile(wheel).extractall(folder)
    (binary,) = (folder / "tensorrt_bindings").glob("tensorrt*.so")
    symbols = subprocess.run(["nm", "-D", "--undefined-only", binary], capture_output=True, text=True, check=True).stdout
    wanted = re.findall(r"\b(create\w+_INTERNAL|get\w+Registry|getNv\w+|initLibNv\w+)", symbols)
    source = folder / "empty.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in wanted))
    needed = subprocess.run(["readelf", "-d", binary], capture_output=True, text=True, check=True).stdout
    for library in re.findall(r"NEEDED.*\[(libnv\S+)\]", needed):
        subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", folder / library, source], check=True)
        ctypes.CDLL(str(folder / library), ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(folder))
    return importlib.import_module("tensorrt_bindings")


def main() -> None:
    if sys.argv[1:2] == ["--one"]:  # one process for each: a process can load only one of them
        with tempfile.TemporaryDirectory() as folder:
            source = sys.argv[2]
            module = load(Path(source), Path(folder)) if source.endswith(".whl") else importlib.import_module(source)
            name = "tensorrt" if source.endswith(".whl") else source
            sys.stdout.write(json.dumps({f"{name} {module.__version__}": describe(module)}))
        return
    table: dict[str, Any] = {}
    for source in (*sys.argv[1:], "tensorrt_rtx"):
        done = subprocess.run([sys.executable, __file__, "--one", source], stdout=subprocess.PIPE, check=True)
        table.update(json.loads(done.stdout))
    lines = [f" {json.dumps(version)}: {{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(names.items()))
             + "\n }" for version, names in sorted(table.items())]  # fmt: skip
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
