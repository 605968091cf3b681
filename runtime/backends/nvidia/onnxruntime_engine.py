"""A session of ONNX Runtime as a step engine: it runs on a stream of ours, at addresses of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    """Sessions of a step graph, one for each batch size.

    A session that runs a larger batch moves some of its memory, and plans its convolutions again.
    A graph that was captured before would read what is gone.

    Args:
        make: Opens a session on the stream. It is called at once, for its errors.

    Attributes:
        held: Bytes that the sessions hold on the device, estimated from what is free.
    """

    def __init__(
        self, ort: OnnxRuntimeLibrary, cuda: Cuda, bundle: Bundle, make: Callable[[], Session]
    ) -> None:
        self._ort = ort
        self._make = make
        self._sessions: dict[int, Session] = {}
        self.cuda = cuda
        self.bundle = bundle
        self.held = 0
        self._first: Session | None = self._opened()

    def context(self, bucket: int, stream: Stream) -> Context:
        """Make a context for a batch size. `stream` is the one that sessions are opened with.

        Raises:
            GpuError: A session does not open.
        """
        if bucket not in self._sessions:
            self._sessions[bucket] = self._first or self._opened()
            self._first = None
        options = self._ort.RunOptions()
        for key, value in RUN.items():
            options.add_run_config_entry(key, value)
        return Context(self, self._sessions[bucket], bucket, options)

    def _opened(self) -> Session:
        with self.growing():
            return self._make()

    @contextmanager
    def growing(self) -> Iterator[None]:
        """Add what the device's memory loses meanwhile, and let no other backend capture."""
        with exclusive():
            before = self.cuda.free_bytes()
            yield
            self.held += max(0, before - self.cuda.free_bytes())


class Context:
    """Bindings of a session to device memory, for one batch size."""

    def __init__(self, engine: Engine, session: Session, bucket: int, options: RunOptions) -> None:
        self._engine = engine
        self._session = session
        self._options = options
        self._kinds = shapes(engine.bundle, bucket)
        self._bindings: dict[tuple[Address, ...], Binding] = {}
        self._current: Binding | None = None
        self._settled = False

    def bind(self, addresses: Mapping[str, Address]) -> None:
        """Set the address of each tensor, for the next runs."""
        session = self._session
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
                with engine.growing():
                    for _ in range(_SETTLING):
                        self._session.run_with_iobinding(self._current, self._options)
                        engine.cuda.synchronize(stream)
                self._settled = True
            self._session.run_with_iobinding(self._current, self._options)

    def capturable(self, stream: Stream) -> bool:
        """Whether runs can be captured."""
        return True

    def _bound(self, addresses: Mapping[str, Address]) -> Binding:
        session = self._session
        binding = session.io_binding()
        for bind, ports in (
            (binding.bind_input, session.get_inputs()),
            (binding.bind_output, session.get_outputs()),
        ):
            for port in ports:
                name = port.name
                kind = dtype_of(self._engine.bundle, name)
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
