"""ONNX Runtime on an NVIDIA GPU: the state stays on the device, and a row is one CUDA graph.

ONNX Runtime captures single runs of a session, so this backend launches a graph a row; TensorRT's
launches one for many rows. It never falls back to the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import TypeVar, cast

from ...bundle.bundle import Bundle
from ...bundle.format import STEP, STEP_GUIDED, WEIGHTS, inside
from ...errors import BackendError, GpuMemoryError, RequestError, UnnoiseError
from ..base import Float32, Rows, Timing, missing
from ..forks import ForkGuard
from ..onnxfile import check_graph
from ..onnxruntime import check_ports
from ..onnxruntime_api import Binding, OnnxRuntimeLibrary, RunOptions, Session
from .cuda_api import Stream
from .cuda_errors import library_error
from .cuda_libraries import ready
from .exclusive import capturing, exclusive
from .onnxruntime_buffers import CudaBuffers
from .onnxruntime_loop import RUN, Loop

Result = TypeVar("Result")
PROVIDER = "CUDAExecutionProvider"
OPTIONS = {"device_id": "0", "enable_cuda_graph": "1", "use_tf32": "0"}
"""The provider's options, besides our stream. TF32 would round the products of the update."""
SESSION = {"session.disable_cpu_ep_fallback": "1"}
"""Entries of a session's configuration, which silently accepts unknown keys."""


