"""The options that the runtime's commands share, and a progress bar over samples."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from ..bundle.bundle import Bundle
from ..bundle.sampling import SolverOptions
from ..diffusion.arrays import Array
from ..diffusion.grid import GRIDS
from ..diffusion.solvers import SOLVERS
from ..engine.conditions import Conditions, ConditionValue
from ..engine.expand import ARGUMENTS
from ..engine.keywords import GuidedKeywords
from ..engine.loop import Preview, StepCallback
from ..errors import RequestError
from ..errors.keywords import check_options
from ..errors.messages import reason, shown
from ..sampler import Sampler
from .output import say
from .progress import Progress
from .verbs import add_bundle

Label = TypeVar("Label", str, int | str)


def add_sampling(
    parser: argparse.ArgumentParser, defaults: Mapping[str, str] | None = None
) -> None:
    """Add the bundle, and the options that decide its samples, apart from their labels.

    defaults: What the command does without an option, for the help; else the bundle's.
    """
    add_bundle(parser)
    default = dict.fromkeys(("solver", "grid", "guidance"), "the bundle's") | dict(defaults or {})
    add = parser.add_argument
    add("--seed", type=int, default=0, help="seed of the first; the next ones follow [0]")
    add("--steps", type=int, help="grid intervals [the bundle's]")
    add(
        "--solver",
        metavar="NAME",
        help=f"{', '.join(SOLVERS)}, or tuned if the bundle has it [{default['solver']}]",
    )
    add(
        "--option",
        type=assignment,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the solver, such as eta=0.5",
    )
    add("--grid", help=f"{', '.join(GRIDS)}, or times with commas between [{default['grid']}]")
    guidance = f"classifier-free guidance scale, 1 is none [{default['guidance']}]"
    add("--guidance", type=float, help=guidance)
    add(
        "--condition",
        type=condition,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a condition of the bundle: an image, an .npy file, numbers with commas between, or "
        "null; repeat the name for one a sample",
    )
    add(
        "--guidance-interval",
        metavar="LOW,HIGH",
        help="guide only where sigma/alpha is above LOW and at most HIGH [everywhere]",
    )


def add_options(
    parser: argparse.ArgumentParser, out: str, defaults: Mapping[str, str] | None = None
) -> None:
    """Add the bundle, and every option that all commands with an output file have."""
    add_sampling(parser, defaults)
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path(out),
        help=f"an image, or an .npy file of the samples themselves [{out}]",
    )
    add("--columns", type=int, help="images to a row of the sheet")
    add(
        "--width",
        type=int,
        default=512,
        help="enlarge the sheet, by a whole factor, to at least this many pixels [512]",
    )
    add(
        "--backend",
        default="auto",
        help="inference library, or fastest, which measures [auto: onnxruntime]",
    )
    add("--min-psnr", type=float, help="dB to fp32 that --backend fastest keeps [fp32 alone]")
    add("--precision", default="auto", help="one that the bundle holds [auto: fp32]")
    add("--threads", type=int, help="of the inference library [one a core]")
    add("--streams", type=int, help="parts of a batch that run at once [what is fastest]")
    add(
        "--max-batch",
        type=int,
        default=16,
        help="more samples than this run in several batches [16]",
    )


def settings(given: argparse.Namespace) -> GuidedKeywords:
    """Return the arguments of `Sampler`'s methods that the command line gives."""
    found = GuidedKeywords()
    # Absent options are left out, because some methods refuse arguments that they do not take.
    if given.solver is not None:
        found["solver"] = given.solver
    if given.steps is not None:
        found["steps"] = given.steps
    if given.grid is not None:
        # The names of grids begin with a letter, and times with a digit.
        named = given.grid[:1].isalpha()
        found["grid"] = given.grid if named else _numbers("--grid", given.grid)
    if given.guidance is not None:
        found["guidance"] = given.guidance
    if given.guidance_interval is not None:
        low_high = tuple(_numbers("--guidance-interval", given.guidance_interval))
        found["guidance_interval"] = cast(tuple[float, float], low_high)
    if given.condition:
        found["conditions"] = _conditions(given.condition)
    # The sampler checks the names and the values of the solver's options.
    return cast(GuidedKeywords, {**found, **_options(given.option)})


