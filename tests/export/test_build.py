"""export.build proves what it writes, and writes nothing that it cannot prove."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import ModelProto
from PIL import Image

from export import build as building
from export.build import build, main
from export.errors import ExportError
from export.graph import convert, trace, write
from export.proof import documents
from export.proof.card import card, proof_lines
from export.proof.check import Proof
from export.proof.plan import QUICK, Bounds, Plan
from export.proof.report import (
    NONE,
    PrecisionCheck,
    Report,
    StepCheck,
    TrajectoryCheck,
    Worst,
)
from export.proof.steps import difference
from export.proof.verdict import judge
from export.sources.run import from_run, newest_run
from runtime import Bundle, Sampler, run
from runtime.diffusion.noise import Stream, noise
from runtime.files import from_json, to_json

from ..traces import Traces


def test_the_runtimes_pictures_are_pytorchs(tiny_run: Path, sampler: Sampler) -> None:
    """The whole pipeline, compared with torch in the reference loop, with other seeds and settings
    than the build's own check."""
    model = from_run(tiny_run, 2.0)
    label, seeds = np.array([9, 0, 4], np.int64), (70, 71, 72)
    program = sampler.bundle.program("ddpm", 25, guidance=1.7)

    def draw(stream: Stream, k: int) -> np.ndarray:
        return np.stack([noise(s, stream, k, (1, 8, 8)) for s in seeds])

    expected = run(
        program,
        model.reference(),
        draw(Stream.INITIAL, 0),
        lambda k: draw(Stream.STEP, k),
        label=label,
        null_label=10,
    )
    found = sampler.sample(3, 70, label=label, solver="ddpm", steps=25, guidance=1.7)
    assert difference(found, expected) <= Bounds().trajectory


