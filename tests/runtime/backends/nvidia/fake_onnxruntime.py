"""A strict fake of onnxruntime-gpu: the real names on a fake machine, see fake_cuda.py. It computes
with ONNX Runtime's CPU sessions.

As in the real library a run on our stream waits for nothing. The first runs allocate, which a
capture does not allow. Queued and captured runs use the session's memory. A session runs one batch
size: with another one the real library moves memory that a graph may read.
"""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime

from runtime.backends.nvidia.onnxruntime_cuda import OPTIONS, PROVIDER

from . import fake_cuda
from .fake_cuda import E, World

KNOWN_OPTIONS = {"device_id", "use_tf32", "user_compute_stream"}
"""Of the CUDA provider, from its documentation (C API, CUDA execution provider)."""
KINDS = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
WEIGHTS_BYTES = 3000
"""What a session takes on the device when it is opened."""
_sessions: dict[bytes, Any] = {}
ARENA_BYTES = 500
"""What each of its first runs takes."""
SETTLED = 2
"""Runs that allocate."""


class Options(onnxruntime.SessionOptions):
    """The real options; the CPU session that computes here would not accept an empty list of
    fallbacks."""

    def add_session_config_entry(self, key: str, value: str) -> None:
        assert (key, value) == ("session.disable_cpu_ep_fallback", "1")


class Bound:
    """IOBinding of memory on the device."""

    def __init__(self, session: "Session") -> None:
        self.session, self.addresses = session, dict[str, int]()

    def bind_input(
        self,
        name: str,
        device: str,
        number: int,
        kind: Any,
        shape: tuple[int, ...],
        address: int,
    ) -> None:
        port = self.session.ports[name]
        assert (device, number, kind) == ("cuda", 0, KINDS[port.type])
        assert tuple(port.shape[1:]) == tuple(shape[1:])
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        self.session.fake.world.view(address, size)
        assert address % 256 == 0
        self.addresses[name], self.batch = address, shape[0]

    bind_output = bind_input


class Session:
    """A session whose provider is the GPU's."""

    def __init__(
        self, fake: "Library", model: bytes, options: Any, providers: Any, enable_fallback: int
    ) -> None:
        ((provider, given),) = providers
        stream = fake.world.stream(int(given["user_compute_stream"]))
        assert enable_fallback == 0
        assert stream is not None
        assert provider == PROVIDER
        assert given == OPTIONS | {"user_compute_stream": given["user_compute_stream"]}
        assert given.keys() <= KNOWN_OPTIONS
        assert fake.preloaded, "the libraries of CUDA are not found"
        fake.opened += 1
        if fake.refuses:
            raise RuntimeError("CUDA failure 999: unknown error")
        self.fake, self.stream, self.memory = fake, stream, list[int]()
        weakref.finalize(self, fake.free, self.memory)
        self.take(WEIGHTS_BYTES)
        self.runs, self.batch = 0, 0
        if model not in _sessions:
            _sessions[model] = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        self.computes = _sessions[model]
        self.get_inputs, self.get_outputs = self.computes.get_inputs, self.computes.get_outputs
        self.ports = {p.name: p for p in (*self.get_inputs(), *self.get_outputs())}

    def take(self, size: int) -> None:
        answer = fake_cuda.cudaMalloc(self.fake.world, size)
        if not isinstance(answer, tuple):
            # Its words for a refusal of any kind.
            raise RuntimeError(f"Failed to allocate memory for requested buffer of size {size}")
        self.memory.append(answer[1])
        self.fake.held += size

    def get_providers(self) -> list[str]:
        return self.fake.providers

    def io_binding(self) -> Bound:
        return Bound(self)

    def run_with_iobinding(self, binding: Bound, options: Any) -> None:
        fake = self.fake
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        assert binding.session is self
        assert binding.addresses.keys() == self.ports.keys()
        assert len(set(binding.addresses.values())) == len(self.ports)
        if fake.fails:
            raise RuntimeError(fake.fails)
        addresses, batch, computes = dict(binding.addresses), binding.batch, self.computes
        assert self.batch in (0, batch), "the session ran another batch size"
        self.batch = batch
        if self.runs < SETTLED:
            self.runs += 1
            fake.meanwhile()
            self.take(ARENA_BYTES)
        held, world = tuple(self.memory), fake.world

        def run() -> None:
            for address in held:
                world.view(address, 1)
            compute(world, computes, addresses, batch)

        world.enqueue(self.stream, run)


def compute(world: World, session: Any, addresses: dict[str, int], batch: int) -> None:
    """Run the step at the addresses."""

    def array(port: Any) -> Any:
        shape, kind = (batch, *port.shape[1:]), KINDS[port.type]
        data = world.view(addresses[port.name], int(np.prod(shape)) * np.dtype(kind).itemsize)
        return np.frombuffer(data, kind).reshape(shape)

    outputs = session.get_outputs()
    feeds = {port.name: array(port).copy() for port in session.get_inputs()}
    with np.errstate(all="ignore"):
        values = session.run([port.name for port in outputs], feeds)
    for port, value in zip(outputs, values, strict=True):
        array(port)[...] = value


class Library:
    """The module onnxruntime of onnxruntime-gpu."""

    SessionOptions = Options
    cuda_version = "13.0"

    def __init__(self, world: World) -> None:
        self.world = world
        self.providers, self.available = [PROVIDER], [PROVIDER, "CPUExecutionProvider"]
        self.refuses, self.fails, self.preloaded = False, "", False
        self.absent = set[str]()
        self.opened = self.held = 0
        self.meanwhile: Callable[[], object] = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)

    def get_available_providers(self) -> list[str]:
        return self.available

    def preload_dlls(self) -> None:
        print("Failed to load libcufft.so.12: as the real one may")
        self.preloaded = True

    def loads(self, name: str) -> bool:
        assert self.preloaded
        return name not in self.absent

    def free(self, memory: list[int]) -> None:
        """Give a session's memory back, as its destructor does."""
        for address in memory:
            self.held -= self.world.device[address][1]
            assert fake_cuda.cudaFree(self.world, address) == E.cudaSuccess
        memory.clear()

    def InferenceSession(
        self, model: bytes, options: Any, providers: list[Any], enable_fallback: int
    ) -> Session:
        return Session(self, model, options, providers, enable_fallback)
