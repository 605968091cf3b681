"""TensorRT engines from a bundle, kept in this machine's cache: python -m export.engines build
BUNDLE | list | clear

An engine in the cache is loaded if it fits this machine exactly, and is built otherwise.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from runtime.backends import cache
from runtime.backends.nvidia import engine_cache as engines
from runtime.backends.nvidia.cuda import Cuda, cudart
from runtime.backends.nvidia.engine_cache import LIBRARIES, Entry, Gpu, Recipe
from runtime.backends.nvidia.tensorrt_engine import load_library
from runtime.backends.onnxfile import refuse_endless, with_weights
from runtime.bundle.bundle import Bundle
from runtime.bundle.format import STEPS, WEIGHTS, inside
from runtime.errors import BackendError, EngineError, RequestError, unknown
from runtime.terminal.output import say
from runtime.terminal.verbs import program, run_verb

from .graph.tensorrt import Chosen, build_engine, capability_of, flags_of

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
        timing_cache: The file of TensorRT's timings; None for one beside the engines.

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
                f"batch buckets must be rising numbers from 1, found {list(self.buckets)}."
            )
        if self.compute_capability and self.engine == "tensorrt":
            raise RequestError(
                "TensorRT builds for the GPU it runs on; --compute-capability is for tensorrt-rtx."
            )


def choose(order: Order) -> Chosen:
    """Return the first library of the order that can build here.

    Raises:
        BackendError: None can. The message says why, for each.
    """
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


def prepare(order: Order) -> None:
    """Check, before a long export, that an engine named explicitly can be built here.

    Raises:
        BackendError: It cannot.
    """
    if order.engine != NONE and (order.engine != AUTO or order.compute_capability):
        choose(order)


def after_export(bundle: Bundle, order: Order, typed: bool) -> None:
    """Build the engines that `--engine` asks for, once the bundle is written.

    Args:
        typed: Whether a precision for engines was exported. Without one, "auto" builds none.

    Raises:
        BackendError, ExportError: An engine named explicitly cannot be built. For "auto" without a
            GPU, a line says that none was built, and why.
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
    if why:
        _LOG.warning("building again: %s", why)
    begun = time.perf_counter()
    path = f"{precision}/{graph}"
    model = bundle.read(path)
    refuse_endless(model)
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=program("export.engines"), description=__doc__)
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
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return run_verb(parser, _act, arguments)


def _act(given: argparse.Namespace) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
