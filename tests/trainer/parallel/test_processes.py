"""Two processes learn what one does, with each image once per epoch. If one is killed, the other
reports it, and the same command resumes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from export.sources.run import from_run
from runtime.errors import RequestError
from trainer.config import Config
from trainer.data import sources as data
from trainer.data.loader import Wanted, batch_indices
from trainer.errors import TrainingError
from trainer.fit import fit
from trainer.parallel.processes import Processes, join
from trainer.quality import features
from trainer.runs.log import read
from trainer.training.step import Trainer

from ..runs.killing import free_port
from ..runs.test_resume import ONE_THREAD, assert_same
from ..test_fit import command_line

CONFIG = Config(
    data="digits", channels=(8, 16), attention=(), batch=16, steps=24, warmup=5, T=100,
    checkpoint_every=3, log_every=1, sample_every=0, ema_half_life=(100, 1000), device="cpu",
    quality_every=190, quality_samples=40, sample_steps=2,
)  # fmt: skip


def at(index: int, count: int) -> Processes:
    return Processes(index, count, torch.device("cpu"))


DDP = ("--multi_gpu",)  # without GPUs accelerate's processes find each other by gloo
FSDP = ("--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP")


CLASSIFIER_STEPS = 5
SHORT_FIT = f"""
import sys
from trainer.fit import main
from trainer.quality import features
features.STEPS = {CLASSIFIER_STEPS}
sys.exit(main())
"""
"""`trainer.fit` with little training of the classifier that scores samples.

It would take most of the time of these runs.
"""
PAUSED_AT = 7
PAUSE = f"""
import os, time
from pathlib import Path
from trainer.training.step import Trainer
train_step = Trainer.train_step
def paused(self):
    if os.environ["RANK"] == "1" and self.state.step == {PAUSED_AT}:
        Path(__file__).with_name("paused").write_text(str(os.getpid()))
        time.sleep(3600)
    return train_step(self)
Trainer.train_step = paused
"""
"""Before `SHORT_FIT`, the second process stops after some steps, and the first waits for it."""


@pytest.fixture(scope="module", autouse=True)
def _short_classifier() -> Iterator[None]:
    """Runs in this process have the classifier of `SHORT_FIT`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "STEPS", CLASSIFIER_STEPS)
        yield


def launched(
    root: Path, runs: Path, config: Config, how: tuple[str, ...] = DDP, before: str = ""
) -> subprocess.Popen:
    runs.mkdir(parents=True, exist_ok=True)
    script = runs / "short_fit.py"
    script.write_text(before + SHORT_FIT)
    return started(root, [str(script), *command_line(config, runs)], how)


