"""TensorRT's Python interface as far as the package uses it, with no GPU behind it: what each of the three libraries has.

The names and arguments are those of the real bindings of TensorRT 10.3 and 11.4 and of TensorRT-RTX 1.7: :mod:`tensorrt_names`
has read them into tensorrt_names.json, which :mod:`test_tensorrt_engine` holds this against.
An engine is ``b"engine"``, the library's version, its shapes and its model's digest; running one counts, and calls ``execute``.
"""

from __future__ import annotations

import enum
import hashlib
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class DataType(enum.Enum):
    FLOAT, HALF, INT8, BF16 = 0, 1, 2, 7


class Strategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class ILogger:
    Severity = Severity


MODELS: dict[str, bytes] = {}  #: every ONNX model that was parsed, by its digest: engines outlive their library in caches


class FakeTensorRT:
    """One library.

    Args:
        name: ``tensorrt`` or ``tensorrt_rtx``.
        version: decides what there is.

    Attributes:
        calls: what was asked of it, in order.
        fail: the name of the method that fails next, after an error in the log; with ``raises`` by an exception.
        dtype: of the engines' input and output.
        execute: called with an execution's model, shape, addresses by tensor, and the stream.
    """

    def __init__(self, name: str, version: str) -> None:
        self.name, self.version, self.rtx = name, version, name == "tensorrt_rtx"
        self.calls: list[tuple[Any, ...]] = []
        self.fail, self.raises = "", False
        self.dtype, self.digest = DataType.HALF, ""
        self.execute: Callable[[bytes, tuple[int, ...], dict[str, int], int], None] | None = None
        self.logger: Any = None
        self.module: Any = self._module()

    def install(self, patch: pytest.MonkeyPatch) -> FakeTensorRT:
        patch.setitem(sys.modules, self.name, self.module)
        return self

    def did(self, *call: Any) -> bool:
        """Note a call; False, or an exception, if it is the one to fail."""
        self.calls.append(call)
        if call[0] != self.fail:
            return True
        if self.logger is not None:
            self.logger.log(Severity.ERROR, f"[{call[0]}] Error Code 1: it is broken")
        if self.raises:
            raise RuntimeError(f"{call[0]} raises")
        return False

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == name]

    def _module(self) -> types.ModuleType:
        fake, major = self, int(self.version.split(".")[0])
        module: Any = types.ModuleType(self.name)
        module.__spec__ = types.SimpleNamespace(name=self.name)
        module.__version__ = self.version
        module.ILogger, module.DataType, module.ExecutionContextAllocationStrategy = ILogger, DataType, Strategy
        module.NetworkDefinitionCreationFlag = enum.Enum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})
        module.NetworkDefinitionCreationFlag.__int__ = lambda self: self.value
        module.BuilderFlag = enum.Enum("BuilderFlag", {"TF32": 6, **({} if self.rtx or major > 10 else {"FP16": 0})})

        class Profile:
            def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
                fake.did("set_shape", input, min, opt, max)
                self.shape = max

        class Config:
            def __init__(self) -> None:
                self.profiles: list[Profile] = []

            def clear_flag(self, flag: Any) -> None:
                fake.did("clear_flag", flag.name)

            def add_optimization_profile(self, profile: Profile) -> int:
                self.profiles.append(profile)
                return len(self.profiles) - 1 if fake.did("add_optimization_profile") else -1

        class RtxConfig(Config):
            num_compute_capabilities = 0

            def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
                return index < self.num_compute_capabilities and fake.did("set_compute_capability", compute_capability.name)

        class Builder:
            def __init__(self, logger: ILogger) -> None:
                fake.logger = logger

            def create_network(self, flags: int = 0) -> str:
                fake.did("create_network", flags)
                return "network"

            def create_builder_config(self) -> Config:
                return RtxConfig() if fake.rtx else Config()

            def create_optimization_profile(self) -> Profile:
                return Profile()

            def build_serialized_network(self, network: str, config: Config) -> bytes | None:
                if not fake.did("build_serialized_network"):
                    return None
                fake.logger.log(Severity.WARNING, "a warning")
                shapes = ";".join(",".join(map(str, profile.shape)) for profile in config.profiles)
                return f"engine {fake.version} {shapes} {fake.digest}".encode()

        class Parser:
            num_errors = 1

            def __init__(self, network: str, logger: ILogger) -> None:
                pass

            def parse(self, model: bytes, path: str | None = None) -> bool:
                fake.digest = hashlib.sha256(model).hexdigest()
                MODELS[fake.digest] = model
                return fake.did("parse", len(model))

            def get_error(self, index: int) -> Any:
                return types.SimpleNamespace(desc=lambda: "node 3 is unknown")

        class Context:
            def __init__(self, model: str) -> None:
                self.model, self.addresses = model, dict[str, int]()
                self.shape: tuple[int, ...] = ()

            def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
                return fake.did("set_optimization_profile_async", profile_index, stream_handle)

            def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
                self.shape = shape
                return fake.did("set_input_shape", name, shape)

            def set_tensor_address(self, name: str, memory: int) -> bool:
                self.addresses[name] = memory
                return fake.did("set_tensor_address", name, memory)

            def execute_async_v3(self, stream_handle: int) -> bool:
                if not fake.did("execute_async_v3", stream_handle):
                    return False
                if fake.execute is not None:
                    fake.execute(MODELS[self.model], self.shape, dict(self.addresses), stream_handle)
                return True

        class RuntimeCache:
            def serialize(self) -> bytes:
                return b"kernels of " + fake.version.encode()

            def deserialize(self, blob: bytes) -> bool:
                return fake.did("deserialize", blob)

        class RuntimeConfig:
            dynamic_shapes_kernel_specialization_strategy: Any = None

            def create_runtime_cache(self) -> RuntimeCache:
                return RuntimeCache()

            def set_runtime_cache(self, cache: RuntimeCache) -> bool:
                return fake.did("set_runtime_cache")

            def set_execution_context_allocation_strategy(self, strategy: Strategy) -> None:
                self.strategy = strategy

        class Engine:
            def __init__(self, blob: bytes) -> None:
                words = blob.decode().split()
                self.shapes = [tuple(map(int, shape.split(","))) for shape in words[2].split(";")]
                self.model = words[3]
                self.num_optimization_profiles = len(self.shapes)

            def get_tensor_dtype(self, name: str) -> DataType:
                return {"x": fake.dtype, "output": fake.dtype}[name]

            def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
                return [self.shapes[profile_index]] * 3 if name == "x" else []

            def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
                return 1000 * self.shapes[profile_index][0]

            def create_execution_context(self, strategy: Any = Strategy.STATIC) -> Context | None:
                if isinstance(strategy, RuntimeConfig):
                    assert fake.rtx and strategy.dynamic_shapes_kernel_specialization_strategy is not None
                    strategy = strategy.strategy
                assert isinstance(strategy, Strategy)
                return Context(self.model) if fake.did("create_execution_context", strategy.name) else None

        class RtxEngine(Engine):
            def create_runtime_config(self) -> RuntimeConfig:
                return RuntimeConfig()

        class Runtime:
            def __init__(self, logger: ILogger) -> None:
                fake.logger = logger
                fake.did("Runtime")

            def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
                if not fake.did("deserialize_cuda_engine"):
                    return None
                if not serialized_engine.startswith(f"engine {fake.version} ".encode()):
                    fake.logger.log(Severity.ERROR, "Error Code 6: the engine is of another version")
                    return None
                return (RtxEngine if fake.rtx else Engine)(serialized_engine)

        module.Builder, module.OnnxParser, module.Runtime = Builder, Parser, Runtime
        if self.rtx:
            names = ("CURRENT", "SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
            module.ComputeCapability = enum.Enum("ComputeCapability", names)
            module.DynamicShapesKernelSpecializationStrategy = enum.Enum("Specialization", ("LAZY", "EAGER", "NONE"))
        self.interface = {
            "Builder": Builder,
            "OnnxParser": Parser,
            "IBuilderConfig": RtxConfig if self.rtx else Config,
            "IOptimizationProfile": Profile,
            "Runtime": Runtime,
            "ICudaEngine": RtxEngine if self.rtx else Engine,
            "IExecutionContext": Context,
            **({"IRuntimeConfig": RuntimeConfig, "IRuntimeCache": RuntimeCache} if self.rtx else {}),
        }
        return module  # type: ignore[no-any-return]
