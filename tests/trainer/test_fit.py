"""Re-running the same command resumes a run, however it stopped, and ends with the same bytes."""

import contextlib
import csv
import errno
import hashlib
import io
import itertools
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.files import from_json, to_json
from trainer.config import Config
from trainer.data import sources as data
from trainer.data.loader import batch_indices
from trainer.errors import CheckpointError, TrainingError
from trainer.fit import fit, main
from trainer.objectives.forward import ForwardProcess
from trainer.parallel.processes import Processes
from trainer.runs import checkpoint as checkpoints
from trainer.runs.checkpoint import PARTS
from trainer.runs.log import TIME_COLUMNS
from trainer.runs.weights import STEP, WEIGHTS, fitting, weights_of
from trainer.training.averages import half_life_decay
from trainer.training.step import Trainer, learning_rate

TINY = Config(
    data="digits", channels=(8, 16), attention=(), batch=8, steps=20, warmup=5, checkpoint_every=5, log_every=4,
    sample_every=10, sample_steps=3, keep=2,
)  # fmt: skip
LAST = "checkpoints/step-00000020"


def command_line(config: Config, runs: Path) -> list[str]:
    """The options that give `config`, independent of presets and defaults."""
    options = []
    for name, value in config.to_json().items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            options.append(
                f"--{flag}={','.join(map(str, value)) if isinstance(value, list) else value}"
            )
    return [*options, f"--runs={runs}"]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act) -> None:
    """Call act(trainer) after step `step`, before the loop checks whether to stop."""
    original = Trainer.train_step

    def train_step(self: Trainer) -> dict[str, float]:
        found = original(self)
        if self.state.step == step:
            act(self)
        return found

    monkeypatch.setattr(Trainer, "train_step", train_step)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    at_step(monkeypatch, step, lambda _: signal.raise_signal(number))


def log_rows(run: Path) -> list[dict[str, str]]:
    """The rows of log.csv without the columns of times."""
    with (run / "log.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in TIME_COLUMNS} for row in csv.DictReader(file)
        ]


