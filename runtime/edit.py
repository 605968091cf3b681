"""Pictures into pictures: python -m runtime.edit VERB BUNDLE PICTURE ... --out edited.png"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .diffusion.noise import MAX_SEED
from .errors import RequestError
from .images import animation_format, picture_format, read, save_animation, tile
from .options import add_options, check_out, in_turn, load, progress, settings, write
from .sampler import Sampler
from .terminal.output import say
from .terminal.verbs import program, run_verb


def main(arguments: list[str] | None = None) -> int:
    return run_verb(_parser(), edit, arguments)


def edit(given: argparse.Namespace) -> None:
    """Do what the command line asks."""
    sampler, _ = load(given)
    format_of = animation_format if given.verb == "animate" else picture_format
    check_out(given, sampler.bundle, format_of)
    how = settings(given)
    if given.verb != "translate":
        how["label"] = in_turn(given.label, _count(given))
    with progress(given.verb, sampler) as count:
        note = VERBS[given.verb].act(sampler, given, {**how, "on_step": count})
    say(f"{note}: {given.out}")


def _stylize(sampler: Sampler, given: argparse.Namespace, how: dict[str, Any]) -> str:
    x = _read(sampler, given)
    return _beside(sampler, given, x, sampler.stylize(x, given.strength, given.seed, **how))


def _invert(sampler: Sampler, given: argparse.Namespace, how: dict[str, Any]) -> str:
    x = _read(sampler, given)
    found = sampler.invert(x, strength=given.strength, **how)
    note = "RMS distance of what comes back: " + ", ".join(f"{error:.4f}" for error in found.error)
    if given.out.suffix == ".npy":
        write(given.out, found.noise, sampler, None, 0)
        return f"{note}. The noise"
    return f"{note}. {_beside(sampler, given, x, found.back)}"


def _translate(sampler: Sampler, given: argparse.Namespace, how: dict[str, Any]) -> str:
    x = _read(sampler, given)
    source, target = (in_turn(labels, len(x)) for labels in (given.source, given.target))
    return _beside(
        sampler, given, x, sampler.translate(x, source, target, strength=given.strength, **how)
    )


def _inpaint(sampler: Sampler, given: argparse.Namespace, how: dict[str, Any]) -> str:
    x = _read(sampler, given)
    return _beside(
        sampler, given, x, sampler.inpaint(x, given.mask, given.seed, convert=given.convert, **how)
    )


def _interpolate(sampler: Sampler, given: argparse.Namespace, how: dict[str, Any]) -> str:
    first, last = (_end(text) for text in (given.first, given.last))
    _write(
        sampler,
        given,
        sampler.interpolate(first, last, given.n, convert=given.convert, **how),
        given.n,
    )
    return f"{given.n} pictures from {given.first} to {given.last}"


def _end(text: str) -> int | str:
    """A seed, or a path: of digits alone it is a seed."""
    if not re.fullmatch("[0-9]+", text):
        return text
    try:
        return int(text)
    except ValueError:  # thousands of digits
        raise RequestError(
            f"a seed must be 0 to {MAX_SEED}, got one of {len(text)} digits."
        ) from None


def _variations(sampler: Sampler, given: argparse.Namespace, how: dict[str, Any]) -> str:
    x = _read(sampler, given)
    found = sampler.variations(x, given.n, given.amount, given.seed, **how)
    _write(sampler, given, np.concatenate([x, found]), None)
    return f"the picture and {given.n} variations of it"


def _animate(sampler: Sampler, given: argparse.Namespace, how: dict[str, Any]) -> str:
    pictures = _read(sampler, given) if given.pictures else None
    how = {name: value for name, value in how.items() if value is not None}
    frames = sampler.animate(given.n, given.seed, pictures=pictures, **how)
    if given.out.suffix == ".npy":
        write(given.out, frames, sampler, None, 0)
    else:
        sheets = [tile(sheet, given.columns) for sheet in sampler.to_uint8(frames)]
        save_animation(given.out, np.stack(sheets), given.width)
    return f"{len(frames)} frames"


def _count(given: argparse.Namespace) -> int:
    """How many samples the command line asks for."""
    pictures = getattr(given, "pictures", None)
    return len(pictures) if pictures and isinstance(pictures, list) else given.n


def _read(sampler: Sampler, given: argparse.Namespace) -> Any:
    pictures = given.pictures
    shape = sampler.bundle.sample_shape
    span = sampler.bundle.sample_range
    return read(
        pictures if isinstance(pictures, list) else [pictures], shape, *span, convert=given.convert
    )


def _beside(sampler: Sampler, given: argparse.Namespace, before: Any, after: Any) -> str:
    """Write what was handed in above what was made of it; an .npy file gets the latter alone."""
    if given.out.suffix == ".npy":
        write(given.out, after, sampler, None, 0)
        return f"{len(after)} samples"
    _write(sampler, given, np.concatenate([before, after]), len(before))
    return f"above what was handed in, below what it became, {len(after)} of them"


def _write(sampler: Sampler, given: argparse.Namespace, samples: Any, columns: int | None) -> None:
    write(given.out, samples, sampler, given.columns or columns, given.width)


class Verb(NamedTuple):
    """A verb's doing, its line in the help, and the file that it writes if not told."""

    act: Callable[[Sampler, argparse.Namespace, dict[str, Any]], str]
    help: str
    out: str = "edited.png"


