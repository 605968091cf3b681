"""OpenVINO on the CPU: the step graph in float32 or int8, or with its network in bf16.

In bf16 a head and a tail around the network stay in float32. Every batch size has its own compiled
models. Their kernels compute a sample alike in any batch.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import cast
from weakref import WeakValueDictionary

from ..bundle.bundle import Bundle
from ..bundle.format import STEP, WEIGHTS, inside, step_file
from ..diffusion.arrays import Array
from ..errors import BackendError, BundleError
from ..errors.arguments import integer
from . import cache
from .base import missing
from .forks import ForkGuard
from .host import Call
from .memory import is_heavy, trim
from .onnxfile import check_graph, with_weights
from .openvino_api import CompiledModel, Config, Memory, Model, OpenVinoLibrary, Port
from .openvino_parts import PARTS, split
from .openvino_phases import join_phases
from .ports import shapes
from .processor import flags, usable_cores
from .streams import StreamBuffers

CACHED = 3
"""Version of the cached models. Raise it if graphs are cut or compiled in another way."""
EXACT_INT8 = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
"""Instruction sets, by Linux's names, that add the products of int8 in 32 bits."""
BINDINGS = 8
HEAVY_BINDINGS = 4
"""The number of bindings that are kept: a request holds the network's intermediate values, and
that of a large network also a copy of the weights. Four are two slices in both directions."""
LEAST_GUIDED = 2
"""The smallest guided batch in int8. A lone sample runs next to an empty one, because OpenVINO
2026.4 computes it slightly differently alone than in a batch."""


class _SignalStack(ctypes.Structure):
    """Linux's stack_t."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def own_signal_stack() -> Iterator[None]:
    """Restore this thread's signal stack after the block.

    When OpenVINO (2026.4) loads its CPU plugin, it sets a signal stack, which it frees later and
    leaves in use. The next signal that Python handles, such as Ctrl-C, would then end the process
    with a segmentation fault.
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


