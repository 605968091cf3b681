"""A session of ONNX Runtime as a step engine: it runs on a stream of ours, at addresses of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ...bundle.bundle import Bundle
from ...errors import UnnoiseError
from ..onnxruntime_api import Binding, OnnxRuntimeLibrary, RunOptions, Session
from ..ports import dtype_of, shapes
from .cuda import Cuda
from .cuda_api import Address, Stream
from .cuda_errors import library_error
from .exclusive import exclusive

RUN = {"disable_synchronize_execution_providers": "1"}
"""Entries of a run's configuration. The stream keeps the order, so a run waits for nothing."""
_SETTLING = 3
"""Runs of a context before it counts as used: ONNX Runtime's arena and memory patterns, and cuDNN's
choice of algorithms, settle in the first runs, and must not be captured."""


class Engine:
    """A session of a step graph. All its contexts share its weights and its arena.

    Args:
        held: Bytes of device memory that opening the session took.

    Attributes:
        held: Bytes that it holds on the device, estimated from what is free.
        lacking: 0; the arena grows in the first runs, by an amount that nothing tells.
    """

    lacking = 0

    def __init__(
        self, ort: OnnxRuntimeLibrary, session: Session, cuda: Cuda, bundle: Bundle, held: int
    ) -> None:
        self._ort = ort
        self.session = session
        self.cuda = cuda
        self.bundle = bundle
        self.held = held

    def context(self, bucket: int, stream: Stream) -> Context:
        """Make a context for a batch size. `stream` is the one that the session was opened with."""
        options = self._ort.RunOptions()
        for key, value in RUN.items():
            options.add_run_config_entry(key, value)
        return Context(self, bucket, options)


class Context:
    """Bindings of a session to device memory, for one batch size."""

    def __init__(self, engine: Engine, bucket: int, options: RunOptions) -> None:
        self._engine = engine
        self._options = options
        self._kinds = shapes(engine.bundle, bucket)
        self._bindings: dict[tuple[Address, ...], Binding] = {}
        self._current: Binding | None = None
        self._settled = False

    def bind(self, addresses: Mapping[str, Address]) -> None:
        """Set the address of each tensor, for the next runs."""
        session = self._engine.session
        ports = (*session.get_inputs(), *session.get_outputs())
        key = tuple(addresses[port.name] for port in ports)
        if key not in self._bindings:
            self._bindings[key] = self._bound(addresses)
        self._current = self._bindings[key]

    def enqueue(self, stream: Stream) -> None:
        """Put a run on the stream. The first one waits until the session has settled.

        Raises:
            GpuError: The run fails.
            GpuMemoryError: The device's memory is full.
        """
        assert self._current is not None, "not bound"
        engine = self._engine
        with _failing():
            if not self._settled:
                # It allocates, which would break another backend's capture.
                with exclusive():
                    before = engine.cuda.free_bytes()
                    for _ in range(_SETTLING):
                        engine.session.run_with_iobinding(self._current, self._options)
                        engine.cuda.synchronize(stream)
                    engine.held += max(0, before - engine.cuda.free_bytes())
                self._settled = True
            engine.session.run_with_iobinding(self._current, self._options)

    def capturable(self, stream: Stream) -> bool:
        """Whether runs can be captured."""
        return True

    def _bound(self, addresses: Mapping[str, Address]) -> Binding:
        engine = self._engine
        session = engine.session
        binding = session.io_binding()
        for bind, ports in (
            (binding.bind_input, session.get_inputs()),
            (binding.bind_output, session.get_outputs()),
        ):
            for port in ports:
                name = port.name
                kind = dtype_of(engine.bundle, name)
                bind(name, "cuda", 0, kind, self._kinds[name], addresses[name])
        return binding


@contextmanager
def _failing() -> Iterator[None]:
    """Turn onnxruntime's errors, which share no base class, into ours."""
    try:
        yield
    except UnnoiseError:
        raise
    except Exception as error:
        raise library_error("onnxruntime-cuda could not run", str(error)[:600]) from error
