"""A damaged log never prevents a run from resuming; a damaged essential file raises an error that
names it; a run that fails leaves nothing."""

import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime.errors import RequestError, UnnoiseError
from runtime.files import from_json, to_json
from trainer import average, distill, evaluate, report
from trainer.config import Config
from trainer.config.distillation import Distillation
from trainer.data import workers
from trainer.errors import CheckpointError, DataError, TrainingError
from trainer.fit import fit, main
from trainer.quality import features
from trainer.runs import starts
from trainer.runs.folder import claim
from trainer.runs.log import read
from trainer.runs.starts import note_start
from trainer.runs.weights import SHA256, started_from
from trainer.training.step import Trainer

TINY = Config(
    data="digits", channels=(8, 8), attention=(), batch=8, steps=4, log_every=2, checkpoint_every=2, sample_every=0,
    quality_every=16, quality_samples=16, quality_batch=16, sample_steps=2, T=50, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _short_classifier() -> Iterator[None]:
    """Training the classifier that scores samples would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "STEPS", 2)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs of mine")
    assert fit(TINY, runs)
    return runs / "digits"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(run, tmp_path / "digits"))


BAD = {
    "no header": b"2,16,0.5\n4,32,0.25\n",
    "bad step": b"step,loss\nx,1\n",
    "bad number": b"step,loss,frechet\n2,x,y\n",
    "not UTF-8": b"step,loss\n2,\xff\xfe\n",
    "zeros": b"\0" * 100,
    "too many columns": b"step\n1,2,3\n",
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("name", ["log.csv", "quality.csv"])
def test_a_damaged_table_is_moved_aside_and_the_run_goes_on(
    copy: Path, name: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    (copy / name).write_bytes(BAD[what])
    assert fit(TINY, copy.parent)
    assert (copy / f"{name}.damaged").read_bytes() == BAD[what]
    assert f"moved to {name}.damaged" in caplog.text
    assert read(copy / name) == []


@pytest.mark.parametrize("name", ["log.csv", "quality.csv", "starts.json"])
def test_a_folder_in_place_of_a_log_is_moved_aside(copy: Path, name: str) -> None:
    (copy / name).unlink()
    (copy / name).mkdir()
    assert fit(TINY, copy.parent)
    assert (copy / f"{name}.damaged").is_dir()


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[1]", b"[{}]", b"5", b"\xff", b'[{"time": 1, "step": 2, "versions": 3}]']
)
def test_a_damaged_list_of_starts_is_moved_aside(copy: Path, text: bytes) -> None:
    (copy / "starts.json").write_bytes(text)
    assert fit(TINY, copy.parent)
    assert (copy / "starts.json.damaged").read_bytes() == text
    assert len(from_json((copy / "starts.json").read_bytes())) == 1


def test_a_report_reads_the_list_of_starts_that_replaced_a_damaged_one(copy: Path) -> None:
    (copy / "starts.json").write_bytes(b"[{}]")
    assert fit(TINY, copy.parent)
    assert report.main([str(copy)]) == 0


def test_a_second_damaged_log_does_not_replace_the_first(copy: Path) -> None:
    for text in (b"one", b"two"):
        (copy / "log.csv").write_bytes(text)
        assert fit(TINY, copy.parent)
    assert (copy / "log.csv.damaged1").read_bytes() == b"two"


def test_a_distance_that_is_not_finite_does_not_keep_a_run_from_resuming(copy: Path) -> None:
    (copy / "quality.csv").write_text("step,frechet,kernel,precision,recall\n2,,,,\n")
    assert fit(replace(TINY, keep=2), copy.parent)


def without(key: str) -> Callable[[dict], object]:
    return lambda record: {k: v for k, v in record.items() if k != key}


@pytest.mark.parametrize(
    "change",
    [
        lambda record: [], lambda record: None, without("classes"), without("data_record"),
        lambda record: {**record, "steps": "x"}, lambda record: {**record, "channels": 5},
        lambda record: {**record, "classes": 5}, lambda record: {**record, "classes": [1]},
        lambda record: {**record, "sample_shape": [1, 8]}, lambda record: {**record, "data_record": []},
        lambda record: {**record, "unheard": 1}, lambda record: {**record, "flips": 1},
    ],
)  # fmt: skip
def test_a_damaged_config_is_refused_by_every_command(
    copy: Path, change: Callable[[dict], object]
) -> None:
    path = copy / "config.json"
    path.write_text(to_json(change(from_json(path.read_bytes()))))
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        fit(TINY, copy.parent)
    for command in (report.main, evaluate.main, average.main):
        assert command([str(copy)]) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda state: [], without("environment"), without("sha256"), without("seconds"),
        lambda state: {**state, "environment": 5}, lambda state: {**state, "step": "4"},
        lambda state: {**state, "state": {"bad": ["x"]}}, lambda state: {**state, "state": {"buckets": [[1]]}},
        lambda state: {**state, "state": 5},
    ],
)  # fmt: skip
def test_a_damaged_state_is_refused(copy: Path, change: Callable[[dict], object]) -> None:
    path = copy / "checkpoints" / "step-00000004" / "state.json"
    path.write_text(to_json(change(from_json(path.read_bytes()))))
    with pytest.raises(CheckpointError, match="is damaged"):
        fit(TINY, copy.parent)


def test_a_damaged_classifier_is_trained_again(copy: Path) -> None:
    (path,) = copy.glob("features-*.safetensors")
    path.write_bytes(b"x")
    assert evaluate.main([str(copy), "--n=8", "--steps=2", "--device=cpu"]) == 0
    assert path.with_name(f"{path.name}.damaged").exists()


# --- a run that fails


def test_a_run_that_fails_before_it_begins_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), claim(tmp_path / "runs" / "a"):
        raise KeyError
    assert not (tmp_path / "runs" / "a").exists()


def test_a_run_that_failed_before_its_first_checkpoint_does_not_block_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Trainer) -> dict[str, float]:
        raise DataError("a bad image")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", fail)
        with pytest.raises(DataError):
            fit(replace(TINY, seed=1), tmp_path)
    assert not (tmp_path / "digits" / "lock").exists()
    assert fit(TINY, tmp_path)
    with pytest.raises(CheckpointError, match="another config"):
        fit(replace(TINY, seed=1), tmp_path)


def test_files_that_are_not_a_runs_are_left_alone(run: Path, tmp_path: Path) -> None:
    own = tmp_path / "digits" / ".git" / "config"
    own.parent.mkdir(parents=True)
    own.touch()
    with pytest.raises(CheckpointError, match=r"is not a run, and not empty: it holds \.git"):
        fit(TINY, tmp_path)
    # The user's own files in a run, and what a kill has left of it.
    for path in (".gitignore", "samples/.keep", ".log.csv.0123456789ab"):
        (run / path).parent.mkdir(exist_ok=True)
        (run / path).touch()
    assert fit(TINY, run.parent)
    assert own.exists()
    assert (run / ".gitignore").exists()
    assert (run / "samples" / ".keep").exists()
    assert not (run / ".log.csv.0123456789ab").exists()


def test_what_a_kill_left_of_snapshots_and_paths_goes_with_the_next_start(copy: Path) -> None:
    left = [
        copy / "snapshots" / "step-00000002" / ".power-0.1.safetensors.0123456789ab",
        copy / "trajectories" / "0123456789abcdef" / ".00000.npy.0123456789ab",
    ]
    own = left[0].with_name(".notes")
    for path in (*left, own):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert fit(TINY, copy.parent)
    assert [path.exists() for path in (*left, own)] == [False, False, True]


def test_what_a_run_began_with_is_what_its_last_beginning_had(tmp_path: Path) -> None:
    """A start that was killed before the first checkpoint has left nothing in the weights."""
    for step, identity in ((0, "a"), (0, "b"), (7, "b")):
        note_start(tmp_path, step, {}, {SHA256: identity})
    assert started_from(tmp_path) == ["b", "b"]


def test_a_commit_is_that_of_this_code_and_of_no_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / ".venv" / "starts.py"
    installed.parent.mkdir()
    installed.touch()
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), (*identity, "commit", "-q", "--allow-empty", "-m", "mine")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(starts, "__file__", str(installed))
    assert starts.commit() is None
    subprocess.run(["git", "add", str(installed)], cwd=tmp_path, check=True)
    found = starts.commit()
    assert found is not None
    assert len(found.rstrip("+")) == 40


def test_a_file_in_place_of_the_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "digits").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot be used"):
        fit(TINY, tmp_path)


def test_memory_that_runs_out_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Trainer) -> dict[str, float]:
        raise MemoryError

    monkeypatch.setattr(Trainer, "train_step", fail)
    with pytest.raises(TrainingError, match="memory ran out"):
        fit(TINY, tmp_path)


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_network_that_no_memory_holds_is_refused(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "--data=digits",
        "--channels=65536,65536",
        "--attention=",
        "--device=cpu",
        f"--runs={tmp_path / 'runs'}",
    ]
    assert main([*command, *options]) == 2
    assert "Use smaller --channels" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_next_command_can_be_copied(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(TINY, run.parent)
    (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("next: ")]
    assert shlex.split(line.removeprefix("next: ")) == ["python", "-m", "export.build", str(run)]


# --- shared memory


@pytest.fixture
def streamed(tmp_path: Path) -> Config:
    (tmp_path / "data" / "a").mkdir(parents=True)
    for i in range(16):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "data" / "a" / f"{i}.png")
    where = f"folder:{tmp_path / 'data'}"
    return replace(TINY, data=where, in_memory_mb=0, workers=2, quality_every=0, cache_mb=0)


def test_too_little_shared_memory_is_named_with_the_remedy(
    streamed: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DataError, match=r"/dev/shm has .* MiB left.*--workers 0"):
        fit(streamed, tmp_path / "runs")
    assert fit(replace(streamed, workers=0), tmp_path / "runs")


@pytest.mark.parametrize(
    "message",
    [
        "unable to write to file </torch_1>: No space left on device (28)",
        "killed by signal: Bus error.",
    ],
)
def test_shared_memory_that_runs_out_is_named(
    streamed: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(workers, "DataLoader", fail)
    with pytest.raises(DataError, match=r"through /dev/shm .*--workers 0"):
        fit(streamed, tmp_path / "runs")


# --- every option

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=3),
    st.lists(st.integers(-1, 64), max_size=3), st.tuples(st.floats(), st.text(max_size=2)), st.just(10**400),
    st.just(np.int64(8)), st.just(np.float32(0.5)), st.just(np.zeros(2)), st.just("\ud800"), st.just({}), st.just({1}),
)  # fmt: skip


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([f.name for f in fields(Config)]), VALUES)
def test_every_value_of_every_field_makes_a_config_or_a_typed_error(
    name: str, value: object
) -> None:
    try:
        config = Config(**{name: value})  # pyright: ignore[reportArgumentType]
    except RequestError:
        return
    assert Config.from_json(from_json(to_json(config.to_json()))) == config


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([f.name for f in fields(Distillation)]), VALUES)
def test_every_value_of_a_distillation_makes_one_or_a_typed_error(name: str, value: object) -> None:
    try:
        made = Distillation(**{name: value})  # pyright: ignore[reportArgumentType]
    except RequestError:
        return
    assert Distillation.from_json(from_json(to_json(made.to_json()))) == made


@pytest.mark.parametrize("command", [main, evaluate.main, average.main, report.main, distill.main])
@pytest.mark.parametrize("place", ["", ".", "nowhere", "file", "a\0b", "\udce9", "x" * 5000])
def test_every_command_refuses_what_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[[list[str]], int], place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    options = [f"--start-from={place or '.'}", "--data=digits"] if command is main else [place]
    assert command(options) == 2


@pytest.mark.parametrize(
    "options",
    [["--n=0"], ["--n=-1"], ["--n=1"], ["--solver=x"], ["--steps=0"], ["--guidance=nan"], ["--features=nowhere"],
     ["--features=."], ["--device=x"], ["--best", "--device=cpu", "--n=2"]],
    ids=str,
)  # fmt: skip
def test_evaluate_refuses_what_makes_no_sense(run: Path, options: list[str]) -> None:
    assert evaluate.main([str(run), *options]) == 2


@pytest.mark.parametrize("width", ["nan", "inf", "-1", "0", "1", "0.1"])
def test_average_refuses_what_it_cannot_make_and_leaves_nothing(run: Path, width: str) -> None:
    before = sorted(run.parent.iterdir())
    assert average.main([str(run), f"--width={width}"]) == 2
    assert sorted(run.parent.iterdir()) == before


@pytest.mark.parametrize(
    "name", ["power-x.safetensors", "power-nan.safetensors", "power-0.1.safetensors"]
)
def test_damaged_snapshots_are_refused(copy: Path, name: str) -> None:
    (copy / "snapshots" / "step-00000002").mkdir(parents=True)
    (copy / "snapshots" / "step-00000002" / name).write_bytes(b"x")
    with pytest.raises(UnnoiseError):
        average.write_run(copy, 0.1)
    assert average.main([str(copy)]) == 2
