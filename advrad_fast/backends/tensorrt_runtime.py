"""A built engine, loaded and run on CUDA streams; TensorRT and TensorRT-RTX behind one face."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

from advrad_fast.backends.tensorrt_library import Library, Toolkit, quoted
from advrad_fast.errors import ConfigError, InferenceError, expected

EngineType = Literal["fp32", "fp16", "bf16"]  #: of an engine's input and output

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


class Engine:
    """A loaded engine.  The thread that makes one, or an execution, has the GPU's context current; threads may share it.

    Args:
        blob: from :func:`build`.
        library: the one that built it.
        kernels: what TensorRT-RTX compiled for this blob on this GPU and driver before; it then compiles nothing again.
        keep: called by :meth:`keep_kernels` with what is to be given as ``kernels`` the next time.

    Attributes:
        input_dtype, output_dtype: of ``x`` and ``output``.
        batches: images a call, one optimisation profile each.

    Raises:
        BackendUnavailableError: the library refuses the blob (another version, another GPU), or there is no GPU.
    """

    def __init__(
        self, blob: bytes, library: Library, *, kernels: bytes | None = None, keep: Callable[[bytes], object] | None = None
    ) -> None:
        self._toolkit = Toolkit.of(library)
        self.library = library
        trt = self._toolkit.module
        self._runtime = self._toolkit.runtime()
        with self._toolkit.errors() as said:
            try:
                self._engine = self._runtime.deserialize_cuda_engine(blob)
            except (RuntimeError, TypeError) as error:
                raise self._toolkit.failure("does not load the engine", [*said, str(error)]) from error
            if self._engine is None:
                raise self._toolkit.failure("does not load the engine", said)
        types = {trt.DataType.FLOAT: "fp32", trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16"}
        found = [types.get(self._engine.get_tensor_dtype(name)) for name in ("x", "output")]
        if None in found:
            raise self._toolkit.failure("loaded an engine whose input or output is of a type that no kernel here has", [])
        self.input_dtype: EngineType = found[0]  # type: ignore[assignment]
        self.output_dtype: EngineType = found[1]  # type: ignore[assignment]
        profiles = range(int(self._engine.num_optimization_profiles))
        self._shapes = [tuple(int(n) for n in self._engine.get_tensor_profile_shape("x", i)[2]) for i in profiles]
        self.batches = tuple(shape[0] for shape in self._shapes)
        self._lock = threading.Lock()
        self._kernels, self._keep = self._runtime_cache(kernels), keep

    def execution(self, batch: int) -> Execution:
        """A context for one of :attr:`batches`, with device memory of its own, allocated now.  Not for two threads at once.

        Raises:
            ConfigError: the batch is not among :attr:`batches`.
            InferenceError: TensorRT cannot make it; it has no memory, mostly.
        """
        if batch not in self.batches:
            raise ConfigError(expected("batch", f"one of {list(self.batches)}", batch))
        index = self.batches.index(batch)
        with self._lock, self._toolkit.errors() as said:
            try:
                context = self._context()
                if context is None:
                    raise failed("cannot make an execution context", said)
                self._select(context, index, said)
            except (RuntimeError, TypeError, MemoryError) as error:
                if isinstance(error, InferenceError):
                    raise
                raise failed("cannot make an execution context", [*said, str(error)]) from error
        return Execution(self, context, self._memory(index))

    def keep_kernels(self) -> None:
        """Keep the kernels that TensorRT-RTX has compiled for this GPU; to be called once after each execution has run once.

        Without effect for TensorRT, whose engines hold their kernels.
        """
        if self._kernels is None or self._keep is None:
            return
        with self._lock:
            try:
                serialized = self._kernels.serialize()
            except (RuntimeError, TypeError):
                serialized = None
        if serialized is not None:
            self._keep(bytes(serialized))

    def _runtime_cache(self, kernels: bytes | None) -> Any:
        """TensorRT-RTX's cache of compiled kernels; None for TensorRT."""
        if self.library.name != "tensorrt_rtx":
            return None
        cache = self._engine.create_runtime_config().create_runtime_cache()
        if kernels is not None and not cache.deserialize(kernels):  # of another driver
            cache = self._engine.create_runtime_config().create_runtime_cache()
        return cache

    def _context(self) -> Any:
        """Memory for the profile that is chosen, not for the largest: a batch of 1 does not pay for one of 64."""
        trt = self._toolkit.module
        strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if self._kernels is None:
            return self._engine.create_execution_context(strategy)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.set_runtime_cache(self._kernels)
        # Every shape is known: compile for it at once, so that no slower kernel stands in, in a CUDA graph for good.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return self._engine.create_execution_context(config)

    def _select(self, context: Any, index: int, said: list[str]) -> None:
        """Choose the profile on a stream of its own, so that no capture on another stream is disturbed."""
        from pycuda.driver import Error, Stream

        try:
            stream = Stream(_NON_BLOCKING)
            chosen = context.set_optimization_profile_async(index, stream.handle)
            stream.synchronize()
        except Error as error:
            raise failed("cannot choose a profile", [*said, str(error)]) from error
        if not chosen or not context.set_input_shape("x", self._shapes[index]):
            raise failed(f"cannot choose the profile for the shape {self._shapes[index]}", said)

    def _memory(self, index: int) -> int:
        """Bytes for intermediate results; the method's name changed within TensorRT 10."""
        for name in ("get_device_memory_size_for_profile_v2", "get_device_memory_size_for_profile"):
            if hasattr(self._engine, name):
                return int(getattr(self._engine, name)(index))
        return int(getattr(self._engine, "device_memory_size_v2", 0))


class Execution:
    """One batch size's way through the network; from :meth:`Engine.execution`.

    Attributes:
        device_memory_bytes: what TensorRT holds for intermediate results.
    """

    def __init__(self, engine: Engine, context: Any, device_memory_bytes: int) -> None:
        self._engine, self._context = engine, context  # the context needs its engine alive
        self.device_memory_bytes = device_memory_bytes

    def set_addresses(self, input: int, output: int) -> None:
        """Where ``x`` is read and ``output`` written: (batch, C, H, W), contiguous, in the engine's types; kept until set again.

        Args:
            input, output: device addresses, multiples of 256.

        Raises:
            InferenceError: TensorRT refuses an address.
        """
        with self._engine._toolkit.errors() as said:
            for name, address in (("x", input), ("output", output)):
                try:
                    taken = self._context.set_tensor_address(name, int(address))
                except (RuntimeError, TypeError) as error:
                    raise failed(f"refuses the address {address:#x} for {name}", [*said, str(error)]) from error
                if not taken:
                    raise failed(f"refuses the address {address:#x} for {name}", said)

    def enqueue(self, stream_handle: int) -> None:
        """Put the network onto a CUDA stream, and return.

        It may be captured into a CUDA graph after one run outside of a capture, since the addresses were set.

        Raises:
            InferenceError: TensorRT failed; what it said is in the message.
        """
        with self._engine._toolkit.errors() as said:
            try:
                done = self._context.execute_async_v3(int(stream_handle))
            except RuntimeError as error:
                raise failed("cannot run the network", [*said, str(error)]) from error
            if not done:
                raise failed("cannot run the network", said)


def failed(what: str, said: Sequence[str]) -> InferenceError:
    """The exception for what TensorRT could not do, with what it said."""
    return InferenceError(f"cuda: TensorRT {what}{quoted(said)}")
