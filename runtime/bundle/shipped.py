"""The bundles that ship with the project, by name: `Sampler.load("emoji32")`.

A wheel holds a reduced copy of `emoji32` in runtime/shipped/, which setup.py lays there. A checkout
holds all of them whole in bundles/, next to the packages.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import BundleError, nearest
from ..errors.messages import shown_path
from .format import MANIFEST

NAMES = ("emoji32", "emoji32-fast", "emoji-superres", "emoji-restyle")
_PACKAGE = Path(__file__).parents[1]
INSTALLED = _PACKAGE / "shipped"
CHECKOUT = _PACKAGE.parent / "bundles"


def shipped_folders() -> Mapping[str, Path]:
    """Return the folder of each shipped bundle that is on this machine, by name."""
    folders: dict[str, Path] = {}
    for name in NAMES:
        # An installed copy and a checkout's never coexist, so the order does not matter.
        for place in (INSTALLED, CHECKOUT):
            if (place / name / MANIFEST).is_file():
                folders[name] = place / name
    return folders


def named_folder(path: Path) -> Path:
    """Return the folder of the shipped bundle that `path` names, or `path` if it names none.

    An existing folder comes first, so a path never changes its meaning.
    """
    return path if is_folder(path) else shipped_folders().get(str(path), path)


def bundle_folder(path: Path) -> Path:
    """Return the folder that `path` means: an existing folder, or else a shipped bundle's name.

    Args:
        path: A folder, which is returned as it is; or a name, such as "emoji32".

    Raises:
        BundleError: It is neither. The message has the nearest name.
    """
    folder = named_folder(path)
    if is_folder(folder):
        return folder
    names = list(shipped_folders())
    hint = nearest(path.name[:60], names)
    raise BundleError(
        f"{shown_path(path)} is not a folder, and no shipped bundle has that name.{hint} "
        f"Shipped: {', '.join(names) or 'none'}. "
        f"A bundle is a folder with a {MANIFEST}, made by python -m export.build."
    )


def is_folder(path: Path) -> bool:
    """Whether there is a folder at `path`. Never raises."""
    try:
        return path.is_dir()
    except OSError:  # the name is too long, or a folder above it may not be read
        return False