class OnnxRuntimeCuda:
    """Sessions of the step graphs; batches are padded to powers of two, a CUDA graph each.

    Everything runs on one thread of the backend's own: ONNX Runtime's graphs belong to the thread
    that captured them, and another thread would capture its own and never free them. Each batch
    size has its own sessions: cuDNN's plans, which a graph holds, are rebuilt if the size changes.

    Raises:
        BackendError: One of its kinds in `runtime.errors`: onnxruntime-gpu, a library that it
            needs, a driver or a GPU is missing.
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
        self.guard = ForkGuard(self.name, self)
        self._ort = cast(OnnxRuntimeLibrary, onnxruntime)
        self.cuda = ready(self._ort)
        self._owner = ExitStack()
        self._sessions: dict[tuple[bool, int], Session] = {}
        self._loops: dict[int, Loop] = {}
        self._graphs = 0
        self._library_bytes = 0
        self._closing = Lock()
        self._closed = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        try:
            self.stream: Stream = self.cuda.stream(self._owner)
            self.copying: Stream = self.cuda.stream(self._owner)
            # Opened at once, for its errors.
            self._sessions[False, 0] = self._work(lambda: self._open(STEP))
        except BaseException:
            self.close()
            raise

    @property
    def device_memory(self) -> dict[str, int]:
        """Bytes on the device of sessions, and of batches and programs.

        The sessions' share, weights and arena, is estimated from the device's free memory.
        """
        return {"sessions": self._library_bytes, "buffers": self.cuda.held}

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
        with self._closing:
            if self._closed:
                return
            self._closed = True
            try:
                self._worker.submit(self._free).result()
            finally:
                self._worker.shutdown()

    def run_rows(self, rows: Rows) -> tuple[Float32, Timing]:
        """Run a batch; return x [B, *S] after the last row, and how it ran.

        Raises:
            GpuMemoryError: It does not fit, even without other batch sizes' memory.
        """
        return self.work(lambda: self._run_rows(rows))

    def work(self, function: Callable[[], Result]) -> Result:
        """Call a function on the backend's thread, and wait for it.

        Raises:
            BackendError: After `close`, and in a forked child.
        """
        self.guard.check()  # before waiting: a forked child has no such thread
        if self._closed:
            raise BackendError(f"{self.name} was closed; load the bundle again.")
        return self._work(function)

    def step(self, guided: bool, count: int, fill: Callable[[Loop], object]) -> Loop:
        """Step `count` samples, which `fill` copies into the loop's memory on the host."""
        bucket = 1 << (count - 1).bit_length()

        def run() -> Loop:
            loop = self.loop(bucket)
            fill(loop)
            loop.step(guided)
            return loop

        return self._fitting(bucket, run)

    def loop(self, bucket: int) -> Loop:
        """Return the device memory for a batch size, allocated on first use."""
        if bucket not in self._loops:
            self._loops[bucket] = Loop(self, bucket)
        return self._loops[bucket]

    def session(self, guided: bool, bucket: int) -> Session:
        """Return the session of a step graph for a batch size, opened on first use.

        Raises:
            BackendError: It does not open.
        """
        key = guided, bucket
        if key not in self._sessions:
            # The one that was opened for its errors serves the first batch size.
            first = None if guided else self._sessions.pop((False, 0), None)
            self._sessions[key] = first or self._open(STEP_GUIDED if guided else STEP)
        return self._sessions[key]

    def options(self) -> RunOptions:
        """Make the options of the runs of one new graph."""
        # From 1. ONNX Runtime does not check that a graph is launched with what it was captured
        # with.
        self._graphs += 1
        options = self._ort.RunOptions()
        for key, value in (RUN | {"gpu_graph_id": str(self._graphs)}).items():
            options.add_run_config_entry(key, value)
        return options

    def launch(
        self, session: Session, binding: Binding, options: RunOptions, captures: bool
    ) -> None:
        """Put a run on the stream.

        captures: Whether it is a graph's first run, which allocates, and captures in global mode.
        """
        with self._failing("run"):
            if not captures:
                session.run_with_iobinding(binding, options)
                return
            with capturing(), self._measured():
                session.run_with_iobinding(binding, options)
                self.cuda.synchronize(self.stream)

    def _work(self, function: Callable[[], Result]) -> Result:
        try:
            return self._worker.submit(function).result()
        except RuntimeError as error:
            if not self._closed:
                raise
            raise BackendError(f"{self.name} was closed; load the bundle again.") from error

    def _run_rows(self, rows: Rows) -> tuple[Float32, Timing]:
        batch = len(rows.x)
        bucket = 1 << (batch - 1).bit_length()
        captured = self._fitting(bucket, lambda: self.loop(bucket).prepare(rows))
        x, spent = self._loops[bucket].run(rows)
        held = sum(self.device_memory.values())
        K = len(rows.call)
        return x, Timing(batch, bucket, K, "a graph a row", "", captured, spent, held)

    def _fitting(self, bucket: int, make: Callable[[], Result]) -> Result:
        """Call `make`; if the memory is full, once more without what other batch sizes hold."""
        try:
            return make()
        except GpuMemoryError:
            self._free_loops()
        try:
            return make()
        except GpuMemoryError as error:
            self._free_loops()
            raise GpuMemoryError(
                f"a batch of {bucket} does not fit in the GPU's memory, of which "
                f"{self.cuda.free_bytes() / 1e6:.2f} MB are free: pass a smaller max_batch. "
                f"({error})"
            ) from error

    def _free(self) -> None:
        """Free everything, and the streams last."""
        with self._owner.pop_all():
            self._free_loops()

    def _free_loops(self) -> None:
        """Drop sessions with their graphs, and then the memory that the graphs use."""
        # Called from the last line to the first.
        with ExitStack() as stack:
            stack.enter_context(exclusive())
            for loop in self._loops.values():
                stack.callback(loop.close)
            stack.callback(self._sessions.clear)
            if self._loops:
                stack.callback(self.cuda.synchronize, self.stream)
            self._loops = {}
            self._library_bytes = 0

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Add what the device's memory lost meanwhile to what the sessions hold."""
        before = self.cuda.free_bytes()
        yield
        self._library_bytes += max(0, before - self.cuda.free_bytes())

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Turn onnxruntime's errors, which share no base class, into ours."""
        try:
            yield
        except UnnoiseError:
            raise
        except Exception as error:
            raise library_error(f"{self.name} could not {what}", str(error)[:600]) from error

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
        check_graph(model)
        provider = OPTIONS | {"user_compute_stream": str(int(self.stream))}
        try:
            with exclusive(), self._measured():
                session = ort.InferenceSession(
                    model, options, providers=[(PROVIDER, provider)], enable_fallback=0
                )
        except Exception as error:  # onnxruntime's own errors share no base class
            raise library_error(
                f"{self.bundle.path / path}: onnxruntime's CUDA provider does not take it",
                str(error)[:600],
            ) from error
        # If the provider does not start, onnxruntime logs the reason and takes the next one.
        if session.get_providers()[0] != PROVIDER:
            raise BackendError(
                f"onnxruntime's CUDA provider did not start: it would run on "
                f"{session.get_providers()[0]}, which was not asked for. Its reason is on stderr. "
                "See that CUDA and cuDNN are the versions that its release names."
            )
        check_ports(self.bundle, path, session.get_inputs(), session.get_outputs())
        return session
