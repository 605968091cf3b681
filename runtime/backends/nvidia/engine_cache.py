"""TensorRT engines on disk, keyed by recipe, library and GPU.

They are stored in `engines` in the cache's folder (`runtime.backends.cache`): `<key>.json` records
what an engine is and its sha256, `<sha256>.engine` is the engine. An engine is native code, and its
own validity check does not detect tampering. So it is loaded from this folder only, never from a
bundle, and only if its hash is the recorded one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...bundle.bundle import Bundle
from ...bundle.format import WEIGHTS, inside
from ...errors import BundleError, EngineError
from ...files import from_json, replacing, to_json, write_text
from .. import cache

FOLDER = "engines"
FORMAT = 1
LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""The backends that run engines, with the module of each."""
_ABANDONED = 3600.0
"""Seconds after which an engine without a record counts as left by a process that was killed."""


class Gpu(NamedTuple):
    """What engines are built for.

    Attributes:
        compute_capability: Such as "8.9".
        driver: The CUDA version that it brings, such as "CUDA 13.0".
    """

    name: str
    compute_capability: str
    driver: str

    def __str__(self) -> str:
        return f"{self.name or 'any GPU'} of compute capability {self.compute_capability}"


@dataclass(frozen=True)
class Recipe:
    """All that an engine depends on.

    Attributes:
        onnx: The sha256 of graph and weights.
        gpu: Name and driver are empty for TensorRT-RTX, which finishes an engine on the machine
            that runs it.
        buckets: Batch sizes, a static profile each.
        flags: How the builder was set.
    """

    bundle: str
    precision: str
    graph: str
    onnx: str
    library: str
    version: str
    gpu: Gpu
    buckets: tuple[int, ...]
    flags: tuple[str, ...]

    @property
    def key(self) -> str:
        """The entry's name, which does not depend on the bundle's name."""
        return cache.key(FORMAT, dataclasses.replace(self, bundle=""))

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.buckets))
        return (
            f"{self.bundle} {self.precision} {self.graph}, batches {sizes}, "
            f"{self.library} {self.version} for {self.gpu}"
        )


class Entry(NamedTuple):
    """An engine in the cache.

    Attributes:
        size: In bytes.
        built: When, in seconds since 1970.
    """

    recipe: Recipe
    sha256: str
    size: int
    built: float


def target(library: str, gpu: Gpu) -> Gpu:
    """Reduce a GPU to what an engine of this library depends on."""
    return Gpu("", gpu.compute_capability, "") if library == "tensorrt_rtx" else gpu


def source(bundle: Bundle, precision: str, graph: str) -> str:
    """Compute the sha256 of a step graph and its weights.

    Raises:
        BundleError: The bundle lacks one of them.
    """
    try:
        parts = [bundle.files[inside(precision, name)].sha256 for name in (graph, WEIGHTS)]
    except KeyError as error:
        raise BundleError(f"{bundle.path} has no {error.args[0]}.") from None
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def place(make: bool = False) -> Path:
    """Find the folder of engines.

    Raises:
        EngineError: The cache is off, or other users may write to it.
    """
    found = cache.private(FOLDER, make)
    top = cache.folder()
    if found:
        return found
    if make or top is None or (top / FOLDER).exists():
        raise EngineError(
            f"engines are kept in {top or 'the cache'}, which is turned off, cannot be made, or "
            f"may be written to by others. "
            "Set UNNOISE_CACHE to a folder that is yours alone."
        )
    return top / FOLDER


def entries() -> Iterator[tuple[str, Entry | str]]:
    """Yield every record's key, with its entry or the fault found in it."""
    folder = cache.private(FOLDER)
    for path in sorted(folder.glob("*.json")) if folder else ():
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            yield path.stem, _read(path)


def store(recipe: Recipe, engine: bytes | memoryview) -> Entry:
    """Keep an engine, whole or not at all.

    Several processes may do so at once: the record of the last one stays, with its own engine.
    """
    folder = place(make=True)
    entry = Entry(recipe, hashlib.sha256(engine).hexdigest(), len(memoryview(engine)), time.time())
    # The engine first: a record never names an engine that is not there.
    before = lookup(recipe)
    with replacing(folder / f"{entry.sha256}.engine") as temporary:
        temporary.write_bytes(engine)
    recorded = {
        "format": FORMAT,
        "recipe": dataclasses.asdict(recipe) | {"gpu": recipe.gpu._asdict()},
    }
    write_text(
        folder / f"{recipe.key}.json",
        to_json(recorded | {k: getattr(entry, k) for k in Entry._fields[1:]}),
    )
    if isinstance(before, Entry) and before.sha256 not in _named():
        (folder / f"{before.sha256}.engine").unlink(missing_ok=True)
    _sweep(folder)
    return entry


