"""TensorRT engines from a bundle, kept in this machine's cache: python -m export.engines build
BUNDLE | list | clear

One builder over the module object: `tensorrt` (10.12 to 11) and `tensorrt_rtx` have the same Python
bindings. Precision lies in the ONNX graph (both are strongly typed). TF32 is turned off: it rounds
the products of the update, and an identity row must return the state bit for bit.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from runtime.backends import cache
from runtime.backends.nvidia import engine_cache as engines
from runtime.backends.nvidia.cuda import Cuda, cudart
from runtime.backends.nvidia.engine_cache import LIBRARIES, Entry, Gpu, Recipe
from runtime.backends.nvidia.tensorrt_engine import load_library, logger
from runtime.backends.onnxfile import refuse_endless, with_weights
from runtime.bundle import Bundle
from runtime.errors import BackendError, EngineError, NoGpuError, RequestError, status, unknown
from runtime.files import replacing
from runtime.output import parse, say
from runtime.progress import Progress

from .errors import ExportError

Binding: TypeAlias = Any
"""A module or an object of TensorRT's Python bindings, which carry no types."""
BUCKETS = (1, 2, 4, 8, 16)
AUTO = "auto"
NONE = "none"
ENGINES = (AUTO, *LIBRARIES, NONE)
TYPED = ("fp16", "int8-trt")
"""Precisions that are exported for engines; fp32 where a bundle has neither."""
_LOG = logging.getLogger("unnoise.tensorrt")


@dataclass(frozen=True)
class Order:
    """What engines are asked for. compute_capability: as "8.9", for TensorRT-RTX, which builds for
    it on any machine; None: this machine's GPU.

    timing_cache: a file that TensorRT's timings are kept in, None: one beside the engines. Raises
    RequestError for what makes no sense.
    """

    engine: str = AUTO
    compute_capability: str | None = None
    buckets: tuple[int, ...] = BUCKETS
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise unknown("engine", self.engine, ENGINES)
        if not self.buckets or list(self.buckets) != sorted({b for b in self.buckets if b > 0}):
            raise RequestError(
                f"batch buckets must be rising numbers from 1, found {list(self.buckets)}."
            )
        if self.compute_capability and self.engine == "tensorrt":
            raise RequestError(
                "TensorRT builds for the GPU it runs on; --compute-capability is for tensorrt-rtx."
            )


@dataclass(frozen=True)
class Chosen:
    """A library that can build here, and what for."""

    library: Binding
    gpu: Gpu

    @property
    def rtx(self) -> bool:
        return self.library.__name__ == "tensorrt_rtx"


def choose(order: Order) -> Chosen:
    """The first library of the order that can build here. Raises BackendError that says of each why
    it cannot."""
    names = [
        n
        for n in LIBRARIES
        if order.engine in (n, AUTO) and not (order.compute_capability and n == "tensorrt")
    ]
    reasons = []
    for name in names:
        try:
            library = load_library(name)
            gpu = (
                Gpu("", order.compute_capability, "")
                if order.compute_capability
                else Cuda(cudart()).gpu()
            )
            if library.__name__ == "tensorrt_rtx":
                _capability(library, gpu)
            return Chosen(library, gpu)
        except BackendError as error:
            if len(names) == 1:
                raise
            reasons.append(f"{name}: {error}")
    raise BackendError(" ".join(reasons))


def build_all(bundle: Bundle, order: Order, precisions: Collection[str] = ()) -> list[Entry]:
    """Engines of a bundle's step graphs, from the cache where they are there. precisions: folders;
    none: those made for engines, or fp32.

    Raises BackendError where this machine cannot build them, ExportError where the library refuses
    a graph.
    """
    chosen = choose(order)
    engines.place(make=True)
    for precision in precisions:
        if precision not in bundle.precisions:
            raise unknown("precision", precision, bundle.precisions)
    wanted = precisions or [p for p in TYPED if p in bundle.precisions] or ["fp32"]
    graphs = [
        (p, g)
        for p in wanted
        for g in ("step.onnx", "step_guided.onnx")
        if f"{p}/{g}" in bundle.files
    ]
    return [ensure(bundle, precision, graph, chosen, order) for precision, graph in graphs]


def prepare(order: Order) -> None:
    """Raises BackendError, before a long export, where an engine that is asked for by name cannot
    be built here."""
    if order.engine != NONE and (order.engine != AUTO or order.compute_capability):
        choose(order)


