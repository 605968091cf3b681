"""The promise: after a kill, the same command ends with the bytes of an uninterrupted run, in one
process and in two."""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from runtime.files import from_json, to_json
from trainer.config import Config
from trainer.distill import student_of
from trainer.fit import fit
from trainer.runs.folder import read_run
from trainer.runs.log import TIME_COLUMNS

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 noisy images in two classes, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("data") / "noise"
    random = np.random.default_rng(0)
    for i in range(60):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 9 + i % 3, 3), np.uint8)).save(path)
    (folder / "a" / "bad.png").write_bytes(b"no picture")
    return folder


def config_for(pictures: Path, **changes) -> Config:
    """A tiny network on randomly cropped images that two workers read, and everything that a
    checkpoint can contain."""
    options = {
        "data": f"folder:{pictures}",
        "in_memory_mb": 0,
        "workers": 2,
        "size": 8,
        "crop": "random",
        "flips": True,
        "channels": (8, 8),
        "attention": (),
        "dropout": 0.1,
        "T": 100,
        "steps": 45,
        "batch": 8,
        "warmup": 5,
        "checkpoint_every": 7,
        "log_every": 4,
        "sample_every": 15,
        "sample_steps": 4,
        "keep": 2,
        "ema_half_life": (10, 1000),
        "ema_power": (0.1,),
        "snapshot_every": 15,
        "device": "cpu",
    }
    return Config(**{**options, **changes})


def bytes_of(run: Path) -> dict[str, str]:
    """sha256 of every file that may not differ: the newest checkpoint's tensors, snapshots, sample
    grids."""
    newest = max((run / "checkpoints").glob("step-*"))
    files = [
        *newest.glob("*.safetensors"),
        *run.glob("snapshots/*/*"),
        *run.glob("samples/*"),
        run / "bad-pictures.txt",
    ]
    return {
        str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in files
        if f.exists()
    }


def log_of(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in TIME_COLUMNS} for row in csv.DictReader(file)
        ]


def state_of(run: Path) -> dict:
    state = from_json((max((run / "checkpoints").glob("step-*")) / "state.json").read_bytes())
    return {k: v for k, v in state.items() if k != "seconds"}


def assert_same(run: Path, whole: Path) -> None:
    assert bytes_of(run) == bytes_of(whole)
    assert log_of(run) == log_of(whole)
    assert state_of(run) == state_of(whole)


def killed(root: Path, folder: Path, config: Config, kills: int, processes: int) -> None:
    file = folder / "config.json"
    file.write_text(to_json(config.to_json()))
    command = [
        sys.executable,
        "tests/trainer/runs/killing.py",
        *map(str, (folder, file, kills, processes, 1)),
    ]
    environment = {**ONE_THREAD, "PYTHONPATH": str(root)}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stderr + "".join(
        p.read_text() for p in folder.glob("*/output-*.txt")
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["killed"] == kills
    for i in range(told["runs"]):
        assert_same(folder / f"killed-{i}" / config.name, folder / "whole" / config.name)


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_the_same_bytes(
    root: Path, tmp_path: Path, pictures: Path
) -> None:
    killed(root, tmp_path, config_for(pictures), kills=20, processes=1)
    run = tmp_path / "whole" / "noise"
    assert (
        len(bytes_of(run)) == 5 + 3 + 3 + 1
    )  # weights, optimizer, three averages; snapshots; grids; the bad image's name
    assert (run / "bad-pictures.txt").read_text().splitlines() == [str(pictures / "a" / "bad.png")]


@pytest.mark.slow
def test_two_processes_killed_five_times_end_with_the_same_bytes(
    root: Path, tmp_path: Path, pictures: Path
) -> None:
    killed(root, tmp_path, config_for(pictures, workers=1, steps=30), kills=5, processes=2)


@pytest.mark.slow
def test_a_student_killed_three_times_ends_with_the_same_bytes(
    root: Path, tmp_path: Path, tiny_run: Path
) -> None:
    """Killed while the teacher is sampled, and while the student is trained."""
    paths = {"trajectories": 150, "solver_steps": 16, "guidance": 2.0}
    options = {"steps": 30, "batch": 8, "checkpoint_every": 7, "log_every": 4, "sample_every": 15}
    config = student_of(str(tiny_run), paths, {**options, "name": "fast", "device": "cpu"})
    killed(root, tmp_path, config, kills=3, processes=1)
    assert (tmp_path / "whole" / "fast" / "samples").exists()


def test_a_run_of_the_first_release_resumes_to_the_weights_of_its_own_code(
    first_release: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(first_release / "run", tmp_path / "run")
    config, _ = read_run(run)
    assert fit(config, tmp_path)

    resumed = load_file(run / "checkpoints" / "step-00000012" / "weights.safetensors")
    uninterrupted = load_file(first_release / "final" / "weights.safetensors")
    assert list(resumed) == list(uninterrupted)
    difference = torch.cat([(resumed[k] - uninterrupted[k]).flatten() for k in resumed])
    norm = torch.cat([w.flatten() for w in uninterrupted.values()]).norm()
    # On the machine that made them the bytes are equal. Rounding elsewhere (two threads, no vector
    # units, no oneDNN) changes the weights by 1e-8 of their norm at most; an optimizer's step count
    # that is off by one, or one bias's lost momentum, by 7e-5 or more. Single weights are not
    # compared: Adam divides by the gradient's size, which enlarges the rounding of small gradients.
    assert difference.norm() <= 1e-6 * norm