def digest(path: Path) -> str:
    """Of a file's bytes: pytest takes minutes to explain how two long byte strings differ."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_same_run(run: Path, other: Path) -> None:
    for part in PARTS:
        assert digest(run / LAST / f"{part}.safetensors") == digest(
            other / LAST / f"{part}.safetensors"
        ), part
    assert log_rows(run) == log_rows(other)


def checkpoint_names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def files(folder: Path) -> list[Path]:
    return sorted(p.relative_to(folder) for p in folder.rglob("*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    runs = tmp_path_factory.mktemp("whole")
    assert fit(TINY, runs)
    return runs / "digits"


# --- what a run leaves


def test_a_run_leaves_a_log_with_a_row_for_every_log_every_steps(whole: Path) -> None:
    rows = log_rows(whole)
    assert [int(row["step"]) for row in rows] == [4, 8, 12, 16, 20]
    assert [int(row["pictures"]) for row in rows] == [32, 64, 96, 128, 160]


def test_a_run_leaves_sample_grids_with_two_pictures_a_class(whole: Path) -> None:
    grids = sorted((whole / "samples").iterdir())
    assert [g.name for g in grids] == ["step-00000010.png", "step-00000020.png"]
    for grid in grids:
        with Image.open(grid) as picture:
            assert picture.format == "PNG"
            rows, columns = (
                4,
                5,
            )  # as near square as 2·10 images of 8 pixels get, with 2 pixels between
            assert picture.width * (10 * rows + 2) == picture.height * (10 * columns + 2)


def test_a_run_leaves_tensorboard_events_of_the_loss_and_the_samples(whole: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [4, 8, 12, 16, 20]
    assert [e.step for e in events.Images("samples")] == [10, 20]
    expected = [float(row["loss"]) for row in log_rows(whole)]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(
        expected, rel=1e-5
    )  # the log has six digits


def test_a_run_leaves_its_config_beside_what_it_made(whole: Path) -> None:
    record = from_json((whole / "config.json").read_bytes())
    assert {k: record[k] for k in TINY.to_json()} == TINY.to_json()
    assert record["data_record"]["fingerprint"] == data.digits().fingerprint()
    assert record["sample_shape"] == [1, 8, 8]


def test_only_the_newest_checkpoints_are_kept(whole: Path) -> None:
    assert checkpoint_names(whole) == ["step-00000015", "step-00000020"]


# --- started from another run


def test_a_run_may_begin_with_the_averaged_weights_of_another(whole: Path, tmp_path: Path) -> None:
    config = replace(TINY, start_from=str(whole), steps=10, learning_rate=1e-12)
    assert fit(config, tmp_path)
    begun = checkpoints.newest(whole / "checkpoints").ema
    ended = checkpoints.newest(tmp_path / "digits" / "checkpoints")
    for found in (ended.weights, ended.ema):
        for name, weight in begun.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6, msg=name)
    record = from_json((tmp_path / "digits" / "starts.json").read_bytes())
    assert record[0]["start_sha256"] == digest(whole / LAST / "ema.safetensors")


def test_a_run_goes_on_when_what_it_began_with_is_gone(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(shutil.copytree(whole, tmp_path / "place"))
    config = replace(TINY, start_from=str(place))
    assert fit(config, tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert not fit(config, tmp_path / "stopped")
    shutil.rmtree(place)
    assert fit(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped" / "digits", tmp_path / "unbroken" / "digits")


def test_labels_begin_anew_where_the_classes_are_others(whole: Path) -> None:
    found = checkpoints.newest(whole / "checkpoints").ema
    wanted = {**found, "label.weight": found["label.weight"][:4]}
    taken = fitting(found, wanted, whole)
    assert wanted.keys() - taken.keys() == {"label.weight"}


def test_labels_begin_anew_where_as_many_classes_have_other_names(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = data.digits()
    np.savez(
        tmp_path / "shapes.npz",
        images=pictures.images,
        labels=pictures.labels,
        classes=list("abcdefghij"),
    )
    config = replace(
        TINY,
        data=f"npz:{tmp_path / 'shapes.npz'}",
        name="shapes",
        start_from=str(whole),
        steps=1,
        sample_every=0,
    )
    assert fit(config, tmp_path)
    assert "but for the labels, which are others" in capsys.readouterr().out


def test_another_network_is_refused_before_anything_is_written(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"has another network: its .* is \(32, 8\) and not \(64, 16\)"
    ):
        fit(replace(TINY, start_from=str(whole), channels=(16, 16)), tmp_path)
    with pytest.raises(CheckpointError, match="nothing to start from"):
        fit(replace(TINY, start_from=str(tmp_path / "nowhere")), tmp_path)
    assert not files(tmp_path)


@pytest.mark.parametrize("step", [b"no graph", b"\x3a\x05\x2a\x03\x08\x07\x10"])
def test_a_bundle_whose_graph_cannot_be_read_is_no_start(step: bytes) -> None:
    pytest.importorskip("onnx")
    bundle = SimpleNamespace(read={STEP: step, WEIGHTS: b""}.get)
    with pytest.raises(CheckpointError, match=r"step\.onnx of the bundle cannot be read"):
        weights_of(bundle)  # pyright: ignore[reportArgumentType]


# --- the promise


def test_the_same_config_ends_with_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    torch.rand(7)  # earlier draws do not matter
    assert fit(TINY, tmp_path)
    assert_same_run(tmp_path / "digits", whole)


def test_another_seed_ends_with_other_weights(whole: Path, tmp_path: Path) -> None:
    assert fit(replace(TINY, seed=1), tmp_path)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "digits", whole)


@pytest.mark.parametrize("step", [1, 10, 13])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patched:
        stop_at(patched, step)
        assert not fit(TINY, tmp_path)
    assert checkpoint_names(tmp_path / "digits")[-1] == f"step-{step:08d}"
    assert fit(TINY, tmp_path)
    assert_same_run(tmp_path / "digits", whole)


def test_sampling_and_logging_do_not_change_what_is_learned(whole: Path, tmp_path: Path) -> None:
    assert fit(replace(TINY, sample_every=0, log_every=20, checkpoint_every=20), tmp_path)
    for part in PARTS:
        file = f"{LAST}/{part}.safetensors"
        assert digest(tmp_path / "digits" / file) == digest(whole / file)


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from trainer.fit import main

write_bytes = Path.write_bytes
def cut(path, data):
    if "step-00000015" in str(path) and path.name == "ema.safetensors":
        write_bytes(path, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write_bytes(path, data)
Path.write_bytes = cut
main(sys.argv[1:])
"""


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_to_the_same_bytes(
    whole: Path, tmp_path: Path, root: Path
) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, *command_line(TINY, tmp_path)]
    assert (
        subprocess.run(command, cwd=root, stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    )
    half_written, *whole_ones = checkpoint_names(tmp_path / "digits")
    assert half_written.startswith(".step-00000015.")
    assert whole_ones == ["step-00000005", "step-00000010"]
    assert [row["step"] for row in log_rows(tmp_path / "digits")] == [
        "4",
        "8",
        "12",
    ]  # step 12 will be trained again
    assert fit(TINY, tmp_path)
    assert_same_run(tmp_path / "digits", whole)


HOLDING = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"


def test_a_run_that_another_process_trains_is_left_alone_until_that_ends(
    stopped: Path, whole: Path
) -> None:
    run = stopped / "digits"
    command = [sys.executable, "-c", HOLDING, str(run / "lock")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        left = run / ".log.csv.0123456789ab"  # because another process may be about to rename it
        left.touch()
        with pytest.raises(CheckpointError, match="another process is training in"):
            fit(TINY, stopped)
        assert left.exists()
        other.kill()
    assert fit(TINY, stopped)
    assert not left.exists()
    assert_same_run(run, whole)


def test_a_finished_run_stays_as_it_is(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(TINY, tmp_path)
    before = log_rows(tmp_path / "digits")
    assert fit(TINY, tmp_path)
    assert "done after step 20 of 20" in capsys.readouterr().out
    assert log_rows(tmp_path / "digits") == before
    assert_same_run(tmp_path / "digits", whole)


# --- being asked to stop


def test_ctrl_c_ends_with_a_checkpoint_status_130_and_how_to_go_on(
    root: Path, tmp_path: Path
) -> None:
    endless = replace(TINY, steps=1_000_000, checkpoint_every=1_000_000, sample_every=0)
    command = [sys.executable, "-m", "trainer.fit", *command_line(endless, tmp_path)]
    log = tmp_path / "digits" / "log.csv"
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while process.poll() is None and not (log.exists() and log_rows(log.parent)):
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=3600)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert "re-run the same command to resume from here" in out
    assert "once more to stop at once" in err
    assert checkpoints.newest(tmp_path / "digits" / "checkpoints") is not None


def test_a_run_of_an_older_version_goes_on(stopped: Path, whole: Path) -> None:
    """Its config knows fewer options and one half-life, its checkpoint and its log less."""
    run = stopped / "digits"
    older = (
        "data",
        "name",
        "channels",
        "attention",
        "batch",
        "steps",
        "warmup",
        "checkpoint_every",
        "log_every",
    )
    record = from_json((run / "config.json").read_bytes())
    kept = {
        k: v
        for k, v in record.items()
        if k
        in (
            *older,
            "sample_every",
            "sample_steps",
            "keep",
            "data_record",
            "sample_shape",
            "classes",
        )
    }
    (run / "config.json").write_text(
        to_json({**kept, "ema_half_life": 10_000, "bad_pictures": "refuse"})
    )
    state_file = run / "checkpoints" / "step-00000005" / "state.json"
    state = from_json(state_file.read_bytes())
    state_file.write_text(to_json({k: v for k, v in state.items() if k != "state"}))
    rows = log_rows(run)
    (run / "log.csv").write_text(
        "step,pictures,loss\n" + "".join(f"{r['step']},{r['pictures']},{r['loss']}\n" for r in rows)
    )
    assert fit(TINY, stopped)
    for part in PARTS:
        assert digest(run / LAST / f"{part}.safetensors") == digest(
            whole / LAST / f"{part}.safetensors"
        )
    assert [row["loss"] for row in log_rows(run)] == [row["loss"] for row in log_rows(whole)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_main_gives_130_for_a_stopped_run_and_0_for_the_finished_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    arguments = command_line(replace(TINY, sample_every=0), tmp_path)
    with monkeypatch.context() as patched:
        stop_at(patched, 3, number)
        assert main(arguments) == 130
    assert main(arguments) == 0


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(_: Trainer) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        fit(TINY, tmp_path)
    assert not (tmp_path / "digits" / "checkpoints").exists()


def test_a_second_signal_of_a_launcher_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(_: Trainer) -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    at_step(monkeypatch, 3, twice)
    assert not fit(TINY, tmp_path)
    assert checkpoint_names(tmp_path / "digits") == ["step-00000003"]


def test_a_stop_whose_message_nobody_reads_leaves_a_checkpoint_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends every program of `trainer.fit … 2>&1 | tee log`, so the pipe is broken."""

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def stop(_: Trainer) -> None:
        with contextlib.redirect_stderr(Broken()):
            signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 3, stop)
    assert not fit(TINY, tmp_path)
    assert checkpoint_names(tmp_path / "digits") == ["step-00000003"]


def test_a_run_may_be_trained_in_a_thread(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(fit, replace(TINY, steps=2, sample_every=0), tmp_path).result()
    assert checkpoint_names(tmp_path / "digits") == ["step-00000002"]


def test_the_signal_handlers_are_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    stop_at(monkeypatch, 1)
    fit(TINY, tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_seconds_of_a_stopped_run_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 3)  # before the first row of the log
    fit(TINY, tmp_path)
    checkpoint = checkpoints.newest(tmp_path / "digits" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.seconds > 0


# --- going on with something else


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds a run stopped after step 5."""
    with monkeypatch.context() as patched:
        stop_at(patched, 5)
        fit(TINY, tmp_path)
    return tmp_path


def test_another_config_in_the_same_folder_is_refused_with_the_change_and_the_way_out(
    stopped: Path,
) -> None:
    with pytest.raises(CheckpointError) as refused:
        fit(replace(TINY, batch=16, seed=3), stopped)
    assert "batch was 8, now 16; seed was 0, now 3" in str(refused.value)
    assert "choose another --name" in str(refused.value)


def test_other_data_under_the_same_name_is_refused(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = data.digits()
    pictures.labels[0] += 1
    monkeypatch.setattr(data, "digits", lambda: pictures)
    with pytest.raises(CheckpointError, match="data_record was"):
        fit(TINY, stopped)


def test_a_damaged_newest_checkpoint_is_refused_and_the_one_before_goes_on(
    whole: Path, tmp_path: Path
) -> None:
    assert fit(TINY, tmp_path)
    path = tmp_path / "digits" / LAST
    (path / "weights.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match="Delete this folder to resume from the checkpoint before it"
    ):
        fit(TINY, tmp_path)
    shutil.rmtree(path)
    assert fit(TINY, tmp_path)
    assert_same_run(tmp_path / "digits", whole)


def test_another_number_of_threads_is_warned_of(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    fit(TINY, stopped)
    assert f"threads {threads} → {threads + 1}" in caplog.text


def test_the_same_machine_is_not_warned_of(stopped: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(TINY, stopped)
    assert caplog.text == ""


# --- what is not finite


def nan_target(
    self: ForwardProcess, x0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor
) -> torch.Tensor:
    return x0 * torch.nan


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_good_checkpoint(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ForwardProcess, "target", nan_target)
    with pytest.raises(
        TrainingError, match=r"step 5: the loss is nan .*Lower --learning-rate \(now 0\.001\)"
    ):
        fit(TINY, stopped)
    assert checkpoint_names(stopped / "digits") == ["step-00000005"]


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_what_is_not_finite_does_not_reach_the_weights(
    monkeypatch: pytest.MonkeyPatch, poison: str
) -> None:
    trainer = Trainer(TINY, data.digits())
    before = {name: w.detach().clone() for name, w in trainer.state.weights.items()}
    if poison == "loss":
        monkeypatch.setattr(ForwardProcess, "target", nan_target)
    else:
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.inf))
    with pytest.raises(TrainingError):
        trainer.train_step()
    assert all(torch.equal(w, before[name]) for name, w in trainer.state.weights.items())
    assert trainer.state.step == 0


def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(trainer: Trainer) -> None:
        with torch.no_grad():
            trainer.state.weights["last.bias"].fill_(torch.nan)

    at_step(monkeypatch, 10, poison)
    with pytest.raises(
        TrainingError, match=r"last\.bias is not finite, so no checkpoint is written"
    ):
        fit(replace(TINY, sample_every=0), tmp_path)
    assert checkpoint_names(tmp_path / "digits") == ["step-00000005"]


# --- the command


def test_a_dry_run_says_what_would_be_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command_line(TINY, tmp_path), "--dry-run"]) == 0
    assert "for all 20 steps; nothing was written" in capsys.readouterr().out
    assert files(tmp_path) == []


def test_a_dry_run_of_many_processes_prints_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Processes, "main", property(lambda _: False))
    assert main([*command_line(TINY, tmp_path), "--dry-run"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "emojis"], "error: unknown data 'emojis'. Did you mean 'emoji'?"),
        (["--data", "folder:nowhere"], "error: nowhere is not a folder."),
        (
            ["--data", "digits", "--channels", "8,8,8,8,8"],
            "error: images of 8x8 cannot be halved 4 times",
        ),
        (["--steps", "0"], "error: `steps` must be 1 to 1000000000000, got 0."),
    ],
)
def test_what_cannot_be_done_is_one_line_on_standard_error_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main([*options, f"--runs={tmp_path}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(message)
    assert told.count("\n") == 1
    assert files(tmp_path) == []


# --- what a step is made of


@pytest.mark.parametrize(("batch", "count"), [(8, 24), (7, 24), (10, 4)])
def test_every_picture_comes_once_an_epoch(batch: int, count: int) -> None:
    seen = np.concatenate([batch_indices(0, step, batch, count) for step in range(count)])
    for epoch in seen.reshape(-1, count):
        assert sorted(epoch) == list(range(count))


def test_every_epoch_has_its_own_order_and_every_seed_too() -> None:
    first, second, other = (
        batch_indices(0, 0, 50, 50),
        batch_indices(0, 1, 50, 50),
        batch_indices(1, 0, 50, 50),
    )
    assert first.tolist() != second.tolist()
    assert first.tolist() != other.tolist()


def test_what_a_step_draws_is_a_function_of_seed_and_step_alone() -> None:
    one, two = (Trainer(TINY, data.digits()) for _ in range(2))
    for step in (0, 3, 4):
        one.draw(step)
    torch.rand(7)
    assert all(torch.equal(a, b) for a, b in zip(one.draw(4), two.draw(4), strict=True))
    assert not torch.equal(one.draw(4).eps, one.draw(5).eps)


def test_every_batch_covers_the_schedule() -> None:
    trainer = Trainer(replace(TINY, batch=10), data.digits())
    for step in range(5):
        t = trainer.draw(step).t
        assert sorted((t // 100).tolist()) == list(range(10))  # one of each tenth of the 1000 knots


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_label_dropout_is_the_share_of_null_labels(share: float) -> None:
    pictures = data.digits()
    trainer = Trainer(replace(TINY, label_dropout=share), pictures)
    label = trainer.draw(0).label
    kept = pictures.labels[batch_indices(TINY.seed, 0, TINY.batch, len(pictures.labels))]
    assert label.tolist() == ([10] * 8 if share else kept.tolist())


def test_the_learning_rate_warms_up_to_its_peak_and_ends_at_zero() -> None:
    config = replace(TINY, steps=1000, warmup=10, learning_rate=0.5)
    rates = [learning_rate(config, step) for step in range(1001)]
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == rates[9] == pytest.approx(0.5, rel=1e-3)
    assert rates[500] == pytest.approx(0.25)
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert rates[-1] == 0


def test_the_average_has_the_half_life_that_was_asked_for_and_a_shorter_one_at_first() -> None:
    late, early = half_life_decay(10, 1000, 10**6), half_life_decay(10, 1000, 199)
    assert late ** (1000 / 10) == pytest.approx(0.5)  # 1000 images
    assert early ** (100 / 10) == pytest.approx(0.5)  # a twentieth of the 2000 images seen


def test_the_average_follows_the_weights() -> None:
    trainer = Trainer(TINY, data.digits())
    name = "last.weight"
    before = trainer.state.ema[name].clone()
    trainer.train_step()
    keep = half_life_decay(TINY.batch, TINY.ema_half_life[0], 0)
    torch.testing.assert_close(
        trainer.state.ema[name],
        keep * before + (1 - keep) * trainer.state.weights[name],
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction": "epsilon"},
        {"prediction": "v"},
        {"prediction": "x0"},
        {"zero_terminal_snr": True},
        {"precision": "bf16"},
        {"seed": 2**63 - 1},
    ],
    ids=str,
)
def test_a_step_changes_the_weights(changes: dict) -> None:
    trainer = Trainer(replace(TINY, **changes), data.digits())
    before = trainer.state.weights["last.weight"].detach().clone()
    assert trainer.train_step()["loss"] > 0
    assert not torch.equal(trainer.state.weights["last.weight"], before)


def test_a_network_learns_a_few_pictures_by_heart() -> None:
    digits = data.digits()
    few = replace(digits, images=digits.images[:16], labels=digits.labels[:16])
    trainer = Trainer(
        replace(TINY, channels=(16, 16), batch=16, steps=100, learning_rate=1e-2), few
    )
    losses = [trainer.train_step()["loss"] for _ in range(100)]
    assert (
        np.mean(losses[-5:]) < np.mean(losses[:5]) / 2
    )  # 2.3 to 2.5 times lower with seeds 0, 1 and 2


def test_a_full_disk_is_one_line_and_the_checkpoints_before_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write = checkpoints.write

    def full(folder: Path, checkpoint, keep: int) -> Path:
        if checkpoint.step == 10:
            raise OSError(28, "No space left on device")
        return write(folder, checkpoint, keep)

    monkeypatch.setattr(checkpoints, "write", full)
    assert main(command_line(TINY, tmp_path)) == 2
    assert "No space left on device. Nothing half-written was left" in capsys.readouterr().err
    assert checkpoints.newest(tmp_path / "digits" / "checkpoints").step == 5
