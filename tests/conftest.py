"""One tiny trained run and its bundle, made once and shared; tests that change a bundle work on a
copy."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.bundle import Bundle
from runtime.files import from_json, to_json
from runtime.format import MANIFEST
from runtime.sampler import Sampler

ROOT = Path(__file__).parent.parent
TINY = {
    "data": "digits",
    "name": "tiny",
    "channels": (8, 16),
    "attention": (4,),
    "steps": 30,
    "batch": 32,
    "warmup": 5,
}


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps on the digits, 10 classes and a null label."""
    from trainer.config import Config
    from trainer.fit import fit

    runs = tmp_path_factory.mktemp("runs")
    assert fit(Config(**TINY, sample_every=0), runs)
    return runs / "tiny"


@pytest.fixture(scope="session")
def tiny_bundle(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run's bundle. Read it, do not write it."""
    from export.build import build
    from export.sources.run import from_run

    out = tmp_path_factory.mktemp("bundles") / "tiny"
    build(from_run(tiny_run, guidance=2.0), out)
    return out


@pytest.fixture(scope="session")
def precise(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run's bundle with every precision, made by the command. Read it, do not write it."""
    from export.build import main

    out = tmp_path_factory.mktemp("precise") / "tiny"
    assert main([str(tiny_run), "--fp16", "--int8", "--quick", "--out", str(out)]) == 0
    return out


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
def shipped(root: Path) -> Bundle:
    return Bundle.load(root / "bundles" / "emoji32")