def after_export(bundle: Bundle, order: Order, typed: bool) -> None:
    """What `--engine` says, once the bundle is written. typed: whether a precision for engines was
    exported; without one "auto" builds none.

    "auto" without a GPU says that no engine was built, and why. Raises BackendError and ExportError
    where one that was asked for cannot be built.
    """
    lenient = order.engine == AUTO and not order.compute_capability
    if order.engine == NONE or (lenient and not typed):
        return
    if lenient:
        try:
            choose(order)
        except BackendError as error:
            say(f"no engine was built: {error}")
            return
    build_all(bundle, order)


def ensure(bundle: Bundle, precision: str, graph: str, chosen: Chosen, order: Order) -> Entry:
    """The engine of one graph: the one in the cache, or, where it is not there, stale or not whole,
    built now; the log says why."""
    trt = chosen.library
    recipe = Recipe(
        bundle=bundle.name,
        precision=precision,
        graph=graph,
        onnx=engines.source(bundle, precision, graph),
        library=trt.__name__,
        version=trt.__version__,
        gpu=engines.target(trt.__name__, chosen.gpu),
        buckets=order.buckets,
        flags=_flags(trt),
    )
    found = engines.lookup(recipe)
    why = found if isinstance(found, str) else _stale(recipe) if found is None else ""
    if isinstance(found, Entry):
        try:
            engines.load(found)
            say(f"there: {recipe}")
            return found
        except EngineError as error:
            why = str(error)
    if why:
        _LOG.warning("building again: %s", why)
    begun = time.perf_counter()
    path = f"{precision}/{graph}"
    model = bundle.read(path)
    refuse_endless(model)
    engine = build(
        chosen,
        with_weights(model, bundle.read(f"{precision}/weights.bin")),
        order,
        f"{bundle.path / path}",
    )
    entry = engines.store(recipe, engine)
    say(f"built: {recipe}, {entry.size / 1e6:.1f} MB in {time.perf_counter() - begun:.1f} s")
    return entry


def build(chosen: Chosen, model: bytes, order: Order, name: str) -> bytes:
    """The engine of an ONNX model, whose weights are inside, with a static profile a bucket. `name`
    stands in errors.

    Raises ExportError with what the library said, where it refuses.
    """
    trt = chosen.library
    log = logger(trt)
    try:
        builder = trt.Builder(log)
    except (
        TypeError
    ) as error:  # a factory function that returned nullptr: TensorRT's own message went to the log
        raise NoGpuError(f"{trt.__name__} cannot build here ({log.said() or error}).") from error
    network = _parse(trt, builder, log, model, name)
    config = _configure(chosen, builder, log)
    for bucket in order.buckets:
        _add_profile(builder, network, config, bucket, name)
    timings = None if chosen.rtx else _load_timings(config, _timing_file(chosen, order))
    with Progress(f"building {Path(name).parent.name}/{Path(name).name}", 0) as bar:
        config.progress_monitor = monitor(trt, bar)
        engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(
            f"{name}: {trt.__name__} {trt.__version__} built no engine: "
            f"{log.said() or 'it did not say why'}"
        )
    if timings is not None:
        _keep_timings(timings, _timing_file(chosen, order))
    return bytes(engine)


def monitor(trt: Binding, bar: Progress) -> Binding:
    """A progress monitor that moves `bar` over the steps of the build's outermost phases, and notes
    which phase runs."""

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
    """The network of an ONNX model. Raises ExportError with the nodes that the parser refuses."""
    typed = getattr(
        trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None
    )  # TensorRT 11 knows no other kind
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        said = "; ".join(f"{e.node_name() or 'the graph'}: {e.desc()}" for e in errors[:3])
        raise ExportError(
            f"{name}: {trt.__name__} {trt.__version__} cannot parse it. {said or log.said()}"
        )
    return network


def _flags(trt: Binding) -> tuple[str, ...]:
    """How the builder's flags are set: TF32 off; and where there is the choice, an engine whose
    memory we give, so that it can be captured."""
    user = (
        ("REQUIRE_USER_ALLOCATION",) if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION") else ()
    )
    return ("-TF32", *user)


def _configure(chosen: Chosen, builder: Binding, log: Binding) -> Binding:
    trt = chosen.library
    config = builder.create_builder_config()
    for flag in _flags(trt):
        name = flag.removeprefix("-")
        (config.clear_flag if flag != name else config.set_flag)(getattr(trt.BuilderFlag, name))
    config.max_aux_streams = 0  # one stream, as a captured graph needs it
    if chosen.rtx:
        capability = _capability(trt, chosen.gpu)
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(capability, 0):
            raise ExportError(
                f"{trt.__name__} does not build for compute capability {capability.name}: "
                f"{log.said()}"
            )
    return config


