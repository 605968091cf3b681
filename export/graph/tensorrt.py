"""A step graph as a TensorRT engine.

`tensorrt` (10.12 to 11) and `tensorrt_rtx` have the same Python bindings, so one builder serves
both. The ONNX graph sets the precision: both are strongly typed. TF32 is turned off, because it
rounds the products of the update and an identity row must return the state bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from runtime.backends.nvidia.engine_cache import Gpu
from runtime.backends.nvidia.tensorrt_library import logger
from runtime.errors import EngineError, NoGpuError
from runtime.files import replacing
from runtime.terminal.progress import Progress

from ..errors import ExportError

Binding: TypeAlias = Any
"""A module or an object of TensorRT's Python bindings, which carry no types."""
_LOG = logging.getLogger("unnoise.tensorrt")


@dataclass(frozen=True)
class Chosen:
    """A library that can build here, and what for."""

    library: Binding
    gpu: Gpu

    @property
    def rtx(self) -> bool:
        return self.library.__name__ == "tensorrt_rtx"


def build_engine(
    chosen: Chosen, model: bytes, buckets: Sequence[int], timing_file: Path | None, name: str
) -> bytes:
    """Return the engine of an ONNX model whose weights are inside.

    Args:
        buckets: Batch sizes; each gets a static profile.
        timing_file: Timings of earlier builds, which this build extends; None for none.
        name: What errors call the model.

    Raises:
        NoGpuError: The library finds no GPU to build on.
        ExportError: The library refuses the model; the message has what it said.
    """
    trt = chosen.library
    log = logger(trt)
    try:
        builder = trt.Builder(log)
    except TypeError as error:
        # A factory function returned nullptr. TensorRT's own message went to the log.
        raise NoGpuError(f"{trt.__name__} cannot build here ({log.said() or error}).") from error
    network = _parse(trt, builder, log, model, name)
    config = _configure(chosen, builder, log)
    for bucket in buckets:
        _add_profile(builder, network, config, bucket, name)
    # Timings of earlier builds save most of the minutes that the next one takes.
    timings = None if timing_file is None else _load_timings(config, timing_file)
    with Progress(f"building {Path(name).parent.name}/{Path(name).name}", 0) as bar:
        config.progress_monitor = monitor(trt, bar)
        engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(
            f"{name}: {trt.__name__} {trt.__version__} built no engine: "
            f"{log.said() or 'it did not say why'}"
        )
    if timings is not None and timing_file is not None:
        _keep_timings(timings, timing_file)
    return bytes(engine)


def monitor(trt: Binding, bar: Progress) -> Binding:
    """Return a progress monitor: `bar` counts the steps of the outermost phases of a build."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outer: set[str] = set()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.outer.add(phase_name)
                bar.total += num_steps
            bar.advance(0, phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            bar.advance(int(phase_name in self.outer))
            return True

        def phase_finish(self, phase_name: str) -> None:
            bar.advance(0)

    return Monitor()


def _parse(trt: Binding, builder: Binding, log: Binding, model: bytes, name: str) -> Binding:
    """Return the network of an ONNX model. Raises ExportError with what the parser refuses."""
    # TensorRT 11 knows no other kind of network, and no flag for it.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        said = "; ".join(f"{e.node_name() or 'the graph'}: {e.desc()}" for e in errors[:3])
        raise ExportError(
            f"{name}: {trt.__name__} {trt.__version__} cannot parse it. {said or log.said()}"
        )
    return network


def flags_of(trt: Binding) -> tuple[str, ...]:
    """Return the builder's flags; a minus turns one off.

    TF32 is off. If the library offers it, the caller gives the engine its memory, so that the
    engine can be captured into a CUDA graph.
    """
    user = (
        ("REQUIRE_USER_ALLOCATION",) if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION") else ()
    )
    return ("-TF32", *user)


def _configure(chosen: Chosen, builder: Binding, log: Binding) -> Binding:
    trt = chosen.library
    config = builder.create_builder_config()
    for flag in flags_of(trt):
        name = flag.removeprefix("-")
        (config.clear_flag if flag != name else config.set_flag)(getattr(trt.BuilderFlag, name))
    config.max_aux_streams = 0  # one stream, as a captured graph needs it
    if chosen.rtx:
        capability = capability_of(trt, chosen.gpu)
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(capability, 0):
            raise ExportError(
                f"{trt.__name__} does not build for compute capability {capability.name}: "
                f"{log.said()}"
            )
    return config


def capability_of(trt: Binding, gpu: Gpu) -> Binding:
    """Return TensorRT-RTX's name for a compute capability. Raises EngineError if it has none."""
    known = [n for n in trt.ComputeCapability.__members__ if n.startswith("SM")]
    name = "SM" + gpu.compute_capability.replace(".", "")
    if name not in known:
        there = ", ".join(f"{n[2:-1]}.{n[-1]}" for n in known)
        raise EngineError(
            f"tensorrt-rtx {trt.__version__} knows no compute capability "
            f"{gpu.compute_capability!r}; it knows {there}. "
            "For other GPUs use tensorrt."
        )
    return getattr(trt.ComputeCapability, name)


def _add_profile(
    builder: Binding, network: Binding, config: Binding, bucket: int, name: str
) -> None:
    """Allow every input one batch size and no other: a static profile is faster."""
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        port = network.get_input(i)
        shape = tuple(bucket if size == -1 else size for size in port.shape)
        try:
            profile.set_shape(port.name, shape, shape, shape)
        except (ValueError, RuntimeError) as error:
            raise ExportError(f"{name}: input {port.name!r} cannot be {shape}: {error}") from error
    if config.add_optimization_profile(profile) < 0:
        raise ExportError(f"{name}: a profile for batches of {bucket} is not valid.")


def _load_timings(config: Binding, path: Path) -> Binding:
    """Attach the timings of earlier builds, which make this one fast and nearly repeatable.

    If the file has none, or none that fit this machine, the timings start empty.
    """
    data = path.read_bytes() if path.is_file() else b""
    timings = config.create_timing_cache(data)
    if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):
        _LOG.warning("%s is of another machine or version: timings start empty", path)
        timings = config.create_timing_cache(b"")
        if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):
            return None
    return timings


def _keep_timings(timings: Binding, path: Path) -> None:
    data = timings.serialize()
    if data is not None:
        with replacing(path) as temporary:
            temporary.write_bytes(bytes(data))
