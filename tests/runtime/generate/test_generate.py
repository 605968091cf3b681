"""Generating shards: a restart, after any kill, ends with the bytes of an undisturbed run."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from runtime import BackendError, Bundle, RequestError
from runtime.generate import drafts, environment, maker, run, workers
from runtime.generate.__main__ import main
from runtime.generate.plan import Plan
from runtime.generate.records import digest
from runtime.generate.run import Summary, generate
from runtime.generate.settings import Settings

PLAN = {"labels": "all", "steps": 3, "seed": 2}
KILLS = 20
HANGING_S = 600
"""After this time a process counts as hanging. It is not a bound on speed."""

Generate = Callable[..., Summary]


@pytest.fixture(scope="module")
def bundle(first_release: Path) -> Bundle:
    return Bundle.load(first_release / "bundle")


@pytest.fixture
def make(bundle: Bundle, tmp_path: Path) -> Generate:
    """make(name, …): generate into a folder; 10 samples, 3 in a shard, if nothing else is said."""

    def call(name: str = "out", count: int = 1, **how: object) -> Summary:
        given = {"plan": Plan.from_json(PLAN), "n": 10, "shard": 3, **how}
        return generate(Settings(bundle=bundle, out=tmp_path / name, **given), count)

    return call


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_manifest_names_every_shard_its_hash_and_the_versions(
    make: Generate, bundle: Bundle, tmp_path: Path
) -> None:
    summary = make()
    assert (summary.made, summary.kept, summary.missing, summary.samples) == (4, 0, 0, 10)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["complete"] is True
    assert manifest["bundle"] == {"name": "digits", "sha256": bundle.sha256}
    assert manifest["plan"] == {"seed": 2, "labels": "all", "steps": 3}
    assert manifest["sampling"]["solver"] == "ddim"
    assert [entry["count"] for entry in manifest["shards"]] == [3, 3, 3, 1]
    for entry in manifest["shards"]:
        path = tmp_path / "out" / "shards" / entry["name"]
        assert digest(path) == (entry["sha256"], entry["bytes"])
    assert {"onnxruntime", "numpy", "pillow", "threads", "instructions"} <= {
        *manifest["environments"][0]
    }
    assert manifest["bytes"] == sum(entry["bytes"] for entry in manifest["shards"])


def test_a_second_run_reads_everything_and_changes_nothing(make: Generate, tmp_path: Path) -> None:
    make()
    before = tree(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "shards").iterdir()}
    summary = make()
    assert (summary.made, summary.kept) == (0, 4)
    assert tree(tmp_path / "out") == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.parametrize("kind", ["webdataset", "folder"])
def test_damaged_and_missing_shards_are_made_again(
    make: Generate, tmp_path: Path, kind: str
) -> None:
    make(format=kind)
    before = tree(tmp_path / "out")
    shards = sorted((tmp_path / "out" / "shards").iterdir())
    damaged = shards[0] if kind == "webdataset" else min(shards[0].iterdir())
    damaged.write_bytes(b"0" * damaged.stat().st_size)
    remove = shutil.rmtree if shards[1].is_dir() else Path.unlink
    remove(shards[1])
    (tmp_path / "out" / "records" / "shard-000002.json").write_text("{")
    summary = make(format=kind)
    assert (summary.made, summary.kept, summary.damaged) == (3, 1, 1)
    assert tree(tmp_path / "out") == before


def test_more_samples_keep_the_shards_that_are_full(make: Generate, tmp_path: Path) -> None:
    make("small", n=7)
    summary = make("small", n=10)
    assert (summary.made, summary.kept, summary.damaged) == (2, 2, 0)
    make("large")
    assert tree(tmp_path / "small") == tree(tmp_path / "large")
    with pytest.raises(RequestError, match="can only add to them, got n = 4"):
        make("small", n=4)


def test_a_part_reads_its_own_shards_alone(
    make: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make()
    (tmp_path / "out" / "shards" / "shard-000001.tar").write_bytes(b"damaged")
    read: list[int] = []
    verified = run.verified

    def noted(layout: run.Layout, shard: int) -> object:
        read.append(shard)
        return verified(layout, shard)

    monkeypatch.setattr(run, "verified", noted)
    summary = make(part=(1, 2))
    assert sorted(read) == [0, 2]
    assert (summary.made, summary.kept, summary.damaged) == (0, 2, 0)
    assert make(part=(2, 2)).damaged == 1


def test_the_backend_is_chosen_once_and_not_by_every_worker(
    make: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[str, str]] = []
    make_here = run.make_here

    def noted(settings: Settings, *rest: object) -> None:
        found.append((settings.backend, settings.precision))
        make_here(settings, *rest)

    monkeypatch.setattr(run, "make_here", noted)
    make(backend="auto", precision="auto")
    assert found == [("onnxruntime", "fp32")]


def test_a_run_of_fewer_samples_that_ends_last_does_not_hide_the_larger_one(
    make: Generate, tmp_path: Path, bundle: Bundle
) -> None:
    path = tmp_path / "out" / "manifest.json"
    make(n=7)
    smaller = path.read_text()
    make(n=10)
    larger = path.read_text()
    path.write_text(smaller)
    plan = Plan.from_json(PLAN)
    settings = Settings(bundle=bundle, out=tmp_path / "out", plan=plan, n=10, shard=3)
    assert run._finish(settings) == 0
    assert path.read_text() == larger


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("records/shard-000001.json", {"bytes": "many"}),
        ("records/shard-000001.json", {"sha256": 3}),
        ("records/shard-000001.json", {"environment": []}),
    ],
)
def test_a_record_with_a_field_of_another_type_is_none(
    make: Generate, tmp_path: Path, file: str, change: dict
) -> None:
    make()
    before = tree(tmp_path / "out")
    path = tmp_path / "out" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert make().made == 1
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("change", [{"n": "ten"}, {"environment": 3}, {"version": 9}, {"x": 1}])
def test_a_manifest_with_a_field_of_another_type_is_none(
    make: Generate, tmp_path: Path, change: dict
) -> None:
    make()
    path = tmp_path / "out" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RequestError, match="is not a manifest of generate"):
        make()


def test_a_worker_with_other_versions_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    settings = Settings(bundle=bundle, plan=Plan.from_json(PLAN), out=tmp_path, n=3, shard=3)
    expected = {**maker.Maker(settings).environment, "numpy": "1.0"}
    with pytest.raises(BackendError, match=r"a worker has numpy 2\S+ instead of 1\.0"):
        workers.make_in_processes(settings, expected, [0], 1, lambda _: None)
    assert not [*tmp_path.iterdir()]


def test_parts_make_everything_together(make: Generate, tmp_path: Path) -> None:
    make("whole")
    assert make("parts", part=(2, 3)).missing == 3
    assert not json.loads((tmp_path / "parts" / "manifest.json").read_text())["complete"]
    assert make("parts", part=(1, 3)).missing == 1
    assert make("parts", part=(3, 3)).missing == 0
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"plan": Plan.from_json({**PLAN, "steps": 4})}, "samples with another plan"),
        ({"shard": 4}, "samples with another shard"),
        ({"format": "npy"}, "samples with another format"),
        ({"max_batch": 2}, "begun with max_batch 16 instead of 2"),
        ({"threads": 2}, "begun with threads 1 instead of 2"),
    ],
)
def test_a_run_with_other_settings_is_refused(
    make: Generate, tmp_path: Path, how: dict, message: str
) -> None:
    make()
    before = tree(tmp_path / "out")
    with pytest.raises(RequestError, match=message):
        make(**how)
    assert tree(tmp_path / "out") == before


def test_a_run_with_another_bundle_is_refused(
    make: Generate, tmp_path: Path, bundle: Bundle
) -> None:
    make()
    before = tree(tmp_path / "out")
    other = dataclasses.replace(bundle, provenance={"step": 7})
    plan = Plan.from_json(PLAN)
    settings = Settings(bundle=other, out=tmp_path / "out", plan=plan, n=10, shard=3)
    with pytest.raises(RequestError, match="samples with another bundle"):
        generate(settings)
    assert tree(tmp_path / "out") == before


def test_a_run_with_other_versions_is_refused_unless_asked(
    make: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(n=6)
    monkeypatch.setattr(environment.np, "__version__", "9.9")
    with pytest.raises(RequestError, match=r"begun with numpy 2\S+ instead of 9\.9") as caught:
        make()
    assert "--other-versions" in str(caught.value)
    summary = make(other_versions=True)
    assert (summary.made, summary.kept) == (2, 2)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [entry["numpy"] == "9.9" for entry in manifest["environments"]] == [False, True]
    assert [entry["environment"] for entry in manifest["shards"]] == [0, 0, 1, 1]
    # The folder still belongs to the versions that it was begun with.
    with pytest.raises(RequestError, match="begun with numpy"):
        make()


def test_other_bytes_in_the_same_environment_are_an_error(
    make: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make()
    (tmp_path / "out" / "shards" / "shard-000001.tar").unlink()
    monkeypatch.setattr(maker.Series, "seed", lambda self, index: 77 + index)
    with pytest.raises(BackendError, match=r"shard-000001\.tar was made again .* its bytes differ"):
        make()
    assert len([*(tmp_path / "out" / "shards").iterdir()]) == 3


def test_a_folder_of_other_files_is_refused(make: Generate, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(RequestError, match=r"not made, such as thesis\.txt"):
        make()
    assert tree(out) == {"thesis.txt": b"mine"}
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="is a file"):
        make("file")
    (out / "manifest.json").write_text("{}")
    with pytest.raises(RequestError, match="is not a manifest of generate"):
        make()


@pytest.mark.parametrize("kind", ["webdataset", "folder", "npy"])
def test_two_workers_race_on_every_shard(make: Generate, tmp_path: Path, kind: str) -> None:
    """Both believe that all shards are missing, at the same time."""
    make("alone", format=kind, n=6)
    barrier = threading.Barrier(2)
    failures: list[BaseException] = []

    def compete() -> None:
        barrier.wait()
        try:
            make("race", format=kind, n=6)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=compete) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANGING_S)
    assert failures == []
    assert tree(tmp_path / "race") == tree(tmp_path / "alone")


def test_the_drafts_of_a_running_worker_survive_the_end_of_another_run(
    make: Generate, tmp_path: Path
) -> None:
    make(n=3)
    shards = tmp_path / "out" / "shards"
    with drafts.draft(shards / "shard-000001.tar") as temporary:
        temporary.write_bytes(b"half")
        assert make().missing == 0
        assert temporary.read_bytes() == b"half"


def test_a_shard_that_another_worker_finished_is_not_made_twice(
    make: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("alone")
    inspect = run._inspect

    def inspect_then_lose(layout: run.Layout) -> run._State:
        state = inspect(layout)
        shutil.copytree(tmp_path / "alone", tmp_path / "out", dirs_exist_ok=True)
        return state

    def refuse(*_: object) -> None:
        raise AssertionError("it was made twice")

    monkeypatch.setattr(run, "_inspect", inspect_then_lose)
    monkeypatch.setattr(maker.Maker, "_make", refuse)
    assert make().made == 4


def test_workers_in_processes_make_the_same_bytes(make: Generate, tmp_path: Path) -> None:
    make("one")
    summary = make("two", count=2)
    assert (summary.made, summary.missing) == (4, 0)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_the_error_of_a_worker_reaches_the_caller(
    make: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make()
    record = tmp_path / "out" / "records" / "shard-000001.json"
    value = json.loads(record.read_text())
    record.write_text(json.dumps({**value, "sha256": "0" * 64}))
    with pytest.raises(BackendError, match="its bytes differ"):
        make(count=2)


def test_a_worker_that_fails_after_another_ends_in_silence(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent ended with the first error, and reads no second one."""
    here, there = multiprocessing.Pipe()
    here.close()
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    settings = Settings(bundle=bundle, plan=Plan.from_json(PLAN), out=tmp_path, n=3, shard=3)
    for error in (BackendError("no memory"), RuntimeError("a bug")):
        monkeypatch.setattr(workers, "Maker", Mock(side_effect=error))
        workers._work(workers._Run(settings, {}), there)


