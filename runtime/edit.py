"""Edit images: python -m runtime.edit VERB BUNDLE IMAGE ... --out edited.png"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .backends.base import Float32
from .diffusion.noise import MAX_SEED
from .engine.keywords import GuidedKeywords, Labels
from .engine.loop import StepCallback
from .errors import RequestError
from .images import animation_format, picture_format, read, save_animation, tile
from .sampler import Sampler
from .terminal.options import add_options, check_out, in_turn, load, progress, settings, write
from .terminal.output import say
from .terminal.verbs import program, run_verb


def main(arguments: list[str] | None = None) -> int:
    return run_verb(_parser(), edit, arguments)


def edit(given: argparse.Namespace) -> None:
    """Run the command line."""
    sampler, _ = load(given)
    verb = VERBS[given.verb]
    check_out(given, sampler.bundle, verb.format_of)
    with progress(given.verb, sampler) as on_step:
        note = verb.act(
            Edit(sampler, given, How(**settings(given), convert=given.convert), on_step)
        )
    say(f"{note}: {given.out}")


class How(GuidedKeywords, total=False):
    """The arguments of all verbs."""

    convert: bool


class Labelled(How, total=False):
    """The same, and a label."""

    label: Labels


class Edit(NamedTuple):
    """One run of the command: the sampler, the command line, and the arguments of all verbs."""

    sampler: Sampler
    given: argparse.Namespace
    how: How
    on_step: StepCallback | None

    def label(self) -> str | list[str] | None:
        """Return the label of all samples, or one each."""
        pictures = getattr(self.given, "pictures", None)
        listed = pictures if isinstance(pictures, list) else None
        return in_turn(self.given.label, len(listed) if listed else self.given.n)

    def read(self) -> Float32:
        """Return the images as samples [n, *S]."""
        pictures = self.given.pictures
        bundle = self.sampler.bundle
        return read(
            pictures if isinstance(pictures, list) else [pictures],
            bundle.sample_shape,
            *bundle.sample_range,
            convert=self.given.convert,
        )

    def write(self, samples: Float32, columns: int | None = None) -> None:
        """Write samples [n, *S] as one sheet, or as an .npy file."""
        columns = self.given.columns or columns
        write(self.given.out, samples, self.sampler, columns, self.given.width)

    def write_pairs(self, before: Float32, after: Float32) -> str:
        """Write samples [n, *S] above what became of them, and return what was written.

        An .npy file gets the latter alone.
        """
        if self.given.out.suffix == ".npy":
            self.write(after)
            return f"{len(after)} samples"
        self.write(np.concatenate([before, after]), len(before))
        return f"above the input, below the {len(after)} results"


def _stylize(run: Edit) -> str:
    x = run.read()
    given = run.given
    after = run.sampler.stylize(
        x, given.strength, given.seed, label=run.label(), on_step=run.on_step, **run.how
    )
    return run.write_pairs(x, after)


def _invert(run: Edit) -> str:
    x = run.read()
    found = run.sampler.invert(
        x, strength=run.given.strength, label=run.label(), on_step=run.on_step, **run.how
    )
    errors = ", ".join(f"{error:.4f}" for error in found.error)
    note = f"RMS difference after the way back: {errors}"
    if run.given.out.suffix == ".npy":
        run.write(found.noise)
        return f"{note}. The noise"
    return f"{note}. {run.write_pairs(x, found.back)}"


def _translate(run: Edit) -> str:
    x = run.read()
    source = in_turn(run.given.source, len(x))
    target = in_turn(run.given.target, len(x))
    after = run.sampler.translate(
        x, source, target, strength=run.given.strength, on_step=run.on_step, **run.how
    )
    return run.write_pairs(x, after)


def _inpaint(run: Edit) -> str:
    x = run.read()
    given = run.given
    after = run.sampler.inpaint(
        x, given.mask, given.seed, label=run.label(), on_step=run.on_step, **run.how
    )
    return run.write_pairs(x, after)


def _interpolate(run: Edit) -> str:
    given = run.given
    samples = run.sampler.interpolate(
        _end(given.first),
        _end(given.last),
        given.n,
        label=run.label(),
        on_step=run.on_step,
        **run.how,
    )
    run.write(samples, given.n)
    return f"{given.n} images from {given.first} to {given.last}"


def _end(text: str) -> int | str:
    """Return a seed, if the text is digits alone, or a path."""
    if not re.fullmatch("[0-9]+", text):
        return text
    try:
        return int(text)
    except ValueError:  # thousands of digits
        raise RequestError(
            f"a seed must be 0 to {MAX_SEED}, got one of {len(text)} digits. Pass a smaller one."
        ) from None


def _variations(run: Edit) -> str:
    x = run.read()
    given = run.given
    found = run.sampler.variations(
        x, given.n, given.amount, given.seed, label=run.label(), on_step=run.on_step, **run.how
    )
    run.write(np.concatenate([x, found]))
    return f"the image and {given.n} variations of it"


def _animate(run: Edit) -> str:
    given = run.given
    pictures = run.read() if given.pictures else None
    how = Labelled(**run.how)
    # Noising an image needs no network, and refuses a label.
    if (label := run.label()) is not None:
        how["label"] = label
    frames = run.sampler.animate(given.n, given.seed, pictures=pictures, on_step=run.on_step, **how)
    if given.out.suffix == ".npy":
        run.write(frames)
    else:
        sheets = [tile(sheet, given.columns) for sheet in run.sampler.to_uint8(frames)]
        save_animation(given.out, np.stack(sheets), given.width)
    return f"{len(frames)} frames"


class Verb(NamedTuple):
    """What a verb does, its line in the help, its default output file, and that file's formats."""

    act: Callable[[Edit], str]
    help: str
    out: str = "edited.png"
    format_of: Callable[[Path], str] = picture_format


