"""OpenVINO on the CPU: fp32, bf16 on processors that have it, int8. One compiled model a batch size, made when first needed.

Compiled models are kept in the user's cache folder, which is trusted like the user's own programs; a bundle never brings one.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from ..arguments import integer
from ..bundle import Bundle
from ..errors import BackendError, BundleError
from ..program import R
from . import Float32, failed, missing
from .onnxfile import with_weights

CACHE = "UNNOISE_CACHE"
"""Environment variable: the cache folder, or empty for none."""
FOLDERS = {"fp32": "fp32", "bf16": "fp32", "int8": "int8"}
"""The bundle's folder that a precision is computed from."""


def cache_folder() -> Path | None:
    """Where compiled models are kept, made for this user alone; None for nowhere."""
    given = os.environ.get(CACHE)
    if given == "":
        return None
    base = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unnoise"
    try:
        (base / "openvino").mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None  # a cache is a convenience
    return base / "openvino"


class OpenVino:
    """The step graphs of one precision, compiled for each batch size when first needed.

    threads: of one call, None for one a core. Raises BackendError where openvino is missing or the processor lacks bf16.
    """

    name = "openvino"

    def __init__(self, bundle: Bundle, precision: str, threads: int | None) -> None:
        try:
            import openvino
        except ImportError as error:
            raise missing("openvino", "openvino", error) from error
        self.bundle, self.precision, self._library = bundle, precision, openvino
        self._core = openvino.Core()
        if precision == "bf16" and "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise BackendError("this processor has no bf16 arithmetic: use precision fp32 or int8.")
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",  # OpenVINO's own default is bf16 where the processor has it
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": integer("threads", threads, 1, 1024) if threads is not None else 0,
        }
        folder = cache_folder()
        if folder is not None:
            self._settings["CACHE_DIR"] = str(folder)
        self._lock = Lock()
        self._compiled: dict[tuple[bool, int], list[Any]] = {}
        self._models: dict[bool, Any] = {False: self._read(False)}

    @cached_property
    def _weights(self) -> bytes:
        return self.bundle.read(f"{FOLDERS[self.precision]}/weights.bin")

    def _read(self, guided: bool) -> Any:
        """The step graph as OpenVINO's model, with the weights inside it: no path in the file is ever followed."""
        path = f"{FOLDERS[self.precision]}/{'step_guided' if guided else 'step'}.onnx"
        model = with_weights(self.bundle.read(path), self._weights)
        try:
            return self._core.read_model(model)
        except Exception as error:  # openvino raises RuntimeError and others
            raise BundleError(f"{self.bundle.path / path}: openvino cannot load it: {error}") from error

    def compiled(self, guided: bool, batch: int) -> list[Any]:
        """The compiled parts for a batch, in the order in which they run."""
        with self._lock:
            key = guided, batch
            if key not in self._compiled:
                if guided not in self._models:
                    self._models[guided] = self._read(guided)
                model = self._models[guided].clone()
                try:
                    model.reshape({i.any_name: [batch, *list(i.partial_shape)[1:]] for i in model.inputs})
                    parts = self._cut(model) if self.precision == "bf16" else [(model, "f32")]
                    self._compiled[key] = [
                        self._core.compile_model(part, "CPU", {**self._settings, "INFERENCE_PRECISION_HINT": hint})
                        for part, hint in parts
                    ]
                except Exception as error:
                    raise BundleError(f"{self.bundle.path}: openvino cannot compile the step graph: {error}") from error
            return self._compiled[key]

    def bind(self, batch: int) -> OpenVinoBuffers:
        return OpenVinoBuffers(self, batch)

    def tensor(self, array: np.ndarray[Any, Any]) -> Any:
        """OpenVINO's view of an array's memory."""
        return self._library.Tensor(array, shared_memory=True)

    def between(self, output: Any) -> Any:
        """Memory for what one part hands to the next."""
        return self._library.Tensor(output.get_element_type(), output.get_shape())

    def _cut(self, model: Any) -> list[tuple[Any, str]]:
        """The step in three: what depends on no picture (the time embedding), the network, and the rest; the network alone in bf16.

        bf16 holds 8 bits of a number: neither the time 999, nor the update's coefficients, nor the state would pass through it unchanged.
        """
        ordered = model.get_ordered_ops()
        pictured = {
            n.get_name() for n in ordered if n.get_type_name() == "Parameter" and "state" in n.output(0).get_names()
        }
        for node in ordered:
            if any(value.get_node().get_name() in pictured for value in node.input_values()):
                pictured.add(node.get_name())
        step = ("step/", "state", "next_state", "denoised")  # what export calls the nodes that are not the network's
        network = [n for n in ordered if n.get_name() in pictured and not n.get_friendly_name().startswith(step)]
        names = {n.get_name() for n in network}
        if not any(n.get_type_name() in ("Convolution", "MatMul") for n in network):
            raise BundleError(
                f"{self.bundle.path} was exported before its network could be told apart: export it again."
            )
        parameters = model.get_parameters()
        going_in = [
            reader
            for node in network
            for reader in node.inputs()
            if reader.get_source_output().get_node().get_name() not in names
            and reader.get_source_output().get_node().get_type_name() != "Constant"
        ]
        coming_out = [
            reader
            for node in network
            for output in node.outputs()
            for reader in output.get_target_inputs()
            if reader.get_node().get_name() not in names
        ]
        before, after = self._replace(going_in, "in"), self._replace(coming_out, "out")
        pre = self._part([value for _, value in before], parameters)
        net = self._part([value for _, value in after], [p for p, _ in before])
        post = self._part([r.input_value(0) for r in model.get_results()], [*parameters, *(p for p, _ in after)])
        return [(pre, "f32"), (net, "bf16"), (post, "f32")]

    def _replace(self, readers: list[Any], kind: str) -> list[tuple[Any, Any]]:
        """A new parameter for each value that `readers` read, now read instead of it; with the value. Both are called alike."""
        made: dict[tuple[str, int], tuple[Any, Any]] = {}
        for reader in readers:
            source = reader.get_source_output()
            key = source.get_node().get_name(), source.get_index()
            if key not in made:
                parameter = self._library.op.Parameter(source.get_element_type(), source.get_partial_shape())
                for output in (parameter.output(0), source):
                    output.get_tensor().add_names({f"{kind}_{len(made)}"})
                made[key] = parameter, source
            reader.replace_source_output(made[key][0].output(0))
        return list(made.values())

    def _part(self, outputs: list[Any], parameters: list[Any]) -> Any:
        """The model between these parameters, of which only those are kept that it needs, and these values."""
        return self._library.Model([self._library.opset13.result(output) for output in outputs], parameters, "part")


