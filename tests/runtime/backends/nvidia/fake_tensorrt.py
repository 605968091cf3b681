"""A strict fake of TensorRT's runtime: the real classes' names and signatures, and False or None as
the real ones return. It computes with ONNX Runtime.

Its plans are the ONNX model and the build options. Enums and the base class of loggers are those of
tensorrt_rtx.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime
import pytest

from .fake_cuda import World

real: Any = pytest.importorskip("tensorrt_rtx")
MAGIC = b"fake plan\n"
RTX_ONLY = {
    "ComputeCapability",
    "CudaGraphStrategy",
    "DynamicShapesKernelSpecializationStrategy",
    "IRuntimeCache",
}
KINDS = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
_sessions: dict[bytes, Any] = {}


def plan(model: bytes, buckets: tuple[int, ...]) -> bytes:
    """An engine that these fakes can read."""
    return MAGIC + json.dumps({"buckets": buckets}).encode() + b"\n" + model


def overloads(function: Any) -> list[list[str]]:
    """The parameters of a pybind function after self, as "name: type", for each of its overloads;
    read from its docstring."""
    found = []
    for line in (function.__doc__ or "").splitlines():
        match = re.match(r"(?:\d+\. )?\w+\(self: [\w.]+(?:, (.*))?\) -> ", line)
        if match:
            found.append(re.findall(r"\w+: [^,]+(?:\[[^]]*\])?[^,]*", match[1] or ""))
    return found


def fits(parameters: list[str], arguments: tuple[Any, ...]) -> bool:
    required = sum(" = " not in p for p in parameters)
    if not required <= len(arguments) <= len(parameters):
        return False
    for parameter, argument in zip(parameters, arguments, strict=False):
        kind = parameter.partition(": ")[2]
        if kind.startswith("typing.SupportsInt") and not isinstance(argument, (int, np.integer)):
            return False
        if (
            kind.startswith(("str", "tuple", "list"))
            and type(argument).__name__ != kind.partition(" ")[0].partition("[")[0]
        ):
            return False
    return True


class Strict:
    """Base of the fakes: a method must exist in the real class, with the same signature. `failing`:
    what it returns if the test makes it fail."""

    like: Any
    failing: Mapping[str, Any]

    def __init_subclass__(cls, like: Any, failing: Mapping[str, Any] | None = None) -> None:
        cls.like, cls.failing = like, failing or {}
        for name, value in list(vars(cls).items()):
            if name.startswith("_") or name in ("like", "failing"):
                continue
            assert hasattr(cls.like, name), f"{cls.like.__name__} has no {name}"
            if callable(value):
                setattr(cls, name, cls.checked(name, value))

    @classmethod
    def checked(cls, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        known, failed = overloads(getattr(cls.like, name)), cls.failing.get(name)

        def call(self: Any, *arguments: Any) -> Any:
            assert any(fits(parameters, arguments) for parameters in known), (
                f"{name}{arguments} is none of {known}"
            )
            if name in cls.failing and self._world.fails(name):
                if isinstance(failed, Exception):
                    raise failed
                return failed
            return function(self, *arguments)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        assert name.startswith("_") or hasattr(self.like, name), (
            f"{self.like.__name__} has no {name}"
        )
        object.__setattr__(self, name, value)


class Library:
    """The module as `tensorrt_rtx`, or as `tensorrt`, which has less."""

    def __init__(self, world: World, name: str, version: str) -> None:
        self.world, self.__name__, self.__version__ = world, name, version

    def __getattr__(self, name: str) -> Any:
        found = getattr(real, name)
        if self.__name__ == "tensorrt" and name in RTX_ONLY:
            raise AttributeError(name)
        assert name not in ("Builder", "OnnxParser"), f"the fake has no {name}"
        return found

    def Runtime(self, logger: Any) -> Any:
        assert isinstance(logger, real.ILogger)
        if self.world.fails("Runtime"):
            logger.log(real.ILogger.Severity.ERROR, "the fake starts no runtime")
            raise TypeError("Runtime: factory function returned nullptr")
        return Runtime(self.world, self, logger)


class Runtime(Strict, like=real.Runtime, failing={"deserialize_cuda_engine": None}):
    engine_host_code_allowed = True

    def __init__(self, world: World, library: Library, logger: Any) -> None:
        self._world, self._library, self._logger = world, library, logger

    def deserialize_cuda_engine(self, data: bytes) -> Any:
        assert self.engine_host_code_allowed is False
        if not data.startswith(MAGIC):
            self._logger.log(real.ILogger.Severity.ERROR, "the fake cannot read this plan")
            return None
        header, _, model = data[len(MAGIC) :].partition(b"\n")
        made = Engine(self._world, self._library, model, json.loads(header)["buckets"])
        made._logger = self._logger
        return made


class Engine(Strict, like=real.ICudaEngine, failing={"create_execution_context": None}):
    num_io_tensors = num_optimization_profiles = device_memory_size_v2 = 0

    def __init__(self, world: World, library: Library, model: bytes, buckets: list[int]) -> None:
        if model not in _sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            _sessions[model] = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        self._world, self._library, self._session, self._buckets = (
            world,
            library,
            _sessions[model],
            buckets,
        )
        self._inputs, self._outputs = (
            {p.name: p for p in f()} for f in (self._session.get_inputs, self._session.get_outputs)
        )
        self._ports = {**self._inputs, **self._outputs}
        self.num_io_tensors, self.num_optimization_profiles = len(self._ports), len(buckets)
        self.device_memory_size_v2 = 1000 * max(buckets)

    def get_tensor_name(self, index: int) -> str:
        return list(self._ports)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return real.TensorIOMode.INPUT if name in self._inputs else real.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return {np.float32: real.DataType.FLOAT, np.int64: real.DataType.INT64}[
            KINDS[self._ports[name].type]
        ]

    def get_tensor_location(self, name: str) -> Any:
        return real.TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        return [(self._buckets[profile_index], *self._ports[name].shape[1:])] * 3

    def create_runtime_config(self) -> Any:
        assert self._library.__name__ == "tensorrt_rtx"
        return RuntimeConfig(self._world)

    def create_execution_context(self, how: Any) -> Any:
        managed = real.ExecutionContextAllocationStrategy.USER_MANAGED
        if isinstance(how, RuntimeConfig):
            assert (
                how.dynamic_shapes_kernel_specialization_strategy
                == real.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            assert how.cuda_graph_strategy == real.CudaGraphStrategy.DISABLED
            how = how._strategy
        else:
            assert self._library.__name__ == "tensorrt"
        return (
            (RtxContext if self._library.__name__ == "tensorrt_rtx" else Context)(self)
            if how == managed
            else None
        )


class RuntimeConfig(Strict, like=real.IRuntimeConfig, failing={"set_runtime_cache": False}):
    dynamic_shapes_kernel_specialization_strategy = cuda_graph_strategy = None

    def __init__(self, world: World) -> None:
        self._world, self._strategy = world, None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> Any:
        return RuntimeCache(self._world)

    def set_runtime_cache(self, cache: Any) -> bool:
        return isinstance(cache, RuntimeCache)


class RuntimeCache(
    Strict, like=real.IRuntimeCache, failing={"serialize": None, "deserialize": False}
):
    def __init__(self, world: World) -> None:
        self._world, self._data = world, b""

    def deserialize(self, blob: bytes) -> bool:
        return blob == b"kernels"

    def serialize(self) -> Any:
        return memoryview(b"kernels")


class Context(
    Strict,
    like=real.IExecutionContext,
    failing={
        "set_optimization_profile_async": False,
        "set_input_shape": False,
        "infer_shapes": ["state"],
        "set_tensor_address": False,
        "execute_async_v3": False,
    },
):
    """Runs when the stream reaches it, at the addresses from when it was enqueued. It overwrites
    its activation memory."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._world = engine, engine._world
        self._bucket, self._shapes, self._addresses = None, {}, {}
        self._memory, self._directions = None, set[int]()

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._bucket = self._engine._buckets[profile_index]
        return self._world.stream(stream_handle) is not None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._bucket is None or name not in self._engine._inputs:
            return False
        self._shapes[name] = shape
        return shape == (self._bucket, *self._engine._ports[name].shape[1:])

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine._inputs if name not in self._shapes]

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        assert size >= self._engine.device_memory_size_v2  # of all profiles
        self._memory = memory, size

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._ports or memory % 256:
            return False
        try:
            self._world.view(memory, self._size(name))
        except MemoryError:
            return False
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        stream, ports = self._world.stream(stream_handle), self._engine._ports
        if self._engine._inputs.keys() != self._shapes.keys():
            return False
        if stream is None or self._memory is None or self._addresses.keys() != ports.keys():
            return False
        if len(set(self._addresses.values())) != len(ports):
            return False  # inputs and outputs alias
        if stream.recording is None:
            self._directions.add(self._addresses["state"])
        elif self._addresses["state"] not in self._directions:
            return False  # what is initialised in the first run cannot be captured
        addresses, (memory, size) = dict(self._addresses), self._memory

        def run() -> None:
            self._world.view(memory, size)[:] = b"\xee" * size
            feeds = {
                name: self._array(name, addresses[name]).copy() for name in self._engine._inputs
            }
            names = list(self._engine._outputs)
            for name, value in zip(names, self._engine._session.run(names, feeds), strict=True):
                self._array(name, addresses[name])[...] = value

        self._world.enqueue(stream, run)
        return True

    def _shape(self, name: str) -> tuple[int, ...]:
        return (self._bucket, *self._engine._ports[name].shape[1:])

    def _size(self, name: str) -> int:
        return (
            int(np.prod(self._shape(name)))
            * np.dtype(KINDS[self._engine._ports[name].type]).itemsize
        )

    def _array(self, name: str, address: int) -> Any:
        data = self._world.view(address, self._size(name))
        return np.frombuffer(data, KINDS[self._engine._ports[name].type]).reshape(self._shape(name))


class RtxContext(
    Context, like=real.IExecutionContext, failing={**Context.failing, "is_stream_capturable": False}
):
    """TensorRT-RTX's context also reports whether it can be captured."""

    def is_stream_capturable(self, stream: int) -> bool:
        return self._world.stream(stream) is not None