def test_the_average_is_exported_unless_the_last_weights_are_asked_for(tiny_run: Path) -> None:
    averaged, last = from_run(tiny_run, 2.0).module, from_run(tiny_run, 2.0, "weights").module
    pairs = list(zip(averaged.parameters(), last.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_the_report_covers_the_schedule_every_graph_and_every_batch(tiny_bundle: Path) -> None:
    assert_covered(tiny_bundle, QUICK)


@pytest.mark.slow
def test_the_report_covers_what_the_default_plan_compares(
    tiny_run: Path, traced: Traces, tmp_path: Path
) -> None:
    build(from_run(tiny_run, 2.0), tmp_path / "tiny", proof_minutes=1e4)
    assert_covered(tmp_path / "tiny", Plan())


def assert_covered(bundle: Path, plan: Plan) -> None:
    """The bundle's report has every graph, solver and level that the plan compares."""
    report = from_json((bundle / "report.json").read_bytes())
    entry = report["precisions"]["fp32"]["onnxruntime"]
    assert set(entry["steps"]) == {"step", "step_guided"}
    for step in entry["steps"].values():
        times = [row["time"] for row in step["by_time"]]
        assert times[0] == 0
        assert times[-1] == 999
        assert len(times) == plan.times
        assert step["batch_invariant"]
        assert 0 < step["answer"]["error"] <= 1e-4
    assert entry["identity"]
    assert {t["trajectory"].split(",")[0] for t in entry["trajectories"]} == {"ddim", "ddpm"}
    assert Bundle.load(bundle).report["fp32"]["onnxruntime"]["trajectory"] <= 2e-3


def test_the_pictures_and_the_card_can_be_read(tiny_bundle: Path) -> None:
    with (
        Image.open(tiny_bundle / "report.png") as report,
        Image.open(tiny_bundle / "samples.png") as samples,
    ):
        assert report.size[0] > 800
        assert samples.size[0] >= 512
    card = (tiny_bundle / "README.md").read_text()
    for part in ("Sampler.load", "samples.png", "CC-BY 4.0", "## Checked", "1,797"):
        assert part in card


@pytest.mark.parametrize(
    "provenance",
    [
        {"data": "CIFAR-10"},
        {"data": ["a"], "step": 5, "config": "x", "training_seconds": "3 hours"},
    ],
)
def test_a_card_is_made_from_provenance_of_any_form(
    tiny_bundle: Path, provenance: dict[str, object]
) -> None:
    bundle = replace(Bundle.load(tiny_bundle), provenance=provenance)
    text = card(bundle)
    assert "CIFAR-10" in text or "['a']" in text


def test_bounds_that_are_left_out_have_their_defaults() -> None:
    assert Bounds(psnr={"int8": 5.0}).psnr == {**Bounds().psnr, "int8": 5.0}


class Wrong:
    """A conversion that changes the network: the module that is checked is not the one that was
    converted."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.module(*inputs) + 1e-3


def test_a_missed_bound_fails_the_build_names_the_worst_case_and_writes_nothing(
    tiny_run: Path, traced: Traces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = trace.traced

    def swap(model) -> ModelProto:
        network = right(model)
        object.__setattr__(model, "module", Wrong(model.module))
        return network

    monkeypatch.setattr(trace, "traced", swap)
    with pytest.raises(
        ExportError, match=r"answer: 0\.001.* > 0\.0001 at step\.onnx, time .*, batch"
    ):
        build(from_run(tiny_run, 2.0), tmp_path / "out", plan=QUICK)
    assert list(tmp_path.iterdir()) == []


def report_of(step: StepCheck, backend: str) -> Report:
    """A report on one step graph in fp32."""
    check = PrecisionCheck("fp32", backend, {"step": step}, (), identity=True)
    return Report(Bounds(), Plan(), (check,))


def test_a_nan_is_never_within_bounds() -> None:
    worst = NONE | Worst(float("nan"), 1e-4, "here") | Worst(1e-9, 1e-4, "there")
    assert worst.where == "here"
    with pytest.raises(ExportError, match=r"nan > 0\.0001 at here"):
        judge(report_of(StepCheck(answer=worst, next_state=NONE), "onnxruntime"))


def test_a_failing_build_leaves_the_bundle_that_was_there(
    tiny_run: Path, traced: Traces, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.read_bytes() for p in bundle_copy.rglob("*") if p.is_file()}

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(documents, "draw", full_disk)
    monkeypatch.setattr(building, "check", lambda *_: Proof(Report(Bounds(), Plan(), ())))
    with pytest.raises(OSError, match="No space left"):
        build(from_run(tiny_run, 2.0), bundle_copy)
    assert {p: p.read_bytes() for p in bundle_copy.rglob("*") if p.is_file()} == before
    assert [p.name for p in bundle_copy.parent.iterdir()] == ["copy"]


NETWORK = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, time):
        return self.layer(x) + time[:, None, None, None] * 0
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_no_bundle(tmp_path: Path, root: Path) -> None:
    """After SIGKILL in the middle of a conversion, the files on disk cannot be mistaken for a
    bundle."""
    (tmp_path / "mynet.py").write_text(NETWORK)
    given = "--module mynet:Net --sample-shape 1,8,8 --prediction v --schedule cosine --clip 1"
    command = [sys.executable, "-m", "export.build", *given.split(), "--out", "out"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not list(tmp_path.glob(".out.*/fp32/weights.bin")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the build ended before it could be killed"
    assert not (tmp_path / "out").exists()


def test_the_newest_run_is_the_default(tiny_run: Path, tmp_path: Path) -> None:
    import shutil

    for age, name in ((200, "old"), (100, "new"), (300, "older")):
        copy = Path(shutil.copytree(tiny_run, tmp_path / name))
        for checkpoint in (copy / "checkpoints").iterdir():
            os.utime(checkpoint, (1e9 - age, 1e9 - age))
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert newest_run(tmp_path).name == "new"


def test_with_no_run_the_error_says_how_to_make_one(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["--runs", str(tmp_path)]) == 2
    assert "python -m trainer.fit" in capsys.readouterr().err


def test_a_folder_that_is_no_bundle_is_not_replaced(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "keep.txt").write_text("precious")
    assert main([str(tiny_run), "--out", str(tmp_path)]) == 2
    assert "is not a bundle, so it is not replaced" in capsys.readouterr().err
    assert (tmp_path / "keep.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("damage", "message"),
    [("cut", "is damaged"), ("empty", "has no checkpoint yet"), ("no config", "is not a run")],
)
def test_a_run_that_cannot_be_exported_is_named(
    tiny_run: Path, tmp_path: Path, damage: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    import shutil

    copy = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    newest = max((copy / "checkpoints").iterdir())
    if damage == "cut":
        file = newest / "ema.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "empty":
        shutil.rmtree(copy / "checkpoints")
    else:
        (copy / "config.json").unlink()
    assert main([str(copy), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_where_another_backend_misses_it_is_not_offered_and_the_build_goes_on(
    capsys: pytest.CaptureFixture,
) -> None:
    step = StepCheck(answer=NONE, next_state=NONE, unlike_alone="step.onnx: at place 1")
    judged = judge(report_of(step, "openvino"))
    assert judged.checks[0].missed == (
        "a sample's bytes depend on the batch it stands in: step.onnx: at place 1",
    )
    assert judged.same_bytes, "a backend that is not offered does not count"
    assert "not offered: fp32 on openvino" in capsys.readouterr().out
    with pytest.raises(ExportError, match="bytes depend on the batch"):
        judge(report_of(step, "onnxruntime"))


def test_a_bound_of_zero_is_for_equal_numbers() -> None:
    assert (NONE | Worst(1e-9, 0.0, "here")).where == "here"
    assert (Worst(1.0, 2.0, "there") | Worst(0.0, 0.0, "here")).where == "there"
    assert Worst(0.0, 0.0, "here").passes


def test_another_backend_that_computes_nan_is_not_offered() -> None:
    lost = StepCheck(answer=Worst(float("nan"), 1e-4, "here"), next_state=NONE, not_finite=5)
    right = report_of(StepCheck(answer=NONE, next_state=NONE), "onnxruntime")
    whole = TrajectoryCheck("ddim", 0.0, 1e-3, 100.0)
    checks = (
        replace(right.checks[0], trajectories=(whole,), psnr_db={"ddim": 200.0}),
        PrecisionCheck("bf16", "openvino", {"step": lost}, (whole,), True, {"ddim": -np.inf}),
    )
    judged = judge(replace(right, checks=checks))
    # Strict JSON, and numbers alone in bundle.json.
    assert from_json(to_json(judged.to_json()))["precisions"]["bf16"]["openvino"]["missed"]
    figures = from_json(to_json(judged.summary()))["bf16"]["openvino"]
    assert figures["answer"] == 1e9
    assert figures["psnr_db"] == -1e9
    assert figures["missed"] == 2


def test_what_missed_its_bounds_is_not_said_to_agree(tiny_bundle: Path) -> None:
    bundle = Bundle.load(tiny_bundle)
    worst = bundle.report["fp32"]["onnxruntime"]
    report = {"fp32": {"onnxruntime": worst, "openvino": {**worst, "missed": 1}}}
    reported = replace(bundle, report=report)
    lines = [line for line in proof_lines(reported, Bounds()).splitlines() if " ms a call" in line]
    assert ["agrees" in line for line in lines] == [True, False]
    assert "openvino (not offered: missed bounds)" in card(reported)


@pytest.mark.parametrize("broken", ["guided", "loop"])
def test_a_wrong_graph_in_another_precision_fails_the_build(
    tiny_run: Path, traced: Traces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Their final images are compared without guidance, and by the step graph alone."""
    half = convert.to_float16
    right = write.loop

    def guided(step: ModelProto) -> ModelProto:
        proto = half(step)
        for node in proto.graph.node:
            # The contrast is added once, and not times g - 1.
            if "step.more" in node.output:
                node.op_type = "Add"
        return proto

    def loop(step: ModelProto, shape: tuple[int, ...]) -> ModelProto:
        proto = right(step, shape)
        if any(tensor.name.endswith(".half") for tensor in step.graph.initializer):
            proto.graph.node[-1].input[0] = "start"
        return proto

    monkeypatch.setattr(
        *((convert, "to_float16", guided) if broken == "guided" else (write, "loop", loop))
    )
    message = {"guided": "fp16 .*answer under guidance 2", "loop": "fp16 .*loop_graph of the traj"}
    with pytest.raises(ExportError, match=message[broken]):
        build(from_run(tiny_run, 2.0), tmp_path / "out", plan=QUICK, precisions=["fp16"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["link", "dot"])
def test_a_link_and_the_current_folder_are_replaced_and_other_files_stay(
    tiny_run: Path,
    traced: Traces,
    bundle_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    (bundle_copy / "bundle.json").write_bytes((bundle_copy / "bundle.json").read_bytes() + b"\n")
    before = (bundle_copy / "bundle.json").read_bytes()
    (bundle_copy / ".git").mkdir()
    (bundle_copy / ".git" / "HEAD").write_text("mine")
    (bundle_copy / "int8").mkdir()
    (tmp_path / "link").symlink_to(bundle_copy)
    monkeypatch.chdir(bundle_copy)
    out = Path(".") if way == "dot" else tmp_path / "link"
    build(from_run(tiny_run, 2.0), out, plan=QUICK)
    monkeypatch.chdir(tmp_path)
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "link"]
    assert (bundle_copy / "bundle.json").read_bytes() != before
    assert 'Sampler.load("copy")' in (bundle_copy / "README.md").read_text()
    assert (bundle_copy / ".git" / "HEAD").read_text() == "mine"
    # A precision that is exported no more is the bundle's, and goes.
    assert not (bundle_copy / "int8").exists()
    assert not [name for name in Bundle.load(bundle_copy).files if ".git" in name]
