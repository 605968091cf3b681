"""Two processes learn what one does, each picture once an epoch; where one is killed, the other says so, and the same command goes on."""

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

from runtime.errors import RequestError
from trainer import data
from trainer.config import Config
from trainer.errors import TrainingError
from trainer.fit import fit
from trainer.loader import Wanted, batch_indices
from trainer.log import read
from trainer.processes import Processes, join
from trainer.step import Trainer

from .test_fit import command_line
from .test_resume import ONE_THREAD, assert_same

CONFIG = Config(
    data="digits", channels=(8, 16), attention=(), batch=16, steps=24, warmup=5, T=100,
    checkpoint_every=6, log_every=1, sample_every=0, ema_half_life=(100, 1000), device="cpu",
    quality_every=190, quality_samples=40, sample_steps=2,
)  # fmt: skip


def at(index: int, count: int) -> Processes:
    return Processes(index, count, torch.device("cpu"))


def launched(root: Path, runs: Path, config: Config) -> subprocess.Popen:
    """By what `accelerate launch` starts processes with, too; on CPUs it would need mpirun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "trainer.fit"]
    environment = {**ONE_THREAD, "PYTHONPATH": str(root)}
    return subprocess.Popen(
        [*command, *command_line(config, runs)], cwd=root, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def two(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes that nothing interrupts."""
    runs = tmp_path_factory.mktemp("two")
    process = launched(root, runs, CONFIG)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert "in 2 processes" in out
    assert out.count("done after step 24 of 24") == 1  # one of them speaks
    return runs / "digits"


def test_two_processes_have_the_loss_curve_of_one(two: Path, tmp_path: Path) -> None:
    assert fit(CONFIG, tmp_path)
    one = tmp_path / "digits"
    for column in ("loss", "grad_norm"):
        curves = [np.array([float(row[column]) for row in read(run / "log.csv")]) for run in (one, two)]
        assert len(curves[0]) == 24
        # The same pictures, noise and knots; sums of another order, 1e-6 a step, which the optimizer's division by the gradient's own size spreads.
        np.testing.assert_allclose(*curves, rtol=1e-3)


def test_accumulation_has_the_loss_curve_of_a_whole_batch() -> None:
    whole, parts = (Trainer(replace(CONFIG, accumulate=n), data.digits()) for n in (1, 4))
    for _ in range(8):
        a, b = whole.train_step(), parts.train_step()
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def killed_worker(process: subprocess.Popen, log: Path) -> None:
    """Kill one of the two workers once there are rows in the log."""
    deadline = time.monotonic() + 90
    while not (log.exists() and len(read(log)) >= 8):
        assert time.monotonic() < deadline, "the run did not begin"
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.01)
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True)
    workers = [int(line.split()[0]) for line in listed.stdout.splitlines() if "trainer.fit" in line]
    assert len(workers) == 2, listed.stdout
    os.kill(workers[-1], signal.SIGKILL)


def test_a_killed_process_ends_the_run_with_a_message_and_the_same_command_goes_on(
    root: Path, tmp_path: Path, two: Path
) -> None:
    process = launched(root, tmp_path, CONFIG)
    try:
        killed_worker(process, tmp_path / "digits" / "log.csv")
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "another process of this run is gone" in out
    assert "The same command again goes on from the last checkpoint" in out
    again = launched(root, tmp_path, CONFIG)
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0, out
    assert "going on after step" in out
    assert_same(tmp_path / "digits", two)
    assert read(tmp_path / "digits" / "quality.csv") == read(two / "quality.csv")
    assert [p.name for p in (tmp_path / "digits" / "best").iterdir()] == [p.name for p in (two / "best").iterdir()]


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


@pytest.mark.parametrize("asked", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_what_is_not_supported_is_refused_and_not_ignored(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv(asked, "true")
    with pytest.raises(RequestError, match="FSDP and DeepSpeed are not supported"):
        join("cpu")


def test_an_error_of_ones_own_is_not_blamed_on_others() -> None:
    with pytest.raises(RuntimeError, match="shapes"), at(0, 2).together():
        raise RuntimeError("shapes do not fit")
