"""python -m runtime.bench: its measurements are complete and consistent, and invalid input gives a
one-line error."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime import Bundle, Request, RequestError, Sampler
from runtime.backends.registry import BACKENDS
from runtime.bench import measure as timing
from runtime.bench import table as bench
from runtime.bench.fresh import cold as measure_cold
from runtime.bench.results import Result

from ...root import ROOT

QUICK = ["--seconds", "0.01", "--steps", "2", "--pictures", "2"]


@pytest.fixture(scope="module")
def found(precise: Path) -> dict:
    """The machine-readable line, for every pair of the tiny bundle."""
    arguments = [
        *QUICK,
        "--backend",
        "all",
        "--precision",
        "all",
        "--batch",
        "2,1",
        "--cold",
        "1",
        "--json",
    ]
    run = [sys.executable, "-m", "runtime.bench", str(precise), *arguments]
    out = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert out.count("\n") == 1, "one line"
    return json.loads(out)


def test_every_pair_is_measured_at_every_batch(found: dict) -> None:
    pairs = {(run["backend"], run["precision"]) for run in found["runs"]}
    assert {("onnxruntime", "fp32"), ("onnxruntime", "int8")} <= pairs
    assert found["calls"] == 2
    assert found["versions"].keys() >= {"python", "numpy", "onnxruntime"}
    for run in found["runs"]:
        assert [speed["batch"] for speed in run["batches"]] == [1, 2]
        for speed in run["batches"]:
            latency = speed["latency_ms"]
            assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
            assert speed["timed"] >= timing.LEAST
            assert speed["call_ms"] > 0


def test_the_parts_of_the_first_picture_are_no_more_than_the_whole(found: dict) -> None:
    for run in found["runs"]:
        cold = run["cold"]
        assert 0 < cold["import_s"] + cold["load_s"] + cold["sample_s"] <= cold["first_picture_s"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_the_childs_own(precise: Path) -> None:
    """A child inherits getrusage's peak from its parent; this value must not be inherited."""
    ballast = np.ones(2**27)  # 1 GiB, touched
    cold = measure_cold(precise, Result("onnxruntime", "fp32"), 1, Request(0, steps=1), 1)
    assert cold.peak_mib is not None
    assert 20 < cold.peak_mib < ballast.nbytes / 2**20


def test_the_distance_is_that_of_the_samplers_pictures(found: dict, precise: Path) -> None:
    fp32, int8 = (
        Sampler.load(precise, "onnxruntime", p).sample(2, label=[0, 1], steps=2).astype(float)
        for p in ("fp32", "int8")
    )
    run = next(
        r for r in found["runs"] if (r["backend"], r["precision"]) == ("onnxruntime", "int8")
    )
    reference = next(
        r for r in found["runs"] if (r["backend"], r["precision"]) == ("onnxruntime", "fp32")
    )
    assert run["rms"] == pytest.approx(np.sqrt(np.mean((int8 - fp32) ** 2)), rel=1e-9)
    assert (reference["rms"], reference["psnr_db"]) == (None, None)


def test_the_distance_by_hand() -> None:
    a = np.zeros((2, 1, 4, 4), np.float32)
    db, rms = timing.distance(a + np.float32(0.5), a, (-1.0, 1.0))
    assert (db, rms) == (pytest.approx(20 * np.log10(2 / 0.5)), 0.5)
    assert timing.distance(a, a, (-1.0, 1.0)) == (200.0, 0.0)
    assert timing.distance(a * np.float32(np.nan), a, (-1.0, 1.0))[0] == -np.inf


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(v) for v in range(1, 101)]
    assert [timing.percentile(values, p) for p in (50, 95, 99)] == [50, 95, 99]
    assert [timing.percentile([3.0, 1.0, 2.0], p) for p in (50, 95, 99)] == [2, 3, 3]
    assert timing.percentile([7.0], 50) == 7


