"""The first image of a fresh process, and a process's peak memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ..engine.request import Request
from ..errors import BackendError
from ..terminal.progress import Progress
from .results import Cold, Result

# What a user's first program does. Its parent times it from before the process starts. Memory is
# asked for last, because importing this module takes time and memory of its own.
FIRST = """
import json, sys, time
begun = time.perf_counter()
from runtime.sampler import Sampler
imported = time.perf_counter()
from runtime.engine.request import Request
path, backend, precision, threads, request = json.load(sys.stdin)
sampler = Sampler.load(path, backend, precision, threads)
loaded = time.perf_counter()
sampler.sample_requests([Request.from_json(request)])
sampled = time.perf_counter()
times = {"import_s": imported - begun, "load_s": loaded - imported, "sample_s": sampled - loaded}
print(json.dumps(times), flush=True)
from runtime.bench.fresh import peak_mib
print(json.dumps(peak_mib()))
"""


def cold(
    path: Path,
    result: Result,
    threads: int | None,
    request: Request,
    runs: int,
    bar: Progress | None = None,
) -> Cold:
    """Time the first image in fresh processes, one after another, after one that is not counted.

    Args:
        path: The bundle's folder.
        threads: Of the inference library; None for one a core.
        request: The sample that each of them makes.
        runs: The number of processes that are counted.

    Raises:
        BackendError: A process fails.
    """
    arguments = json.dumps(
        [str(path.resolve()), result.backend, result.precision, threads, request.to_json()]
    )
    found = []
    for _ in range(runs + 1):
        found.append(_first_image(result.name, arguments))
        if bar:
            bar.advance(note=f"{result.name}, fresh process")
    # The first process may have filled the cache of compiled models, and the system's of files.
    counted = found[1:]
    known = [run["peak_mib"] for run in counted if run["peak_mib"] is not None]
    times = {k: statistics.median(run[k] for run in counted) for k in counted[0] if k != "peak_mib"}
    return Cold(**times, peak_mib=statistics.median(known) if known else None)


def _first_image(name: str, arguments: str) -> dict[str, Any]:
    """Run a process. Returns its times and its peak memory, by their names in `Cold`."""
    # The child must import this package, wherever the parent found it.
    here = str(Path(__file__).resolve().parents[2])
    paths = [here, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # A file: conditions may be longer than an argument, and a pipe would wait for its reader.
    with tempfile.TemporaryFile("w+") as given:
        given.write(arguments)
        given.seek(0)
        begun = time.perf_counter()
        with subprocess.Popen(
            # -P: modules in the working directory are not those that are meant.
            [sys.executable, "-P", "-c", FIRST],
            stdin=given,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        ) as child:
            assert child.stdout is not None
            # The line is printed at once after sampling: its arrival is the time from the start.
            line = child.stdout.readline()
            first = time.perf_counter() - begun
            rest = child.stdout.read()
    if child.returncode or not line:
        raise BackendError(
            f"a fresh process could not sample with {name} (status {child.returncode}). Its own "
            "error is printed above."
        )
    return {"first_picture_s": first, **json.loads(line), "peak_mib": json.loads(rest)}


def peak_mib() -> float | None:
    """Return this process's largest resident memory so far, in MiB; None if the system has none."""
    # Not getrusage on Linux: its maximum is inherited from the process that started this one.
    path = Path("/proc/self/status")
    if path.exists():
        words = path.read_text().partition("VmHWM:")[2].split()
        return int(words[0]) / 1024 if words else None
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
