"""Ahead-of-time builds: every kernel, for every GPU, on a machine with none; neither torch nor a driver is needed.

``advrad-fast compile --kernels --out k/`` writes PTX, cubins and the manifest that :mod:`advrad_fast.kernels.manifest` reads:
what the runtime launches then needs no Triton either.  No paths of the building machine are in the files.
For AMD, :func:`build_amd` compiles to code objects, to show that nothing stands in the way; nothing launches them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from advrad_fast.errors import ConfigError, KernelFileError, expected
from advrad_fast.files import write_atomically
from advrad_fast.kernels import arguments, manifest, noise, reconstruction_error, resources, votes
from advrad_fast.kernels.manifest import FILE, SCHEMA, TARGETS, Manifest, read_manifest

TRITON = "3.9.0"  #: the only version whose private interfaces this uses are known
AMD_TARGETS = ("gfx942", "gfx1100")

Variant = Mapping[str, str | int | bool]
_log = logging.getLogger(__name__)

_POINTERS = {"*u8": 1, "*i32": 4, "*i64": 8, "*fp32": 4, "*fp16": 2, "*bf16": 2}
_PARAMETERS = {"i32": "u32", "i64": "u64", "u64": "u64", "fp32": "f32"}


@dataclass(frozen=True)
class Source:
    """How one kernel is compiled.

    Attributes:
        function: the Triton function.
        types: Triton's types of its arguments; ``*dtype`` for a pointer whose type is the variant's.
        aligned: pointers at multiples of 16 bytes.
        variants: what it is built for.
        constants: a variant's compile-time arguments.
        grid: as in the manifest.
        num_warps: of a program.
        max_registers: of a thread, where the assembler's own choice is too low and spills.
    """

    function: Any
    types: Mapping[str, str]
    aligned: tuple[str, ...]
    variants: tuple[Variant, ...]
    constants: Callable[[Variant], dict[str, Any]]
    grid: tuple[Any, Any, Any]
    num_warps: int
    max_registers: Callable[[Variant], int | None] = lambda variant: None
    arguments: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", tuple(name for name in self.function.arg_names if name in self.types))


def _per(argument: str, per: int) -> dict[str, str | int]:
    return {"argument": argument, "per": per}


def _variants(**settings: Sequence[str | int | bool]) -> tuple[Variant, ...]:
    return tuple(dict(zip(settings, values, strict=True)) for values in product(*settings.values()))


_STREAM = {
    "images": "*u8", "image_ids": "*i32", "thresholds": "*i64", "seed": "u64", "first_draw": "i64", "draws": "i32",
    "pixel_scale": "fp32", "offset": "fp32", "noise_scale": "fp32", "half": "i32", "lattice_scale": "fp32",
}  # fmt: skip
_MAP = {"results": "i32", "height": "i32", "width": "i32"}

_FORMATS: Mapping[str, Sequence[str | int | bool]] = {"noise": ("gaussian", "lattice"), "channels": (1, 3)}

SOURCES: Mapping[str, Source] = {
    "noise": Source(
        noise.noise_kernel,
        {**_STREAM, "out": "*dtype", "frames": "i32", "items": "i32"},
        ("images", "thresholds", "out"),
        (
            *_variants(layout=("nchw",), dtype=("fp16", "bf16", "fp32"), **_FORMATS),
            *_variants(layout=("nhwc",), dtype=("fp16",), **_FORMATS),
        ),
        lambda v: {
            "CHANNELS": v["channels"], "CHANNELS_LAST": v["layout"] == "nhwc", "LATTICE": v["noise"] == "lattice",
            "BLOCK": noise.BLOCK, "DRAWS": noise.DRAWS_PER_PROGRAM,
        },
        (_per("items", noise.BLOCK), _per("frames", 1), _per("draws", noise.DRAWS_PER_PROGRAM)),
        noise.NUM_WARPS,
    ),
    "errors": Source(
        reconstruction_error.errors_kernel,
        {**_STREAM, **_MAP, "outputs": "*dtype", "errors": "*fp32", "scores": "*fp32", "groups": "i32", "output_scale": "fp32",
         "weight_1": "fp32", "weight_2": "fp32", "weight_4": "fp32", "weight_8": "fp32"},
        ("images", "thresholds", "outputs", "errors"),
        _variants(dtype=("fp16", "bf16", "fp32"), noise=reconstruction_error.NOISES, channels=(1, 3)),
        lambda v: {"CHANNELS": v["channels"], "NOISE": v["noise"], "COLUMNS": reconstruction_error.COLUMNS},
        (_per("width", reconstruction_error.COLUMNS), _per("height", 8), _per("results", 1)),
        1,
    ),
    "rows": Source(
        reconstruction_error.rows_kernel,
        {**_MAP, "errors": "*fp32", "sums": "*fp32", "filter_size": "i32"},
        ("errors", "sums"),
        ({},),
        lambda v: {"SPAN": arguments.SPAN, "ROWS": reconstruction_error.ROWS},
        (_per("width", arguments.SPAN), _per("height", reconstruction_error.ROWS), _per("results", 1)),
        reconstruction_error.NUM_WARPS,
    ),
    "deviation": Source(
        reconstruction_error.deviation_kernel,
        {**_MAP, "errors": "*fp32", "mu": "*fp32", "inverse_spread": "*fp32", "maps": "*fp32", "scores": "*fp32",
         "filter_size": "i32", "tiles": "i32"},
        ("errors", "mu", "inverse_spread", "maps"),
        _variants(maps=(False, True), wide=(False, True)),
        lambda v: {"MAPS": v["maps"], "WIDE": v["wide"], "SPAN": arguments.SPAN, "ROWS": reconstruction_error.ROWS},
        (_per("tiles", 1), _per("height", reconstruction_error.ROWS), _per("results", 1)),
        reconstruction_error.NUM_WARPS,
    ),
    "votes_counts": Source(
        votes.counts_kernel,
        {"scores": "*fp32", "thresholds": "*fp32", "counts": "*i64", "images": "i32", "draws": "i32", "count": "i32"},
        ("scores",),
        ({},),
        lambda v: {"BLOCK": votes.BLOCK, "THRESHOLDS": votes.THRESHOLDS},
        (_per("images", 1), _per("count", votes.THRESHOLDS), 1),
        votes.COUNTS_WARPS,
    ),
    "votes_ranks": Source(
        votes.ranks_kernel,
        {"scores": "*fp32", "ranks": "*i64", "statistics": "*fp32", "images": "i32", "draws": "i32", "count": "i32"},
        ("scores",),
        ({},),
        lambda v: {"HELD": votes.HELD},
        (_per("images", 1), _per("count", 1), 1),
        votes.RANKS_WARPS,
    ),
}  # fmt: skip

Wanted = Callable[[str, Variant], bool]


def build(
    out: Path,
    targets: Sequence[str] = TARGETS,
    kernels: Sequence[str] | None = None,
    *,
    wanted: Wanted | None = None,
    processes: int = 1,
) -> Manifest:
    """Compile into the folder ``out``, which is made if it is missing; the manifest is written last.

    Args:
        targets: of TARGETS.
        kernels: names of SOURCES; None for all.
        wanted: whether a kernel's variant is built; None for all.
        processes: that compile at the same time; above 1 they are new ones, which need an importable main module.

    Raises:
        ConfigError: an unknown target or kernel, or Triton is in its interpreter mode or of another version.
        KernelFileError: a kernel came out otherwise than the manifest would say.
        OSError: ``out`` cannot be written.
    """
    _check(targets, TARGETS, kernels)
    jobs = []
    for target in dict.fromkeys(targets):
        (out / target).mkdir(parents=True, exist_ok=True)
        for name, variant in _jobs(kernels, wanted):
            # Turing has no bf16 arithmetic, and no engine in it.
            if target != "sm_75" or variant.get("dtype") != "bf16":
                jobs.append((out, target, name, variant))
    if processes > 1:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            rows = list(pool.map(_build_one, *zip(*jobs, strict=True)))
    else:
        rows = [_build_one(*job) for job in jobs]
    if not rows:
        raise ConfigError(expected("kernels", "at least one kernel to build", list(kernels or ())))
    document = {"schema": SCHEMA, "triton": triton.__version__, "philox": 10, "kernels": rows}
    manifest.parse(document, out)
    write_atomically(out / FILE, (json.dumps(document, indent=1) + "\n").encode())
    return read_manifest(out)


def build_amd(
    targets: Sequence[str] = AMD_TARGETS, kernels: Sequence[str] | None = None, *, wanted: Wanted | None = None
) -> Iterator[tuple[str, str, Variant, bytes]]:
    """Compile for AMD GPUs and give (target, kernel, variant, code object) one by one.  Nothing here launches these.

    Raises:
        ConfigError: as :func:`build`.
    """
    _check(targets, AMD_TARGETS, kernels)
    for target in targets:
        for name, variant in _jobs(kernels, wanted):
            gpu = GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
            yield target, name, variant, compiled(name, variant, gpu).asm["hsaco"]


def _check(targets: Sequence[str], known: tuple[str, ...], kernels: Sequence[str] | None) -> None:
    if triton.__version__ != TRITON:
        raise ConfigError(expected("triton", f"version {TRITON}, whose compiler interface is known", triton.__version__))
    if knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET is set: there is nothing to compile in the interpreter's mode")
    for what, given, allowed in (("targets", targets, known), ("kernels", kernels or (), tuple(SOURCES))):
        if unknown := sorted(set(given) - set(allowed)):
            raise ConfigError(expected(what, f"some of {list(allowed)}", unknown))


def _jobs(kernels: Sequence[str] | None, wanted: Wanted | None) -> Iterator[tuple[str, Variant]]:
    for name, source in SOURCES.items():
        if kernels is None or name in kernels:
            for variant in source.variants:
                if wanted is None or wanted(name, variant):
                    yield name, variant


def compiled(name: str, variant: Variant, target: GPUTarget) -> Any:
    """Triton's compiled kernel."""
    source = SOURCES[name]
    names = list(source.function.arg_names)
    types = {n: source.types.get(n, "constexpr").replace("dtype", str(variant.get("dtype"))) for n in names}
    constants = {(names.index(n),): value for n, value in source.constants(variant).items()}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in source.aligned}
    limit = source.max_registers(variant) if target.backend == "cuda" else None
    # FMA is meant: the arithmetic's bounds are stated with it.  Line numbers would put paths into the files.
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True
        return triton.compile(
            ASTSource(fn=source.function, signature=types, constexprs=constants, attrs=attributes),
            target=target,
            options={"num_warps": source.num_warps, "maxnreg": limit, "enable_fp_fusion": True},
        )


