"""A tiny trained run and its bundle, made once and shared. Tests that change a bundle copy it."""

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.bundle.bundle import Bundle
from runtime.bundle.format import MANIFEST
from runtime.files import from_json, lock, to_json
from runtime.sampler import Sampler

from .quick import quick_proof
from .root import ROOT
from .traces import Traces, operators_once

TINY = {
    "data": "digits",
    "name": "tiny",
    "channels": (8, 16),
    "attention": (4,),
    "steps": 30,
    "batch": 32,
    "warmup": 5,
}

LONGEST = (
    "test_readme_runs.py",
    "test_processes.py",
    "test_readme.py",
    "test_from_diffusers.py",
    "test_engines.py",
    "test_fuzz.py",
    "test_learn.py",
    "test_service.py",
    "test_fit.py",
    "test_distill.py",
    "test_every_program.py",
    "test_quality.py",
    "test_tune.py",
    "test_tensorrt.py",
    "test_resume.py",
)
"""The files that take longest come first, so that no worker is left with one at the end.

The order decides how long the tests take and nothing else.
"""


def pytest_configure() -> None:
    """Look for cycles of objects a thirtieth as often, which saves a tenth of all time.

    A process keeps thousands of tests and the modules of large libraries. Python would look at them
    again and again, most of all while torch traces a network.
    """
    gc.set_threshold(20_000, 10, 10)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have two workers neither wait for the same fixture nor for each other at the end.

    One file that needs the traced graphs comes first, so that one worker makes them. The files that
    need none follow, and the others come last. Within each, the longest come first.
    """

    def needs_graphs(item: pytest.Item) -> bool:
        return "traces" in getattr(item, "fixturenames", ())

    needing = [item.path for item in items if needs_graphs(item)]
    files = set(needing)

    def place(item: pytest.Item) -> tuple[int, int]:
        name = item.path.name
        rank = LONGEST.index(name) if name in LONGEST else len(LONGEST)
        if needing and item.path == needing[0]:
            return 0, rank
        return 1 + (item.path in files), rank

    items.sort(key=place)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


Make = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all processes of a run."""
    base = tmp_path_factory.getbasetemp()
    # Under pytest-xdist each worker has a folder of its own below the run's.
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session", autouse=True)
def own_cache(run_folder: Path) -> Iterator[None]:
    """The run has a cache of its own: what an earlier one measured or compiled is not used."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("UNNOISE_CACHE", str(run_folder / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_proxy() -> Iterator[None]:
    """Tests talk to servers of this machine, also where a proxy leads to all others."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("NO_PROXY", "no_proxy"):
            patched.setenv(name, "127.0.0.1,localhost")
        yield


@pytest.fixture(scope="session")
def made_once(run_folder: Path) -> Make:
    """made_once(name, make): a folder that make(folder) fills, once for all processes of a run."""

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder = run_folder / name
        with lock(run_folder / f"{name}.lock", wait=True):
            if not (run_folder / f"{name}.done").exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                (run_folder / f"{name}.done").touch()
        return folder

    return once


@pytest.fixture(scope="session")
def tiny_run(made_once: Make) -> Path:
    """A run of 30 steps on the digits, 10 classes and a null label."""

    def train(folder: Path) -> None:
        from trainer.config import Config
        from trainer.fit import fit

        assert fit(Config(**TINY, sample_every=0), folder)

    return made_once("runs", train) / "tiny"


@pytest.fixture(scope="session")
def traces(tiny_run: Path, made_once: Make) -> Traces:
    """The step graphs of the tiny run's averaged weights."""

    def trace(folder: Path) -> None:
        from export.sources.run import from_run

        Traces.write(from_run(tiny_run, guidance=2.0), folder)

    return Traces(made_once("traces", trace))


@pytest.fixture(scope="session")
def operators_read_once() -> Iterator[None]:
    """Have torch's exporter read its tables once; see tests/traces.py."""
    with operators_once():
        yield


@pytest.fixture
def quickly_proved() -> Iterator[None]:
    """Have an export within a test prove less; see tests/quick.py.

    Bundles of fixtures that live longer than a test are proved in full, and tests look at those.
    """
    with quick_proof():
        yield


@pytest.fixture
def traced(traces: Traces) -> Iterator[Traces]:
    """Exports of the tiny run's averaged weights do not trace them again."""
    with traces.used():
        yield traces


@pytest.fixture(scope="session")
def tiny_bundle(tiny_run: Path, traces: Traces, made_once: Make) -> Path:
    """The tiny run's bundle, proved by the quick plan. Read it, do not write it."""

    def export(folder: Path) -> None:
        from export.build import build
        from export.proof.plan import QUICK
        from export.sources.run import from_run

        with traces.used():
            build(from_run(tiny_run, guidance=2.0), folder / "tiny", plan=QUICK)

    return made_once("bundles", export) / "tiny"


@pytest.fixture(scope="session")
def precise(tiny_run: Path, traces: Traces, made_once: Make) -> Path:
    """The tiny run's bundle with every precision, made by the command. Read it, do not write it."""

    def export(folder: Path) -> None:
        from export.build import main

        words = [str(tiny_run), "--fp16", "--int8", "--quick", "--out", str(folder / "tiny")]
        with traces.used():
            assert main(words) == 0

    return made_once("precise", export) / "tiny"


@pytest.fixture(scope="session")
def sampler(tiny_bundle: Path) -> Sampler:
    return Sampler.load(tiny_bundle)


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle to damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


@pytest.fixture
def edited(bundle_copy: Path) -> Callable[[Callable[[dict], object]], Path]:
    """edited(change): the copy with its bundle.json changed in place by `change`."""

    def edit(change: Callable[[dict], object]) -> Path:
        manifest = bundle_copy / MANIFEST
        value = from_json(manifest.read_bytes())
        change(value)
        manifest.write_text(to_json(value))
        return bundle_copy

    return edit


@pytest.fixture(scope="session")
def first_release(root: Path) -> Path:
    """A run and a bundle that the first release made; see the README there."""
    return root / "tests" / "fixtures" / "v0_1"


@pytest.fixture(scope="session")
def second_format(root: Path) -> Path:
    """A bundle with conditions, and samples of it; see the README there."""
    return root / "tests" / "fixtures" / "format2"


@pytest.fixture(scope="session")
def shipped(root: Path) -> Bundle:
    return Bundle.load(root / "bundles" / "emoji32")
