"""Sample a bundle into a picture: python -m runtime.sample BUNDLE --n 16 --out grid.png"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from .arguments import integer
from .errors import RequestError, status
from .files import replacing
from .grid import GRIDS
from .pictures import picture_format, save, tile, to_uint8
from .progress import Progress
from .sampler import Preview, Sampler
from .solvers import SOLVERS


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)

    def action() -> int:
        print(sample(given))
        return 0

    return status(action)


def sample(given: argparse.Namespace) -> str:
    """Do what the command line asks; returns what to tell the person."""
    begun = time.perf_counter()
    sampler = Sampler.load(given.bundle, given.backend, given.precision, given.threads, given.max_batch)
    bundle = sampler.bundle
    if given.labels:
        names = bundle.labels.names if bundle.labels else ()
        return "\n".join(f"{i:3d}  {name}" for i, name in enumerate(names)) or f"{bundle.name} has no labels"
    integer("n", given.n, 1)
    if given.columns is not None:
        integer("columns", given.columns, 1)
    if given.out.suffix != ".npy":
        _require_pictures(bundle.name, bundle.sample_shape)
        picture_format(given.out)
    label = _labels(given.label, given.n)
    grid = given.grid if given.grid is None or given.grid[:1].isalpha() else _numbers(given.grid)
    options = {
        "solver": given.solver,
        "steps": given.steps,
        "grid": grid,
        "guidance": given.guidance,
        **dict(given.option),
    }
    loaded = time.perf_counter()
    with Progress("sampling", given.n) as bar:

        def count(preview: Preview) -> None:
            done = int(preview.samples[0]) if preview.step < preview.steps else int(preview.samples[-1]) + 1
            bar.advance(max(0, done - bar.done), note=f"step {preview.step}/{preview.steps}")

        samples = sampler.sample(given.n, given.seed, label=label, on_step=count, **options)
    spent = time.perf_counter() - loaded
    if given.out.suffix == ".npy":
        with replacing(given.out) as temporary, temporary.open("wb") as file:
            np.save(file, samples)
    else:
        save(given.out, tile(to_uint8(samples, *bundle.sample_range), given.columns), given.width)
    return (
        f"{given.n} of {bundle.name} on {sampler.backend.name} {sampler.backend.precision}: loaded in {loaded - begun:.2f} s, "
        f"sampled in {spent:.2f} s: {given.out}"
    )


def _require_pictures(name: str, shape: tuple[int, ...]) -> None:
    """Raises RequestError, before anything is sampled, for samples that no picture can show."""
    if len(shape) != 3 or shape[0] not in (1, 3):
        found = "×".join(map(str, shape))
        raise RequestError(
            f"the samples of {name} are {found}, and a picture takes 1 or 3 channels by height by width: "
            "write the samples themselves with --out samples.npy."
        )


def _labels(given: list[str] | None, n: int) -> Any:
    """One label for all, or the given ones in turn."""
    if not given or len(given) == 1:
        return given[0] if given else None
    return [given[i % len(given)] for i in range(n)]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(
            f"--grid is a name ({', '.join(GRIDS)}) or times with commas between, found {text!r}."
        ) from None


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"needs NAME=VALUE, found {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m runtime.sample", description=__doc__)
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="a bundle's folder, made by python -m export.build")
    add("--n", type=int, default=16, help="how many [16]")
    add("--seed", type=int, default=0, help="seed of the first; the next ones follow [0]")
    add(
        "--label",
        action="append",
        help="a label's name or number; several in turn if given again; none: the null label",
    )
    add("--labels", action="store_true", help="list the labels and stop")
    add("--steps", type=int, help="grid intervals [the bundle's]")
    add("--solver", metavar="NAME", help=f"{', '.join(SOLVERS)} [the bundle's]")
    add(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the solver, such as eta=0.5",
    )
    add("--grid", help=f"{', '.join(GRIDS)}, or times with commas between [the bundle's]")
    add("--guidance", type=float, help="classifier-free guidance scale, 1 is none [the bundle's]")
    add(
        "--out",
        type=Path,
        default=Path("grid.png"),
        help="a picture, or an .npy file of the samples themselves [grid.png]",
    )
    add("--columns", type=int, help="pictures to a row of the sheet")
    add(
        "--width",
        type=int,
        default=512,
        help="enlarge the sheet, by a whole factor, to at least this many pixels [512]",
    )
    add("--backend", default="auto", help="inference library [auto]")
    add("--precision", default="auto", help="one that the bundle holds [auto: fp32]")
    add("--threads", type=int, help="of the inference library [one a core]")
    add("--max-batch", type=int, default=16, help="more samples than this run in chunks [16]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
