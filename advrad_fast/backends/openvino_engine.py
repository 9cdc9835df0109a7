"""The network in OpenVINO: fp32 on every CPU, bf16 where the processor computes in it, int8 once it has been calibrated."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from advrad_fast.backends import cache
from advrad_fast.backends.base import Array
from advrad_fast.backends.telemetry import no_telemetry
from advrad_fast.config import DetectorConfig
from advrad_fast.errors import AdvRADError, BackendUnavailableError, InferenceError
from advrad_fast.graph import GRAPH_VERSION, build_graph

with no_telemetry():
    import openvino as ov

_log = logging.getLogger(__name__)

# A forked child has OpenVINO's locks, as they happened to be, and none of its threads: what it calls may hang, once in ten
# times where OpenVINO had only been loaded before the fork.  So nothing there is called, not even a destructor.
_forked = False
_native_objects: weakref.WeakSet[Any] = weakref.WeakSet()


def _mark_forked() -> None:
    global _forked
    _forked = True
    for owner in list(_native_objects):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner.native))
    with contextlib.suppress(AttributeError, OSError):  # glibc's: exit handlers of the libraries are skipped, Python's are not
        libc = ctypes.CDLL(None)
        libc.on_exit(libc._exit, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)

_ADVICE = (
    "OpenVINO was loaded before this process was forked and would hang in it: start processes with multiprocessing's 'spawn', or"
    " load detectors in the children only"
)


def _check_process(error: type[AdvRADError]) -> None:
    """Raise ``error`` in a child that was forked after OpenVINO was loaded."""
    if _forked:
        raise error(f"cpu: {_ADVICE}")


class OpenVinoEngine:
    """One compiled network of a fixed batch.

    Args:
        precision: ``fp32``, ``bf16``, or ``int8``, which :func:`quantise` has put into the cache.
        batch: images a call.
        threads: None for OpenVINO's choice, one a physical core.
        folder: the cache of compiled networks; None for none.

    Raises:
        BackendUnavailableError: OpenVINO cannot compile the network, there is no int8 network in the cache, or this is a child
            that was forked after OpenVINO was loaded.
    """

    name = "OpenVINO"

    def __init__(
        self,
        config: DetectorConfig,
        weights: Mapping[str, Array],
        precision: str,
        *,
        batch: int,
        threads: int | None = None,
        folder: Path | None = None,
    ) -> None:
        self.precision = precision
        self._shape = (batch, config.image.channels, config.image.height, config.image.width)
        try:
            self.native = _compile(config, weights, precision, batch=batch, threads=threads, folder=folder)
            self.threads = int(self.native.get_property("INFERENCE_NUM_THREADS"))
        except RuntimeError as error:
            raise BackendUnavailableError(f"cpu: OpenVINO cannot compile the network: {error}") from error
        _native_objects.add(self)

    def request(self) -> OpenVinoRequest:
        """Something that runs the network; not for two threads at once.

        Raises:
            InferenceError: this is a child that was forked after OpenVINO was loaded.
        """
        _check_process(InferenceError)
        return OpenVinoRequest(self.native.create_infer_request(), self._shape)


class OpenVinoRequest:
    """Fill :attr:`x`, then :meth:`infer`.

    Attributes:
        x: float32 (batch, C, H, W), the network's input.
    """

    def __init__(self, request: Any, shape: tuple[int, ...]) -> None:
        self.x = np.zeros(shape, dtype=np.float32)
        self.native = request
        _native_objects.add(self)
        self.native.set_input_tensor(ov.Tensor(self.x, shared_memory=True))

    def infer(self) -> Array:
        """The network's output, float32 like :attr:`x`; the request's own memory, until the next call.

        Raises:
            InferenceError: OpenVINO failed, or this is a child that was forked after it was loaded.
        """
        _check_process(InferenceError)
        try:
            self.native.infer()
        except RuntimeError as error:
            raise InferenceError(f"cpu: OpenVINO failed: {error}") from error
        output: Array = self.native.get_output_tensor().data
        return output


def version() -> str:
    """Of OpenVINO."""
    return str(ov.get_version()).partition("-")[0]


def computes_bf16() -> bool:
    """Whether the processor has bf16 arithmetic: elsewhere OpenVINO would emulate it."""
    _check_process(BackendUnavailableError)
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def quantise(config: DetectorConfig, weights: Mapping[str, Array], inputs: Sequence[Array], *, batch: int, folder: Path) -> None:
    """Calibrate the network for int8 by NNCF's post-training quantisation and put it into the cache.

    Args:
        inputs: network inputs of normals, float32 (batch, C, H, W) each; a few dozen.
        batch: images a call.

    Raises:
        BackendUnavailableError: nncf is not installed, or the cache cannot be written.
    """
    try:
        with no_telemetry():
            import nncf
    except ModuleNotFoundError as error:
        raise BackendUnavailableError("cpu: int8 needs nncf: pip install 'advrad-fast[int8]'") from error
    _check_process(BackendUnavailableError)
    model = _read(ov.Core(), config, weights, _size(config, batch))
    quantised = nncf.quantize(model, nncf.Dataset(list(inputs)), subset_size=len(inputs))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "int8.xml"
        ov.save_model(quantised, path, compress_to_fp16=False)
        parts = [path.read_bytes(), path.with_suffix(".bin").read_bytes()]
    name = _int8_name(config, weights, batch)
    cache.store(folder, name, b"".join([len(parts[0]).to_bytes(8, "little"), *parts]))
    if cache.load(folder, name) is None:
        raise BackendUnavailableError(f"cpu: the int8 network could not be written to {folder}")


def has_int8(config: DetectorConfig, weights: Mapping[str, Array], *, batch: int, folder: Path | None) -> bool:
    """Whether :func:`quantise` has been here."""
    return cache.load(folder, _int8_name(config, weights, batch)) is not None


def _int8_name(config: DetectorConfig, weights: Mapping[str, Array], batch: int) -> str:
    return cache.key(weights, graph=GRAPH_VERSION, unet=config.unet.to_json(), size=_size(config, batch), quantised="int8")


def _size(config: DetectorConfig, batch: int) -> dict[str, int]:
    image = config.image
    return {"height": image.height, "width": image.width, "batch": batch, "timestep": config.diffusion.timestep}


def _compile(
    config: DetectorConfig,
    weights: Mapping[str, Array],
    precision: str,
    *,
    batch: int,
    threads: int | None = None,
    folder: Path | None = None,
) -> Any:
    """For one request at a time, from the cache or compiled and put there."""
    _check_process(BackendUnavailableError)
    core = ov.Core()
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        # Pinned, the caller's thread runs on the machine's first core while it infers, and so does every other process's: two
        # detectors of one thread each then share a core.  One alone gains 2 to 4 % of a frame by it.
        "ENABLE_CPU_PINNING": False,
        # What int8 leaves in floating point: bf16 where the processor has it.
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" or (precision == "int8" and computes_bf16()) else "f32",
    }
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    size = _size(config, batch)

    def read() -> Any:
        if precision != "int8":
            return _read(core, config, weights, size)
        blob = cache.load(folder, _int8_name(config, weights, batch))
        if blob is None:
            raise BackendUnavailableError(
                f"cpu: there is no int8 network of this model in {folder or 'the cache (there is none)'}; make it: "
                "advrad-fast compile MODEL --precision int8 --calibration GOOD_FRAMES"
            )
        end = 8 + int.from_bytes(blob[:8], "little")
        return core.read_model(model=blob[8:end], weights=blob[end:])

    if folder is None:
        return core.compile_model(read(), "CPU", options)
    name = cache.key(
        weights,
        graph=GRAPH_VERSION,
        unet=config.unet.to_json(),
        size=size,
        options=sorted(options.items()),
        openvino=str(ov.get_version()),
        device=(platform.machine(), core.get_property("CPU", "FULL_DEVICE_NAME")),
        capabilities=sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
        **({"quantised": _digest(folder, config, weights, batch)} if precision == "int8" else {}),
    )
    blob = cache.load(folder, name)
    if blob is not None:
        try:
            return core.import_model(BytesIO(blob), "CPU", options)
        except RuntimeError as error:
            _log.warning("OpenVINO refuses the compiled network %s in %s; compiling again: %s", name, folder, error)
    compiled = core.compile_model(read(), "CPU", options)
    exported = compiled.export_model()
    cache.store(folder, name, exported.getvalue() if isinstance(exported, BytesIO) else bytes(exported))
    return compiled


def _digest(folder: Path, config: DetectorConfig, weights: Mapping[str, Array], batch: int) -> str:
    """Of the int8 network: calibrated again, it is compiled again."""
    return hashlib.sha256(cache.load(folder, _int8_name(config, weights, batch)) or b"").hexdigest()


def _read(core: Any, config: DetectorConfig, weights: Mapping[str, Array], size: Mapping[str, int]) -> Any:
    return core.read_model(build_graph(config.unet, weights, **size).SerializeToString())
