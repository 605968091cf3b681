"""Sample a bundle into an image: python -m runtime.sample BUNDLE --n 16 --out grid.png"""

from __future__ import annotations

import argparse
import sys
import time

from .errors.arguments import integer
from .terminal.options import add_options, in_turn, labels_of, load, progress, settings
from .terminal.output import say
from .terminal.sheets import check_out, write
from .terminal.verbs import program, run_verb


def main(arguments: list[str] | None = None) -> int:
    return run_verb(_parser(), lambda given: say(sample(given)), arguments)


def sample(given: argparse.Namespace) -> str:
    """Run the command line, and return what to print."""
    if given.labels:
        return labels_of(given)
    sampler, loaded = load(given)
    bundle = sampler.bundle
    integer("n", given.n, 1)
    check_out(given, bundle, given.n)
    begun = time.perf_counter()
    with progress("sampling", sampler) as count:
        # `run` instead of `sample`, for the timings of a device.
        requests = sampler.requests(
            given.n,
            given.seed,
            label=in_turn(given.label, given.n),
            convert=given.convert,
            **settings(given),
        )
        ran = sampler.run(requests, on_step=count)
    spent = time.perf_counter() - begun
    write(given.out, ran.samples, sampler, given.columns, given.width)
    # The last batch represents all: the first may have captured the graph that the rest ran.
    how = "".join(
        f" ({timing.how}{timing.note and ': ' + timing.note})" for timing in ran.timings[-1:]
    )
    sampler.close()
    return (
        f"{given.n} of {bundle.name} on {sampler.backend.name} {sampler.backend.precision}: "
        f"loaded in {loaded:.2f} s, "
        f"sampled in {spent:.2f} s{how}: {given.out}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program("runtime.sample"), description=__doc__)
    add_options(parser, out="grid.png")
    add = parser.add_argument
    add("--n", type=int, default=16, help="the number of samples [16]")
    add(
        "--label",
        action="append",
        help="a label's name or number; repeat it for several in turn [the null label]",
    )
    text = "fit the images of conditions to their size and mode"
    add("--convert", action="store_true", help=text)
    add("--labels", action="store_true", help="list the labels and exit")
    return parser


if __name__ == "__main__":
    sys.exit(main())
