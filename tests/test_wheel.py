"""The first image from pip alone: the wheel, in an environment that has only what its extra needs."""

import re
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import Bundle, BundleError, Sampler

from .root import ROOT

SOURCES = ("runtime", "trainer", "export", "serve", "bundles/emoji32")
MAX_WHEEL_MB = 20
HANGING_S = 1800
FIRST = """\
from PIL import Image
from runtime import Sampler

sampler = Sampler.load("emoji32")
pictures = sampler.pictures(4, seed=0, label="noto/flags", steps=4)
Image.fromarray(pictures[0]).save("flag.png")
"""
"""The six lines of a user who has only run pip install."""
README = [
    program
    for program in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    if 'Sampler.load("emoji32")' in program
][:1]
"""The first program of the README that loads the bundle by name, if it has one."""
SAVE = 'import numpy; numpy.save("samples.npy", sampler.sample(4, seed=0, label=3, steps=4))'


def _run(*words: object, cwd: Path) -> str:
    """Run a program outside the checkout and return its standard output."""
    run = subprocess.run(
        [*map(str, words)],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANGING_S,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist, which is built from a copy of the checkout's sources."""
    base = tmp_path_factory.mktemp("build")
    copy = base / "copy"
    copy.mkdir()
    for name in SOURCES:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).symlink_to(ROOT / name)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"):
        (copy / name).symlink_to(ROOT / name)
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    _run(sys.executable, "-c", build, cwd=copy)
    (sdist,) = base.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps"]
    _run(*pip, "--no-build-isolation", "--wheel-dir", base, sdist, cwd=base)
    (made,) = base.glob("*.whl")
    return made


def _needed(name: str, extras: set[str]) -> set[str]:
    """The installed distributions that `name` requires with these extras, and what they require."""
    found = set()
    for line in metadata.requires(name) or ():
        required, _, marker = line.partition(";")
        extra = re.search(r"extra == ['\"](.+?)['\"]", marker)
        if extra is None or extra[1] in extras:
            own = re.split(r"[^\w.-]", required.strip())[0]
            found |= {own, *_needed(own, set())}
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an empty environment with the wheel and its cpu extra.

    Nothing is downloaded: the distributions that the extra requires are links to those that run
    this test, and pip, offline, finds the extra's requirements met by them.
    """
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False, symlinks=True)
    python = place / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
    for name in _needed("unnoise", {"cpu"}):
        distribution = metadata.distribution(name)
        for part in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / part).exists():
                (site / part).symlink_to(distribution.locate_file(part))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index"]
    _run(*pip, f"unnoise[cpu] @ {wheel.as_uri()}", cwd=place)
    return python


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    return tmp_path


@pytest.mark.slow
def test_the_wheel_is_small_enough(wheel: Path) -> None:
    assert wheel.stat().st_size < MAX_WHEEL_MB * 1e6


@pytest.mark.slow
def test_the_first_lines_run_and_give_the_checkouts_bytes(python: Path, empty: Path) -> None:
    _run(python, "-c", FIRST + SAVE, cwd=empty)
    sampler = Sampler.load(ROOT / "bundles" / "emoji32", threads=1)
    expected = sampler.sample(4, seed=0, label=3, steps=4)
    assert np.load(empty / "samples.npy").tobytes() == expected.tobytes()
    flag = sampler.pictures(1, seed=0, label="noto/flags", steps=4)[0]
    with Image.open(empty / "flag.png") as saved:
        assert np.array_equal(np.asarray(saved), flag)


@pytest.mark.slow
@pytest.mark.parametrize("program", README)
def test_the_first_program_of_the_readme_runs(program: str, python: Path, empty: Path) -> None:
    _run(python, "-c", program, cwd=empty)
    assert [*empty.glob("*.png")]


@pytest.mark.slow
def test_the_command_makes_a_grid_by_name(python: Path, empty: Path) -> None:
    unnoise = python.parent / "unnoise"
    said = _run(
        unnoise, "sample", "emoji32", "--n", 4, "--steps", 4, "--out", "grid.png", cwd=empty
    )
    assert "4 of emoji32 on onnxruntime fp32" in said
    with Image.open(empty / "grid.png") as grid:
        assert grid.size[0] >= 512
    assert "emoji32: samples of 3×32×32" in _run(unnoise, "info", "emoji32", cwd=empty)


@pytest.mark.slow
def test_the_copy_lists_what_is_there_and_nothing_else(python: Path, empty: Path) -> None:
    path = "from runtime import Bundle; print(Bundle.load('emoji32').path)"
    folder = Path(_run(python, "-c", path, cwd=empty).strip())
    assert folder.parts[-3:] == ("runtime", "shipped", "emoji32")
    bundle = Bundle.load(folder)
    assert bundle.precisions == ("fp32", "int8")
    assert all(len(bundle.read(name)) == file.size for name, file in bundle.files.items())
    on_disk = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert on_disk == {*bundle.files, "bundle.json"}
    assert {*bundle.report} == {"fp32", "int8", "bf16"}  # bf16 is computed from fp32's files
    card = (folder / "README.md").read_text()
    assert not set(re.findall(r"`(\w+\.(?:png|json))`", card)) - on_disk - {"report.png"}
    assert [
        row for row in ("fp32", "bf16", "int8", "fp16", "int8-trt") if f"| {row} |" in card
    ] == [
        "fp32",
        "bf16",
        "int8",
    ]


def test_a_checkout_finds_its_own_bundle_by_name(empty: Path, monkeypatch) -> None:
    monkeypatch.chdir(empty)
    assert Bundle.load("emoji32").path == ROOT / "bundles" / "emoji32"
    assert Bundle.load(Path("emoji32")).path == ROOT / "bundles" / "emoji32"


def test_an_existing_folder_stays_a_path(empty: Path, monkeypatch) -> None:
    monkeypatch.chdir(empty)
    (empty / "emoji32").mkdir()
    with pytest.raises(BundleError, match=r"^emoji32 has no bundle\.json"):
        Bundle.load("emoji32")


@pytest.mark.parametrize("name", ["emoji23", "bundles/emoji32", "emoji"])
def test_another_name_gets_the_nearest_and_what_is_shipped(name: str, empty, monkeypatch) -> None:
    monkeypatch.chdir(empty)
    with pytest.raises(
        BundleError,
        match=r"'emoji32'\? Shipped: emoji32, emoji32-fast, emoji-superres, emoji-restyle\.",
    ):
        Bundle.load(name)


def test_tuning_does_not_rewrite_the_installed_copy(monkeypatch, capsys) -> None:
    from export import tune

    monkeypatch.setattr(tune, "INSTALLED", ROOT / "bundles")
    assert tune.main(["emoji32"]) == 2
    assert "tune the copy" in capsys.readouterr().err
