"""How fast a bundle samples on this machine, and how close its images are to float32's:
python -m runtime.bench BUNDLE --backend all --precision all"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from ..backends.registry import BACKENDS, check_precision, offered
from ..backends.survey import BackendState, backends
from ..bundle.bundle import Bundle
from ..engine.expand import MAX_SAMPLES
from ..errors import BackendError, RequestError
from ..errors.arguments import choice, integer, number
from ..errors.messages import shown
from ..sampler import Sampler
from ..terminal.options import add_sampling, settings
from ..terminal.output import columns, say
from ..terminal.verbs import program, run_verb
from . import plot as bench_plot
from .facts import Facts, facts_of
from .measure import measure
from .results import Result
from .workload import Effort, Workload

EXAMPLE = """
examples:
  python -m runtime.bench bundles/emoji32
  python -m runtime.bench bundles/emoji32 --backend all --precision all --plot bench.png
  python -m runtime.bench bundles/emoji32 --backend openvino --precision fp32,bf16 --json

p50, p95, p99: of one whole call of Sampler.sample(batch), with all its steps and its noise.
Configurations are interleaved call by call, so background load affects all of them equally.
loop: the share of the time that is not spent in calls of the network. to fp32: the median PSNR of
final images against fp32's of the same seeds. first picture: from the start of a fresh process,
with the models that a backend compiles already in its cache.
"""


SPEED_HEADS: tuple[str, ...] = (
    *("backend", "precision", "batch", "p50 ms", "p95", "p99"),
    *("pictures/s", "ms a call", "loop", "to fp32"),
)
FRESH_HEADS: tuple[str, ...] = (
    *("fresh process", "", "first picture", "of it: import"),
    *("load", "sample", "peak memory"),
)


def chosen(
    bundle: Bundle,
    backend: str,
    precision: str,
    here: Mapping[str, BackendState],
    for_cpus: str = "",
) -> tuple[list[tuple[str, str]], list[str]]:
    """Find the pairs of backend and precision that a command line names.

    Args:
        backend: Names with commas between. "all" is all that this machine runs, "auto" onnxruntime.
        precision: Likewise; "auto" is fp32.
        here: What `backends.survey.backends` returned.
        for_cpus: An option of the command line that GPUs do not have; "" for none.

    Returns:
        The pairs; and for each that was left out, its name and why.

    Raises:
        RequestError: A name is unknown, or no pair is left.
        BackendError: Only one pair is named, and this machine cannot run it.
    """
    names = ["onnxruntime" if n == "auto" else n for n in listed("--backend", backend)]
    kinds = ["fp32" if p == "auto" else p for p in listed("--precision", precision)]
    every = offered(bundle)
    for name in names:
        if name not in ("all", *BACKENDS):
            choice("backend", name, ["all", "auto", *BACKENDS])  # raises, with the nearest name
    for kind in kinds:
        if kind != "all":
            check_precision(bundle, kind)
    # "all" precisions are those that are offered on each backend.
    wanted = list(product(list(BACKENDS) if "all" in names else names, kinds))
    wanted = [
        (b, q) for b, p in wanted for q in ([k for c, k in every if c == b] if p == "all" else [p])
    ]
    wanted = list(dict.fromkeys(wanted))
    # A pair that is named by itself must run. One of several is left out if it cannot.
    several = len(wanted) > 1 or "all" in (*names, *kinds)
    runs = []
    left = []
    for b, p in wanted:
        if for_cpus and BACKENDS[b].gpu:
            left.append(f"{b} {p}: {for_cpus} is for CPUs")
        elif (b, p) in every and p in here[b]["precisions"]:
            runs.append((b, p))
        elif not several:
            Sampler(bundle, b, p)  # raises, with the reason
            raise BackendError(f"{b} cannot compute {p} on this machine: {here[b]['missing']}.")
        else:
            why = here[b]["missing"] if (b, p) in every else f"{bundle.name} does not offer it"
            left.append(f"{b} {p}: {why}")
    if not runs:
        raise RequestError(
            f"nothing to measure. {'; '.join(left)}. See: python -m runtime.info {bundle.path}"
        )
    return runs, left


def listed(option: str, text: str) -> list[str]:
    """Split names with commas between.

    Raises:
        RequestError: There is none.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise RequestError(
            f"{option} needs a name, several with commas between, or all; got {shown(text)}."
        )
    return names


def sizes(text: str) -> list[int]:
    """Parse the batch sizes of --batch, ascending.

    Raises:
        RequestError: They are not integers from 1 to 4096.
    """
    try:
        found = [int(part) for part in listed("--batch", text)]
    except ValueError:
        raise RequestError(
            f"--batch needs whole numbers with commas between, got {shown(text)}."
        ) from None
    return sorted({integer("batch", size, 1, 4096) for size in found})


