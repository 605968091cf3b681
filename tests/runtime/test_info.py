"""python -m runtime.info: what runs here, what is missing, what a bundle holds."""

import json
import sys
from pathlib import Path

import pytest

from runtime import info
from runtime.backends import survey

from ..root import ROOT


def test_the_machine_and_its_backends(capsys: pytest.CaptureFixture) -> None:
    assert info.main([]) == 0
    out = capsys.readouterr().out
    assert "cores" in out
    assert "onnxruntime" in out
    assert "fp32, int8" in out


def test_a_bundle_with_every_pair_and_what_was_checked(
    precise: Path, capsys: pytest.CaptureFixture
) -> None:
    assert info.main([str(precise)]) == 0
    out = capsys.readouterr().out
    for part in (
        "1×8×8",
        "10 labels",
        "prediction v",
        "guidance 2",
        "dB",
        "for GPUs  fp16, int8-trt",
    ):
        assert part in out
    assert info.main([str(precise), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["bundle"]
    assert {("fp32", "onnxruntime"), ("int8", "onnxruntime")} <= {
        (r["precision"], r["backend"]) for r in found["runs"]
    }
    assert all(r["runs_here"] for r in found["runs"] if r["backend"] == "onnxruntime")
    assert found["labels"] == [str(i) for i in range(10)]


def test_what_is_missing_is_named_with_the_command_that_brings_it(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "find_spec", lambda name: None)
    assert info.main([]) == 0
    out = capsys.readouterr().out
    assert "pip install 'unnoise[openvino]'" in out
    assert "pip install 'unnoise[cpu]'" in out


def test_no_bundle_is_an_error_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert info.main([str(tmp_path)]) == 2
    assert "no bundle.json" in capsys.readouterr().err


def test_it_needs_neither_torch_nor_onnx() -> None:
    import subprocess

    code = "import sys, runtime.info; assert not {'torch', 'onnx', 'onnxruntime', 'openvino'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