def started(root: Path, what: list[str], how: tuple[str, ...] = DDP) -> subprocess.Popen:
    """`accelerate launch` of `what` in two processes."""
    launch = [
        "-m",
        "accelerate.commands.launch",
        *how,
        "--num_processes=2",
        f"--main_process_port={free_port()}",
    ]
    return subprocess.Popen(
        [sys.executable, *launch, *what], cwd=root, env={**ONE_THREAD, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finished(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=3600)
    assert process.returncode == 0, out
    return out


@pytest.fixture(scope="module")
def two(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two processes."""
    runs = tmp_path_factory.mktemp("two")
    out = finished(launched(root, runs, CONFIG))
    assert "in 2 processes" in out
    assert out.count("done after step 24 of 24") == 1  # only one of them prints
    return runs / "digits"


def test_two_processes_have_the_loss_curve_of_one(two: Path, tmp_path: Path) -> None:
    assert fit(CONFIG, tmp_path)
    assert_same_curve(tmp_path / "digits", two, steps=24)


def assert_same_curve(*runs: Path, steps: int) -> None:
    for column in ("loss", "grad_norm"):
        curves = [np.array([float(row[column]) for row in read(run / "log.csv")]) for run in runs]
        assert len(curves[0]) == steps
        # The same images, noise and knots, but another order of sums: 1e-6 per step, which the
        # optimizer enlarges by dividing by the gradient's size.
        np.testing.assert_allclose(*curves, rtol=1e-3)


def test_accumulation_has_the_loss_curve_of_a_whole_batch() -> None:
    whole, parts = (Trainer(replace(CONFIG, accumulate=n), data.digits()) for n in (1, 4))
    for _ in range(8):
        a, b = whole.train_step(), parts.train_step()
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def killed(root: Path, runs: Path, config: Config, how: tuple[str, ...] = DDP) -> str:
    """The output of a run whose second process is killed after some steps."""
    process = launched(root, runs, config, how, PAUSE)
    paused = runs / "paused"
    try:
        while not (paused.exists() and paused.read_text()):
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            time.sleep(0.01)
        os.kill(int(paused.read_text()), signal.SIGKILL)
        out, _ = process.communicate(timeout=3600)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "another process of this run is gone" in out
    assert len(read(runs / "digits" / "log.csv")) >= 5
    return out


@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_a_message_and_the_same_command_goes_on(
    root: Path, tmp_path: Path, two: Path
) -> None:
    out = killed(root, tmp_path, CONFIG)
    assert "Re-run the same command to resume from the last checkpoint" in out
    out = finished(launched(root, tmp_path, CONFIG))
    assert "going on after step" in out
    assert_same(tmp_path / "digits", two)
    assert read(tmp_path / "digits" / "quality.csv") == read(two / "quality.csv")
    assert [p.name for p in (tmp_path / "digits" / "best").iterdir()] == [
        p.name for p in (two / "best").iterdir()
    ]


# --- parameters split among the processes (FSDP)

SPLIT = replace(
    CONFIG,
    steps=12,
    quality_every=100,
    sample_every=6,
    accumulate=2,
    ema_power=(0.1,),
    snapshot_every=6,
    keep=4,
    quality_samples=20,
)


@pytest.fixture(scope="module")
def split(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes, each with half of the parameters, that nothing interrupts."""
    runs = tmp_path_factory.mktemp("split")
    finished(launched(root, runs, SPLIT, FSDP))
    return runs / "digits"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process."""
    runs = tmp_path_factory.mktemp("one")
    assert fit(SPLIT, runs)
    return runs / "digits"


def tensors_of(run: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Of all parts of the newest checkpoint, and of snapshots."""
    files = [
        *max((run / "checkpoints").glob("step-*")).glob("*.safetensors"),
        *run.glob("snapshots/*/*"),
    ]
    return {
        f"{f.relative_to(run)}:{k}": (t.shape, t.dtype)
        for f in files
        for k, t in load_file(f).items()
    }


@pytest.mark.slow
def test_split_parameters_have_the_loss_curve_of_one_process_and_its_checkpoint(
    split: Path, one: Path
) -> None:
    assert_same_curve(one, split, steps=12)
    assert tensors_of(split) == tensors_of(one)
    assert {p.name for p in split.rglob("*.png")} == {p.name for p in one.rglob("*.png")} != set()
    assert [row["step"] for row in read(split / "quality.csv")] == ["7", "12"]


@pytest.mark.slow
def test_a_split_run_that_is_killed_goes_on_to_the_same_bytes(
    root: Path, tmp_path: Path, split: Path
) -> None:
    killed(root, tmp_path, SPLIT, FSDP)
    out = finished(launched(root, tmp_path, SPLIT, FSDP))
    assert "going on after step" in out
    assert "written elsewhere" not in out
    assert_same(tmp_path / "digits", split)


def cut(run: Path, runs: Path) -> Path:
    """A copy of the run, cut to half of its steps."""
    copy = shutil.copytree(run, runs / "digits")
    for step in (9, 12):
        shutil.rmtree(copy / "checkpoints" / f"step-{step:08d}")
    return copy


@pytest.mark.slow
def test_a_split_run_goes_on_whole_and_a_whole_one_split(
    root: Path, tmp_path: Path, split: Path, one: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = cut(split, tmp_path / "whole")
    assert fit(SPLIT, whole.parent)
    assert "sharded True → None" in caplog.text
    assert_same_curve(one, whole, steps=12)
    parted = cut(one, tmp_path / "parted")
    assert "sharded None → True" in finished(launched(root, parted.parent, SPLIT, FSDP))
    assert_same_curve(one, parted, steps=12)


@pytest.mark.slow
def test_a_split_network_starts_from_what_another_run_learned(
    root: Path, tmp_path: Path, one: Path
) -> None:
    config = replace(SPLIT, start_from=str(one), steps=6, quality_every=0)
    command = ["-m", "trainer.fit", *command_line(config, tmp_path / "split")]
    assert "starting from the weights of" in finished(started(root, command, FSDP))
    assert fit(config, tmp_path / "whole")
    assert_same_curve(tmp_path / "whole" / "digits", tmp_path / "split" / "digits", steps=6)
    starts = [
        json.loads((tmp_path / how / "digits" / "starts.json").read_text())
        for how in ("split", "whole")
    ]
    assert starts[0][0]["start_sha256"] == starts[1][0]["start_sha256"]


@pytest.mark.slow
def test_a_split_run_is_exported_like_any_other(split: Path, one: Path) -> None:
    models = [from_run(run, guidance=1.0) for run in (split, one)]
    weights = [dict(model.module.named_parameters()) for model in models]
    assert list(weights[0]) == list(weights[1])
    for name, tensor in weights[0].items():
        torch.testing.assert_close(
            tensor, weights[1][name], rtol=0, atol=2e-4
        )  # a tenth of a step of the learning rate


HELD = """
import json; from pathlib import Path
from trainer.data import sources as data; from trainer.config import Config
from trainer.parallel.sharding import own; from trainer.training.step import Trainer
trainer = Trainer(Config(data="digits", channels=(8, 16), attention=(), batch=4, device="cpu"), data.digits())
trainer.train_step()
moments = [s[k] for s in trainer.state.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
held = {"weights": trainer.state.weights.values(), "ema": trainer.state.ema.values(), "moments": moments}
shares = {n: sum(own(v).numel() for v in vs) / sum(v.numel() for v in vs) for n, vs in held.items()}
# Each process writes a file of its own: on one stream their lines may run into each other.
Path(__file__).with_name(f"shares{trainer.processes.index}.json").write_text(json.dumps(shares))
from trainer.parallel.processes import leave; leave()
"""


@pytest.mark.slow
def test_each_process_holds_its_share_of_weights_averages_and_optimizer(
    root: Path, tmp_path: Path
) -> None:
    (tmp_path / "held.py").write_text(HELD)
    finished(started(root, [str(tmp_path / "held.py")], FSDP))
    for process in range(2):
        shares = json.loads((tmp_path / f"shares{process}.json").read_text())
        assert set(shares) == {"weights", "ema", "moments"}
        # Rows are whole, so the shares are not quite equal.
        assert all(0.45 < share < 0.55 for share in shares.values())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"FSDP_VERSION": "1"},
            "FSDP_VERSION is '1', which is not supported: launch with --fsdp_version 2",
        ),
        (
            {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"},
            "TRANSFORMER_BASED_WRAP takes the network's own blocks",
        ),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "leave --fsdp_offload_params out"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "own --checkpointing"),
        ({"FSDP_IGNORED_MODULES": "first"}, "every parameter is split"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "one group"),
    ],
)
def test_what_fsdp_cannot_do_is_refused_and_not_ignored(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, str], message: str
) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **asked}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match=re.escape(message)):
        join("cpu")