def _capability(trt: Binding, gpu: Gpu) -> Binding:
    """TensorRT-RTX's name for a compute capability. Raises EngineError where it has none."""
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
    """Every input at one size of the batch and no other: a static profile is the faster one."""
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


def _timing_file(chosen: Chosen, order: Order) -> Path:
    trt = chosen.library
    name = f"timings-{cache.key(trt.__name__, trt.__version__, chosen.gpu)[:16]}.cache"
    return order.timing_cache or engines.place(make=True) / name


def _load_timings(config: Binding, path: Path) -> Binding:
    """Attach the timings of earlier builds, which make this one quick and nearly repeatable; new
    ones where there are none that fit."""
    data = path.read_bytes() if path.is_file() else b""
    timings = config.create_timing_cache(data)
    if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):
        _LOG.warning("%s is of another machine or version: timings begin anew", path)
        timings = config.create_timing_cache(b"")
        if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):
            return None
    return timings


def _keep_timings(timings: Binding, path: Path) -> None:
    data = timings.serialize()
    if data is not None:
        with replacing(path) as temporary:
            temporary.write_bytes(bytes(data))


def _stale(recipe: Recipe) -> str:
    """Why an engine that was built of this graph, precision and bundle is not the one that is
    wanted; "" where none was built."""
    for _, entry in engines.entries():
        if isinstance(entry, Entry):
            other = entry.recipe
            if (other.bundle, other.precision, other.graph, other.library) == (
                recipe.bundle,
                recipe.precision,
                recipe.graph,
                recipe.library,
            ):
                changed = [
                    f
                    for f in ("onnx", "version", "gpu", "buckets", "flags")
                    if getattr(other, f) != getattr(recipe, f)
                ]
                told = [f"{f} was {getattr(other, f)}, is {getattr(recipe, f)}" for f in changed]
                return f"the engine of {other.bundle} {other.precision} {other.graph} in the cache is another: {'; '.join(told)}"
    return ""


def add_engine_options(parser: argparse.ArgumentParser, default: str = AUTO) -> None:
    add = parser.add_argument
    add("--engine", default=default, metavar="NAME", help=f"{', '.join(ENGINES)} [{default}]")
    add(
        "--compute-capability",
        metavar="X.Y",
        help="of the GPU that tensorrt-rtx builds for [this machine's]",
    )
    add(
        "--batch-buckets",
        type=_sizes,
        default=BUCKETS,
        metavar="N,N",
        help="batch sizes to build for [1,2,4,8,16]",
    )
    add(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="of TensorRT's timings [one beside the engines]",
    )


def ordered(given: argparse.Namespace) -> Order:
    return Order(given.engine, given.compute_capability, given.batch_buckets, given.timing_cache)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"needs numbers with commas between, found {text!r}"
        ) from None


def listing() -> list[str]:
    """A line for every engine in the cache."""
    lines = []
    for key, entry in engines.entries():
        if isinstance(entry, Entry):
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.built))
            lines.append(f"{key[:12]}  {when}  {entry.size / 1e6:7.1f} MB  {entry.recipe}")
        else:
            lines.append(f"{key[:12]}  {entry}")
    return lines or [f"no engines in {engines.place()}"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m export.engines", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="build the engines of a bundle")
    make.add_argument("bundle", type=Path, metavar="BUNDLE")
    make.add_argument(
        "--precision",
        action="append",
        default=[],
        help="a folder of the bundle [fp16 and int8-trt, or fp32]",
    )
    add_engine_options(make)
    commands.add_parser("list", help="the engines in the cache")
    gone = commands.add_parser("clear", help="remove engines from the cache")
    gone.add_argument("key", nargs="*", help="the beginning of a key, as list shows it [all]")
    given = parse(parser, arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")

    def action() -> int:
        if given.command == "build":
            build_all(Bundle.load(given.bundle), ordered(given), given.precision)
        elif given.command == "list":
            say("\n".join(listing()))
        else:
            keys = [
                k
                for k, _ in engines.entries()
                if not given.key or any(k.startswith(s) for s in given.key)
            ]
            say(f"{engines.clear(keys)} engines removed")
        return 0

    return status(action)


if __name__ == "__main__":
    sys.exit(main())
