"""Write a bundle as a static site: the page, the graphs, the programs, and onnxruntime-web."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.bundle.bundle import Bundle
from runtime.bundle.format import STEPS, WEIGHTS, inside, step_file
from runtime.diffusion.program import R
from runtime.errors import RequestError
from runtime.errors.arguments import choice
from runtime.errors.messages import shown_path
from runtime.files import copy_others, replacing_folder, to_json
from runtime.images import is_image

from .libraries import VERSION, library
from .tables import Menu, menu

PAGE = Path(__file__).parent / "page"
MODEL = "model.json"
PROGRAMS = "programs.bin"
ORT = "ort"
"""The folder of onnxruntime-web."""
WORKER = "sw.js"
"""The service worker, which keeps the site for offline use."""
PRECISIONS = ("fp32", "fp16", "int8")
OWN = (*STEPS, ORT)
"""What an earlier site may have that this one lacks."""
HEADERS = """\
/*
  Cross-Origin-Opener-Policy: same-origin
  Cross-Origin-Embedder-Policy: require-corp
"""
"""Hosts that read `_headers` send these, which lets the page use several threads."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """What is written.

    Attributes:
        solvers, steps: See `menu`.
        precision: The bundle's folder of graphs.
        webgpu: Whether the site can use WebGPU, which adds 27 MB to the folder.
        package: See `library`.
    """

    bundle: Bundle
    precision: str = "fp32"
    solvers: Sequence[str] = ()
    steps: Sequence[int] = ()
    webgpu: bool = True
    package: Path | None = None


def write_site(site: Site, out: Path) -> Menu:
    """Write a site into a folder, in place of an earlier site. Other files there stay.

    Raises:
        RequestError: The bundle or the folder cannot be used.
        ExportError: onnxruntime-web cannot be fetched.
        BundleError: A file of the bundle is damaged.
    """
    _check(site, out)
    programs = menu(site.bundle, site.solvers, site.steps)
    files = _page()
    files |= _graphs(site.bundle, site.precision)
    files |= {f"{ORT}/{name}": data for name, data in library(site.package, site.webgpu).items()}
    files[PROGRAMS] = programs.table
    files[MODEL] = to_json(_model(site, programs)).encode()
    files[WORKER] = _worker(files)
    files["_headers"] = HEADERS.encode()
    # A link, or ".", is the folder that it leads to.
    place = out.resolve()
    with replacing_folder(place) as folder:
        (folder / ORT).mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        copy_others(place, folder, OWN)
    return programs


def _check(site: Site, out: Path) -> None:
    bundle = site.bundle
    choice("precision", site.precision, [p for p in PRECISIONS if p in bundle.precisions])
    shape = bundle.sample_shape
    if not is_image(shape):
        raise RequestError(
            f"a page shows images of 1 or 3 channels, and the samples of {bundle.name} are "
            f"{'×'.join(map(str, shape))}."
        )
    if bundle.conditions:
        raise RequestError(
            f"{bundle.name} has conditions ({', '.join(c.name for c in bundle.conditions)}), which "
            "the page cannot ask for yet. Serve it: unnoise serve."
        )
    if out.exists() and not (out / MODEL).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(
            f"{shown_path(out)} holds files that are not of a site. Choose another folder."
        )


def _page() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in PAGE.iterdir() if path.is_file()}


def _graphs(bundle: Bundle, precision: str) -> dict[str, bytes]:
    """Return the step graphs and their weights, by name."""
    names = [step_file(guided) for guided in (False, True)]
    found = {
        name: bundle.read(inside(precision, name))
        for name in names
        if inside(precision, name) in bundle.files
    }
    return {**found, WEIGHTS: bundle.read(inside(precision, WEIGHTS))}


def _model(site: Site, programs: Menu) -> dict[str, object]:
    """Return what the page must know of the bundle, as JSON."""
    bundle = site.bundle
    defaults = bundle.defaults
    return {
        "format": 1,
        "name": bundle.name,
        "bundle": bundle.sha256,
        "precision": site.precision,
        "onnxruntime": VERSION,
        "webgpu": site.webgpu,
        "shape": list(bundle.sample_shape),
        "range": list(bundle.sample_range),
        "registers": R,
        "labels": list(bundle.labels.names) if bundle.labels else [],
        "null_label": bundle.null_label,
        "can_guide": bundle.can_guide,
        "defaults": {"solver": defaults.solver, "guidance": defaults.guidance},
        "programs": [entry.to_json() for entry in programs.entries],
    }


def _worker(files: Mapping[str, bytes]) -> bytes:
    """Return the service worker, which names the files of this very site."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name} {hashlib.sha256(files[name]).hexdigest()}\n".encode())
    # The browser keeps either library when the page has used it: nobody needs both.
    kept = [name for name in sorted(files) if name != WORKER and not name.startswith(ORT)]
    head = (
        f'const VERSION = "{digest.hexdigest()[:16]}";\n'
        f"const FILES = {json.dumps(['./', *kept])};\n"
    )
    return head.encode() + files[WORKER]
