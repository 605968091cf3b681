"""Generate the samples of a plan into a folder of shards. A restart makes the missing ones."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from ..backends.base import missing
from ..backends.processor import usable_cores
from ..backends.registry import BACKENDS
from ..errors import RequestError
from ..errors.arguments import integer
from ..errors.messages import shown_path
from ..terminal.progress import Progress
from .drafts import clean, is_draft, remove
from .environment import Environment
from .layout import RECORDS, SHARDS, Layout
from .maker import Maker, OnSamples
from .manifest import Manifest
from .records import Record, is_present, verified
from .settings import Settings
from .workers import make_here, make_in_processes

ROUNDS = 3
"""How often a run looks for shards that another worker has not finished after all."""
HASHING = 4
"""Threads that verify shards."""


@dataclass(frozen=True)
class Summary:
    """What a run has done.

    Attributes:
        kept: Shards of this part that were there, with the bytes that their records state.
        made: Shards that this run, or another one at the same time, has made.
        damaged: Shards of `made` that were there with other bytes.
        missing: Shards of all parts that are still missing; other parts make them.
        samples: Samples of `made`.
        seconds: Time to make them.
    """

    kept: int
    made: int
    damaged: int
    missing: int
    samples: int
    seconds: float


@dataclass(frozen=True)
class _State:
    """The shards of a run's part at its start."""

    kept: list[int]
    missing: list[int]
    damaged: list[int]  # a part of the missing ones


def generate(settings: Settings, workers: int = 1, ray: bool = False) -> Summary:
    """Write the samples of a plan into a folder of shards.

    The same call continues a run that has stopped. Several may run at the same time.

    Args:
        workers: Processes, each with its own inference library. With `ray`, actors.
        ray: Make the shards on the Ray cluster. All of its nodes must reach the folder.

    Raises:
        RequestError: A setting cannot be used, or the folder holds something else.
        BackendError: This machine cannot run the backend, or workers died.
        OSError: A file cannot be written.
    """
    workers = integer("workers", workers, 1, 10_000)
    layout = settings.layout
    environment = _begin(settings)
    # "auto" and "fastest" are decided once, and not by every worker.
    settings = replace(
        settings,
        backend=str(environment["backend"]),
        precision=str(environment["precision"]),
    )
    state = _inspect(settings)
    begun = perf_counter()
    with _progress(layout, state) as on_samples:
        _make(settings, environment, state.missing, workers, ray, on_samples)
    return Summary(
        kept=len(state.kept),
        made=len(state.missing),
        damaged=len(state.damaged),
        missing=_finish(settings),
        samples=_samples(layout, state.missing),
        seconds=perf_counter() - begun,
    )


def usable_workers(backend: str) -> int:
    """Return the number of workers that use a machine well: one a core, or one for a GPU."""
    if backend in BACKENDS and BACKENDS[backend].gpu:
        return 1
    return usable_cores()


def _begin(settings: Settings) -> Environment:
    """Check everything, and write the manifest. Returns the environment of this machine."""
    layout = settings.layout
    maker = Maker(settings)
    maker.close()
    now = Manifest.of(settings, maker.series, maker.environment)
    before = _before(layout)
    if before is not None:
        before.check(now, settings.other_versions)
    _clean(layout)
    first = now if before is None else replace(now, environment=before.environment)
    # Complete or not: that is known only after every shard was read.
    if before is None or before.n != now.n:
        first.write(layout.manifest)
    return maker.environment


def _clean(layout: Layout) -> None:
    """Make the folders of a run, and remove what dead processes have left in them."""
    for folder in (layout.out, layout.out / SHARDS, layout.out / RECORDS):
        folder.mkdir(parents=True, exist_ok=True)
        clean(folder)


