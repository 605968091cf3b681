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
from .errors.arguments import integer
from .images import animation_format, picture_format, read, save_animation, tile
from .sampler import Sampler
from .terminal.editing import DEFAULTS, ONE_LABEL, add_editing
from .terminal.options import add_options, in_turn, load, progress, settings
from .terminal.output import say
from .terminal.sheets import check_out, write
from .terminal.verbs import program, run_verb


def main(arguments: list[str] | None = None) -> int:
    return run_verb(_parser(), edit, arguments)


def edit(given: argparse.Namespace) -> None:
    """Run the command line."""
    sampler, _ = load(given)
    verb = VERBS[given.verb]
    n, columns = verb.sheet(given)
    check_out(given, sampler.bundle, n, columns, verb.format_of)
    with sampler, progress(given.verb, sampler) as on_step:
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
        given = self.given
        if given.verb in ONE_LABEL and given.label and len(given.label) > 1:
            raise RequestError(
                f"{given.verb} takes one label, got {len(given.label)}. Pass --label once."
            )
        pictures = getattr(given, "pictures", None)
        listed = pictures if isinstance(pictures, list) else None
        return in_turn(given.label, len(listed) if listed else given.n)

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

    def write(self, samples: Float32) -> None:
        """Write samples [n, *S] as one sheet, or as an .npy file."""
        _, columns = VERBS[self.given.verb].sheet(self.given)
        columns = self.given.columns or columns
        write(self.given.out, samples, self.sampler, columns, self.given.width)

    def write_pairs(self, before: Float32, after: Float32) -> str:
        """Write samples [n, *S] above what became of them, and return what was written.

        An .npy file gets the latter alone.
        """
        if self.given.out.suffix == ".npy":
            self.write(after)
            return f"{len(after)} samples"
        self.write(np.concatenate([before, after]))
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
    run.write(samples)
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
        # Frame by frame: all at once need several times the memory.
        sheets = [tile(run.sampler.to_uint8(frame), given.columns) for frame in frames]
        save_animation(given.out, np.stack(sheets), given.width)
    return f"{len(frames)} frames"


def _pairs(given: argparse.Namespace) -> tuple[int, int]:
    """Images above what became of them."""
    n = len(given.pictures)
    return 2 * n, n


def _row(given: argparse.Namespace) -> tuple[int, int]:
    n = integer("n", given.n, 1)
    return n, n


def _image_first(given: argparse.Namespace) -> tuple[int, None]:
    return 1 + integer("n", given.n, 1), None


def _one_frame(given: argparse.Namespace) -> tuple[int, None]:
    return len(given.pictures) or integer("n", given.n, 1), None


class Verb(NamedTuple):
    """A verb of the command.

    Attributes:
        act: What it does. Returns what to print.
        sheet: How many images it writes on a sheet, and how many to a row; None is square.
        help: Its line in the help.
        out: Its default output file.
        format_of: What that file's ending selects, for images of so many channels.
    """

    act: Callable[[Edit], str]
    sheet: Callable[[argparse.Namespace], tuple[int, int | None]]
    help: str
    out: str = "edited.png"
    format_of: Callable[[Path, int], str] = picture_format


VERBS: Mapping[str, Verb] = {
    "stylize": Verb(
        _stylize,
        _pairs,
        "noise images to a chosen strength and denoise them again, under another label if given "
        "(SDEdit)",
    ),
    "invert": Verb(
        _invert, _pairs, "find the noise that images come from, and how nearly it returns to them"
    ),
    "translate": Verb(
        _translate,
        _pairs,
        "invert images under one label and sample them under another: style transfer",
    ),
    "inpaint": Verb(_inpaint, _pairs, "paint the part of images that a mask leaves black"),
    "interpolate": Verb(_interpolate, _row, "sample the way from one seed or image to another"),
    "variations": Verb(_variations, _image_first, "sample variations of an image"),
    "animate": Verb(
        _animate,
        _one_frame,
        "show a sample on its way from noise, or an image on its way to noise",
        "animation.gif",
        animation_format,
    ),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program("runtime.edit"), description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        own = verbs.add_parser(name, help=verb.help, description=verb.help)
        add_options(own, verb.out, DEFAULTS.get(name))
        own.add_argument(
            "--convert", action="store_true", help="fit images to the bundle's size and mode"
        )
        add_editing(name, own)
    return parser


if __name__ == "__main__":
    sys.exit(main())