def test_a_worker_that_is_killed_is_replaced(
    make: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("alone")
    received = workers._received
    killed: list[int | None] = []

    def kill_first(worker: workers._Worker, message: object, *rest: object) -> None:
        if not killed:
            killed.append(worker.process.pid)
            os.kill(worker.process.pid, signal.SIGKILL)
        received(worker, message, *rest)

    monkeypatch.setattr(workers, "_received", kill_first)
    assert make("killed", count=2).missing == 0
    assert killed
    assert tree(tmp_path / "killed") == tree(tmp_path / "alone")


def test_a_shard_on_which_workers_die_is_given_up(
    make: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = workers._start

    def start_dead(run: workers._Run) -> workers._Worker:
        worker = start(run)
        worker.process.kill()
        return worker

    monkeypatch.setattr(workers, "_start", start_dead)
    with pytest.raises(BackendError, match="3 workers in turn died on shard"):
        make(count=2)


# Ends itself with SIGKILL at the n-th call that changes something on the disk.
CRASHING = """
import os, signal, sys
left = int(sys.argv[1])
def dying(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
from runtime.generate.__main__ import main
for name in ("fsync", "replace", "rename", "mkdir", "unlink"):
    setattr(os, name, dying(getattr(os, name)))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["webdataset", "folder"])
def test_after_a_kill_at_any_change_on_the_disk_a_restart_ends_alike(
    bundle: Bundle, tmp_path: Path, kind: str
) -> None:
    expected = tmp_path / "expected"
    arguments = [str(bundle.path), "--n", "3", "--shard", "2", "--format", kind, "--workers", "1"]
    assert main([*arguments, "--out", str(expected)]) == 0
    for point in range(1, 200):
        out = tmp_path / f"killed-{point}"
        words = [sys.executable, "-c", CRASHING, str(point), *arguments, "--out", str(out)]
        status = subprocess.run(words, timeout=HANGING_S, capture_output=True).returncode
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert main([*arguments, "--out", str(out)]) == 0
        assert tree(out) == tree(expected), point
    assert 15 < point < 199
    assert tree(out) == tree(expected)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_twenty_kills_at_random_moments(bundle: Bundle, tmp_path: Path, count: int) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"labels": "all", "steps": 40}))
    words = [str(bundle.path), "--n", "4000", "--shard", "100", "--max-batch", "16"]
    words += ["--plan", str(tmp_path / "plan.json")]
    begun = time.monotonic()
    assert main([*words, "--workers", "1", "--out", str(tmp_path / "expected")]) == 0
    whole = time.monotonic() - begun
    command = [sys.executable, "-m", "runtime.generate", *words, "--workers", str(count)]
    command += ["--out", str(tmp_path / "killed")]
    chance = random.Random(count)
    for _ in range(KILLS):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0, 1.5 + 2 * whole / KILLS))
        # The whole group, or the parent alone: its workers then end by themselves, some day.
        kill = os.killpg if chance.random() < 0.5 else os.kill
        kill(process.pid, signal.SIGKILL)
        process.wait(HANGING_S)
    subprocess.run(command, check=True, timeout=HANGING_S)
    subprocess.run(command, check=True, timeout=HANGING_S)
    assert tree(tmp_path / "killed") == tree(tmp_path / "expected")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--n 0", "`n` must be 1 to"),
        ("--n 5 --shard 0", "`shard` must be 1 to"),
        ("--n 5 --format tar", "unknown format 'tar'"),
        ("--n 5 --part 3/2", "`part` must be 1 to 2"),
        ("--n 5 --part 2", "must be K/PARTS"),
        ("--n 5 --workers 0", "`workers` must be 1 to"),
        ("--n 5 --backend onxruntime", "Did you mean 'onnxruntime'"),
        ("--n 5 --plan none.json", "cannot be read as JSON"),
        ("--n 3000000 --shard 1", "`shard` must be at least 3, got 1. Pass at least 3"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    bundle: Bundle,
    arguments: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(bundle.path), *arguments.split(), "--out", str(tmp_path / "out")]
    status = 2
    with suppress(SystemExit):  # of argparse
        status = main(words)
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_has_done(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(bundle.path), "--n", "5", "--shard", "2", "--workers", "1"]
    words += ["--out", str(tmp_path / "out")]
    assert main([*words, "--part", "1/2"]) == 0
    said = capsys.readouterr().out
    assert "2 shards made, 0 kept" in said
    assert "1 shards are missing: run the other parts too" in said
    assert main(words) == 0
    assert "1 shards made, 2 kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"part": 3}, r"`part` must be two integers \(k, parts\), got 3"),
        ({"part": "1/4"}, "`part` must be two integers"),
        ({"plan": Plan.from_json({"guidance_interval": [1, math.inf]})}, "written as JSON"),
        ({"n": "10"}, "`n` must be an integer"),
        ({"other_versions": "no"}, "`other_versions` must be True or False"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    make: Generate, tmp_path: Path, how: dict, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        make(**how)
    assert not [*tmp_path.iterdir()]


def test_numbers_of_numpy_are_numbers(make: Generate, tmp_path: Path) -> None:
    make("python", plan=Plan.from_json({"labels": [1], "steps": 2, "guidance": 2.0}), n=4)
    plan = Plan.from_json({"labels": [1], "steps": np.int64(2), "guidance": np.float32(2)})
    make("numpy", plan=plan, n=np.int64(4), shard=np.int64(3))
    assert tree(tmp_path / "numpy") == tree(tmp_path / "python")
