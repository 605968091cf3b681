"""ONNX Runtime on an NVIDIA GPU: the loop of TensorRT, with a session as its step engine.

The loop captures runs of the session into CUDA graphs of ours; ONNX Runtime captures nothing
itself. It never falls back to the CPU.
"""

from __future__ import annotations

import re
from typing import cast

from ...bundle.bundle import Bundle
from ...bundle.format import WEIGHTS, inside, step_file
from ...errors import BackendError, GpuMemoryError
from ..base import missing
from ..onnxfile import check_graph
from ..onnxruntime import check_ports
from ..onnxruntime_api import OnnxRuntimeLibrary, Session
from .cuda_errors import library_error
from .cuda_libraries import ready
from .device_backend import DeviceBackend
from .exclusive import exclusive
from .onnxruntime_engine import Engine

PROVIDER = "CUDAExecutionProvider"
OPTIONS = {"device_id": "0", "use_tf32": "0"}
"""The provider's options, besides our stream. TF32 would round the products of the update."""
SESSION = {"session.disable_cpu_ep_fallback": "1"}
"""Entries of a session's configuration, which silently accepts unknown keys."""
LEAST = (1, 31)
"""The version that was seen to run in graphs of ours. Before 1.30 a run leaves work in a captured
graph that frees memory whenever the graph is launched."""


def lacks(library: OnnxRuntimeLibrary) -> str:
    """Say what the module onnxruntime lacks; "" if nothing."""
    if PROVIDER not in library.get_available_providers():
        return (
            "the onnxruntime that is installed has no CUDA: pip uninstall onnxruntime, then "
            "pip install 'unnoise[cuda]'. "
            "The two are one module and cannot be installed together."
        )
    version = tuple(int(n) for n in re.findall(r"\d+", library.__version__)[:2])
    if version < LEAST:
        return (
            f"onnxruntime-gpu {library.__version__} cannot run in a CUDA graph; "
            f"{'.'.join(map(str, LEAST))} can. Install it: pip install 'unnoise[cuda]'."
        )
    return ""


class OnnxRuntimeCuda(DeviceBackend[Engine]):
    """Sessions of the step graphs; batches are padded to powers of two.

    Raises:
        BackendError: One of its kinds in `runtime.errors`: onnxruntime-gpu, a library that it
            needs, a driver or a GPU is missing.
        RequestError: `threads` is given.
    """

    kept = "sessions"

    def __init__(self, bundle: Bundle, precision: str, threads: int | None) -> None:
        super().__init__("onnxruntime-cuda", bundle, precision, threads)
        try:
            import onnxruntime
            from onnxruntime import InferenceSession  # noqa: F401  see `OnnxRuntime`
        except ImportError as error:
            raise missing("onnxruntime", "cuda", error) from error
        self._ort = cast(OnnxRuntimeLibrary, onnxruntime)
        if lacking := lacks(self._ort):
            raise BackendError(lacking)
        cuda = ready(self._ort)
        try:
            self._start(cuda)
            # Opened at once, for its errors.
            self.engine(False)
        except BaseException:
            self.close()
            raise

    def bucket(self, batch: int) -> int:
        """Return the power of two that holds so many samples."""
        return 1 << (batch - 1).bit_length()

    def _make_room(self) -> None:
        """Free all: loops, sessions with their arenas, which never shrink, and spaces."""
        super()._make_room()
        self.cuda.synchronize(self.stream)
        with exclusive():
            self._steps.clear()
            self._engines.clear()
        while self._spaces:
            self._spaces.popitem()[1].close()

    def _too_large(
        self, bucket: int, error: GpuMemoryError, K: int, noisy: bool, kinds: set[bool]
    ) -> GpuMemoryError:
        """Make the error without sizes: what a session needs is not known before it runs."""
        return GpuMemoryError(
            f"a batch of {bucket} does not fit in the GPU's memory, of which "
            f"{self.cuda.free_bytes() / 1e6:.2f} MB are free: pass a smaller max_batch. ({error})"
        )

    def _open(self, guided: bool) -> Engine:
        return Engine(self._ort, self.cuda, self.bundle, lambda: self._session(guided))

    def _session(self, guided: bool) -> Session:
        ort = self._ort
        path = inside(self.precision, step_file(guided))
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