def _before(layout: Layout) -> Manifest | None:
    """Return the manifest of the folder; None if nothing is in it.

    Raises:
        RequestError: It is not a folder, or holds files that no run has made.
    """
    out = layout.out
    if out.exists() and not out.is_dir():
        raise RequestError(f"{shown_path(out)} is a file. Choose a folder.")
    found = Manifest.read(layout.manifest)
    if found is not None or not (foreign := _foreign(out)):
        return found
    # Another run may have begun in this moment. It writes the manifest before any shard.
    found = Manifest.read(layout.manifest)
    if found is None:
        raise RequestError(
            f"{shown_path(out)} holds files that generate has not made, such as {foreign}. "
            "Choose another folder."
        )
    return found


def _foreign(out: Path) -> str:
    """Return the name of a file that a run without a manifest cannot have made, or ""."""
    for path in out.glob("*"):
        is_own = is_draft(path) or (path.name in (SHARDS, RECORDS) and not any(path.iterdir()))
        if not is_own:
            return path.name
    return ""


def _inspect(settings: Settings) -> _State:
    """Read every shard of the part, and compare it with its record. Remove damaged ones."""
    layout = settings.layout
    first, parts = settings.part
    # A thousand jobs of a part each must not read everything a thousand times.
    mine = range(first - 1, len(layout), parts)
    present = [i for i in mine if layout.path(i).exists()]
    with ThreadPoolExecutor(HASHING) as pool:
        records = pool.map(lambda i: verified(layout, i), present)
        kept = [i for i, record in zip(present, records, strict=True) if record is not None]
    missing = sorted({*mine} - {*kept})
    # Without a record it is of a smaller n, and no damage: it is replaced when it is made again.
    damaged = [i for i in missing if is_present(layout, i)]
    for i in damaged:
        # Another worker may have replaced it in the meantime.
        if verified(layout, i) is None:
            remove(layout.path(i))
    return _State(kept, missing, damaged)


def _make(
    settings: Settings,
    environment: Environment,
    mine: list[int],
    workers: int,
    ray: bool,
    on_samples: OnSamples,
) -> None:
    """Make shards until all of them are there."""
    layout = settings.layout
    left = mine
    for _ in range(ROUNDS):
        if not left:
            return
        if ray:
            _on_ray(settings, environment, left, workers, on_samples)
        elif workers == 1:
            make_here(settings, left, on_samples)
        else:
            make_in_processes(settings, environment, left, workers, on_samples)
        # A folder that another worker was just replacing may be missing for a moment.
        left = [i for i in left if not is_present(layout, i)]


def _on_ray(
    settings: Settings,
    environment: Environment,
    shards: list[int],
    workers: int,
    on_samples: OnSamples,
) -> None:
    try:
        from .ray_data import make_on_ray
    except ImportError as error:
        raise missing("ray", "ray", error) from error
    make_on_ray(settings, environment, shards, workers, on_samples)


def _samples(layout: Layout, shards: list[int]) -> int:
    """Return how many samples are in shards."""
    return sum(len(layout.samples(i)) for i in shards)


@contextmanager
def _progress(layout: Layout, state: _State) -> Iterator[OnSamples]:
    """Draw a bar over the samples of this run's part."""
    # Shards that were there say nothing about the speed.
    before = _samples(layout, state.kept)
    begun = perf_counter()
    made = 0
    with Progress("generating", before + _samples(layout, state.missing), before) as bar:

        def count(samples: int) -> None:
            nonlocal made
            made += samples
            bar.advance(samples, f"{made / max(1e-9, perf_counter() - begun):.1f} per second")

        yield count


def _finish(settings: Settings) -> int:
    """Write the manifest if every shard is there. Returns how many are missing."""
    layout = settings.layout
    records = [
        record
        for i in range(len(layout))
        if layout.path(i).exists() and (record := Record.read(layout, i)) is not None
    ]
    manifest = Manifest.read(layout.manifest)
    # Another run may have asked for more samples in the meantime. It writes the manifest itself,
    # also if one for fewer samples has replaced it since.
    if len(records) == len(layout) and manifest is not None and manifest.n <= layout.n:
        replace(manifest, n=layout.n).write(layout.manifest, records)
        _clean(layout)
    return len(layout) - len(records)
