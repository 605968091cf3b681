"""Types of what we call in onnxruntime, whose module has no annotations for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias


class Port(Protocol):
    """An input or output of a session. A free dimension of its shape is a string or None."""

    name: str
    type: str
    shape: Sequence[int | str | None]


class Binding(Protocol):
    """IOBinding: which memory a run reads and writes."""

    _iobinding: object

    def bind_input(
        self,
        name: str,
        device: str,
        device_id: int,
        element_type: type,
        shape: tuple[int, ...],
        address: int,
    ) -> None: ...
    def bind_output(
        self,
        name: str,
        device: str,
        device_id: int,
        element_type: type,
        shape: tuple[int, ...],
        address: int,
    ) -> None: ...


class RunOptions(Protocol):
    def add_run_config_entry(self, key: str, value: str) -> None: ...


class NativeSession(Protocol):
    """The session below the Python wrapper."""

    def run_with_iobinding(self, binding: object, options: RunOptions | None) -> None: ...


class Session(Protocol):
    """InferenceSession."""

    _sess: NativeSession

    def get_inputs(self) -> Sequence[Port]: ...
    def get_outputs(self) -> Sequence[Port]: ...
    def get_providers(self) -> Sequence[str]: ...
    def io_binding(self) -> Binding: ...
    def run_with_iobinding(self, binding: Binding, options: RunOptions) -> None: ...


class SessionOptions(Protocol):
    enable_mem_pattern: bool
    intra_op_num_threads: int
    log_severity_level: int

    def add_session_config_entry(self, key: str, value: str) -> None: ...
    def add_external_initializers_from_files_in_memory(
        self, names: list[str], contents: list[bytes], sizes: list[int]
    ) -> None: ...


Provider: TypeAlias = str | tuple[str, Mapping[str, str]]


class OnnxRuntimeLibrary(Protocol):
    """The module onnxruntime. Its classes are functions here."""

    __version__: str
    cuda_version: str
    """That it was built with; empty without CUDA."""

    def preload_dlls(self) -> None: ...
    def get_available_providers(self) -> Sequence[str]: ...
    def SessionOptions(self) -> SessionOptions: ...
    def RunOptions(self) -> RunOptions: ...
    def InferenceSession(
        self,
        model: bytes,
        options: SessionOptions,
        *,
        providers: Sequence[Provider],
        enable_fallback: int = ...,
    ) -> Session: ...
