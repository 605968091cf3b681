"""TensorRT engines of a bundle's step graphs, from this machine's cache or built now.

An engine in the cache is loaded if it fits this machine exactly, and is built otherwise.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from runtime.backends import cache
from runtime.backends.nvidia import engine_cache as engines
from runtime.backends.nvidia.cuda import Cuda, cudart
from runtime.backends.nvidia.engine_cache import LIBRARIES, Entry, Gpu, Recipe
from runtime.backends.nvidia.tensorrt_library import load_library
from runtime.backends.onnxfile import check_graph, with_weights
from runtime.bundle.bundle import Bundle
from runtime.bundle.format import STEPS, WEIGHTS, inside
from runtime.errors import BackendError, EngineError, RequestError, unknown
from runtime.terminal.output import say

from .tensorrt import Chosen, build_engine, capability_of, flags_of

BUCKETS = (1, 2, 4, 8, 16)
AUTO = "auto"
NONE = "none"
ENGINES = (AUTO, *LIBRARIES, NONE)
TYPED = ("fp16", "int8-trt")
"""Precisions that are exported for engines; fp32 where a bundle has neither."""
_LOG = logging.getLogger("unnoise.tensorrt")


@dataclass(frozen=True)
class Order:
    """Which engines are wanted.

    Args:
        engine: A library of `LIBRARIES`, "auto" or "none".
        compute_capability: Such as "8.9", for TensorRT-RTX, which builds for it on any machine;
            None for this machine's GPU.
        buckets: Batch sizes, rising.
        timing_cache: The file of TensorRT's timings; None for one next to the engines.

    Raises:
        RequestError: A value is invalid, or two of them contradict each other.
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
                f"batch buckets must be rising numbers from 1, got {list(self.buckets)}."
            )
        if self.compute_capability and self.engine == "tensorrt":
            raise RequestError(
                "TensorRT builds for the GPU it runs on; --compute-capability is for tensorrt-rtx."
            )


def choose(order: Order) -> Chosen:
    """Return the first library of the order that can build here.

    Raises:
        RequestError: The order is for none.
        BackendError: None can. The message says why, for each.
    """
    if order.engine == NONE:
        raise RequestError(f"--engine {NONE} builds nothing. Pass one of {', '.join(LIBRARIES)}.")
    names = [
        n
        for n in LIBRARIES
        if order.engine in (n, AUTO) and not (order.compute_capability and n == "tensorrt")
    ]
    reasons: list[str] = []
    for name in names:
        try:
            library = load_library(name)
            gpu = (
                Gpu("", order.compute_capability, "")
                if order.compute_capability
                else Cuda(cudart()).gpu()
            )
            # Better to learn here that RTX does not know the GPU than after the conversion.
            if library.__name__ == "tensorrt_rtx":
                capability_of(library, gpu)
            return Chosen(library, gpu)
        except BackendError as error:
            if len(names) == 1:
                raise
            reasons.append(f"{name}: {error}")
    raise BackendError(" ".join(reasons))


def build_all(bundle: Bundle, order: Order, precisions: Collection[str] = ()) -> list[Entry]:
    """Return engines of a bundle's step graphs, from the cache if they are there.

    Args:
        precisions: Folders of the bundle; none for those made for engines, or fp32.

    Raises:
        BackendError: This machine cannot build them.
        ExportError: The library refuses a graph.
    """
    chosen = choose(order)
    engines.place(make=True)
    for precision in precisions:
        if precision not in bundle.precisions:
            raise unknown("precision", precision, bundle.precisions)
    wanted = precisions or [p for p in TYPED if p in bundle.precisions] or ["fp32"]
    graphs = [(p, g) for p in wanted for g in STEPS if inside(p, g) in bundle.files]
    return [ensure(bundle, precision, graph, chosen, order) for precision, graph in graphs]


def ensure(bundle: Bundle, precision: str, graph: str, chosen: Chosen, order: Order) -> Entry:
    """Return the engine of one graph, from the cache or built now.

    If the cache has one that is stale or damaged, the log says why it is built again.
    """
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
        flags=flags_of(trt),
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
    # A build takes minutes, so a user who expected none must learn why.
    if why:
        _LOG.warning("building again: %s", why)
    begun = time.perf_counter()
    path = f"{precision}/{graph}"
    model = bundle.read(path)
    check_graph(model)
    engine = build(
        chosen,
        with_weights(model, bundle.read(inside(precision, WEIGHTS))),
        order,
        f"{bundle.path / path}",
    )
    entry = engines.store(recipe, engine)
    say(f"built: {recipe}, {entry.size / 1e6:.1f} MB in {time.perf_counter() - begun:.1f} s")
    return entry


def build(chosen: Chosen, model: bytes, order: Order, name: str) -> bytes:
    """Return the engine of an ONNX model whose weights are inside, with a profile for each bucket.

    Args:
        name: What errors call the model.

    Raises:
        ExportError: The library refuses the model; the message has what it said.
    """
    trt = chosen.library
    # TensorRT-RTX has no timings: it tunes its kernels on the machine that runs them.
    timings = None
    if not chosen.rtx:
        key = cache.key(trt.__name__, trt.__version__, chosen.gpu)[:16]
        timings = order.timing_cache or engines.place(make=True) / f"timings-{key}.cache"
    return build_engine(chosen, model, order.buckets, timings, name)


def _stale(recipe: Recipe) -> str:
    """Return why an engine of this graph in the cache is not the wanted one; "" if there is
    none."""
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
                which = f"{other.bundle} {other.precision} {other.graph}"
                return f"the engine of {which} in the cache is another: {'; '.join(told)}"
    return ""
