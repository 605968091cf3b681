"""ONNX Runtime on the CPU. Its float32 kernels compute a sample alike in any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property, partial
from threading import Lock
from typing import cast

import numpy as np

from ..bundle.bundle import Bundle
from ..bundle.format import WEIGHTS, inside, step_file
from ..errors import BundleError
from ..errors.arguments import integer
from .base import missing
from .forks import ForkGuard
from .host import Call
from .memory import is_heavy, trim
from .onnxfile import check_graph
from .onnxruntime_api import OnnxRuntimeLibrary, Port, Session
from .ports import dtype_of, optional_ports, shapes
from .processor import quota, usable_cores
from .streams import StreamBuffers

LEAST_ROUNDED = 2
"""The smallest batch without guidance in int8. A lone sample runs next to an empty one: its
convolutions would be cut among the threads, which sum in another order. Graphs in float32 are
written so that they are not cut (`export.graph.rounding`). One thread cuts nothing."""
FEW_THREADS = 2
"""One of so many threads computes a lone sample sooner than all of them compute two."""


class OnnxRuntime:
    """The step graphs of one precision as ONNX Runtime sessions, each made when first needed.

    A session has a number of threads, so streams have sessions of their own. Sessions of one thread
    run in the threads that call them.

    Args:
        threads: Of one call; None for one a core.
        streams: Into how many parts every call is cut; None leaves it to the caller.

    Raises:
        BackendError: onnxruntime is missing.
        BundleError: onnxruntime cannot load a graph.
    """

    name = "onnxruntime"

    def __init__(
        self, bundle: Bundle, precision: str, threads: int | None, streams: int | None = None
    ) -> None:
        try:
            import onnxruntime

            # To uninstall one of its two packages leaves a folder that imports, without its files.
            from onnxruntime import InferenceSession  # noqa: F401
        except ImportError as error:
            raise missing("onnxruntime", "cpu", error) from error
        self.bundle = bundle
        self.precision = precision
        self.guard = ForkGuard(self.name, self)
        self.threads = integer("threads", threads, 1, 1024) if threads is not None else 0
        self._library = cast(OnnxRuntimeLibrary, onnxruntime)
        self._lock = Lock()
        self._heavy = is_heavy(bundle, precision)
        self.streams = streams
        few = (self.threads or usable_cores()) <= FEW_THREADS
        # The smallest batch without guidance, and the threads of a lone sample.
        self.least = 1 if few or precision == "fp32" else LEAST_ROUNDED
        self.alone = 1 if few and precision != "fp32" else self.threads
        # Opened at once, for its errors; whether it has been used.
        self._sessions = {(False, self.alone): self.open(False, self.alone)}
        self._used = False

    @cached_property
    def _weights(self) -> bytes:
        return self._read_weights()

    def _read_weights(self) -> bytes:
        return self.bundle.read(inside(self.precision, WEIGHTS))

    def open(self, guided: bool, threads: int) -> Session:
        """Open a session of a step graph; 0 threads are one a core.

        Raises:
            BundleError: It cannot be loaded, or is not a step graph for the bundle's samples.
        """
        ort = self._library
        # The CPU variant of a graph, if the bundle has one, computes the same values faster.
        path = inside(self.precision, step_file(guided, pixels=True))
        if path not in self.bundle.files:
            path = inside(self.precision, step_file(guided))
        options = ort.SessionOptions()
        # Of its own accord it counts the machine's cores, not those of a container.
        options.intra_op_num_threads = threads or quota() or 0
        options.log_severity_level = 3
        # Its threads would keep the cores busy for a while after a call, and slow the next one if
        # that is of another session: calls alone and in streams take turns.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # A pattern is one block for all values of a call, on top of those of the first call.
        options.enable_mem_pattern = not self._heavy
        # A session has its own copy, so large weights are read again for the next one.
        weights = self._read_weights() if self._heavy else self._weights
        # From memory, under the name that the graph gives: no path in the file is ever followed.
        options.add_external_initializers_from_files_in_memory([WEIGHTS], [weights], [len(weights)])
        model = self.bundle.read(path)
        try:
            check_graph(model)
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own errors share no base class
            raise BundleError(
                f"{self.bundle.path / path}: onnxruntime cannot load it: {error}"
            ) from error
        check_ports(self.bundle, path, session.get_inputs(), session.get_outputs())
        del options, weights
        if self._heavy:
            trim()
        return session

    def session(self, guided: bool, threads: int) -> Session:
        """Return the session of the step graph, or of the guided one, with so many threads."""
        # Other threads may ask for the same session at the same time.
        with self._lock:
            key = guided, threads
            first = False, self.alone
            if key == first:
                self._used = True
            elif not guided and not self._used:
                # It makes room: who samples in batches alone then holds the weights once.
                self._sessions.pop(first, None)
            if key not in self._sessions:
                self._sessions[key] = self.open(guided, threads)
            return self._sessions[key]

    def bind(self, batch: int) -> OnnxRuntimeBuffers:
        """Allocate memory for `batch` samples, bound to the sessions."""
        return OnnxRuntimeBuffers(self, batch)


def check_ports(bundle: Bundle, file: str, inputs: Iterable[Port], outputs: Iterable[Port]) -> None:
    """Check a graph's inputs and outputs.

    Raises:
        BundleError: They are not those of a step graph for the bundle's samples, of any batch.
    """
    wanted = {
        name: list(shape[1:])
        for name, shape in shapes(bundle, 1).items()
        if name not in optional_ports(bundle)
    }
    for port in (*inputs, *outputs):
        integers = dtype_of(bundle, port.name) is np.int64
        kind = "tensor(int64)" if integers else "tensor(float)"
        # The batch must be a free dimension, every other one the bundle's.
        if (
            port.name not in wanted
            or port.type != kind
            or not port.shape
            or isinstance(port.shape[0], int)
            or list(port.shape[1:]) != wanted.pop(port.name)
        ):
            raise BundleError(
                f"{bundle.path / file}: {port.name!r}, {port.type} {port.shape}, is none of a "
                f"step graph's "
                f"for samples of {list(bundle.sample_shape)}. "
                "Fetch or export the bundle again."
            )
    if wanted.keys() - {"label"}:
        raise BundleError(
            f"{bundle.path / file} lacks {', '.join(sorted(wanted))}. Fetch or export the bundle "
            f"again."
        )


class OnnxRuntimeBuffers(StreamBuffers):
    """Memory bound to the sessions."""

    def __init__(self, backend: OnnxRuntime, batch: int) -> None:
        threads = backend.threads or usable_cores()
        spare = backend.least - 1
        super().__init__(backend.bundle, backend.guard, batch, threads, backend.streams, spare)
        self._backend = backend

    def _least(self, guided: bool) -> int:
        # A guided graph runs two rows a sample.
        return 1 if guided else self._backend.least

    def _bind_part(self, part: Call) -> Callable[[], object]:
        backend = self._backend
        threads = backend.threads if part.streams == 1 else self.threads_of(part.streams)
        if part.count == 1 and not part.guided and part.streams == 1:
            threads = backend.alone
        session = backend.session(part.guided, threads)
        # The spare sample of the allocation fills the batch next to a single one.
        arrays = self._arrays(replace(part, count=max(part.count, self._least(part.guided))))
        binding = session.io_binding()
        for bind, ports in (
            (binding.bind_input, session.get_inputs()),
            (binding.bind_output, session.get_outputs()),
        ):
            for port in ports:
                array = arrays[port.name]
                bind(port.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        # The session's own method, without the wrapper's checks for graph capture on a GPU.
        return partial(session._sess.run_with_iobinding, binding._iobinding, None)
