"""Shards on a Ray cluster of this machine: the bytes of a local run, also if an actor dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import BackendError, Bundle
from runtime.generate.maker import Maker
from runtime.generate.plan import Plan
from runtime.generate.run import generate
from runtime.generate.settings import Settings

from ...ray_cluster import CPUS, cluster, limited, processes
from .test_generate import tree

pytestmark = [
    pytest.mark.slow,
    # Ray leaves sockets and files to the end of the process.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def _limit() -> Iterator[None]:
    with limited():
        yield


@pytest.fixture(scope="module")
def started() -> Iterator[None]:
    with cluster():
        yield


def settings_of(first_release: Path, out: Path) -> Settings:
    bundle = Bundle.load(first_release / "bundle")
    plan = Plan.from_json({"labels": "all", "steps": 20})
    return Settings(bundle=bundle, plan=plan, out=out, n=600, shard=50)


def test_as_many_actors_as_cpus_end_alike_if_one_is_killed(
    started: None, first_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(settings_of(first_release, tmp_path / "local"))
    from runtime.generate import run

    killed: list[int] = []
    make = run._on_ray

    def make_and_kill(*arguments: object) -> None:
        *others, on_samples = arguments

        def kill(samples: int) -> None:
            if not killed:
                killed.append(processes("ShardActor")[0])
                os.kill(killed[0], signal.SIGKILL)
            on_samples(samples)

        make(*others, kill)

    monkeypatch.setattr(run, "_on_ray", make_and_kill)
    summary = generate(settings_of(first_release, tmp_path / "ray"), workers=CPUS, ray=True)
    assert killed
    assert (summary.made, summary.missing) == (12, 0)
    assert tree(tmp_path / "ray") == tree(tmp_path / "local")


def test_a_node_with_other_versions_is_refused(first_release: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install 'unnoise[ray]'")
    from runtime.generate.ray_data import ShardActor

    settings = settings_of(first_release, tmp_path / "out")
    environment = {**Maker(settings).environment, "numpy": "1.0"}
    with pytest.raises(BackendError, match=r"a worker has numpy 2\S+ instead of 1\.0"):
        ShardActor(settings, environment)
