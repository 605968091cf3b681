"""The images that come with the package: emoji and handwritten digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .memory import Pictures

ASSETS = Path(__file__).parent / "assets"
EMOJI = ASSETS / "emoji32.npz"
DIGITS = ASSETS / "digits.npz"
STYLES = ("noto", "twemoji")


def held_out(count: int) -> NDArray[np.bool_]:
    """Return which emoji are kept for measurements, [count]: every tenth, from the first."""
    return np.arange(count) % 10 == 0


def emoji(split: str = "train", paired: bool = False) -> Pictures:
    """Return emoji in two styles, 32×32 RGB on white, labelled style/category.

    Args:
        split: "train" leaves the held-out tenth out, "all" has all 1,906 emoji.
        paired: Whether each image comes with the same emoji in the other style, its source.
    """
    with np.load(EMOJI, allow_pickle=False) as file:
        images = file["images"]
        category = file["category"].astype(np.int64)
        categories = file["categories"]
    classes = tuple(
        f"{style}/{c.lower().replace(' & ', '-')}" for style in STYLES for c in categories
    )
    # An emoji is a row: images [N, styles, H, W, C] and labels [N, styles]. Both styles of one
    # emoji
    # are held out together, or neither.
    labels = category[:, None] + len(categories) * np.arange(len(STYLES))
    kept = np.ones(len(images), bool) if split == "all" else ~held_out(len(images))
    wanted = images[kept].reshape(-1, *images.shape[2:])
    others = images[kept][:, ::-1].reshape(-1, *images.shape[2:])
    return Pictures(
        name="emoji",
        images=wanted,
        given={"source": others} if paired else {},
        labels=labels[kept].reshape(-1),
        classes=classes,
        licence="Noto Emoji: Copyright Google LLC, Apache License 2.0. Twemoji: Copyright "
        "Twitter, Inc and other contributors, CC-BY 4.0.",
        note="every emoji, in both styles"
        if split == "all"
        else "emoji with index % 10 != 0, in both styles; index % 10 == 0 is held out and was "
        "never seen",
    )


def digits() -> Pictures:
    """Return 1,797 handwritten digits, 8×8 grey, white on black."""
    with np.load(DIGITS, allow_pickle=False) as file:
        images = file["images"]
        label = file["label"]
    return Pictures(
        name="digits",
        images=np.round(images * (255 / 16)).astype(np.uint8)[..., None],  # stored as 0 … 16
        labels=label.astype(np.int64),
        classes=tuple("0123456789"),
        licence="UCI Optical Recognition of Handwritten Digits (Alpaydin & Kaynak 1998), CC-BY "
        "4.0.",
        note="all 1,797 pictures of scikit-learn's load_digits",
    )
