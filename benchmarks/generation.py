"""How fast `generate` is against a bare loop, and whether kills change a byte.

python benchmarks/generation.py            throughput, in turn with a bare loop of `Sampler.sample`
python benchmarks/generation.py --kills    10,000 emoji, 20 SIGKILLs at random moments
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runtime import Bundle, Sampler
from runtime.generate.plan import Plan
from runtime.generate.run import generate
from runtime.generate.settings import Settings

ROOT = Path(__file__).parent.parent
BUNDLE = ROOT / "bundles" / "emoji32"
BATCH = 16
KILLS = 20


def throughput(folder: Path, samples: int, steps: int, rounds: int) -> None:
    """Print the samples per second of CPU and of wall time, in alternating rounds."""
    bundle = Bundle.load(BUNDLE)
    plan = Plan.from_json({"steps": steps})
    ratios: dict[str, list[float]] = {"wall": [], "cpu": []}
    for turn in range(rounds):
        sampler = Sampler(bundle, threads=1)
        sampler.sample(BATCH, steps=1)
        bare = _timed(lambda s=sampler: _loop(s, samples, steps))
        for kind in ("webdataset", "folder", "npy"):
            settings = Settings(
                bundle=bundle,
                plan=plan,
                out=folder / f"{kind}-{turn}",
                n=samples,
                shard=samples,
                format=kind,
            )
            found = _timed(lambda s=settings: generate(s))
            print(f"{kind}: wall {bare[0] / found[0]:.3f}, cpu {bare[1] / found[1]:.3f}")
            ratios["wall"].append(bare[0] / found[0])
            ratios["cpu"].append(bare[1] / found[1])
        print(f"bare loop: {samples / bare[0]:.1f} per second, cpu {samples / bare[1]:.1f}")
    for name, values in ratios.items():
        print(f"{name}: median {statistics.median(values):.3f} of the bare loop's throughput")


def _loop(sampler: Sampler, samples: int, steps: int) -> None:
    for first in range(0, samples, BATCH):
        sampler.sample(min(BATCH, samples - first), seed=first, steps=steps)


def _timed(action) -> tuple[float, float]:
    begun = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - begun[0], time.process_time() - begun[1]


def kills(folder: Path, samples: int, shard: int, workers: int, longest: float) -> None:
    """Kill a run 20 times, let it finish, and compare with one that was left alone."""
    (folder / "plan.json").write_text(json.dumps({"labels": "all", "guidance": 1, "steps": 1}))
    command = [sys.executable, "-m", "runtime.generate", str(BUNDLE), "--n", str(samples)]
    command += ["--shard", str(shard), "--plan", str(folder / "plan.json")]
    expected = folder / "expected"
    if not expected.exists():
        begun = time.monotonic()
        subprocess.run([*command, "--workers", "1", "--out", str(expected)], check=True)
        print(f"undisturbed: {time.monotonic() - begun:.0f} s", flush=True)
    out = folder / f"killed-{workers}"
    command += ["--workers", str(workers), "--out", str(out)]
    chance = random.Random(workers)
    for number in range(KILLS):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0, longest))
        # The whole group, or the parent alone, whose workers then live on for a moment.
        kill = os.killpg if chance.random() < 0.5 else os.kill
        kill(process.pid, signal.SIGKILL)
        process.wait()
        print(f"kill {number + 1}: {len([*out.glob('shards/*')])} shards", flush=True)
    subprocess.run(command, check=True)
    same = _hashes(out) == _hashes(expected)
    hidden = list(out.rglob(".*"))
    print(f"{workers} workers: {len(_hashes(out))} files, equal: {same}, drafts left: {hidden}")


def _hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", action="store_true")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--shard", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--longest", type=float, default=12, help="seconds until a kill")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="kept; otherwise a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if given.kills:
            for workers in given.workers:
                kills(folder, given.samples or 10_000, given.shard, workers, given.longest)
        else:
            throughput(folder, given.samples or 64, given.steps, given.rounds)


if __name__ == "__main__":
    main()
