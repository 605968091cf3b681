"""Kill runs at random moments and start them again: python tests/trainer/runs/killing.py FOLDER
CONFIG.json KILLS PROCESSES SEED

Trains CONFIG into FOLDER/whole without a stop, then into FOLDER/killed-0, and kills it KILLS times.
If it ends before that, it starts killed-1, and so on. Every start is a process forked from this
one, which has imported everything and computed nothing. Prints how many runs were killed.
"""

import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import tensorboard.summary.writer.event_file_writer  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from accelerate import PartialState  # noqa: F401
from PIL import Image

from runtime.errors import UnnoiseError
from trainer.config import Config
from trainer.fit import fit

Image.init()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(config: Config, runs: Path, count: int) -> list[int]:
    """The ids of `count` processes that train together, each leader of a group that its workers are
    in too."""
    port = free_port()
    return [_forked(config, runs, rank, count, port) for rank in range(count)]


def _forked(config: Config, runs: Path, rank: int, count: int, port: int) -> int:
    if child := os.fork():
        with contextlib.suppress(OSError):
            os.setpgid(child, child)
        return child
    os.setpgid(0, 0)
    runs.mkdir(parents=True, exist_ok=True)
    out = os.open(runs / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if count > 1:
        ranks = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_PORT": port,
        }
        os.environ.update(
            {k: str(v) for k, v in ranks.items()},
            MASTER_ADDR="localhost",
            ACCELERATE_USE_CPU="true",
        )
    try:
        os._exit(0 if fit(config, runs) else 130)
    except UnnoiseError as error:
        print(f"error: {error}", file=sys.stderr)
        os._exit(2)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(children: list[int]) -> list[int | None]:
    """Exit status of each, None for those that run."""
    return [
        None if not (found := os.waitpid(c, os.WNOHANG))[0] else os.waitstatus_to_exitcode(found[1])
        for c in children
    ]


def finish(children: list[int]) -> None:
    for child in children:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            raise SystemExit(f"process {child} ended with status {status}")


def kill(children: list[int]) -> None:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    for child in children:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def main(folder: Path, config: Config, kills: int, count: int, seed: int) -> None:
    chance, begun = random.Random(seed), time.monotonic()
    finish(start(config, folder / "whole", count))
    whole_s = time.monotonic() - begun
    killed, run = 0, 0
    while killed < kills:
        children = start(config, folder / f"killed-{run}", count)
        until = time.monotonic() + chance.uniform(0.0, 0.6) * whole_s
        while (
            time.monotonic() < until
            and os.waitid(os.P_PGID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            time.sleep(0.001)
        if os.waitid(os.P_PGID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            finish(children)
            run += 1
            continue
        kill(children)
        killed += 1
    finish(start(config, folder / f"killed-{run}", count))
    print(json.dumps({"killed": killed, "runs": run + 1, "whole_s": whole_s}))


if __name__ == "__main__":
    place, config_file, *numbers = sys.argv[1:]
    main(
        Path(place), Config.from_json(json.loads(Path(config_file).read_text())), *map(int, numbers)
    )