VERBS: Mapping[str, Verb] = {
    "stylize": Verb(
        _stylize,
        "noise pictures to a chosen strength and bring them back, under another label if asked "
        "(SDEdit)",
    ),
    "invert": Verb(
        _invert, "find the noise that pictures come from, and how nearly they come back from it"
    ),
    "translate": Verb(
        _translate,
        "invert pictures under one label and bring them back under another: style transfer",
    ),
    "inpaint": Verb(_inpaint, "paint anew what a mask leaves black"),
    "interpolate": Verb(_interpolate, "the way from one seed or picture to another"),
    "variations": Verb(_variations, "pictures like one that is given"),
    "animate": Verb(
        _animate,
        "a sample on its way from noise; or a picture on its way to noise",
        "animation.gif",
    ),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program("runtime.edit"), description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        own = verbs.add_parser(name, help=verb.help, description=verb.help)
        add_options(own, verb.out)
        own.add_argument(
            "--convert", action="store_true", help="bring pictures to the bundle's size and mode"
        )
        _add_own(name, own.add_argument)
    return parser


def _add_own(verb: str, add: Callable[..., Any]) -> None:
    """The options of one verb alone."""
    if verb == "interpolate":
        add("first", metavar="FIRST", help="a picture, or a seed")
        add("last", metavar="LAST", help="a picture, or a seed")
    elif verb == "variations":
        add("pictures", metavar="PICTURE", help="the picture")
        add(
            "--amount",
            type=float,
            default=0.3,
            help="0: the picture itself, 1: nothing of it [0.3]",
        )
    else:
        add(
            "pictures",
            nargs="*" if verb == "animate" else "+",
            metavar="PICTURE",
            help="pictures, all of the bundle's size",
        )
    if verb == "translate":
        add(
            "--from",
            dest="source",
            action="append",
            required=True,
            metavar="LABEL",
            help="what the pictures are; several in turn if given again",
        )
        add(
            "--to",
            dest="target",
            action="append",
            required=True,
            metavar="LABEL",
            help="what they become; several in turn if given again",
        )
    else:
        add(
            "--label",
            action="append",
            help="a label's name or number; several in turn if given again; none: the null label",
        )
    if verb in ("interpolate", "variations", "animate"):
        add("--n", type=int, default=1 if verb == "animate" else 8, help="how many")
    if verb in ("stylize", "invert", "translate"):
        strength = {"stylize": 0.5, "invert": 1.0, "translate": 0.4}[verb]
        add(
            "--strength",
            type=float,
            default=strength,
            help=f"the share of the grid that is walked, 0 to 1 [{strength:g}]",
        )
    if verb == "inpaint":
        add(
            "--mask",
            required=True,
            help="a picture of the same size: white is kept, black is painted anew",
        )


if __name__ == "__main__":
    sys.exit(main())
