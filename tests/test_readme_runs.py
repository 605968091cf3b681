"""The runs of the README and the docs that go through training, export and sampling."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .documented import HANGING_S, IN_TURN, clone, commands, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the commands run."""
    return clone(tmp_path_factory.mktemp("clone"))


@pytest.mark.slow
def test_the_run_of_the_readme_goes_from_data_to_images(folder: Path) -> None:
    in_turn = [command for command in commands() if command in IN_TURN]
    assert in_turn == list(IN_TURN)
    fit, build, sample = (run(command, folder) for command in in_turn)
    assert "done after step 600 of 600" in fit
    assert "agrees with PyTorch" in build
    assert "20 of digits on onnxruntime fp32" in sample
    assert (folder / "digits.png").is_file()


@pytest.mark.slow
def test_training_writes_a_checkpoint_on_ctrl_c_and_its_export_is_proved(folder: Path) -> None:
    """docs/training.md: Ctrl-C saves a checkpoint. The export takes the newest run.

    The proof is the quick one: the README's own run, above, has the one in full.
    """
    training = subprocess.Popen(
        [sys.executable, "-m", "trainer.fit"], cwd=folder, stdout=subprocess.PIPE, text=True
    )
    assert training.stdout is not None
    for line in training.stdout:
        if "epochs" in line:  # the last line before the loop
            break
    time.sleep(4)
    training.send_signal(signal.SIGINT)
    rest = training.communicate(timeout=HANGING_S)[0]
    assert training.returncode == 130
    assert "re-run the same command to resume" in rest
    assert list(folder.glob("runs/emoji/checkpoints/step-*"))

    assert "agrees with PyTorch" in run("python -m export.build --quick", folder)
    assert (folder / "bundles" / "emoji" / "report.png").is_file()
