"""Bundles of the Hugging Face Hub: `Sampler.load("hf:user/name@revision")`.

Files are kept in the Hub's own cache. Its settings hold here, too: HF_HOME, HF_TOKEN, HF_ENDPOINT,
and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import hashlib
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ..errors import BundleError, RequestError, UnnoiseError
from ..errors.messages import reason, shown
from ..files import from_json
from .format import MANIFEST
from .manifest import File, read_manifest

PREFIX = "hf:"
_REPO = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_NAME = rf"{PREFIX}(?P<repo>{_REPO})(@(?P<revision>[\w./-]+))?"


class HubName(NamedTuple):
    """A bundle on the Hub.

    Attributes:
        repo: USER/NAME.
        revision: A branch, a tag or a commit; None for the main branch.
    """

    repo: str
    revision: str | None = None

    @classmethod
    def read(cls, text: str) -> HubName:
        """Parse hf:USER/NAME or hf:USER/NAME@REVISION. Raises RequestError for anything else."""
        found = re.fullmatch(_NAME, text, re.ASCII)
        if found is None:
            raise RequestError(
                f"a bundle of the Hub is named hf:USER/NAME or hf:USER/NAME@REVISION, got "
                f"{shown(text)}."
            )
        return cls(found["repo"], found["revision"])


def is_hub_name(path: Path) -> bool:
    """Whether a path that a user gives names a bundle of the Hub, and no folder."""
    return path.as_posix().startswith(PREFIX)


def hub_library() -> ModuleType:
    """Return huggingface_hub. Raises BundleError if it is not installed."""
    try:
        return import_module("huggingface_hub")
    except ImportError as error:
        raise BundleError(
            f"the Hugging Face Hub needs huggingface_hub ({error}). Install it: "
            "pip install 'unnoise[hub]'."
        ) from error


def hub_folder(path: Path) -> Path:
    """Return the folder of a bundle in the Hub's cache; download the files that it lacks.

    Raises:
        RequestError: It does not have the form of a name.
        BundleError: The Hub or the cache has no such bundle, or a file was damaged on the way.
    """
    name = HubName.read(path.as_posix())
    hub = hub_library()
    try:
        return _downloaded(hub, name)
    except UnnoiseError:
        raise
    except Exception as error:  # its HTTP library, and so its errors, differ by version
        raise BundleError(
            f"{path.as_posix()} cannot be fetched from the Hugging Face Hub: {reason(error)} "
            "Check the name, the revision and the network. A private repository needs "
            "`hf auth login`; HF_HUB_OFFLINE=1 allows what is in the cache alone."
        ) from error


def _downloaded(hub: ModuleType, name: HubName) -> Path:
    manifest = Path(_fetched(hub, name.repo, MANIFEST, name.revision))
    folder = manifest.parent
    try:
        value = from_json(manifest.read_bytes())
    except ValueError as error:
        discard(folder, manifest)
        raise BundleError(
            f"{manifest} cannot be read as JSON ({error}). Load the bundle again."
        ) from error
    files = read_manifest(manifest, value).files
    for file, expected in files.items():
        # A snapshot of a commit never changes, so a file that is there needs no network.
        if not (folder / file).exists() or (folder / file).stat().st_size != expected.size:
            discard(folder, folder / file)
            # By commit: the branch may have moved since bundle.json was read.
            _check(Path(_fetched(hub, name.repo, file, folder.name)), expected)
    return folder


def _fetched(hub: ModuleType, repo: str, file: str, revision: str | None) -> str:
    return hub.hf_hub_download(repo, file, revision=revision, library_name="unnoise")


def _check(path: Path, expected: File) -> None:
    """Remove a file again if its content is not that of bundle.json. Raises BundleError."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected.sha256:
        _remove(path)
        raise BundleError(
            f"{path.name} has sha256 {found}, {expected.sha256} expected: it was damaged on the "
            "way, or on the Hub. Load the bundle again."
        )


def discard(folder: Path, path: Path) -> None:
    """Remove a damaged file of a snapshot, so that the next load fetches it again.

    Elsewhere nothing is removed.
    """
    if is_snapshot(folder):
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a link and what it leads to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def is_snapshot(folder: Path) -> bool:
    """Whether a folder is a snapshot in the Hub's cache, which nobody may change."""
    folder = folder.resolve()
    return folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")


def stores(folder: Path) -> tuple[Path, ...]:
    """Return the folders, besides its own, that the files of a bundle may be links into.

    The Hub's cache holds each file once, and a snapshot has links to them.
    """
    if not is_snapshot(folder):
        return ()
    repo = folder.resolve().parents[1]
    # These folders may not be links themselves: a bundle of somebody else would lead anywhere.
    return repo / "blobs", repo.parent / "blobs"