def _build_one(out: Path, target: str, name: str, variant: Variant) -> dict[str, Any]:
    """Compile one kernel, write its two files and give its row of the manifest."""
    source = SOURCES[name]
    kernel = compiled(name, variant, GPUTarget("cuda", int(target.removeprefix("sm_")), 32))
    ptx, cubin = kernel.asm["ptx"].encode(), kernel.asm["cubin"]
    arguments = list(_arguments(source, variant))
    _check_parameters(name, kernel.asm["ptx"], source, variant)
    used = resources.inspect(cubin)
    stem = "_".join([name, *(v if isinstance(v, str) else f"{k}{int(v)}" for k, v in variant.items())])
    for suffix, data in (("ptx", ptx), ("cubin", cubin)):
        write_atomically(out / target / f"{stem}.{suffix}", data)
    _log.info("%s/%s", target, stem)
    (arch,) = re.findall(r"^\.target (sm_\w+)", kernel.asm["ptx"], re.MULTILINE)
    return {
        "name": name,
        "variant": dict(variant),
        "target": target,
        "arch": arch,
        "entry": kernel.metadata.name,
        "ptx": f"{target}/{stem}.ptx",
        "cubin": f"{target}/{stem}.cubin",
        "sha256": {"ptx": hashlib.sha256(ptx).hexdigest(), "cubin": hashlib.sha256(cubin).hexdigest()},
        "num_warps": source.num_warps,
        "block": [32 * source.num_warps, 1, 1],
        "shared": kernel.metadata.shared,
        "registers": used.registers,
        "spills": used.spills,
        "stack": used.stack,
        "arguments": arguments,
        "grid": list(source.grid),
    }


def _arguments(source: Source, variant: Variant) -> Iterator[dict[str, str | int]]:
    for name in source.arguments:
        kind = source.types[name].replace("dtype", str(variant.get("dtype")))
        if kind in _POINTERS:
            yield {"name": name, "type": "pointer", "multiple_of": 16 if name in source.aligned else _POINTERS[kind]}
        else:
            yield {"name": name, "type": {"fp32": "f32"}.get(kind, kind), "multiple_of": 1}
    # Triton's own: memory for kernels that ask for it, and for its profiler.
    for name in ("global_scratch", "profile_scratch"):
        yield {"name": name, "type": "null", "multiple_of": 1}


def _check_parameters(name: str, ptx: str, source: Source, variant: Variant) -> None:
    """Refuse to describe a kernel whose parameters are not those of the manifest."""
    kinds = [source.types[n].replace("dtype", str(variant.get("dtype"))) for n in source.arguments]
    wanted = [_PARAMETERS.get(kind, "u64") for kind in kinds] + ["u64", "u64"]
    header = ptx[ptx.index(".visible .entry") :].split(")", 1)[0]
    got = re.findall(r"\.param \.(\w+)", header)
    if got != wanted:
        raise KernelFileError(expected(f"{name}: parameters", str(wanted), got))
