"""OpenVINO on the CPU: the step graph in float32 or int8; in bf16 the network alone, between a head
and a tail in float32.

Every batch size has compiled models of its own. Their kernels compute each sample alike whatever
else is in the batch.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Collection, Iterator
from threading import Lock
from typing import Any

import numpy as np

from ..bundle.bundle import Bundle
from ..bundle.format import STEP, WEIGHTS, inside, step_file
from ..errors import BackendError, BundleError
from ..errors.arguments import integer
from . import cache
from .base import HostBuffers, missing, shapes
from .forks import ForkGuard
from .onnxfile import refuse_endless, with_weights
from .openvino_parts import PARTS, split

CACHED = 1
"""Version of what is cached: raised whenever a graph is cut or compiled in another way than before.
"""
LEAST_GUIDED = 2
"""In int8 a lone guided sample runs beside an empty one: for it alone OpenVINO 2026.4 computes a
little otherwise than in any batch."""


class _SignalStack(ctypes.Structure):
    """Linux's stack_t."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def own_signal_stack() -> Iterator[None]:
    """Leave this thread's stack for signals as it was.

    OpenVINO (2026.4) sets another when it loads its plugin for the CPU, frees it later, and leaves
    it in use: the next signal that Python handles, Ctrl-C for one, would end the process with a
    segmentation fault.
    """
    if sys.platform != "linux":
        yield
        return
    libc = ctypes.CDLL(None)
    before = _SignalStack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)


