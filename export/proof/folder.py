"""A bundle's folder while it is being written: its files, versions, and bundle.json at the end."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from runtime.bundle.bundle import Bundle
from runtime.bundle.conditions import LEARNED
from runtime.bundle.format import CARD, MANIFEST, REPORT, null_file
from runtime.bundle.manifest import File
from runtime.files import from_json, to_json

from ..sources.model import Model, versions


def listed(folder: Path) -> dict[str, File]:
    """Return every file of a bundle's folder except bundle.json, by its path inside."""
    files: dict[str, File] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[name] = File(digest, path.stat().st_size)
    return files


def _write_nulls(folder: Path, model: Model) -> None:
    """Write the learned null values of a model's conditions."""
    for condition in model.conditions:
        if condition.null == LEARNED:
            path = folder / null_file(condition.name)
            path.parent.mkdir(exist_ok=True)
            kind = np.dtype(condition.kind).newbyteorder("<")
            path.write_bytes(model.learned_null(condition).astype(kind).tobytes())


def bundle_in(folder: Path, model: Model) -> Bundle:
    """Return the bundle of the graphs in `folder`, in memory, as a user will read it.

    The null values that the model's conditions learned are written there first.
    The bundle goes through the text of its bundle.json, so that a value which JSON changes or the
    runtime refuses is found before the proof.
    """
    _write_nulls(folder, model)
    bundle = Bundle(
        path=folder,
        files=listed(folder),
        provenance={**model.provenance, "versions": versions()},
        **model.spec_fields(),
    )
    return Bundle.from_json(folder, from_json(to_json(bundle.to_json())))


def write_report(folder: Path, report: Mapping[str, object]) -> None:
    """Write report.json."""
    (folder / REPORT).write_text(to_json(report), encoding="utf-8")


def write_card(folder: Path, card: str) -> None:
    """Write the model card."""
    (folder / CARD).write_text(card, encoding="utf-8")


def write_manifest(bundle: Bundle, changed: Collection[str] | None = None) -> None:
    """Write bundle.json over the files that are in the bundle's folder, and read it back.

    Args:
        changed: The files that are new; the others keep their hashes. None for all that are there.

    Raises:
        BundleError: A user could not load it.
    """
    # Read back, because a bundle that its own runtime refuses must not be renamed into place.
    files = listed(bundle.path)
    if changed is not None:
        files = {**bundle.files, **{name: files[name] for name in changed}}
    complete = replace(bundle, files=files)
    (bundle.path / MANIFEST).write_text(to_json(complete.to_json()), encoding="utf-8")
    Bundle.load(bundle.path)
