"""TensorRT engines from a bundle, kept in this machine's cache: python -m export.engines build
BUNDLE | list | clear

An engine in the cache is loaded if it fits this machine exactly, and is built otherwise.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

from runtime.backends.nvidia import engine_cache as engines
from runtime.backends.nvidia.engine_cache import Entry
from runtime.bundle.bundle import Bundle
from runtime.errors import BackendError
from runtime.terminal.options import integers
from runtime.terminal.output import say
from runtime.terminal.verbs import program, run_verb

from .graph.cached_engines import AUTO, BUCKETS, ENGINES, NONE, Order, build_all, choose


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
    # An export that did not name an engine does not fail on a machine without a GPU.
    if lenient:
        try:
            choose(order)
        except BackendError as error:
            say(f"no engine was built: {error}")
            return
    build_all(bundle, order)


def add_engine_options(parser: argparse.ArgumentParser, default: str = AUTO) -> None:
    """Add the options that say which engines are built."""
    add = parser.add_argument
    add("--engine", default=default, metavar="NAME", help=f"{', '.join(ENGINES)} [{default}]")
    add(
        "--compute-capability",
        metavar="X.Y",
        help="of the GPU that tensorrt-rtx builds for [this machine's]",
    )
    add(
        "--batch-buckets",
        type=integers,
        default=BUCKETS,
        metavar="N,N",
        help="batch sizes to build for [1,2,4,8,16]",
    )
    add(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="of TensorRT's timings [one next to the engines]",
    )


def ordered(given: argparse.Namespace) -> Order:
    """Return what the options say. Raises RequestError if they contradict each other."""
    return Order(given.engine, given.compute_capability, given.batch_buckets, given.timing_cache)


def listing() -> list[str]:
    """Return a line for every engine in the cache."""
    lines = []
    for key, entry in engines.entries():
        if isinstance(entry, Entry):
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.built))
            lines.append(f"{key[:12]}  {when}  {entry.size / 1e6:7.1f} MB  {entry.recipe}")
        else:
            lines.append(f"{key[:12]}  {entry}")
    return lines or [f"no engines in {engines.place()}"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
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
