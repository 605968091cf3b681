"""This checkout against another version of it: the time of a batch, and the peak of memory.

    git worktree add /tmp/old REVISION
    python benchmarks/versions.py /tmp/old [--rounds 9] [--write]

Each version samples in a process of its own, with its defaults and DDIM of ten steps without
guidance. The two take turns, in blocks of calls of which the first is not counted, and each round
starts with the other version. Each samples emoji32 from its own bundles/. The CIFAR-shaped network
of the other benchmarks is exported by this version; the old one samples its fp32/step.onnx. --write
refreshes docs/benchmarks.md. Takes ten minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from figures import busy, fill, kept, machine, markdown
from systems import cifar10, emoji32

from runtime.terminal.progress import track

CASES = (
    ("emoji32", "onnxruntime", "fp32", (1, 4, 16)),
    ("emoji32", "onnxruntime", "int8", (1, 16)),
    ("emoji32", "openvino", "fp32", (1, 4, 16)),
    ("emoji32", "openvino", "bf16", (1, 4, 16)),
    ("emoji32", "openvino", "int8", (1, 4, 16)),
    ("CIFAR-shaped", "onnxruntime", "fp32", (1, 8)),
    ("CIFAR-shaped", "openvino", "int8", (8,)),
)
BLOCK_S = 1.0
"""Seconds of a block, at least."""
REST_S = 0.1
"""Between two blocks: threads of a library may spin for a while after a call."""
SAMPLING = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from runtime import Sampler, __file__ as used
assert used.startswith(sys.argv[1]), used
bundle, backend, precision, batch, block_s = sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), float(sys.argv[6])
sampler = Sampler.load(bundle, backend=backend, precision=precision)
how = dict(solver="ddim", steps=10, guidance=1.0)
if sampler.bundle.labels:
    how["label"] = 1
sampler.sample(batch, 0, **how)
for line in sys.stdin:
    sampler.sample(batch, 0, **how)
    calls, begun = 0, time.perf_counter()
    while (spent := time.perf_counter() - begun) < block_s:
        calls += 1
        sampler.sample(batch, calls, **how)
    status = open("/proc/self/status").read()
    print(json.dumps([spent / calls, int(status.partition("VmHWM:")[2].split()[0]) / 1024]), flush=True)
"""


class Version:
    """A process in which one version samples."""

    def __init__(self, root: Path, bundle: Path, *how: str) -> None:
        command = [sys.executable, "-c", SAMPLING, str(root), str(bundle), *how, str(BLOCK_S)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, cwd=root
        )

    def block(self) -> list[float]:
        """Seconds of a batch, and the process's peak of memory so far in MB. [] if it cannot."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return []
        line = self._process.stdout.readline()
        time.sleep(REST_S)
        return json.loads(line) if line else []

    def end(self) -> None:
        self._process.communicate()


def compared(
    roots: tuple[Path, Path], bundles: tuple[Path, Path], how: tuple[str, ...], rounds: int
) -> dict[str, list[list[float]]]:
    """The blocks of the old version and of this one; {} if one of them cannot run this."""
    versions = [Version(root, bundle, *how) for root, bundle in zip(roots, bundles, strict=True)]
    found: list[list[list[float]]] = [[], []]
    try:
        for turn in track(range(rounds + 1), " ".join(how)):
            for k in (0, 1) if turn % 2 else (1, 0):
                block = versions[k].block()
                if not block:
                    return {}
                # The first round opens what later ones have open.
                found[k] += [block] * (turn > 0)
    finally:
        for version in versions:
            version.end()
    return {"old": found[0], "now": found[1]}


def row(name: str, how: tuple[str, ...], blocks: dict[str, list[list[float]]]) -> list[str]:
    seconds = {k: [block[0] for block in v] for k, v in blocks.items()}
    low, ratio, high = statistics.quantiles(
        [a / b for a, b in zip(seconds["old"], seconds["now"], strict=True)], n=4
    )
    old, now = (statistics.median(seconds[k]) for k in ("old", "now"))
    backend, precision, batch = how
    return [
        name,
        f"{backend} {precision}",
        batch,
        f"{1e3 * old:.0f} ms",
        f"{1e3 * now:.0f} ms",
        f"**{ratio:.2f} ×** ({low:.2f} … {high:.2f})",
        f"{blocks['old'][-1][1]:.0f}, {blocks['now'][-1][1]:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, help="a checkout of the other version")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="refresh docs/benchmarks.md")
    given = parser.parse_args()
    roots = (given.old.resolve(), Path.cwd())
    note = busy()
    shown = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=roots[0], capture_output=True, text=True
    )
    revision = shown.stdout.strip()
    bundles = {"emoji32": emoji32().bundle.path, "CIFAR-shaped": cifar10().bundle.path}
    rows = []
    for name, backend, precision, batches in CASES:
        now = bundles[name].resolve()
        old = roots[0] / "bundles" / name if name == "emoji32" else now
        for batch in map(str, batches):
            how = (backend, precision, batch)
            blocks = kept(
                f"versions-{name}-{'-'.join(how)}",
                (revision, now.joinpath("bundle.json").read_text(), given.rounds),
                lambda old=old, now=now, how=how: compared(roots, (old, now), how, given.rounds),
            )
            rows += [row(name, how, blocks)] if blocks else []
    head = ["network", "", "batch", "old", "now", "old / now (quartiles)", "peak MB, old and now"]
    source = (
        f"The old version is commit {revision}. Medians of {given.rounds} rounds by "
        f"`benchmarks/versions.py` on {machine()}. "
        f"Pairs that are missing cannot run on this machine.{note}"
    )
    text = f"{markdown(head, rows)}\n\n{source}"
    print(text)
    if given.write:
        fill(Path("docs/benchmarks.md"), "versions", text)


if __name__ == "__main__":
    main()