def capabilities(library: Any) -> frozenset[str]:
    """What OpenVINO can use of this machine's CPU, such as BF16."""
    with own_signal_stack():
        return frozenset(library.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


class OpenVino:
    """The step graphs of one precision, compiled for a batch size when first needed, or taken from
    the cache.

    threads: of one call, None for one a core. Raises BackendError where openvino is missing or the
    CPU has no bf16.
    """

    name = "openvino"

    def __init__(self, bundle: Bundle, precision: str, threads: int | None) -> None:
        try:
            import openvino
        except ImportError as error:
            raise missing("openvino", "openvino", error) from error
        self.bundle = bundle
        self.precision = precision
        self.guard = ForkGuard(self.name, self)
        self.threads = None if threads is None else integer("threads", threads, 1, 1024)
        if precision == "bf16" and "BF16" not in capabilities(openvino):
            raise BackendError(
                "this CPU does not compute in bf16 (it has neither AVX-512 BF16 nor AMX): use fp32."
            )
        self._library: Any = openvino
        self._core = openvino.Core()
        self._lock = Lock()
        self._models: dict[str, Any] = {}
        self._compiled: dict[tuple[str, int], list[Any]] = {}
        self._kept: list[
            Any
        ] = []  # memory that compiled models out of the cache read their weights from
        with own_signal_stack():
            self._read_once()

    def _read_once(self) -> None:
        if cache.load(self._key(STEP, 0)) is None:
            self._model(STEP)
            cache.store(
                self._key(STEP, 0), []
            )  # it was read once, and need not be before it is known for which batch

    def bind(self, batch: int) -> OpenVinoBuffers:
        return OpenVinoBuffers(self, batch)

    def compiled(self, guided: bool, batch: int) -> list[Any]:
        """The step graph for this batch size, or its parts in the order in which they run. Raises
        BundleError where it is none."""
        key = (step_file(guided), batch)
        with self._lock, own_signal_stack():
            if key not in self._compiled:
                self._compiled[key] = self._from_cache(*key) or self._compile(*key)
            return self._compiled[key]

    def tensor(self, array: np.ndarray[Any, Any]) -> Any:
        """The array's memory as OpenVINO's tensor."""
        return self._library.Tensor(array, shared_memory=True)

    @contextlib.contextmanager
    def blaming(self, file: str) -> Iterator[str]:
        """The file's path in the bundle. What goes wrong with the file in the block is a
        BundleError that names it."""
        path = f"{self._folder}/{file}"
        try:
            yield path
        except Exception as error:  # OpenVINO's own errors share no base class
            raise BundleError(
                f"{self.bundle.path / path}: openvino cannot load it: {short(error)}"
            ) from error

    @property
    def _folder(self) -> str:
        return "fp32" if self.precision == "bf16" else self.precision

    def _model(self, file: str) -> Any:
        """One of the bundle's graphs, for any batch size. The weights are put inside: no path in
        the file is ever followed."""
        if file not in self._models:
            graph, weights = (
                self.bundle.read(inside(self._folder, name)) for name in (file, WEIGHTS)
            )
            with self.blaming(file):
                refuse_endless(graph)
                self._models[file] = self._core.read_model(with_weights(graph, weights))
        return self._models[file]

    def _compile(self, file: str, batch: int) -> list[Any]:
        """Compile for a batch size, and put that into the cache."""
        model = self._model(file)
        with self.blaming(file):
            whole = model.clone()
            sizes = shapes(self.bundle, batch)
            whole.reshape({(n := name_of(i, sizes)): list(sizes[n]) for i in whole.inputs})
            parts = split(whole) if self.precision == "bf16" else [whole]
            compiled = [
                self._core.compile_model(part, "CPU", config)
                for part, config in zip(parts, self._configs(len(parts)), strict=True)
            ]
        cache.store(self._key(file, batch), [part.export_model().getbuffer() for part in compiled])
        return compiled

    def _from_cache(self, file: str, batch: int) -> list[Any]:
        """What `_compile` made before, or nothing."""
        key = self._key(file, batch)
        blobs = cache.load(key) or []
        try:
            compiled = [
                self._core.import_model(self.tensor(blob), "CPU", config)
                for blob, config in zip(blobs, self._configs(len(blobs)), strict=True)
            ]
        # OpenVINO's own errors share no base class; it may refuse what it wrote, as after an update
        except Exception:
            cache.forget(key)
            return []
        self._kept += blobs
        return compiled

    def _key(self, file: str, batch: int) -> str:
        files = [self.bundle.files.get(inside(self._folder, name)) for name in (file, WEIGHTS)]
        cpu = (
            self._core.get_property("CPU", "FULL_DEVICE_NAME"),
            sorted(capabilities(self._library)),
        )
        made_by = CACHED, self.name, self._library.__version__, cpu
        return cache.key(made_by, files, self.bundle.sample_shape, batch, self._configs(len(PARTS)))

    def _configs(self, parts: int) -> list[dict[str, Any]]:
        """How each of so many parts is compiled. OpenVINO's own choice is bf16 for everything,
        wherever the CPU has it."""
        names = PARTS if parts == len(PARTS) else ("whole",) * parts
        bf16 = self.precision == "bf16"
        return [
            {
                "INFERENCE_PRECISION_HINT": "bf16" if bf16 and name == "network" else "f32",
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": self.threads or 0,
                # activations are quantized where the graph says so, nowhere else
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            }
            for name in names
        ]


class OpenVinoBuffers(HostBuffers):
    """Memory bound to the requests."""

    def __init__(self, backend: OpenVino, batch: int) -> None:
        super().__init__(backend.bundle, backend.guard, batch, spare=LEAST_GUIDED - 1)
        self._backend = backend

    BINDINGS = 8
    """A request holds the network's intermediate values."""

    def _bind(self, guided: bool, current: int, first: int, count: int) -> Callable[[], object]:
        """A request for each part of the step graph, which run one after another."""
        alone = guided and self._backend.precision == "int8"
        size = max(count, LEAST_GUIDED) if alone else count
        arrays = self._arrays(current, first, size)
        tensors = {name: self._backend.tensor(array) for name, array in arrays.items()}
        requests = []
        for part in self._backend.compiled(guided, size):
            request = part.create_infer_request()
            with self._backend.blaming(step_file(guided)):
                for port in part.inputs:
                    request.set_tensor(port, tensors[name_of(port, tensors)])
                for port in part.outputs:
                    name = name_of(port, tensors)
                    if name in tensors:
                        request.set_tensor(port, tensors[name])
                    else:  # a cut: the next part reads it where this one writes it
                        tensors[name] = request.get_tensor(port)
            requests.append(request)

        def run() -> None:
            for request in requests:
                request.start_async()  # not `infer`, which copies the outputs
                request.wait()

        return run

    def _said(self, error: Exception) -> str:
        return short(error)


def name_of(port: Any, known: Collection[str]) -> str:
    """The name of an input or output that is among the known ones, or any of its names.

    OpenVINO drops a node that changes nothing, and then gives its names to the value it read.
    """
    return next((name for name in sorted(port.names) if name in known), port.any_name)


def short(error: Exception) -> str:
    """The last line of OpenVINO's message, which says what is wrong; those before say where in its
    source."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
