"""Every program in examples/ runs, in an empty folder, with few steps."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import Sampler
from runtime.backends.survey import backends

from .root import ROOT
from .small_pipeline import save_small_pipeline

EXAMPLES = ROOT / "examples"
PICTURES = ROOT / "docs" / "pictures"
LONGEST = 60
HANGING_S = 1800


def _run(name: str, folder: Path, *words: object, steps: int = 3) -> str:
    """Run an example in a folder and return its standard output."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, words)],
        cwd=folder,
        env={**os.environ, "STEPS": str(steps), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=HANGING_S,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_each_is_short_listed_and_run_here() -> None:
    programs = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".cpp")}
    listed = set(re.findall(r"\]\((\w+\.(?:py|cpp))\)", (EXAMPLES / "README.md").read_text()))
    assert programs == listed
    here = Path(__file__).read_text()
    for name in programs:
        assert f'"{name}"' in here
        assert len((EXAMPLES / name).read_text().splitlines()) <= LONGEST


def test_batch_job(tmp_path: Path) -> None:
    flag = {"seed": 3, "label": "noto/flags", "steps": 3}
    face = {"seed": 4, "label": 0, "solver": "dpmpp_2m", "steps": 4}
    lines = [json.dumps({"name": "flag", **flag}), json.dumps({"name": "face", **face})]
    (tmp_path / "requests.jsonl").write_text("\n".join(lines))
    _run("batch_job.py", tmp_path, "requests.jsonl", "images")
    expected = Sampler.load("emoji32").pictures(1, **flag)[0]
    with Image.open(tmp_path / "images" / "flag.png") as image:
        # Both use the same number of threads only if OMP_NUM_THREADS is set: rounding may differ.
        assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1
    assert _size(tmp_path / "images" / "face.png") == (32, 32)


def test_previews(tmp_path: Path) -> None:
    assert "step 3 of 3" in _run("previews.py", tmp_path)
    with Image.open(tmp_path / "previews.gif") as image:
        assert getattr(image, "n_frames", 1) == 3


def test_web_app() -> None:
    pytest.importorskip("flask")
    spec = importlib.util.spec_from_file_location("web_app", EXAMPLES / "web_app.py")
    assert spec is not None
    assert spec.loader is not None
    web_app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(web_app)
    client = web_app.app.test_client()
    found = client.get("/image.png?label=noto/flags&seed=3&steps=3")
    assert found.status_code == 200
    assert found.data.startswith(b"\x89PNG")
    assert client.get("/image.png?label=noto/flags&seed=3&steps=3").data == found.data
    wrong = client.get("/image.png?label=flag")
    assert wrong.status_code == 400
    assert "unknown label 'flag'" in wrong.json["error"]


def test_inpainting(tmp_path: Path) -> None:
    _run("inpainting.py", tmp_path, PICTURES / "face.png", PICTURES / "mask.png")
    assert _size(tmp_path / "inpainted.png")[0] >= 512


def test_style_transfer(tmp_path: Path) -> None:
    said = _run("style_transfer.py", tmp_path, PICTURES / "face.png", steps=8)
    change = [float(number) for number in re.findall(r"RMS change (\S+)", said)]
    assert len(change) == 8
    assert change[0] < change[3]
    assert change[4] < change[7]
    assert _size(tmp_path / "styles.png")[0] >= 512


def test_own_solver(tmp_path: Path) -> None:
    said = _run("own_solver.py", tmp_path)
    errors = [float(number) for number in re.findall(r"error (\S+)", said)]
    assert np.log2(errors[2] / errors[3]) == pytest.approx(2, abs=0.1)  # order 2
    assert "emoji: (4, 3, 32, 32)" in said


def test_any_callable(tmp_path: Path) -> None:
    said = _run("any_callable.py", tmp_path, steps=60)
    distances = [float(number) for number in re.findall(r"a mean (\S+),", said)]
    assert len(distances) == 4
    # Two dimensions of spread 0.3 are 0.42 from their mean; 60 steps come close.
    assert max(abs(distance - 0.3 * 2**0.5) for distance in distances) < 0.1


def test_int8_openvino(tmp_path: Path) -> None:
    if "int8" not in backends()["openvino"]["precisions"]:
        pytest.skip("this CPU does not compute int8 exactly")
    said = _run("int8_openvino.py", tmp_path)
    assert float(re.findall(r"median (\S+) dB", said)[0]) > 25


def test_onnx_loop(tmp_path: Path) -> None:
    """From Python, and from C++ if a compiler and ONNX Runtime's headers are available: otherwise
    it is skipped after the first half.

    ONNXRUNTIME_HOME: a folder with include/ and lib/.
    """
    graph = _run("onnx_loop.py", tmp_path, "inputs").strip()
    sample = np.fromfile(tmp_path / "inputs" / "sample.bin", np.float32).reshape(1, 3, 32, 32)
    expected = Sampler.load("emoji32").sample(1, seed=0, label="noto/flags", steps=10)
    assert np.abs(sample - expected).max() < 1e-4  # the loop in one graph, and row by row

    compiler = shutil.which("g++") or shutil.which("c++")
    home = Path(os.environ.get("ONNXRUNTIME_HOME", "/usr"))
    headers = [*home.glob("include/**/onnxruntime_cxx_api.h")]
    if compiler is None or not headers:
        pytest.skip("the C++ half needs a compiler and ONNX Runtime's headers")
    program = tmp_path / "onnx_loop"
    source = EXAMPLES / "onnx_loop.cpp"
    words = [compiler, "-std=c++17", f"-I{headers[0].parent}", source, f"-L{home / 'lib'}"]
    link = ["-lonnxruntime", f"-Wl,-rpath,{home / 'lib'}", "-o", program]
    subprocess.run([*map(str, [*words, *link])], check=True, timeout=HANGING_S)
    ran = subprocess.run(
        [str(program), graph, str(tmp_path / "inputs")],
        capture_output=True,
        text=True,
        check=True,
        timeout=HANGING_S,
    )
    assert "3072 values" in ran.stdout
    assert float(ran.stdout.split()[-1]) < 1e-4


@pytest.mark.slow
def test_own_module(tmp_path: Path) -> None:
    said = _run("own_module.py", tmp_path, steps=1500)
    radius, spread = re.findall(r"radius of 500 samples: (\S+) ± (\S+)", said)[0]
    assert float(radius) == pytest.approx(1, abs=0.1)
    assert float(spread) < 0.3


@pytest.mark.slow
def test_diffusers_folder(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    save_small_pipeline(tmp_path / "saved", "DDIM")
    said = _run("diffusers_folder.py", tmp_path, "saved", "bundle")
    assert "ddim, 50 steps on leading: the scheduler's own" in said
    assert _size(tmp_path / "bundle.png") == (8, 8)
