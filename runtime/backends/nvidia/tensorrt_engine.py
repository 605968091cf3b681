"""An engine of TensorRT or TensorRT-RTX, whose modules have the same names.

The libraries report errors by return values and a log, so every return value is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import numpy as np

from ...bundle.bundle import Bundle
from ...errors import EngineError, GpuError, GpuMemoryError
from .. import cache
from ..ports import dtype_of, optional_ports, shapes
from . import engine_cache as engines
from .cuda import Cuda
from .cuda_api import Address, Stream
from .cuda_errors import library_error
from .engine_cache import Entry, Gpu
from .exclusive import exclusive
from .tensorrt_api import ExecutionContext, Log, NativeRuntime, TensorRtLibrary

OUTPUTS = frozenset({"next_state", "denoised"})
"""The step graph's outputs; its other tensors are inputs."""


class Engine:
    """An engine of a bundle's step graph, on the device.

    Args:
        owner: Of the memory for activations.

    Attributes:
        held: Bytes that it holds there.

    Raises:
        EngineError: It cannot be loaded, or is not of a step graph for the bundle's samples.
        GpuMemoryError: It does not fit in the device's memory.
    """

    def __init__(
        self,
        trt: TensorRtLibrary,
        runtime: NativeRuntime,
        log: Log,
        cuda: Cuda,
        bundle: Bundle,
        entry: Entry,
        gpu: Gpu,
        owner: ExitStack,
    ) -> None:
        self._owner = owner
        self._trt = trt
        self._log = log
        self._cuda = cuda
        self._gpu = gpu
        self.entry = entry
        data = engines.load(entry)
        before = cuda.free_bytes()
        log.clear()
        with exclusive():
            engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            # The library does not say why. If less than twice its size was free, memory is why.
            if before < 2 * len(data):
                raise GpuMemoryError(
                    f"the engine of {entry.recipe} did not fit: it has {len(data) / 1e6:.0f} MB, "
                    f"and {before / 1e6:.0f} MB were free."
                )
            raise EngineError(
                f"{self} does not load here: {log.said() or 'no reason given'}. {self._again()}"
            )
        self._engine = engine
        self._activations: tuple[Address, int] | None = None
        # The library allocates weights itself: other processes' allocations may falsify this.
        self.held = max(0, before - cuda.free_bytes())
        count = engine.num_io_tensors
        self.names: tuple[str, ...] = tuple(engine.get_tensor_name(i) for i in range(count))
        self._shapes = {
            name: shape for name, shape in shapes(bundle, 1).items() if name not in OUTPUTS
        }
        self._check(bundle)

    def __str__(self) -> str:
        return f"the engine of {self.entry.recipe}"

    @property
    def buckets(self) -> tuple[int, ...]:
        """The batch sizes that it was built for, ascending."""
        return self.entry.recipe.buckets

    def inputs(self, bucket: int) -> dict[str, tuple[int, ...]]:
        """List the shapes of the inputs for a batch size, by name."""
        return {
            name: (bucket, *self._shapes[name][1:]) for name in self.names if name in self._shapes
        }

    @property
    def lacking(self) -> int:
        """Bytes for activations that are still to be allocated."""
        return 0 if self._activations else int(self._engine.device_memory_size_v2)

    def context(self, bucket: int, stream: Stream) -> Context:
        """Make a context for a batch size.

        All contexts share their activations: they run one after another, on one stream.

        Raises:
            GpuMemoryError: The device's memory is full.
            GpuError: The library refuses.
        """
        # The size for all profiles: the library asks for it even if a smaller one is used.
        if self._activations is None:
            size = int(self._engine.device_memory_size_v2)
            self._activations = self._cuda.memory(size, self._owner), size
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        rtx = self._trt.__name__ == "tensorrt_rtx"
        self._log.clear()
        with exclusive():
            made = (
                self._finished(strategy) if rtx else self._engine.create_execution_context(strategy)
            )
            if made is None:
                raise library_error(f"{self} gave no execution context", self._log.said())
            return Context(self, made, self._log, bucket, *self._activations, stream)

    def _finished(self, strategy: object) -> ExecutionContext | None:
        """A context of TensorRT-RTX, whose kernels are compiled now or come from the cache."""
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # By default it compiles during the first runs: a graph would then hold kernels that are
        # replaced, and results would change with them.
        config.dynamic_shapes_kernel_specialization_strategy = (
            self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        # We capture the loop ourselves: the library must not capture inside a capture.
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.DISABLED
        compiled = config.create_runtime_cache()
        key = cache.key("rtx", self.entry.sha256, self._gpu)
        kept = cache.load(key)
        if kept and not compiled.deserialize(bytes(kept[0])):
            cache.forget(key)
            kept = None
        if not config.set_runtime_cache(compiled):
            raise GpuError(
                f"{self}: the library does not take a cache of kernels: {self._log.said()}."
            )
        context = self._engine.create_execution_context(config)
        # Stored again only if making the context compiled kernels that the cache lacked.
        data = compiled.serialize() if context is not None else None
        if data is not None and (not kept or len(kept[0]) != data.nbytes):
            cache.store(key, [bytes(data)])
        return context

    def _check(self, bundle: Bundle) -> None:
        """Raise EngineError unless the tensors and profiles are a step graph's."""
        trt = self._trt
        engine = self._engine
        absent = optional_ports(bundle)
        wanted = {name: s for name, s in shapes(bundle, -1).items() if name not in absent}
        if set(self.names) != wanted.keys():
            raise EngineError(
                f"{self} has the tensors {sorted(self.names)}, not {sorted(wanted)}. "
                f"{self._again()}"
            )
        if engine.num_optimization_profiles != len(self.buckets):
            raise EngineError(
                f"{self} has {engine.num_optimization_profiles} profiles. {self._again()}"
            )
        for name in self.names:
            integers = dtype_of(bundle, name) is np.int64
            kind = trt.DataType.INT64 if integers else trt.DataType.FLOAT
            mode = trt.TensorIOMode.OUTPUT if name in OUTPUTS else trt.TensorIOMode.INPUT
            found = (
                engine.get_tensor_mode(name),
                engine.get_tensor_dtype(name),
                engine.get_tensor_location(name),
            )
            good = found == (mode, kind, trt.TensorLocation.DEVICE)
            # Static profiles: the least, best and largest shape are all the bucket's.
            for i, bucket in enumerate(self.buckets):
                if name not in OUTPUTS:
                    three = [tuple(shape) for shape in engine.get_tensor_profile_shape(name, i)]
                    good = good and three == [(bucket, *wanted[name][1:])] * 3
            if not good:
                raise EngineError(
                    f"{self}: tensor {name!r} is not that of a step graph, {found}. {self._again()}"
                )

    def _again(self) -> str:
        return (
            "Remove it and build it again: python -m export.engines clear, "
            "python -m export.engines build."
        )


class Context:
    """An execution context for one batch size.

    Only the addresses of its tensors can change between runs.
    """

    def __init__(
        self,
        engine: Engine,
        context: ExecutionContext,
        log: Log,
        bucket: int,
        memory: Address,
        size: int,
        stream: Stream,
    ) -> None:
        self._engine = engine
        self._context = context
        self._log = log
        self.names = engine.names
        profile = engine.buckets.index(bucket)
        try:
            chosen = context.set_optimization_profile_async(profile, int(stream))
        except (RuntimeError, ValueError) as error:
            raise GpuError(f"{engine} refused profile {profile}: {error}.") from error
        self._must(chosen, f"refused profile {profile}")
        for name, shape in engine.inputs(bucket).items():
            self._must(
                context.set_input_shape(name, shape), f"refused the shape {shape} of {name!r}"
            )
        try:
            lacking = context.infer_shapes()
        except RuntimeError as error:
            raise GpuError(f"{engine} could not infer its shapes: {error}.") from error
        self._must(not lacking, f"lacks the shapes of {lacking}")
        if size:
            context.set_device_memory(memory, size)

    def bind(self, addresses: Mapping[str, Address]) -> None:
        """Set the address of each tensor, for the next runs."""
        for name in self.names:
            self._must(
                self._context.set_tensor_address(name, addresses[name]),
                f"refused {name!r} at {addresses[name]:#x}",
            )

    def enqueue(self, stream: Stream) -> None:
        """Put a run on the stream."""
        self._must(self._context.execute_async_v3(int(stream)), "could not be enqueued")

    def capturable(self, stream: Stream) -> bool:
        """Ask the library whether runs can be captured; True if its version cannot be asked."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(int(stream)))

    def _must(self, good: bool, what: str) -> None:
        if not good:
            raise library_error(f"{self._engine} {what}", self._log.said())
