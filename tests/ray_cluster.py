"""A Ray cluster of this machine, for tests."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

TRIES = 5
CPUS = 2
PATIENT = {"health_check_timeout_ms": 60_000, "health_check_failure_threshold": 100}
"""A busy machine is not a dead node."""


@contextmanager
def limited(seconds: int = 900) -> Iterator[None]:
    """Raise TimeoutError if the block takes longer: what hangs in Ray may not hang the tests."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def cluster(variables: Mapping[str, str] | None = None) -> Iterator[None]:
    """Two CPUs, whether the machine has them or not. Its workers import this checkout.

    variables: of the environment of every process.
    """
    ray = pytest.importorskip("ray", reason="pip install 'unnoise[ray]'")
    psutil = pytest.importorskip("psutil", reason="psutil is not installed")
    before = {*psutil.Process().children(recursive=True)}
    paths = os.pathsep.join(path for path in sys.path if path)
    for left in reversed(range(TRIES)):
        try:
            with limited(240):
                ray.init(
                    num_cpus=CPUS,
                    log_to_driver=False,
                    include_dashboard=False,
                    _system_config=PATIENT,
                    runtime_env={
                        "env_vars": {
                            "PYTHONPATH": paths,
                            "OMP_NUM_THREADS": "1",
                            **(variables or {}),
                        }
                    },
                )
            break
        # A node has 30 seconds to start, which a busy machine may not give it.
        except Exception:
            ray.shutdown()
            if not left:
                raise
    try:
        yield
    finally:
        ray.shutdown()
        left = {*psutil.Process().children(recursive=True)} - before
        _, alive = psutil.wait_procs(left, timeout=30)
        for process in alive:
            process.kill()
        gc.collect()  # Ray's processes end by themselves, which is a warning in a later test


def processes(name: str) -> list[int]:
    """The processes of the cluster whose title holds a name."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:  # it has ended
            continue
    return found