VERBS: Mapping[str, Verb] = {
    "stylize": Verb(
        _stylize,
        "noise images to a chosen strength and denoise them again, under another label if given "
        "(SDEdit)",
    ),
    "invert": Verb(
        _invert, "find the noise that images come from, and how nearly it returns to them"
    ),
    "translate": Verb(
        _translate, "invert images under one label and sample them under another: style transfer"
    ),
    "inpaint": Verb(_inpaint, "paint the part of images that a mask leaves black"),
    "interpolate": Verb(_interpolate, "sample the way from one seed or image to another"),
    "variations": Verb(_variations, "sample variations of an image"),
    "animate": Verb(
        _animate,
        "show a sample on its way from noise, or an image on its way to noise",
        "animation.gif",
        animation_format,
    ),
}
STRENGTHS = {"stylize": 0.5, "invert": 1.0, "translate": 0.4}
"""The verbs that walk a part of the grid, and how much of it by default."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program("runtime.edit"), description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        own = verbs.add_parser(name, help=verb.help, description=verb.help)
        add_options(own, verb.out)
        own.add_argument(
            "--convert", action="store_true", help="fit images to the bundle's size and mode"
        )
        _add_images(name, own)
        _add_labels(name, own)
        _add_own(name, own)
    return parser


def _add_images(verb: str, parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    if verb == "interpolate":
        add("first", metavar="FIRST", help="an image, or a seed")
        add("last", metavar="LAST", help="an image, or a seed")
    elif verb == "variations":
        add("pictures", metavar="IMAGE", help="the image")
    else:
        count = "*" if verb == "animate" else "+"
        add("pictures", nargs=count, metavar="IMAGE", help="images, all of the bundle's size")


def _add_labels(verb: str, parser: argparse.ArgumentParser) -> None:
    several = "repeat it for several in turn"
    if verb == "translate":
        for option, name, what in (
            ("--from", "source", "the label that the images have"),
            ("--to", "target", "the label that they get"),
        ):
            parser.add_argument(
                option,
                dest=name,
                action="append",
                required=True,
                metavar="LABEL",
                help=f"{what}; {several}",
            )
    else:
        more = "" if verb in ("interpolate", "variations") else f"; {several}"
        text = f"a label's name or number{more} [the null label]"
        parser.add_argument("--label", action="append", help=text)


def _add_own(verb: str, parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    if verb in ("interpolate", "variations", "animate"):
        count = 1 if verb == "animate" else 8
        add("--n", type=int, default=count, help=f"the number of samples [{count}]")
    if verb in STRENGTHS:
        strength = STRENGTHS[verb]
        text = f"the share of the grid that is walked, 0 to 1 [{strength:g}]"
        add("--strength", type=float, default=strength, help=text)
    if verb == "variations":
        text = "0: the image itself, 1: nothing of it [0.3]"
        add("--amount", type=float, default=0.3, help=text)
    if verb == "inpaint":
        text = "an image of the same size: white is kept, black is painted"
        add("--mask", required=True, help=text)


if __name__ == "__main__":
    sys.exit(main())