class OpenVinoBuffers:
    """numpy arrays whose memory is bound to the compiled parts once; the two `state` arrays are input and output in turn."""

    def __init__(self, backend: OpenVino, batch: int) -> None:
        shape = backend.bundle.sample_shape
        states = (batch, R, *shape)
        self._backend, self._current = backend, 0
        self._states = (np.zeros(states, np.float32), np.zeros(states, np.float32))
        self.noise: Float32 = np.zeros((batch, *shape), np.float32)
        self.call: Float32 = np.zeros((batch, 6), np.float32)
        self.update: Float32 = np.zeros((batch, R, R + 2), np.float32)
        self.label = np.zeros(batch, np.int64)
        self.denoised: Float32 = np.zeros((batch, *shape), np.float32)
        self._between: dict[tuple[bool, str], Any] = {}
        self._requests: dict[tuple[bool, int], list[Any]] = {}

    @property
    def state(self) -> Float32:
        return self._states[self._current]

    def step(self, guided: bool) -> None:
        key = guided, self._current
        if key not in self._requests:
            self._requests[key] = self._bind(*key)
        try:
            for request in self._requests[key]:
                request.infer()
        except Exception as error:  # openvino raises RuntimeError and others
            raise failed(self._backend.bundle, "openvino", len(self.label), error) from error
        self._current = 1 - self._current

    def _bind(self, guided: bool, current: int) -> list[Any]:
        arrays = {
            "state": self._states[current],
            "noise": self.noise,
            "call": self.call,
            "update": self.update,
            "label": self.label,
            "next_state": self._states[1 - current],
            "denoised": self.denoised,
        }
        requests = []
        for part in self._backend.compiled(guided, len(self.label)):
            request = part.create_infer_request()
            for port in (*part.inputs, *part.outputs):
                name = next((n for n in port.get_names() if n in arrays or n.startswith(("in_", "out_"))), "")
                if name in arrays:
                    tensor = self._backend.tensor(arrays[name])
                elif name:
                    tensor = self._between.setdefault((guided, name), self._backend.between(port))
                else:
                    raise BundleError(
                        f"{self._backend.bundle.path}: the step graph has an input that no step graph has."
                    )
                request.set_tensor(port, tensor)
            requests.append(request)
        return requests