def lookup(recipe: Recipe) -> Entry | str | None:
    """Return the entry of exactly this recipe, the fault found in it, or None."""
    folder = cache.private(FOLDER)
    try:
        found = _read(folder / f"{recipe.key}.json") if folder else None
    except FileNotFoundError:
        return None
    if (
        isinstance(found, Entry)
        and dataclasses.replace(found.recipe, bundle=recipe.bundle) != recipe
    ):
        return "its record is of another engine"
    return found


def load(entry: Entry) -> bytes:
    """Read an engine.

    Raises:
        EngineError: It cannot be read, or its hash is not the recorded one.
    """
    path = place() / f"{entry.sha256}.engine"
    try:
        data = path.read_bytes()
    except OSError as error:
        now = lookup(entry.recipe)
        # Another process may just have built it again.
        if isinstance(now, Entry) and now.sha256 != entry.sha256:
            return load(now)
        raise EngineError(
            f"the engine of {entry.recipe} cannot be read ({error}). Build it again."
        ) from error
    if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise EngineError(
            f"the engine of {entry.recipe} is not what was built: {path} was changed. Build it "
            f"again."
        )
    return data


def find(bundle: Bundle, precision: str, graph: str, library: str, version: str, gpu: Gpu) -> Entry:
    """Find the engine of a graph that this machine can run: the largest buckets, then the newest.

    Raises:
        EngineError: There is none. The message says what there is instead, and how to build one.
    """
    place()
    wanted = source(bundle, precision, graph), library, version, target(library, gpu)
    there = [
        e
        for _, e in entries()
        if isinstance(e, Entry) and (e.recipe.onnx, e.recipe.library) == wanted[:2]
    ]
    fitting = [e for e in there if (e.recipe.version, e.recipe.gpu) == wanted[2:]]
    if fitting:
        return max(fitting, key=lambda e: (e.recipe.buckets[-1], e.built))
    name = next(name for name, module in LIBRARIES.items() if module == library)
    others = "; ".join(sorted({_why_not(e.recipe, version, gpu) for e in there}))
    raise EngineError(
        f"no engine of {bundle.name} {precision} {graph} for {name} {version} on {gpu}, driver "
        f"{gpu.driver}"
        f"{f': there is one {others}' if others else ''}. "
        f"Build it: python -m export.engines build {bundle.path} --engine {name} --precision "
        f"{precision}"
    )


def clear(keys: Iterable[str] | None = None) -> int:
    """Remove these entries, or all, and engines without a record; return the number of records."""
    folder = cache.private(FOLDER)
    if folder is None:
        return 0
    gone = [key for key, _ in entries() if keys is None or key in set(keys)]
    for key in gone:
        (folder / f"{key}.json").unlink(missing_ok=True)
    _sweep(folder, 0.0)
    return len(gone)


def _why_not(recipe: Recipe, version: str, gpu: Gpu) -> str:
    ours = target(recipe.library, gpu)
    if recipe.gpu[:2] != ours[:2]:
        return f"for another GPU ({recipe.gpu})"
    if recipe.version != version:
        return f"by version {recipe.version}"
    return f"for driver {recipe.gpu.driver}"


def _read(path: Path) -> Entry | str:
    """A record, or the fault found in it. Raises FileNotFoundError if there is none."""
    try:
        value = from_json(path.read_bytes())
        if value["format"] != FORMAT:
            return f"it is of format {value['format']}, not {FORMAT}"
        fields = value["recipe"]
        gpu = Gpu(**fields.pop("gpu"))
        buckets = tuple(map(int, fields.pop("buckets")))
        flags = tuple(fields.pop("flags"))
        recipe = Recipe(**fields, gpu=gpu, buckets=buckets, flags=flags)
        entry = Entry(recipe, str(value["sha256"]), int(value["size"]), float(value["built"]))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its record cannot be read ({type(error).__name__}: {error})"
    if not buckets or recipe.key != path.stem:
        return "its record is of another engine"
    if len(entry.sha256) != 64 or not set(entry.sha256) <= set("0123456789abcdef"):
        return "its record holds no sha256"
    return entry


def _named() -> set[str]:
    """The sha256 of every engine that a record names."""
    return {entry.sha256 for _, entry in entries() if isinstance(entry, Entry)}


def _sweep(folder: Path, age: float = _ABANDONED) -> None:
    """Remove engines that no record names and that are older than `age` seconds."""
    named = _named()
    for path in [*folder.glob("*.engine"), *folder.glob(".*")]:
        with contextlib.suppress(OSError):
            if path.stem not in named and time.time() - path.stat().st_mtime >= age:
                path.unlink()
