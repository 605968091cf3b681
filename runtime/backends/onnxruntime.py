"""ONNX Runtime on the CPU. Its float32 kernels compute each sample alike whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np

from ..arguments import integer
from ..bundle import Bundle
from ..errors import BundleError
from ..program import R
from . import Float32, failed, missing
from .onnxfile import refuse_loops


class OnnxRuntime:
    """The step graphs of one precision as ONNX Runtime sessions, each made when first needed.

    threads: of one call, None for one a core. Raises BackendError where onnxruntime is missing or cannot run a graph.
    """

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, precision: str, threads: int | None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise missing("onnxruntime", "cpu", error) from error
        self.bundle, self.precision = bundle, precision
        self.threads = integer("threads", threads, 1, 1024) if threads is not None else 0
        self._library: Any = onnxruntime
        self._lock = Lock()
        self._sessions: dict[bool, Any] = {False: self.open("step.onnx")}

    @cached_property
    def _weights(self) -> bytes:
        return self.bundle.read(f"{self.precision}/weights.bin")

    def open(self, file: str) -> Any:
        """A session of one of the bundle's graphs. Raises BundleError where it cannot be loaded."""
        ort, path = self._library, f"{self.precision}/{file}"
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        options.add_external_initializers_from_files_in_memory(["weights.bin"], [self._weights], [len(self._weights)])
        model = self.bundle.read(path)
        try:
            refuse_loops(model)
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own errors share no base class
            raise BundleError(f"{self.bundle.path / path}: onnxruntime cannot load it: {error}") from error
        check_ports(self.bundle, path, session.get_inputs(), session.get_outputs())
        return session

    def session(self, guided: bool) -> Any:
        """The step session, or the guided one."""
        with self._lock:
            if guided not in self._sessions:
                self._sessions[guided] = self.open("step_guided.onnx")
            return self._sessions[guided]

    def bind(self, batch: int) -> OnnxRuntimeBuffers:
        return OnnxRuntimeBuffers(self, batch)


def check_ports(bundle: Bundle, file: str, inputs: Iterable[Any], outputs: Iterable[Any]) -> None:
    """Raises BundleError where a graph's inputs and outputs are not a step graph's for the bundle's samples, of any batch."""
    S = list(bundle.sample_shape)
    wanted = {"state": [R, *S], "noise": S, "call": [6], "update": [R, R + 2], "next_state": [R, *S], "denoised": S}
    wanted |= {"label": []} if bundle.labels else {}
    for port in (*inputs, *outputs):
        kind = "tensor(int64)" if port.name == "label" else "tensor(float)"
        if (
            port.name not in wanted
            or port.type != kind
            or not port.shape
            or isinstance(port.shape[0], int)
            or list(port.shape[1:]) != wanted.pop(port.name)
        ):
            raise BundleError(
                f"{bundle.path / file}: {port.name!r}, {port.type} {port.shape}, is none of a step graph's for samples of {S}. "
                "Fetch or export the bundle again."
            )
    if wanted.keys() - {"label"}:
        raise BundleError(f"{bundle.path / file} lacks {', '.join(sorted(wanted))}. Fetch or export the bundle again.")


class OnnxRuntimeBuffers:
    """numpy arrays whose memory is bound to the sessions once; the two `state` arrays are input and output in turn."""

    def __init__(self, backend: OnnxRuntime, batch: int) -> None:
        shape = backend.bundle.sample_shape
        states = (batch, R, *shape)
        self._backend = backend
        self._states = (np.zeros(states, np.float32), np.zeros(states, np.float32))
        self._current = 0
        self.noise: Float32 = np.zeros((batch, *shape), np.float32)
        self.call: Float32 = np.zeros((batch, 6), np.float32)
        self.update: Float32 = np.zeros((batch, R, R + 2), np.float32)
        self.label = np.zeros(batch, np.int64)
        self.denoised: Float32 = np.zeros((batch, *shape), np.float32)
        self._bindings: dict[tuple[bool, int], tuple[Any, Any]] = {}

    @property
    def state(self) -> Float32:
        return self._states[self._current]

    def step(self, guided: bool) -> None:
        key = (guided, self._current)
        if key not in self._bindings:
            self._bindings[key] = self._bind(*key)
        run, binding = self._bindings[key]
        try:
            run(binding, None)
        except Exception as error:  # onnxruntime's own errors share no base class
            raise failed(self._backend.bundle, "onnxruntime", len(self.label), error) from error
        self._current = 1 - self._current

    def _bind(self, guided: bool, current: int) -> tuple[Any, Any]:
        session = self._backend.session(guided)
        binding = session.io_binding()
        inputs = {
            "state": self._states[current],
            "noise": self.noise,
            "call": self.call,
            "update": self.update,
            "label": self.label,
        }
        outputs = {"next_state": self._states[1 - current], "denoised": self.denoised}
        for name in (i.name for i in session.get_inputs()):
            array = inputs[name]
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        # The session's own method, without the wrapper's checks for graph capture on a GPU.
        return session._sess.run_with_iobinding, binding._iobinding
