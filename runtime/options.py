"""What the runtime's commands share: their options, and a progress bar over samples."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .bundle.bundle import Bundle
from .diffusion.grid import GRIDS
from .diffusion.solvers import SOLVERS
from .engine.loop import Preview, StepCallback
from .errors import RequestError
from .errors.arguments import integer, shown
from .files import replacing
from .images import picture_format, save, tile, to_uint8
from .sampler import ARGUMENTS, Sampler
from .terminal.progress import Progress


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The bundle, and what decides its samples but for their labels."""
    add = parser.add_argument
    add(
        "bundle",
        type=Path,
        metavar="BUNDLE",
        help="a bundle's folder, made by python -m export.build; or a shipped bundle: emoji32",
    )
    add("--seed", type=int, default=0, help="seed of the first; the next ones follow [0]")
    add("--steps", type=int, help="grid intervals [the bundle's]")
    add(
        "--solver",
        metavar="NAME",
        help=f"{', '.join(SOLVERS)}, or tuned where the bundle has it [the bundle's]",
    )
    add(
        "--option",
        type=assignment,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the solver, such as eta=0.5",
    )
    add("--grid", help=f"{', '.join(GRIDS)}, or times with commas between [the bundle's]")
    add("--guidance", type=float, help="classifier-free guidance scale, 1 is none [the bundle's]")
    add(
        "--guidance-interval",
        metavar="LOW,HIGH",
        help="guide only where sigma/alpha is above LOW and at most HIGH [everywhere]",
    )


def add_options(parser: argparse.ArgumentParser, out: str) -> None:
    """The bundle, and every option that does not depend on what is made."""
    add_sampling(parser)
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path(out),
        help=f"a picture, or an .npy file of the samples themselves [{out}]",
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


def settings(given: argparse.Namespace) -> dict[str, Any]:
    """What `Sampler`'s methods take, without what was not given."""
    grid = (
        given.grid
        if given.grid is None or given.grid[:1].isalpha()
        else _numbers("--grid", given.grid)
    )
    interval = None
    if given.guidance_interval is not None:
        interval = tuple(_numbers("--guidance-interval", given.guidance_interval))
    found = {"solver": given.solver, "steps": given.steps, "grid": grid, "guidance": given.guidance}
    found |= {"guidance_interval": interval, **_options(given.option)}
    return {name: value for name, value in found.items() if value is not None}


def _options(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The solver's options. Raises RequestError for the name of an argument that is no option."""
    for name, _ in pairs:
        if name in ARGUMENTS:
            raise RequestError(f"--option {name} is no option of a solver. Leave it out.")
    return dict(pairs)


def load(given: argparse.Namespace) -> tuple[Sampler, float]:
    """The sampler, and the seconds that it took."""
    begun = time.perf_counter()
    sampler = Sampler.load(
        given.bundle, given.backend, given.precision, given.threads, given.max_batch
    )
    return sampler, time.perf_counter() - begun


@contextmanager
def progress(title: str, sampler: Sampler) -> Iterator[StepCallback | None]:
    """A step callback that draws a bar over network calls; several passes, one after another, are
    one bar each.

    None for a backend that runs whole programs by itself: a callback would keep it from that.
    """
    if sampler.whole:
        yield None
        return
    bars: list[Progress] = []

    def count(preview: Preview) -> None:
        if not bars or preview.step < bars[-1].done:
            if bars:
                bars[-1].__exit__()
            bars.append(Progress(title, preview.steps))
        bars[-1].advance(preview.step - bars[-1].done, note=f"{len(preview.samples)} at once")

    try:
        yield count
    finally:
        if bars:
            bars[-1].__exit__()


def write(path: Path, samples: Any, sampler: Sampler, columns: int | None, width: int) -> None:
    """Samples [n, *S] as one sheet of pictures, or as they are into an .npy file."""
    if path.suffix == ".npy":
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, samples)
    else:
        save(path, tile(to_uint8(samples, *sampler.bundle.sample_range), columns), width)


def check_out(
    given: argparse.Namespace, bundle: Bundle, format_of: Callable[[Path], str] = picture_format
) -> None:
    """Raises RequestError, before anything is sampled, for a file or sheet that `write` cannot
    write, and for samples that no picture can show."""
    if given.columns is not None:
        integer("columns", given.columns, 1)
    if given.out.suffix == ".npy":
        return
    shape = bundle.sample_shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise RequestError(
            f"the samples of {bundle.name} are {'×'.join(map(str, shape))}, and a picture takes 1 "
            f"or 3 channels by height by width: "
            "write the samples themselves with --out samples.npy."
        )
    format_of(given.out)


def in_turn(given: list[str] | None, n: int) -> Any:
    """One label for all, or the given ones in turn."""
    if not given or len(given) == 1:
        return given[0] if given else None
    return [given[i % len(given)] for i in range(n)]


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        names = f"a name ({', '.join(GRIDS)}) or times" if option == "--grid" else "two numbers"
        raise RequestError(
            f"{option} must be {names} with commas between, got {shown(text)}."
        ) from None


def assignment(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE, for argparse.

    The value is JSON, a number that Python reads and JSON does not (".5", "nan"), or else text.
    """
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {shown(text)}")
    for parse in (json.loads, int, float):
        try:
            return name, parse(value)
        except (ValueError, RecursionError):
            continue
    return name, value
