"""The options of runtime.edit's verbs, besides those that all commands with an output share."""

from __future__ import annotations

import argparse

STRENGTHS = {"stylize": 0.5, "invert": 1.0, "translate": 0.4}
"""The verbs that walk a part of the grid, and how much of it by default."""
_INVERTED = {"solver": "dpmpp_2m", "grid": "log_snr", "guidance": "1"}
DEFAULTS = {
    "invert": _INVERTED,
    "interpolate": _INVERTED,
    "variations": _INVERTED,
    "translate": {**_INVERTED, "guidance": "3 on the way back"},
    "inpaint": {"solver": "repaint"},
}
"""What a verb does without an option, if that is not what the bundle says."""
ONE_LABEL = ("interpolate", "variations")
"""The verbs that take one label for all samples."""


def add_editing(verb: str, parser: argparse.ArgumentParser) -> None:
    """Add the images and options of a verb."""
    _add_images(verb, parser)
    _add_labels(verb, parser)
    _add_own(verb, parser)


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
        more = "" if verb in ONE_LABEL else f"; {several}"
        text = f"a label's name or number{more} [the null label]"
        parser.add_argument("--label", action="append", help=text)


def _add_own(verb: str, parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    if verb in ("interpolate", "variations", "animate"):
        count = 1 if verb == "animate" else 8
        add("--n", type=int, default=count, help=f"the number of samples [{count}]")
    if verb in STRENGTHS:
        strength = STRENGTHS[verb]
        least = "" if verb == "stylize" else ", of two steps or more"
        text = f"the share of the grid that is walked, 0 to 1{least} [{strength:g}]"
        add("--strength", type=float, default=strength, help=text)
    if verb == "variations":
        text = "0: the image itself, 1: nothing of it [0.3]"
        add("--amount", type=float, default=0.3, help=text)
    if verb == "inpaint":
        text = "an image of the same size: white is kept, black is painted"
        add("--mask", required=True, help=text)