def test_a_split_network_is_not_compiled() -> None:
    with pytest.raises(TrainingError, match="--compile fails with FSDP"):
        Trainer(replace(CONFIG, compile=True), data.digits(), replace(at(0, 2), sharding=True))


# --- who sees what


@pytest.mark.parametrize(("count", "pictures"), [(2, 24), (4, 40), (2, 7)])
def test_every_picture_comes_once_an_epoch_over_all_processes(count: int, pictures: int) -> None:
    config = Config(data="digits", batch=8, steps=pictures)
    shares = [list(Wanted(config, pictures, at(i, count), 0)) for i in range(count)]
    seen = [i for step in zip(*shares, strict=True) for share in step for i, _ in share]
    expected = np.concatenate([batch_indices(0, step, 8, pictures) for step in range(pictures)])
    assert seen == expected.tolist()
    for epoch in np.array(seen).reshape(-1, pictures):
        assert sorted(epoch) == list(range(pictures))


def test_what_is_drawn_does_not_depend_on_how_many_processes_share_it() -> None:
    config, pictures = replace(CONFIG, flips=True), data.digits()
    whole = Trainer(config, pictures, at(0, 1)).draw(3)
    halves = [Trainer(config, pictures, at(i, 2)).draw(3) for i in range(2)]
    for one, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(one, torch.cat([first, second]))


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(TrainingError, match="a batch of 16 does not divide among 3 processes"):
        Trainer(CONFIG, data.digits(), at(0, 3))


JOINED = """
import torch; from trainer.parallel.processes import join, leave
processes = join("cpu")
print(processes.index, processes.count, float(processes.sum(torch.tensor([1.0 + processes.index], dtype=torch.float64))))
leave()
"""


def joined(root: Path, **asked: str) -> subprocess.Popen:
    environment = {**ONE_THREAD, "PYTHONPATH": str(root), "MASTER_PORT": "29500", **asked}
    command = [sys.executable, "-c", JOINED]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_processes_that_mpirun_started_are_one_run(root: Path) -> None:
    """As with `accelerate launch --cpu --mpirun_hostfile …`: under Open MPI's names instead of
    torch's."""
    asked = {f"OMPI_COMM_WORLD_{name}": "2" for name in ("SIZE", "LOCAL_SIZE")}
    asked |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    both = [
        joined(root, **asked, OMPI_COMM_WORLD_RANK=rank, OMPI_COMM_WORLD_LOCAL_RANK=rank)
        for rank in ("0", "1")
    ]
    assert [process.communicate(timeout=3600)[0] for process in both] == ["0 2 3.0\n", "1 2 3.0\n"]
    lost, _ = joined(root, OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_LOCAL_SIZE="2").communicate(
        timeout=3600
    )
    assert "RequestError: one of 2 processes that do not find each other" in lost
    assert "MASTER_ADDR" in lost


def test_a_launcher_s_variable_is_a_number_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "")
    assert join("cpu").count == 1
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(RequestError, match="WORLD_SIZE must be a number of processes, got 'two'"):
        join("cpu")


def test_deepspeed_is_refused_and_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RequestError, match="DeepSpeed is not supported"):
        join("cpu")


def test_an_error_of_ones_own_is_not_blamed_on_others() -> None:
    with pytest.raises(RuntimeError, match="shapes"), at(0, 2).together():
        raise RuntimeError("shapes do not fit")
