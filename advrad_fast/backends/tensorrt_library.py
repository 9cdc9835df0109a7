"""Which TensorRT is installed here: TensorRT 10 or 11, TensorRT-RTX, both or none; and where their Python interfaces differ.

===============================  ==================  ==================  ===============================
what                             TensorRT 10         TensorRT 11         TensorRT-RTX
===============================  ==================  ==================  ===============================
types as the graph says          a creation flag     always              always
builds for                       the GPU it sees     the GPU it sees     any of RTX_TARGETS, without one
compiles kernels for the GPU     when it builds      when it builds      when it loads, unless kept
===============================  ==================  ==================  ===============================
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from advrad_fast.errors import BackendUnavailableError, ConfigError, expected

#: What TensorRT-RTX builds for on a machine without a GPU.
RTX_TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")

_PRODUCTS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_INSTALL = {"tensorrt": "pip install 'advrad-fast[cuda]'", "tensorrt_rtx": "pip install tensorrt-rtx-cu13"}
_LONGEST = 500  # characters of a library's message in an exception
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Library:
    """One of NVIDIA's two engine libraries, as it is, or is not, installed here.

    Attributes:
        name: ``tensorrt`` or ``tensorrt_rtx``, the module's name.
        version: such as ``11.0.0.114``; empty where it is not installed.
        usable: whether engines can be built with it.
        detail: what it is, or the reason why it cannot be used.
    """

    name: str
    version: str
    usable: bool
    detail: str


def libraries() -> list[Library]:
    """TensorRT and TensorRT-RTX in the order in which they are tried, usable or with the reason why not.  Never raises."""
    return [_look(name) for name in _PRODUCTS]


def _look(name: str) -> Library:
    product = _PRODUCTS[name]
    try:
        if importlib.util.find_spec(name) is None:
            return Library(name, "", False, f"{product} is not installed: {_INSTALL[name]}")
        module = importlib.import_module(name)
        version = str(module.__version__)
    except Exception as error:  # a broken installation can raise anything at import
        return Library(name, "", False, f"{product} cannot be loaded: {type(error).__name__}: {error}")
    missing = [part for part in ("Builder", "OnnxParser", "Runtime", "ILogger") if not hasattr(module, part)]
    if missing:
        return Library(name, version, False, f"{product} {version} has no {', '.join(missing)}: it cannot build engines")
    if name == "tensorrt" and _major(version) < 10:
        return Library(name, version, False, f"{product} {version} is too old: 10 and 11 are supported")
    return Library(name, version, True, f"{product} {version}")


def _major(version: str) -> int:
    return int((re.match(r"\d+", version) or ["0"])[0])


def choose(target: str) -> Library:
    """The library that builds for a target: ``here``, or one of RTX_TARGETS.

    Raises:
        ConfigError: not a target, or one that can only be built for on the machine itself.
        BackendUnavailableError: no library that could is usable; the message has each one's reason.
    """
    check_target(target)
    found = libraries()
    for library in found:
        if library.usable and (target == "here" or library.name == "tensorrt_rtx"):
            return library
    reasons = "; ".join(library.detail for library in found if target == "here" or library.name == "tensorrt_rtx")
    raise BackendUnavailableError(f"no library can build an engine for {target}: {reasons}")


def check_target(target: object) -> str:
    """``target``, or a ConfigError that says what to do instead."""
    if target == "here" or (isinstance(target, str) and target in RTX_TARGETS):
        return str(target)
    message = expected("target", f"'here' or one of {list(RTX_TARGETS)}", target)
    if isinstance(target, str) and re.fullmatch(r"sm_\d+[a-z]?", target):
        message += (
            "; TensorRT-RTX does not build for it, and TensorRT builds only for the GPU of its own machine: run compile there,"
            " with --target here"
        )
    raise ConfigError(message)


def quoted(said: Sequence[str]) -> str:
    """What a library said, for the end of a message: each thing once, and no page of it."""
    lines = [" ".join(line.split()) for line in dict.fromkeys(said) if line]
    return "".join(f"{': ' if i == 0 else '; '}{line[:_LONGEST]}" for i, line in enumerate(lines))


class Toolkit:
    """A loaded library; one for each in a process, for TensorRT keeps the first logger that it is given.

    Args:
        library: one of :func:`libraries`.

    Raises:
        BackendUnavailableError: it is not usable here, or another version is loaded.
    """

    _loaded: dict[str, Toolkit] = {}  # noqa: RUF012
    _lock = threading.Lock()

    def __init__(self, library: Library) -> None:
        self.library = library
        self.module: Any = importlib.import_module(library.name)
        self._messages: dict[int, list[str]] = {}
        self._warned: set[str] = set()
        self._logger = self._make_logger()
        self._build = threading.Lock()

    @classmethod
    def of(cls, library: Library) -> Toolkit:
        """The one Toolkit of a library."""
        if not library.usable:
            raise BackendUnavailableError(library.detail)
        with cls._lock:
            if library.name not in cls._loaded:
                cls._loaded[library.name] = cls(library)
            toolkit = cls._loaded[library.name]
        if str(toolkit.module.__version__) != library.version:
            raise BackendUnavailableError(
                f"{library.name} {library.version} was asked for, and {toolkit.module.__version__} is loaded"
            )
        return toolkit

    def build(self, model: bytes, shapes: Sequence[tuple[int, ...]], target: str) -> bytes:
        """An engine from an ONNX model of input ``x``, with one optimisation profile for each of its input's shapes.

        Raises:
            BackendUnavailableError: the parser or the builder failed; what they said is in the message.
        """
        with self._build, self.errors() as said:  # one at a time: a build takes all the memory and cores it can get
            self._warned.clear()
            try:
                return self._built(model, shapes, target, said)
            except BackendUnavailableError:
                raise
            except (RuntimeError, TypeError, AttributeError, ValueError, MemoryError) as error:
                raise self.failure(f"cannot build an engine for {target}", [*said, str(error)]) from error

    def _built(self, model: bytes, shapes: Sequence[tuple[int, ...]], target: str, said: list[str]) -> bytes:
        trt = self.module
        builder = trt.Builder(self._logger)
        network = builder.create_network(self._creation_flags())
        parser = trt.OnnxParser(network, self._logger)
        if not parser.parse(model):
            reasons = [str(parser.get_error(i).desc()) for i in range(parser.num_errors)]
            raise self.failure("does not read the graph", reasons or said)
        config = builder.create_builder_config()
        if hasattr(trt.BuilderFlag, "TF32"):
            config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
        for shape in shapes:
            profile = builder.create_optimization_profile()
            profile.set_shape("x", shape, shape, shape)
            if config.add_optimization_profile(profile) < 0:
                raise self.failure(f"refuses the shape {shape}", said)
        if self.library.name == "tensorrt_rtx":
            config.num_compute_capabilities = 1
            name = "CURRENT" if target == "here" else target.replace("sm_", "SM")
            if not config.set_compute_capability(getattr(trt.ComputeCapability, name), 0):
                raise self.failure(f"cannot build for {target}", said)
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise self.failure(f"cannot build an engine for {target}", said)
        return bytes(serialized)

    def _creation_flags(self) -> int:
        """TensorRT 10 takes the graph's types literally only when asked to; the others always do, and 11 ignores the flag."""
        flag = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        if self.library.name == "tensorrt_rtx" or _major(self.library.version) >= 11:
            return 0
        if flag is None:
            raise self.failure("has no strongly typed networks", [])
        return 1 << int(flag)

    def runtime(self) -> Any:
        """A new ``IRuntime``.

        Raises:
            BackendUnavailableError: there is no GPU, or no driver.
        """
        with self.errors() as said:
            try:
                return self.module.Runtime(self._logger)
            except (RuntimeError, TypeError) as error:  # what a constructor that returns null becomes
                raise self.failure("has no runtime here", [*said, str(error)]) from error

    def failure(self, what: str, reasons: list[str]) -> BackendUnavailableError:
        """The exception for a failure, with what the library said."""
        return BackendUnavailableError(f"{self.library.detail} {what}{quoted(reasons)}")

    @contextmanager
    def errors(self) -> Iterator[list[str]]:
        """Collects the errors that the library logs meanwhile, in any thread: its builder has threads of its own."""
        said: list[str] = []
        self._messages[id(said)] = said
        try:
            yield said
        finally:
            del self._messages[id(said)]

    def _make_logger(self) -> Any:
        trt, messages, warned = self.module, self._messages, self._warned
        severity = trt.ILogger.Severity
        levels = {
            severity.INTERNAL_ERROR: logging.ERROR,
            severity.ERROR: logging.ERROR,
            severity.WARNING: logging.WARNING,
            severity.INFO: logging.DEBUG,  # a page for each build
            severity.VERBOSE: logging.DEBUG - 5,
        }

        class Logger(trt.ILogger):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                level = levels.get(severity, logging.DEBUG)
                if level == logging.WARNING and message in warned:  # one line for each layer of a network is no help
                    level = logging.DEBUG
                elif level == logging.WARNING:
                    warned.add(message)
                if level == logging.ERROR:
                    for said in tuple(messages.values()):
                        said.append(message)
                _log.log(level, "%s: %s", trt.__name__, message)

        return Logger()
