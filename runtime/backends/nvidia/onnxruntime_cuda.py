"""ONNX Runtime on an NVIDIA GPU: the state stays on the device, and a row is one CUDA graph.

ONNX Runtime captures single runs of a session, so this backend launches a graph a row; TensorRT's
launches one for all rows. It never falls back to the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import RLock
from typing import cast

import numpy as np

from ...bundle.bundle import Bundle
from ...bundle.format import STEP, STEP_GUIDED, WEIGHTS, inside
from ...diffusion.arrays import Array
from ...errors import BackendError, GpuError, RequestError, UnnoiseError
from ..base import Float32, Rows, Timing, missing
from ..forks import ForkGuard
from ..host import Call, HostBuffers
from ..onnxfile import refuse_endless
from ..onnxruntime import check_ports
from ..onnxruntime_api import Binding, OnnxRuntimeLibrary, RunOptions, Session, Value
from ..ports import dtype_of, inputs_of, shapes

PROVIDER = "CUDAExecutionProvider"
OPTIONS = {"device_id": "0", "enable_cuda_graph": "1", "use_tf32": "0"}
"""The provider's options. TF32 would round the products of the update."""
SESSION = {"session.disable_cpu_ep_fallback": "1"}
"""Entries of a session's configuration, which silently accepts unknown keys."""


class OnnxRuntimeCuda:
    """Sessions of the step graphs; batches are padded to powers of two, a CUDA graph each.

    Raises:
        BackendError: onnxruntime-gpu is missing, or its CUDA provider does not start here.
        RequestError: `threads` is given.
    """

    name = "onnxruntime-cuda"
    largest = None

    def __init__(self, bundle: Bundle, precision: str, threads: int | None) -> None:
        if threads is not None:
            raise RequestError(
                f"threads are a CPU backend's, {self.name} runs on the GPU: leave them out."
            )
        try:
            import onnxruntime
        except ImportError as error:
            raise missing("onnxruntime", "cuda", error) from error
        if PROVIDER not in onnxruntime.get_available_providers():
            raise BackendError(
                "the onnxruntime that is installed has no CUDA: pip uninstall onnxruntime, then "
                "pip install 'unnoise[cuda]'. "
                "The two are one module and cannot be installed together."
            )
        self.bundle = bundle
        self.precision = precision
        self.lock = RLock()
        self.guard = ForkGuard(self.name, self)
        self._ort = cast(OnnxRuntimeLibrary, onnxruntime)
        self._sessions: dict[bool, Session] = {False: self._open(STEP)}
        self._loops: dict[int, Loop] = {}
        self._graph_ids: dict[tuple[bool, int, int], int] = {}

    def bind(self, batch: int) -> CudaBuffers:
        """Allocate memory for `batch` samples that are stepped from the host."""
        return CudaBuffers(self, batch)

    def __enter__(self) -> OnnxRuntimeCuda:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the sessions and their device memory. In a forked child, do nothing."""
        if self.guard.forked:
            return
        with self.lock:
            self._loops.clear()
            self._sessions.clear()

    def session(self, guided: bool) -> Session:
        """Return the session of the step graph, or of the guided one, opened on first use.

        Raises:
            BackendError: After `close`, in a forked child, or if it does not open.
        """
        self.guard.check()
        if False not in self._sessions:
            raise BackendError(f"{self.name} was closed; load the bundle again.")
        if guided not in self._sessions:
            self._sessions[guided] = self._open(STEP_GUIDED)
        return self._sessions[guided]

    def loop(self, batch: int) -> Loop:
        """Return the device memory for a batch, of the next power of two."""
        bucket = 1 << (batch - 1).bit_length()
        if bucket not in self._loops:
            self._loops[bucket] = Loop(self, bucket)
        return self._loops[bucket]

    def run_rows(self, rows: Rows) -> tuple[Float32, Timing]:
        """Run a batch; return x [B, *S] after the last row, and how it ran."""
        self.guard.check()  # before the lock, which a thread of the parent may hold forever
        with self.lock:
            self.session(False)
            loop = self.loop(len(rows.x))
            # A new number means that this call captures a graph.
            known = len(self._graph_ids)
            begun = time.perf_counter()
            x = loop.run(rows)
            spent = 1e3 * (time.perf_counter() - begun)
            new = len(self._graph_ids) > known
            K = len(rows.call)
            return x, Timing(
                len(rows.x), loop.bucket, K, "a graph a row", "", new, spent, loop.bytes
            )

    def graph_id(self, guided: bool, bucket: int, current: int) -> int:
        """Return the number, from 1, of the CUDA graph for these shapes and addresses."""
        # ONNX Runtime does not check that a graph is launched with what it was captured with.
        return self._graph_ids.setdefault((guided, bucket, current), len(self._graph_ids) + 1)

    def on_device(self, array: Array) -> Value:
        """Copy an array of any shape to the device."""
        with self.failing("take memory"):
            return self._ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0)

    def options(self, graph: int) -> RunOptions:
        """Make the options of a run that captures, or launches, that graph."""
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        return options

    def failing(self, what: str) -> Failing:
        """Turn onnxruntime's errors in a block into ours, which say that it could not `what`."""
        return Failing(self, what)

    def _open(self, file: str) -> Session:
        ort = self._ort
        path = f"{self.precision}/{file}"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        for key, value in SESSION.items():
            options.add_session_config_entry(key, value)
        weights = self.bundle.read(inside(self.precision, WEIGHTS))
        model = self.bundle.read(path)
        options.add_external_initializers_from_files_in_memory([WEIGHTS], [weights], [len(weights)])
        refuse_endless(model)
        try:
            session = ort.InferenceSession(
                model, options, providers=[(PROVIDER, OPTIONS)], enable_fallback=0
            )
        except Exception as error:  # onnxruntime's own errors share no base class
            raise BackendError(
                f"{self.bundle.path / path}: onnxruntime's CUDA provider does not take it: "
                f"{str(error)[:600]}. It needs an NVIDIA "
                "driver, a GPU, and the CUDA and cuDNN that its release names."
            ) from error
        # Without a usable GPU onnxruntime logs a warning and takes the next provider.
        if session.get_providers()[0] != PROVIDER:
            raise BackendError(
                f"onnxruntime's CUDA provider did not start: it would run on "
                f"{session.get_providers()[0]}, which was not asked for. "
                "See that the NVIDIA driver, CUDA and cuDNN are those that its release names."
            )
        check_ports(self.bundle, path, session.get_inputs(), session.get_outputs())
        return session