def capabilities(library: object) -> frozenset[str]:
    """Ask the module openvino what it can use of this machine's CPU, such as BF16."""
    with own_signal_stack():
        core = cast(OpenVinoLibrary, library).Core()
        return frozenset(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def lacks(precision: str, library: object) -> str:
    """Say what this CPU lacks for a precision of the module openvino; "" if nothing."""
    # Only OpenVINO itself knows whether it computes in bf16.
    if precision == "bf16" and "BF16" not in capabilities(library):
        return "this CPU does not compute in bf16 (it has neither AVX-512 BF16 nor AMX): use fp32"
    # Older x86 instructions add pairs of products in 16 bits, where large sums are cut off.
    here = flags()
    if precision == "int8" and "sse2" in here and not here & EXACT_INT8:
        return (
            "this CPU does not compute int8 exactly (it has neither VNNI nor AMX): use fp32, or "
            "int8 on onnxruntime"
        )
    return ""


@dataclass(frozen=True, eq=False)
class Compiled:
    """A step graph for one batch size.

    Attributes:
        models: It, or its parts in the order in which they run.
        memory: What models from the cache read their weights from.
    """

    models: Sequence[CompiledModel]
    memory: Sequence[Array] = ()


class OpenVino:
    """The step graphs of one precision, compiled for a batch size when first needed.

    Compiled models are kept in the cache. Those of a large network are in memory only while buffers
    are bound to them, because each has its own copy of the weights.

    Args:
        threads: Of one call; None for one a core.
        streams: Into how many parts every call is cut; None leaves it to the caller.

    Raises:
        BackendError: openvino is missing, or the CPU lacks what the precision needs.
        BundleError: openvino cannot load a graph.
    """

    name = "openvino"

    def __init__(
        self, bundle: Bundle, precision: str, threads: int | None, streams: int | None = None
    ) -> None:
        try:
            import openvino
            from openvino import Core  # noqa: F401  a folder without its files imports, too
        except ImportError as error:
            raise missing("openvino", "openvino", error) from error
        self.bundle = bundle
        self.precision = precision
        self.guard = ForkGuard(self.name, self)
        self.threads = None if threads is None else integer("threads", threads, 1, 1024)
        self.streams = streams
        if lacking := lacks(precision, openvino):
            raise BackendError(f"{lacking}.")
        self._library = cast(OpenVinoLibrary, openvino)
        self._core = self._library.Core()
        self._lock = Lock()
        self._models: dict[str, Model] = {}
        self.heavy = is_heavy(bundle, self._folder)
        self._compiled: MutableMapping[tuple[str, int, int], Compiled] = (
            WeakValueDictionary() if self.heavy else {}
        )
        with own_signal_stack():
            self._read_once()

    def _read_once(self) -> None:
        # A bundle that OpenVINO cannot read fails when it is opened, not at the first batch. An
        # empty entry notes that it was read: the next process reads it only for a batch it lacks.
        if cache.load(self._key(STEP, 0, 1)) is None:
            self._model(STEP)
            cache.store(self._key(STEP, 0, 1), [])

    def bind(self, batch: int) -> OpenVinoBuffers:
        """Allocate memory for `batch` samples, bound to the requests."""
        return OpenVinoBuffers(self, batch)

    def compiled(self, guided: bool, batch: int, streams: int = 1) -> Compiled:
        """Return the step graph for this batch size.

        streams: How many requests run at once.

        Raises:
            BundleError: openvino cannot load it.
        """
        key = (step_file(guided), batch, streams)
        with self._lock, own_signal_stack():
            found = self._compiled.get(key)
            if found is None:
                found = self._from_cache(*key) or self._compile(*key)
                self._compiled[key] = found
                if self.heavy:
                    trim()
            return found

    def tensor(self, array: Array) -> Memory:
        """Wrap the memory of an array of any shape as OpenVINO's tensor."""
        return self._library.Tensor(array, shared_memory=True)

    @contextlib.contextmanager
    def blaming(self, file: str) -> Iterator[str]:
        """Yield the file's path in the bundle. An error in the block becomes a BundleError.

        The error names the file.
        """
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

    def _model(self, file: str) -> Model:
        """One of the bundle's graphs, for any batch size.

        The weights are put inside, so no path in the file is ever followed.
        """
        if file not in self._models:
            graph = self.bundle.read(inside(self._folder, file))
            weights = self.bundle.read(inside(self._folder, WEIGHTS))
            with self.blaming(file):
                check_graph(graph)
                whole = with_weights(graph, weights)
                # OpenVINO makes two more copies meanwhile.
                del weights
                self._models[file] = self._core.read_model(whole)
                join_phases(self._models[file])
            del whole
            if self.heavy:
                trim()
        return self._models[file]

    def _compile(self, file: str, batch: int, streams: int) -> Compiled:
        """Compile for a batch size, and put the result into the cache."""
        model = self._model(file)
        with self.blaming(file):
            # Shapes without a free dimension: the plugin then chooses kernels for this batch, and
            # `split` knows the shapes at its cuts.
            whole = model.clone()
            sizes = shapes(self.bundle, batch)
            whole.reshape({(n := name_of(i, sizes)): list(sizes[n]) for i in whole.inputs})
            parts = split(whole) if self.precision == "bf16" else [whole]
            compiled = [
                self._core.compile_model(part, "CPU", config)
                for part, config in zip(parts, self._configs(len(parts), streams), strict=True)
            ]
        blobs = [part.export_model().getbuffer() for part in compiled]
        cache.store(self._key(file, batch, streams), blobs)
        return Compiled(compiled)

    def _from_cache(self, file: str, batch: int, streams: int) -> Compiled | None:
        """What `_compile` made before, or None."""
        key = self._key(file, batch, streams)
        blobs = cache.load(key) or []
        try:
            compiled = [
                self._core.import_model(self.tensor(blob), "CPU", config)
                for blob, config in zip(blobs, self._configs(len(blobs), streams), strict=True)
            ]
        # OpenVINO's errors share no base class. It may refuse what it wrote, as after an update.
        except Exception:
            cache.forget(key)
            return None
        return Compiled(compiled, blobs) if compiled else None

    def _key(self, file: str, batch: int, streams: int) -> str:
        files = [self.bundle.files.get(inside(self._folder, name)) for name in (file, WEIGHTS)]
        cpu = (
            self._core.get_property("CPU", "FULL_DEVICE_NAME"),
            sorted(capabilities(self._library)),
            sorted(flags()),
        )
        made_by = CACHED, self.name, self._library.__version__, cpu
        configs = self._configs(len(PARTS), streams)
        return cache.key(made_by, files, self.bundle.sample_shape, batch, configs)

    def _configs(self, parts: int, streams: int) -> list[Config]:
        """The settings with which each part is compiled."""
        # OpenVINO's own choice of a precision is bf16 for everything, if the CPU has it.
        names = PARTS if parts == len(PARTS) else ("whole",) * parts
        bf16 = self.precision == "bf16"
        configs: list[Config] = [
            {
                "INFERENCE_PRECISION_HINT": "bf16" if bf16 and name == "network" else "f32",
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": self.threads or 0,
                # Activations are quantized if the graph says so, and never otherwise.
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            }
            for name in names
        ]
        if streams == 1:
            return configs
        threads = max(streams, self.threads or usable_cores())
        cut: Config = {"NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": threads}
        # Parts of two sizes are two models, which would both be pinned to the first core.
        cut |= {"PERFORMANCE_HINT": "THROUGHPUT", "ENABLE_CPU_PINNING": False}
        return [{**config, **cut} for config in configs]


class OpenVinoBuffers(StreamBuffers):
    """Memory bound to the requests."""

    def __init__(self, backend: OpenVino, batch: int) -> None:
        threads = backend.threads or usable_cores()
        spare = LEAST_GUIDED - 1
        super().__init__(backend.bundle, backend.guard, batch, threads, backend.streams, spare)
        self._backend = backend
        self._bindings = HEAVY_BINDINGS if backend.heavy else BINDINGS

    def _least(self, guided: bool) -> int:
        return LEAST_GUIDED if guided and self._backend.precision == "int8" else 1

    def _bind_part(self, part: Call) -> Callable[[], object]:
        """A request for each part of the step graph, which run one after another."""
        # The spare sample of the allocation fills the batch next to a single one, see LEAST_GUIDED.
        size = max(part.count, self._least(part.guided))
        arrays = self._arrays(replace(part, count=size))
        tensors = {name: self._backend.tensor(array) for name, array in arrays.items()}
        requests = []
        compiled = self._backend.compiled(part.guided, size, part.streams)
        for model in compiled.models:
            request = model.create_infer_request()
            with self._backend.blaming(step_file(part.guided)):
                for port in model.inputs:
                    request.set_tensor(port, tensors[name_of(port, tensors)])
                for port in model.outputs:
                    name = name_of(port, tensors)
                    if name in tensors:
                        request.set_tensor(port, tensors[name])
                    else:  # a cut: the next part reads it where this one writes it
                        tensors[name] = request.get_tensor(port)
            requests.append(request)

        # It keeps what was compiled, and with it the memory of the weights.
        def run(_: Compiled = compiled) -> None:
            for request in requests:
                request.start_async()  # not `infer`, which copies the outputs
                request.wait()

        return run

    def _said(self, error: Exception) -> str:
        return short(error)


def name_of(port: Port, known: Collection[str]) -> str:
    """Find the name of an input or output that is among the known ones, or any of its names.

    A port may have several: OpenVINO drops nodes that change nothing, and gives their names to the
    value that they read.
    """
    return next((name for name in sorted(port.names) if name in known), port.any_name)


def short(error: Exception) -> str:
    """Return the last line of OpenVINO's message. The lines before name places in its source."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
