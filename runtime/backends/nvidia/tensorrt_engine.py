"""An engine of TensorRT or TensorRT-RTX, written over the module object. Almost nothing there
raises: every answer is looked at."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Any

from ...bundle.bundle import Bundle
from ...errors import EngineError, GpuError, GpuMemoryError
from .. import cache
from ..base import missing, shapes
from . import engine_cache as engines
from .cuda import Address, Cuda
from .engine_cache import LIBRARIES, Entry, Gpu

OUTPUTS = frozenset({"next_state", "denoised"})
_LOG = logging.getLogger("unnoise.tensorrt")


def load_library(name: str) -> Any:
    """The module of an engine's library. Raises BackendError where it is not installed."""
    try:
        return importlib.import_module(LIBRARIES[name])
    except (ImportError, OSError) as error:
        raise missing(
            LIBRARIES[name], "rtx" if name == "tensorrt-rtx" else "tensorrt", error
        ) from error


def logger(trt: Any) -> Any:
    """A logger for the library: warnings into Python's log, and the errors of late, for messages of
    ours."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors = [*self.errors[-2:], message]
            elif severity == trt.ILogger.Severity.WARNING:
                _LOG.info("%s", message)

        def said(self) -> str:
            """The last errors."""
            return " ".join(self.errors)[:600]

    return Logger()


class Engine:
    """An engine of a bundle's step graph, on the device. weights: bytes that it holds there.

    Raises EngineError for one that cannot be loaded or is not of a step graph for the bundle's
    samples, GpuMemoryError.
    """

    def __init__(
        self, trt: Any, runtime: Any, log: Any, cuda: Cuda, bundle: Bundle, entry: Entry, gpu: Gpu
    ) -> None:
        self._trt = trt
        self._log = log
        self._cuda = cuda
        self._gpu = gpu
        self.entry = entry
        data = engines.load(entry)
        before = cuda.free_bytes()
        self._engine: Any = runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            if before < 2 * len(data):
                raise GpuMemoryError(
                    f"the engine of {entry.recipe} did not fit: it has {len(data) / 1e6:.0f} MB, "
                    f"and {before / 1e6:.0f} MB were free."
                )
            raise EngineError(
                f"{self} does not load here: {log.said() or 'no reason given'}. {self._again()}"
            )
        self.weights = max(0, before - cuda.free_bytes())
        count = self._engine.num_io_tensors
        self.names: tuple[str, ...] = tuple(self._engine.get_tensor_name(i) for i in range(count))
        self._shapes = {
            name: shape for name, shape in shapes(bundle, 1).items() if name not in OUTPUTS
        }
        self._check(bundle)

    def __str__(self) -> str:
        return f"the engine of {self.entry.recipe}"

    @property
    def buckets(self) -> tuple[int, ...]:
        return self.entry.recipe.buckets

    def inputs(self, bucket: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs for a batch size."""
        return {
            name: (bucket, *self._shapes[name][1:]) for name in self.names if name in self._shapes
        }

    def activations(self, bucket: int) -> int:
        """Bytes that a context needs for a batch of this size, beside its tensors."""
        return int(self._engine.get_device_memory_size_for_profile_v2(self.buckets.index(bucket)))

    def context(self, bucket: int, memory: Address, size: int, stream: Any) -> Context:
        """What runs batches of this size, with its activations in the memory given."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        rtx = self._trt.__name__ == "tensorrt_rtx"
        made = self._finished(strategy) if rtx else self._engine.create_execution_context(strategy)
        if made is None:
            raise GpuError(
                f"{self} gave no execution context: {self._log.said() or 'the device may be full'}."
            )
        return Context(self, made, self._log, bucket, memory, size, stream)

    def _finished(self, strategy: Any) -> Any:
        """A context of TensorRT-RTX, whose kernels are compiled now, for these shapes, or taken
        from the cache."""
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # Not lazily, in the first runs: a graph would hold kernels that are replaced, and results
        # would change with them.
        config.dynamic_shapes_kernel_specialization_strategy = (
            self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        config.cuda_graph_strategy = (
            self._trt.CudaGraphStrategy.DISABLED
        )  # we capture ourselves; never both
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
        data = compiled.serialize() if context is not None else None
        if data is not None and (not kept or len(kept[0]) != data.nbytes):
            cache.store(key, [bytes(data)])
        return context

    def _check(self, bundle: Bundle) -> None:
        """Raises EngineError where the tensors and profiles are not a step graph's."""
        trt = self._trt
        engine = self._engine
        wanted = shapes(bundle, -1)
        if not bundle.labels:
            del wanted["label"]
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
            kind = trt.DataType.INT64 if name == "label" else trt.DataType.FLOAT
            mode = trt.TensorIOMode.OUTPUT if name in OUTPUTS else trt.TensorIOMode.INPUT
            found = (
                engine.get_tensor_mode(name),
                engine.get_tensor_dtype(name),
                engine.get_tensor_location(name),
            )
            good = found == (mode, kind, trt.TensorLocation.DEVICE)
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
    """An execution context for one batch size. Its tensors' addresses can be changed between runs,
    nothing else."""

    def __init__(
        self,
        engine: Engine,
        context: Any,
        log: Any,
        bucket: int,
        memory: Address,
        size: int,
        stream: Any,
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
        """Where each tensor lies, from the next run on."""
        for name in self.names:
            self._must(
                self._context.set_tensor_address(name, addresses[name]),
                f"refused {name!r} at {addresses[name]:#x}",
            )

    def enqueue(self, stream: Any) -> None:
        self._must(self._context.execute_async_v3(int(stream)), "could not be enqueued")

    def capturable(self, stream: Any) -> bool:
        """Whether the library says that runs can be captured; True where it cannot be asked."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(int(stream)))

    def _must(self, good: Any, what: str) -> None:
        if not good:
            raise GpuError(f"{self._engine} {what}: {self._log.said() or 'no reason given'}.")
