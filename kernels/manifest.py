"""A folder of compiled kernels: ``manifest.json`` beside PTX and cubins, read as untrusted input, without Triton or torch.

The document, and what a launcher does with it::

    {"schema": 1, "triton": "3.9.0", "philox": 10, "kernels": [
      {"name": "noise",                      # the operation, or a stage of one: NAMES
       "variant": {"channels": 3, ...},      # what was fixed when it was compiled; (name, variant, target) is unique
       "target": "sm_80",                    # whom it was compiled for
       "arch": "sm_80",                      # of PTX and cubin; a trailing "a" ties both to exactly this target
       "entry": "noise_kernel",              # the symbol
       "ptx": "sm_80/x.ptx", "cubin": "sm_80/x.cubin", "sha256": {"ptx": "<64 hex>", "cubin": "<64 hex>"},
       "num_warps": 4, "block": [128, 1, 1], # threads of a program
       "shared": 0,                          # bytes of dynamic shared memory to ask for
       "registers": 32, "spills": 0, "stack": 0,   # a thread's, as the assembler counted them; spills in bytes
       "arguments": [{"name": "images", "type": "pointer", "multiple_of": 16}, ...],
       "grid": [{"argument": "items", "per": 128}, {"argument": "draws", "per": 4}, 1]}]}

``arguments`` are in launch order and complete: Triton's own trailing pointers are there with the type ``null``, for which a null
pointer is passed.  Types: ``pointer`` and ``null`` (8 bytes), ``i32``, ``i64``, ``u64``, ``f32``.  ``multiple_of`` is a promise
of the caller: the address, or the integer, is divisible by it (1: no promise).  A grid's axis is a number, or
ceil(argument / per) of a 32-bit or 64-bit integer argument.

What each argument means is said where the kernel is: :mod:`advrad_fast.kernels.noise`,
:mod:`advrad_fast.kernels.reconstruction_error`, :mod:`advrad_fast.kernels.votes`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn

from advrad_fast.errors import KernelFileError, expected

SCHEMA = 1
FILE = "manifest.json"

#: Kernels by name: the operations, and the stages of those that take several launches.
NAMES = ("noise", "errors", "rows", "deviation", "votes_counts", "votes_ranks")
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121")

ArgumentType = Literal["pointer", "null", "i32", "i64", "u64", "f32"]
TYPES: tuple[ArgumentType, ...] = ("pointer", "null", "i32", "i64", "u64", "f32")
Kind = Literal["ptx", "cubin"]
KINDS: tuple[Kind, ...] = ("ptx", "cubin")

MAX_FILE = 16 << 20  #: bytes of a manifest, a PTX file or a cubin
_MAX_KERNELS = 10_000
_MAX_GRID = (2**31 - 1, 65535, 65535)
_MAX_THREADS = 1024
_TEGRA = {87}  #: of those whose arch has no trailing "a"


@dataclass(frozen=True)
class Argument:
    """One parameter of a kernel.

    Attributes:
        name: as in the kernel's source.
        type: one of TYPES.
        multiple_of: what the address, or the integer, must be divisible by.
    """

    name: str
    type: ArgumentType
    multiple_of: int


@dataclass(frozen=True)
class Axis:
    """One axis of the grid: ceil(value of ``argument`` / ``per``) programs."""

    argument: str
    per: int


@dataclass(frozen=True)
class Kernel:
    """One kernel compiled for one target; the fields are explained in the module's docstring."""

    name: str
    variant: Mapping[str, str | int | bool]
    target: str
    arch: str
    entry: str
    ptx: str
    cubin: str
    sha256: Mapping[Kind, str]
    num_warps: int
    block: tuple[int, int, int]
    shared: int
    registers: int
    spills: int
    stack: int
    arguments: tuple[Argument, ...]
    grid: tuple[int | Axis, int | Axis, int | Axis]

    def grid_for(self, values: Mapping[str, int]) -> tuple[int, int, int]:
        """How many programs to launch for these values of the arguments.

        Raises:
            KernelFileError: a value is missing, or an axis would be empty or longer than CUDA allows.
        """
        sizes = []
        for axis, limit in zip(self.grid, _MAX_GRID, strict=True):
            size = axis
            if isinstance(axis, Axis):
                if axis.argument not in values:
                    raise KernelFileError(f"{self.name}: the grid needs a value for {axis.argument}")
                size = -(-values[axis.argument] // axis.per)
            if not isinstance(size, int) or not 1 <= size <= limit:
                raise KernelFileError(expected(f"{self.name}: grid", f"1 to {limit} programs", size))
            sizes.append(size)
        return sizes[0], sizes[1], sizes[2]

    @property
    def portable(self) -> bool:
        """Whether the PTX runs on later GPUs as well (a trailing ``a`` forbids it)."""
        return not self.arch.endswith("a")


@dataclass(frozen=True)
class Manifest:
    """A checked folder of compiled kernels.

    Attributes:
        folder: where the files are.
        triton: the version that compiled them.
        philox: rounds of the noise generator.
        kernels: all of them, in the file's order.
    """

    folder: Path
    triton: str
    philox: int
    kernels: tuple[Kernel, ...]

    def image(self, kernel: Kernel, kind: Kind) -> bytes:
        """The kernel's PTX or cubin, read now and held against its hash.

        Raises:
            KernelFileError: it is missing, too large, or not what was compiled.
        """
        name = kernel.ptx if kind == "ptx" else kernel.cubin
        path = self.folder / name
        try:
            if path.stat().st_size > MAX_FILE:
                raise KernelFileError(expected(name, f"at most {MAX_FILE} bytes", path.stat().st_size))
            data = path.read_bytes()
        except OSError as error:
            raise KernelFileError(f"{path}: cannot be read: {error.strerror or error}") from error
        if hashlib.sha256(data).hexdigest() != kernel.sha256[kind]:
            raise KernelFileError(f"{path}: its SHA-256 is not the one in the manifest")
        return data

    def find(self, name: str, capability: tuple[int, int], **variant: str | int | bool) -> tuple[Kernel, Kind]:
        """The kernel to load on a GPU of this compute capability, and whether its cubin or its PTX.

        The cubin of exactly this target if there is one, else one of the same major version (they run on later minors, but
        not across Tegra and the others), else the newest PTX that is not newer than the GPU.

        Args:
            name: one of NAMES.
            capability: (major, minor).
            variant: all of the variant's settings.

        Raises:
            KernelFileError: there is none.
        """
        device = 10 * capability[0] + capability[1]
        fitting = [k for k in self.kernels if k.name == name and dict(k.variant) == variant and _number(k.target) <= device]
        fitting.sort(key=lambda k: _number(k.target), reverse=True)
        for kernel in fitting:
            number = _number(kernel.target)
            kin = kernel.portable and number // 10 == capability[0] and not {number, device} & _TEGRA
            if number == device or kin:
                return kernel, "cubin"
        for kernel in fitting:
            if kernel.portable:
                return kernel, "ptx"
        raise KernelFileError(f"{self.folder}: no kernel {name} {variant} for compute capability {capability[0]}.{capability[1]}")


def _number(target: str) -> int:
    return int(target.removeprefix("sm_"))


def read_manifest(path: Path) -> Manifest:
    """Read and check the folder ``path``: every field of its manifest, and the hash of every file that is named there.

    Raises:
        KernelFileError: naming the field or the file.
    """
    file = path / FILE
    try:
        if file.stat().st_size > MAX_FILE:
            raise KernelFileError(expected(str(file), f"at most {MAX_FILE} bytes", file.stat().st_size))
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise KernelFileError(f"{file}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise KernelFileError(f"{file}: not UTF-8: {error.reason}") from error
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise KernelFileError(f"{file}: not JSON: {error}") from error
    manifest = parse(document, path)
    for kernel in manifest.kernels:
        for kind in KINDS:
            manifest.image(kernel, kind)
    return manifest


def parse(document: object, folder: Path) -> Manifest:
    """Check an untrusted JSON document; the files are not looked at.

    Raises:
        KernelFileError: naming the field, what was expected and what came.
    """
    fields = _object("manifest", document, ("schema", "triton", "philox", "kernels"))
    if type(fields["schema"]) is not int or fields["schema"] != SCHEMA:
        _refuse("schema", str(SCHEMA), fields["schema"])
    if type(fields["philox"]) is not int or fields["philox"] != 10:
        _refuse("philox", "10", fields["philox"])
    rows = fields["kernels"]
    if not isinstance(rows, list) or not 1 <= len(rows) <= _MAX_KERNELS:
        _refuse("kernels", f"a list of 1 to {_MAX_KERNELS}", rows)
    kernels = tuple(_kernel(f"kernels[{i}]", row) for i, row in enumerate(rows))
    seen: set[object] = set()
    for i, kernel in enumerate(kernels):
        key = (kernel.name, kernel.target, tuple(sorted(kernel.variant.items())))
        if key in seen:
            raise KernelFileError(f"kernels[{i}]: {kernel.name} {dict(kernel.variant)} for {kernel.target} is there twice")
        seen.add(key)
    return Manifest(folder, _text("triton", fields["triton"], r"\d+\.\d+\.\d+[\w.+]*"), 10, kernels)


_KERNEL_FIELDS = (
    "name", "variant", "target", "arch", "entry", "ptx", "cubin", "sha256", "num_warps", "block", "shared", "registers", "spills",
    "stack", "arguments", "grid",
)  # fmt: skip


def _kernel(where: str, row: object) -> Kernel:
    fields = _object(where, row, _KERNEL_FIELDS)
    target = _choice(f"{where}.target", fields["target"], TARGETS)
    hashes = _object(f"{where}.sha256", fields["sha256"], KINDS)
    num_warps = _integer(f"{where}.num_warps", fields["num_warps"], 1, _MAX_THREADS // 32)
    block = fields["block"]
    if not isinstance(block, list) or any(type(n) is not int for n in block) or block != [32 * num_warps, 1, 1]:
        _refuse(f"{where}.block", f"[{32 * num_warps}, 1, 1]", block)
    arguments = fields["arguments"]
    if not isinstance(arguments, list) or not 1 <= len(arguments) <= 64:
        _refuse(f"{where}.arguments", "a list of 1 to 64", arguments)
    parsed = tuple(_argument(f"{where}.arguments[{i}]", argument) for i, argument in enumerate(arguments))
    if len({argument.name for argument in parsed}) != len(parsed):
        _refuse(f"{where}.arguments", "different names", [argument.name for argument in parsed])
    grid = fields["grid"]
    if not isinstance(grid, list) or len(grid) != 3:
        _refuse(f"{where}.grid", "a list of 3", grid)
    axes = [_axis(f"{where}.grid[{i}]", axis, parsed, _MAX_GRID[i]) for i, axis in enumerate(grid)]
    return Kernel(
        name=_choice(f"{where}.name", fields["name"], NAMES),
        variant=_variant(f"{where}.variant", fields["variant"]),
        target=target,
        arch=_choice(f"{where}.arch", fields["arch"], (target, target + "a")),
        entry=_text(f"{where}.entry", fields["entry"], r"[A-Za-z_$][\w$]{0,127}"),
        ptx=_text(f"{where}.ptx", fields["ptx"], rf"{target}/[\w-]{{1,100}}\.ptx"),
        cubin=_text(f"{where}.cubin", fields["cubin"], rf"{target}/[\w-]{{1,100}}\.cubin"),
        sha256=MappingProxyType({kind: _text(f"{where}.sha256.{kind}", hashes[kind], "[0-9a-f]{64}") for kind in KINDS}),
        num_warps=num_warps,
        block=(32 * num_warps, 1, 1),
        shared=_integer(f"{where}.shared", fields["shared"], 0, 232448),
        registers=_integer(f"{where}.registers", fields["registers"], 1, 255),
        spills=_integer(f"{where}.spills", fields["spills"], 0, 1 << 20),
        stack=_integer(f"{where}.stack", fields["stack"], 0, 1 << 20),
        arguments=parsed,
        grid=(axes[0], axes[1], axes[2]),
    )


def _argument(where: str, row: object) -> Argument:
    fields = _object(where, row, ("name", "type", "multiple_of"))
    multiple = _integer(f"{where}.multiple_of", fields["multiple_of"], 1, 256)
    if multiple & (multiple - 1):
        _refuse(f"{where}.multiple_of", "a power of two", multiple)
    name = _text(f"{where}.name", fields["name"], r"[a-z]\w{0,63}")
    kind: Any = _choice(f"{where}.type", fields["type"], TYPES)
    if kind in ("null", "f32") and multiple != 1:
        _refuse(f"{where}.multiple_of", f"1 for the type {kind}", multiple)
    return Argument(name, kind, multiple)


def _axis(where: str, row: object, arguments: tuple[Argument, ...], limit: int) -> int | Axis:
    if not isinstance(row, dict):
        return _integer(where, row, 1, limit)
    fields = _object(where, row, ("argument", "per"))
    integers = tuple(argument.name for argument in arguments if argument.type in ("i32", "i64", "u64"))
    return Axis(_choice(f"{where}.argument", fields["argument"], integers), _integer(f"{where}.per", fields["per"], 1, 1 << 20))


def _variant(where: str, value: object) -> Mapping[str, str | int | bool]:
    if not isinstance(value, dict) or len(value) > 16:
        _refuse(where, "an object of at most 16 settings", value)
    for name, setting in value.items():
        _text(f"{where}: name", name, r"[a-z]\w{0,31}")
        word = isinstance(setting, str) and re.fullmatch(r"[\w-]{1,32}", setting, re.ASCII) is not None
        if not word and not isinstance(setting, int):
            _refuse(f"{where}.{name}", "a word, an integer or a truth value", setting)
        if type(setting) is int and abs(setting) >= 2**31:
            _refuse(f"{where}.{name}", "an integer of 32 bits", setting)
    return MappingProxyType(dict(value))


def _object(where: str, value: object, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(where, "an object", value)
    if set(value) != set(names):
        unknown, missing = sorted(map(str, set(value) - set(names))), sorted(set(names) - set(value))
        raise KernelFileError(f"{where}: unknown fields {unknown}, missing fields {missing}")
    return value


def _integer(where: str, value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        _refuse(where, f"an integer in [{low}, {high}]", value)
    return value


def _text(where: str, value: object, pattern: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII):
        _refuse(where, f"text like {pattern}", value)
    return value


def _choice(where: str, value: object, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        _refuse(where, f"one of {list(choices)}", value)
    return value


def _refuse(where: str, wanted: str, got: object) -> NoReturn:
    raise KernelFileError(expected(where, wanted, got))
