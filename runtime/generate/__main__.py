"""Many samples as a folder of shards: python -m runtime.generate BUNDLE --n 1000000 --out DIR"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..bundle.bundle import Bundle
from ..errors.messages import shown
from ..terminal.output import say
from ..terminal.verbs import add_bundle, program, run_verb
from .formats import FORMATS
from .plan import Plan
from .run import Summary, generate, usable_workers
from .settings import Settings


def main(arguments: list[str] | None = None) -> int:
    return run_verb(_parser(), _run, arguments)


def _run(given: argparse.Namespace) -> int:
    """Run the command line. The exit status is 0 also if other parts have shards left."""
    most = usable_workers(given.backend)
    # One thread in each worker: the bytes are then the same for any number of workers and cores.
    threads = 1 if given.threads is None and most > 1 else given.threads
    settings = Settings(
        bundle=Bundle.load(given.bundle),
        plan=Plan.read(given.plan) if given.plan else Plan(),
        out=given.out,
        n=given.n,
        shard=given.shard,
        format=given.format,
        backend=given.backend,
        precision=given.precision,
        threads=threads,
        max_batch=given.max_batch,
        part=given.part,
        other_versions=given.other_versions,
    )
    workers = most if given.workers is None else given.workers
    summary = generate(settings, workers, given.ray)
    say(_told(summary, given.out))
    return 0


def _told(summary: Summary, out: Path) -> str:
    """Return what a run has done, in one line or two."""
    rate = summary.samples / max(summary.seconds, 1e-9)
    damaged = f", {summary.damaged} of them damaged before" if summary.damaged else ""
    lines = [
        f"{summary.made} shards made{damaged}, {summary.kept} kept: {out}",
        f"{summary.samples} samples in {summary.seconds:.1f} s, {rate:.1f} per second",
    ]
    if summary.missing:
        lines.append(f"{summary.missing} shards are missing: run the other parts too")
    return "\n".join(lines)


def _part(text: str) -> tuple[int, int]:
    """Parse K/PARTS, for argparse."""
    k, slash, parts = text.partition("/")
    if not (slash and k.isdecimal() and parts.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be K/PARTS, such as 1/4, got {shown(text)}")
    return int(k), int(parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program("runtime.generate"), description=__doc__)
    add_bundle(parser)
    add = parser.add_argument
    add("--n", type=int, required=True, help="samples of all shards")
    add("--out", type=Path, required=True, metavar="DIR", help="the folder of shards")
    add("--plan", type=Path, metavar="FILE", help="labels, solver, steps, … [the bundle's]")
    add("--shard", type=int, default=10_000, help="samples of a shard [10000]")
    add("--format", default="webdataset", metavar="NAME", help=f"{', '.join(FORMATS)} [webdataset]")
    add("--workers", type=int, help="processes [one per core; 1 on a GPU]")
    add("--ray", action="store_true", help="make the shards on a Ray cluster, by --workers actors")
    add(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="K/PARTS",
        help="make only each PARTS-th shard, beginning with the K-th [1/1]",
    )
    add(
        "--other-versions",
        action="store_true",
        help="continue samples that were begun with other versions or settings",
    )
    add("--backend", default="auto", help="inference library [auto: onnxruntime]")
    add("--precision", default="auto", help="one that the bundle holds [auto: fp32]")
    add("--threads", type=int, help="of the inference library in each worker [1]")
    add("--max-batch", type=int, default=16, help="samples of one network call [16]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