def test_a_table_for_people_and_a_page_to_look_at(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "bench.png"
    arguments = [
        *QUICK,
        "--batch",
        "1,2",
        "--cold",
        "0",
        "--label",
        "3",
        "--guidance",
        "2",
        "--plot",
        str(out),
    ]
    assert bench.main([str(tiny_bundle), *arguments]) == 0
    text = capsys.readouterr().out
    for part in (
        "onnxruntime  fp32",
        "2 of them guided",
        "reference",
        "p99 is the slowest",
        "ms a call",
    ):
        assert part in text
    with Image.open(out) as page:
        assert page.size[0] > 1000


def test_a_bundle_with_conditions_is_measured(
    second_format: Path, capsys: pytest.CaptureFixture
) -> None:
    """A fresh process gets the drawn conditions too; no time at all is 5 calls."""
    given = ["--seconds", "0", "--grid", "15,5", "--pictures", "1", "--batch", "1"]
    arguments = [str(second_format / "bundle"), *given, "--cold", "1", "--json"]
    assert bench.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 2
    (run,) = found["runs"]
    assert run["cold"]["sample_s"] > 0
    assert run["batches"][0]["timed"] == timing.LEAST


@pytest.mark.parametrize("option", ["--threads", "--streams"])
def test_what_a_fresh_process_would_refuse_is_refused_before_it_starts(
    option: str, tiny_bundle: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured"))
    assert bench.main([str(tiny_bundle), option, "0"]) == 2
    assert f"`{option[2:]}` must be 1 to 1024, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batch 1,x", "whole numbers with commas"),
        ("--batch 0", "`batch` must be 1 to"),
        ("--batch ,", "--batch needs"),
        ("--backend onnxruntme", "Did you mean 'onnxruntime'"),
        ("--precision fp8", "unknown precision 'fp8'"),
        ("--precision bf16", "onnxruntime does not compute bf16"),
        ("--backend onnxruntime --precision bf16,fp16", "nothing to measure"),
        ("--plot page.txt", "--plot writes .png"),
        ("--solver dimm", "Did you mean 'ddim'"),
        ("--label 12", "out of range"),
        ("--precision fp32,itn8", "Did you mean 'int8'"),
        ("--pictures 1000001", "`pictures` must be 1 to 1000000"),
        ("--pictures 0", "`pictures` must be 1 to"),
        ("--seconds nan", "`seconds` must be a number"),
        ("--threads 0", "`threads` must be 1 to"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    tiny_bundle: Path, arguments: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert bench.main([str(tiny_bundle), "--cold", "0", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_what_a_machine_cannot_run_is_said(
    tiny_bundle: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [
        *QUICK,
        "--cold",
        "0",
        "--batch",
        "1",
        "--backend",
        "onnxruntime",
        "--precision",
        "fp32,bf16",
    ]
    assert bench.main([str(tiny_bundle), *arguments]) == 0
    assert "left out: onnxruntime bf16" in capsys.readouterr().out


def test_a_plot_without_matplotlib_says_how_to_get_it_before_anything_is_measured(
    tiny_bundle: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured"))
    assert bench.main([str(tiny_bundle), "--plot", "page.png"]) == 2
    assert "pip install 'unnoise[plot]'" in capsys.readouterr().err


def test_it_needs_neither_torch_nor_onnx_nor_matplotlib(root: Path) -> None:
    code = "import sys, runtime.bench; assert not {'torch', 'onnx', 'onnxruntime', 'openvino', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_samples_that_are_not_finite_are_null_in_json_and_said_in_the_table(
    tiny_bundle: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = timing.measure

    def spoiled(*arguments: Any) -> list[Result]:
        results = measured(*arguments)
        expected = results[0].samples
        assert expected is not None
        found = Result("openvino", "fp32", results[0].speeds, samples=expected * np.inf)
        found.psnr_db, found.rms = timing.distance(found.samples, expected, (-1.0, 1.0))
        return [*results, found]

    monkeypatch.setattr(bench, "measure", spoiled)
    arguments = [str(tiny_bundle), *QUICK, "--batch", "1", "--cold", "0"]
    assert bench.main([*arguments, "--json"]) == 0
    fine, spoilt = json.loads(capsys.readouterr().out)["runs"]
    assert (fine["finite"], spoilt["finite"]) == (True, False)
    assert spoilt["psnr_db"] is spoilt["rms"] is None
    assert bench.main(arguments) == 0
    assert "not finite" in capsys.readouterr().out


def test_a_page_that_cannot_be_written_costs_no_figures(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any
) -> None:
    (tmp_path / "folder.png").mkdir()
    arguments = [str(tiny_bundle), *QUICK, "--batch", "1", "--cold", "0", "--plot"]
    with monkeypatch.context() as patch:
        patch.setattr(bench, "measure", lambda *_: pytest.fail("measured"))
        for place in (tmp_path / "folder.png", Path(__file__) / "a.png"):
            assert bench.main([*arguments, str(place)]) == 2
            assert "cannot be written" in capsys.readouterr().err

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bench.bench_plot, "draw", full)
    assert bench.main([*arguments, str(tmp_path / "page.png")]) == 2
    found = capsys.readouterr()
    assert "No space left" in found.err
    assert "ms a call" in found.out


def test_a_name_with_dollars_is_no_formula(
    bundle_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    manifest = bundle_copy / "bundle.json"
    value = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**value, "name": r"a $\nothing$"}))
    out = tmp_path / "page.png"
    arguments = [*QUICK, "--batch", "1", "--cold", "0", "--plot", str(out)]
    assert bench.main([str(bundle_copy), *arguments]) == 0
    assert out.exists()
    capsys.readouterr()


def test_a_fresh_process_imports_nothing_of_the_working_directory(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("runtime", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('another module')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    cold = measure_cold(tiny_bundle, Result("onnxruntime", "fp32"), 1, Request(0, steps=1), 1)
    assert cold.sample_s > 0


def test_gpus_are_left_out_if_an_option_is_for_cpus(tiny_bundle: Path) -> None:
    bundle = Bundle.load(tiny_bundle)
    here: Any = {
        name: {"version": "1", "precisions": ["fp32"], "missing": None} for name in BACKENDS
    }
    pairs, left = bench.chosen(bundle, "onnxruntime,tensorrt", "fp32", here, "--threads")
    assert pairs == [("onnxruntime", "fp32")]
    assert left == ["tensorrt fp32: --threads is for CPUs"]
    with pytest.raises(RequestError, match="--streams is for CPUs"):
        bench.chosen(bundle, "tensorrt", "fp32", here, "--streams")
    assert len(bench.chosen(bundle, "all", "fp32", here)[0]) == len(BACKENDS)
