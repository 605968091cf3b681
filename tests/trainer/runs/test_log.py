"""Tables contain complete rows up to the step from which a run resumes; Weights & Biases gets the
same if enabled."""

import importlib.machinery
import math
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trainer.config import Config
from trainer.data import sources as data
from trainer.fit import fit
from trainer.runs.log import BUCKET_COLUMNS, Table, read
from trainer.training.step import Trainer

CONFIG = Config(
    data="digits", channels=(8, 8), attention=(), batch=8, steps=6, log_every=3, sample_every=6, sample_steps=2, T=50, device="cpu",
)  # fmt: skip


def test_rows_after_the_step_and_rows_cut_short_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,loss,bad\n4,0.5,0\n8,0.25,0\n12,0.125,0\n1")
    assert [row["step"] for row in read(path)] == ["4", "8", "12"]
    table = Table(path, ("step", "loss", "new"), step=8)
    table.row({"step": 12, "loss": math.nan, "new": 1e-7})
    table.close()
    assert path.read_text().split() == ["step,loss,new", "4,0.5,", "8,0.25,", "12,,1e-07"]


def test_the_loss_of_each_stretch_is_its_mean_since_the_row_before(tmp_path: Path) -> None:
    """A batch covers the schedule evenly, so the mean over intervals is the mean of the losses."""
    assert fit(replace(CONFIG, batch=10, log_every=2), tmp_path)
    trainer = Trainer(replace(CONFIG, batch=10, log_every=2), data.digits())
    losses = [trainer.train_step()["loss"] for _ in range(6)]
    for i, row in enumerate(read(tmp_path / "digits" / "log.csv")):
        stretches = [float(row[column]) for column in BUCKET_COLUMNS]
        assert np.mean(stretches) == pytest.approx(np.mean(losses[2 * i : 2 * i + 2]), rel=1e-4)


class Recorder:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict]] = []
        self.ended = False

    def log(self, values: dict, step: int) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.ended = True


@pytest.mark.parametrize("project", ["", "mine"])
def test_weights_and_biases_is_told_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: str
) -> None:
    recorder, wandb = Recorder(), types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.init = lambda **_: recorder  # type: ignore[attr-defined]
    wandb.Image = lambda sheet: sheet.shape  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_PROJECT", project)
    assert fit(CONFIG, tmp_path)
    assert recorder.ended == bool(project)
    if project:
        rows = read(tmp_path / "digits" / "log.csv")
        told = {step: values["loss"] for step, values in recorder.rows if "loss" in values}
        assert told == pytest.approx(
            {int(row["step"]): float(row["loss"]) for row in rows}, rel=1e-4
        )
        assert any("samples" in values for _, values in recorder.rows)


def test_a_folder_called_wandb_is_not_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its runs leave such a folder, which Python imports as a package without anything in it."""
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert fit(replace(CONFIG, sample_every=0), tmp_path)


@pytest.mark.parametrize("keeps", [False, True])
def test_rows_that_nobody_reads_again_do_not_fill_the_memory(tmp_path: Path, keeps: bool) -> None:
    for step in (4, 8):
        table = Table(tmp_path / "log.csv", ("step",), step, keeps)
        table.row({"step": step + 1})
        assert len(table.rows) == (keeps and (1 if step == 4 else 2))
        table.close()
    assert [row["step"] for row in read(tmp_path / "log.csv")] == ["5", "9"]