class Failing:
    """A block in which onnxruntime's errors, which share no base class, become ours."""

    def __init__(self, backend: OnnxRuntimeCuda, what: str) -> None:
        self._backend = backend
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, UnnoiseError):
            raise GpuError(
                f"{self._backend.name} could not {self._what}: {str(error)[:600]}. If memory is "
                f"full, pass a smaller max_batch."
            ) from error


class Loop:
    """Memory on the device for batches of one size, and the bindings of the graphs to it.

    The two states are input and output in turn.
    """

    def __init__(self, backend: OnnxRuntimeCuda, bucket: int) -> None:
        self._backend = backend
        self.bucket = bucket
        self.host: dict[str, Array] = {
            name: np.zeros(shape, dtype_of(backend.bundle, name))
            for name, shape in shapes(backend.bundle, bucket).items()
        }
        self.device = {name: backend.on_device(array) for name, array in self.host.items()}
        self.bytes = sum(array.nbytes for array in self.host.values())
        self._bound: dict[tuple[bool, int], tuple[Binding, RunOptions]] = {}

    def send(self, name: str) -> None:
        """Copy an input to the device."""
        with self._backend.failing("copy to the device"):
            self.device[name].update_inplace(self.host[name])

    def fetch(self, name: str) -> Array:
        """Copy an output from the device, in its own shape, see `base.shapes`."""
        with self._backend.failing("copy from the device"):
            return self.device[name].numpy()

    def step(self, guided: bool, current: int) -> None:
        """Run one row, from the state's one memory into the other.

        current: 0 if `state` is the input, 1 if `next_state` is.
        """
        key = guided, current
        session = self._backend.session(guided)
        if key not in self._bound:
            options = self._backend.options(self._backend.graph_id(guided, self.bucket, current))
            self._bound[key] = self._bind(session, current), options
        binding, options = self._bound[key]
        with self._backend.failing(f"run a batch of {self.bucket}"):
            session.run_with_iobinding(binding, options)

    def run(self, rows: Rows) -> Float32:
        """Run a batch; return x [B, *S] after the last row."""
        host = self.host
        B = len(rows.x)
        # Zeros for the padding, whose state then stays zero.
        for name in ("state", "call", "update", *rows.conditions):
            host[name][:] = 0
        host["state"][:B, 0] = rows.x
        self.send("state")
        for name, values in rows.conditions.items():
            host[name][:B] = values
            self.send(name)
        # A program goes up row by row. Noise that is zero stays on the device for the rows after.
        quiet = False
        for k, guided in enumerate(rows.guided):
            host["call"][:B] = rows.call[k]
            host["update"][:B] = rows.update[k]
            self.send("call")
            self.send("update")
            if rows.noisy[k] or not quiet:
                host["noise"][:] = 0
                rows.draw(k, host["noise"][:B])
                self.send("noise")
                quiet = not rows.noisy[k]
            self.step(bool(guided), k % 2)
        return self.fetch(("state", "next_state")[len(rows.guided) % 2])[:B, 0].copy()

    def _bind(self, session: Session, current: int) -> Binding:
        values = dict(self.device)
        if current:
            values["state"], values["next_state"] = values["next_state"], values["state"]
        binding = session.io_binding()
        for port in session.get_inputs():
            binding.bind_ortvalue_input(port.name, values[port.name])
        for port in session.get_outputs():
            binding.bind_ortvalue_output(port.name, values[port.name])
        return binding


class CudaBuffers(HostBuffers):
    """A batch stepped from the host, for previews and inpainting: the state goes up and down."""

    def __init__(self, backend: OnnxRuntimeCuda, batch: int) -> None:
        super().__init__(backend.bundle, backend.guard, batch)
        self._backend = backend

    def _bind(self, call: Call) -> Callable[[], object]:
        backend = self._backend
        count = call.count
        size = 1 << (count - 1).bit_length()
        arrays = self._arrays(call)

        def run() -> None:
            with backend.lock:
                backend.session(call.guided)
                loop = backend.loop(size)
                for name in inputs_of(backend.bundle):
                    loop.host[name][:count] = arrays[name]
                    loop.send(name)
                loop.step(call.guided, 0)
                for name in ("next_state", "denoised"):
                    arrays[name][:] = loop.fetch(name)[:count]

        return run