def describe(facts: Facts, results: Sequence[Result], left: Sequence[str]) -> str:
    """Return the figures as a readable table."""
    lines = [facts.sampled, facts.measured_on, "", *columns(_speeds(results))]
    if any(r.cold for r in results):
        lines += ["", *columns(_first_images(results))]
    fewest = min(s.timed for r in results for s in r.speeds)
    slowest = ", so p99 is the slowest" if fewest < 100 else ""
    lines += ["", f"timed in turn, {fewest} calls of each or more{slowest}"]
    lines += [f"left out: {what}" for what in left]
    return "\n".join(lines)


def _speeds(results: Sequence[Result]) -> list[list[str]]:
    """The cells of one row for each batch size, below their heads."""
    rows = [list(SPEED_HEADS)]
    for r in results:
        for s in r.speeds:
            times = [f"{s.latency_ms[p]:.1f}" for p in ("p50", "p95", "p99")]
            # The share is a difference of two times, which noise may make negative.
            loop = f"{max(0.0, s.loop):.1%}"
            rates = [f"{s.samples_per_s:.1f}", f"{s.call_ms:.2f}", loop, r.nearness]
            rows.append([r.backend, r.precision, str(s.batch), *times, *rates])
    return rows


def _first_images(results: Sequence[Result]) -> list[list[str]]:
    """The cells of one row for each pair measured in fresh processes, below their heads."""
    rows = [list(FRESH_HEADS)]
    for r in results:
        if r.cold:
            c = r.cold
            seconds = (c.first_picture_s, c.import_s, c.load_s, c.sample_s)
            memory = "–" if c.peak_mib is None else f"{c.peak_mib:.0f} MiB"
            rows.append([r.backend, r.precision, *[f"{s:.2f} s" for s in seconds], memory])
    return rows


def as_json(facts: Facts, results: Sequence[Result], left: Sequence[str]) -> str:
    """Return one line of JSON, for programs."""
    runs = [r.to_json() for r in results]
    found = {**facts.to_json(), "runs": runs, "left_out": list(left)}
    return json.dumps(found, ensure_ascii=False, allow_nan=False)


def bench(given: argparse.Namespace) -> None:
    """Run the command line."""
    bundle = Bundle.load(given.bundle)
    batches = sizes(given.batch)
    integer("pictures", given.pictures, 1, MAX_SAMPLES)
    integer("cold", given.cold, 0)
    number("seconds", given.seconds, 0.0, 86400.0)
    # Before a fresh process, whose error would be a traceback.
    for name, value in (("threads", given.threads), ("streams", given.streams)):
        if value is not None:
            integer(name, value, 1, 1024)
    for_cpus = "--threads" if given.threads else "--streams" if given.streams else ""
    here = backends()
    pairs, left = chosen(bundle, given.backend, given.precision, here, for_cpus)
    if given.plot:
        bench_plot.check(given.plot)
    labels = given.label or range(bundle.num_classes)
    effort = Effort(given.seconds, given.cold, given.pictures, given.threads, given.streams)
    workload = Workload.of(bundle, given.seed, settings(given), labels)
    facts = facts_of(bundle, workload, effort, here)
    results = measure(bundle, pairs, batches, workload, effort)
    # First, so that a disk that is full costs the page alone.
    say(as_json(facts, results, left) if given.json else describe(facts, results, left), flush=True)
    if given.plot:
        bench_plot.draw(given.plot, facts, results, bundle.sample_range)


def main(arguments: list[str] | None = None) -> int:
    return run_verb(_parser(), bench, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("runtime.bench"),
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_sampling(parser)
    add = parser.add_argument
    add(
        "--label",
        action="append",
        help="a label's name or number; several in turn if given again [every label in turn]",
    )
    add(
        "--backend",
        default="auto",
        help="inference library; several with commas between, or all [auto: onnxruntime]",
    )
    add(
        "--precision",
        default="auto",
        help="several with commas between, or all that this machine runs [auto: fp32]",
    )
    add("--batch", default="1,4,16", help="batch sizes with commas between [1,4,16]")
    add("--threads", type=int, help="of the inference library [one a core]")
    add("--streams", type=int, help="parts of a batch that run at once [what is fastest]")
    add(
        "--seconds",
        type=float,
        default=2.0,
        help="time for each pair and batch; never fewer than 5 calls [2]",
    )
    add("--cold", type=int, default=3, help="fresh processes a pair, 0 for none [3]")
    add("--pictures", type=int, default=16, help="samples that are compared with fp32's [16]")
    add("--json", action="store_true", help="print one line of JSON, for programs")
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="also draw it, as .png, .svg or .pdf; needs matplotlib",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
