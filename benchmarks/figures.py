"""What the benchmarks share: a ratio of two times, the machine in words, and where a figure goes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import statistics
import sys
import time
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence, Sized
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from runtime.files import write_text
from runtime.terminal.progress import Progress

ROUNDS = 15
WORK = Path("out/benchmarks")
TIMED = ("torch", "diffusers", "onnxruntime", "openvino", "denoising-diffusion-pytorch")
"""The packages that figures compare."""


def ratio(
    a: Callable[[], object], b: Callable[[], object], calls: int, bar: Progress
) -> dict[str, float]:
    """Time of a over time of b, `calls` calls of each in every round, which side first changing
    from round to round."""
    ratios, times = [], {"a": [], "b": []}
    for f in (a, b):
        f()
    for r in range(ROUNDS):
        spent = {}
        for name, f in (("a", a), ("b", b)) if r % 2 else (("b", b), ("a", a)):
            begun = time.perf_counter()
            for _ in range(calls):
                f()
            spent[name] = (time.perf_counter() - begun) / calls
            times[name].append(spent[name])
        ratios.append(spent["a"] / spent["b"])
        bar.advance()
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": median,
        "quartile_low": low,
        "quartile_high": high,
        "a_ms": 1e3 * statistics.median(times["a"]),
        "b_ms": 1e3 * statistics.median(times["b"]),
    }


def most_steps(calls: int, program: Callable[[int], Sized]) -> int:
    """The most steps whose program, program(steps), makes at most `calls` calls; 0 if none does."""
    return bisect(range(1, calls + 1), calls, key=lambda steps: len(program(steps)))


def machine() -> str:
    """The processor and the versions that a time depends on."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    units = {"amx_tile": "AVX-512 and AMX", "avx512f": "AVX-512", "avx2": "AVX2"}
    widest = next((name for flag, name in units.items() if flag in cpuinfo), "no AVX")
    return (
        f"{cpu[1].strip() if cpu else platform.machine()}, {os.cpu_count()} cores, {widest}; "
        f"Python {platform.python_version()}, numpy {np.__version__}, onnxruntime {ort.__version__}"
    )


def fill(path: Path, marker: str, text: str) -> None:
    """Replace the text between <!-- marker --> and <!-- /marker -->. Raises SystemExit unless each
    marker is there once.
    """
    between = rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)"
    new, found = re.subn(
        between, lambda m: m[1] + text + "\n" + m[2], path.read_text(), flags=re.DOTALL
    )
    if found != 1:
        raise SystemExit(
            f"{path} has the markers <!-- {marker} --> … <!-- /{marker} --> {found} times, not "
            f"once."
        )
    path.write_text(new)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def kept(name: str, depends: Sequence[object], make: Callable[[], Any]) -> Any:
    """Return the result of `make` as JSON stores it, from out/benchmarks if the same was measured
    before on this machine with these sources.

    So a stopped script resumes. depends: all other inputs of the figure. Delete the folder to
    measure again.
    """
    own = ("figures.py", "backends.py", "systems.py", Path(sys.argv[0]).name)
    paths = [Path(__file__).with_name(file) for file in own]
    sources = [*sorted(Path("runtime").rglob("*.py")), *(path for path in paths if path.exists())]
    versions = [_version(package) for package in TIMED]
    digest = hashlib.sha256(repr((name, machine(), versions, depends)).encode())
    for path in sources:
        digest.update(path.read_bytes())
    path = WORK / f"{name}-{digest.hexdigest()[:16]}.json"
    if not path.exists():
        write_text(path, json.dumps(make()))
    return json.loads(path.read_text())


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def busy() -> str:
    """A sentence where other processes use the machine now, which the reader should know."""

    def spent() -> tuple[int, int]:  # by all processors since they were started, in all and idle
        ticks = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(ticks), ticks[3] + ticks[4]

    if not Path("/proc/stat").exists():
        return ""
    before = spent()
    time.sleep(2)
    total, idle = (after - first for after, first in zip(spent(), before, strict=True))
    share = 1 - idle / max(1, total)
    return (
        f" Other work took {share:.0%} of the machine before: see the ratios rather than the times."
        if share > 0.1
        else ""
    )