def together(flag: str, assignments: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return NAME=VALUE options as one mapping. Raises RequestError for a name given twice."""
    values: dict[str, Any] = {}
    for name, value in assignments:
        if name in values:
            raise RequestError(f"{flag} must give each name once, got {name!r} twice. Remove one.")
        values[name] = value
    return values


def _options(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return the solver's options. Raises RequestError for names that no solver has."""
    found = together("--option", pairs)
    for name in found:
        if name in ARGUMENTS:
            raise RequestError(f"--option {name} is not an option of a solver. Leave it out.")
    # The sampler checks them, too, but its methods have arguments of their own.
    check_options("a solver", found, sorted(SolverOptions.__optional_keys__))
    return found


def condition(text: str) -> tuple[str, ConditionValue]:
    """Parse the NAME=VALUE of a condition, for argparse: numbers, null, or a file."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(
            f"must be NAME=VALUE, such as low_res=photo.png, got {shown(text)}"
        )
    if value == "null":
        return name, None
    if value.endswith(".npy"):
        return name, _numbers_of(Path(value))
    try:
        numbers = [json.loads(part) for part in value.split(",")]
        return name, numbers[0] if len(numbers) == 1 else numbers
    except (ValueError, RecursionError):
        return name, value


def _numbers_of(path: Path) -> Array:
    """Return the array in an .npy file."""
    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.ndarray):
            found.close()
            raise ValueError("it is an archive of arrays")
        return found
    except Exception as error:  # damaged files raise many kinds of errors inside numpy
        raise argparse.ArgumentTypeError(f"{path} cannot be read: {reason(error)}") from error


def _conditions(pairs: list[tuple[str, ConditionValue]]) -> Conditions:
    """Return conditions by name. A name that is given several times has a list of its values."""
    values: dict[str, list[ConditionValue]] = {}
    for name, value in pairs:
        values.setdefault(name, []).append(value)
    # The sampler checks names and shapes, and reads images.
    found = {name: given[0] if len(given) == 1 else given for name, given in values.items()}
    return cast(Conditions, found)


def labels_of(given: argparse.Namespace) -> str:
    """Return the labels of a bundle, one a line. This needs no inference library."""
    bundle = Bundle.load(given.bundle)
    names = bundle.labels.names if bundle.labels else ()
    return (
        "\n".join(f"{i:3d}  {name}" for i, name in enumerate(names))
        or f"{bundle.name} has no labels"
    )


def load(given: argparse.Namespace) -> tuple[Sampler, float]:
    """Return the sampler, and the seconds that loading took."""
    begun = time.perf_counter()
    sampler = Sampler.load(
        given.bundle,
        given.backend,
        given.precision,
        given.threads,
        given.max_batch,
        given.streams,
        given.min_psnr,
    )
    if sampler.chosen:
        say(str(sampler.chosen))
    return sampler, time.perf_counter() - begun


@contextmanager
def progress(title: str, sampler: Sampler) -> Iterator[StepCallback | None]:
    """Yield a step callback that draws a bar over network calls, one bar for each pass.

    For a backend that runs whole programs by itself it is None: a callback would prevent that.
    """
    if sampler.whole:
        yield None
        return
    bars: list[Progress] = []

    def count(preview: Preview) -> None:
        # A step that is not a later one belongs to the next batch, or to an inversion's way back.
        if not bars or preview.step <= bars[-1].done:
            if bars:
                bars[-1].__exit__()
            bars.append(Progress(title, preview.steps))
        bars[-1].advance(preview.step - bars[-1].done, note=f"{len(preview.samples)} at once")

    try:
        yield count
    finally:
        if bars:
            bars[-1].__exit__()


def in_turn(given: Sequence[Label] | None, n: int) -> Label | list[Label] | None:
    """Return one label for all n samples, or the given labels in turn."""
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


def integers(text: str) -> tuple[int, ...]:
    """Parse integers with commas between them, for argparse."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be integers with commas between them, such as 1,2,4, got {shown(text)}"
        ) from None


def assignment(text: str) -> tuple[str, object]:
    """Parse NAME=VALUE, for argparse.

    The value is JSON, what Python reads and JSON does not (".5", "nan", "True"), or else text.
    """
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {shown(text)}")
    if value in ("True", "False"):
        return name, value == "True"
    for parse in (json.loads, int, float):
        try:
            return name, parse(value)
        except (ValueError, RecursionError):
            continue
    return name, value
