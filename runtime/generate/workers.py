"""Workers in processes of this machine. Each makes one shard at a time, and says how far it is."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import NamedTuple

from ..errors import BackendError, UnnoiseError
from ..errors.messages import described
from .environment import Environment
from .maker import Maker, OnSamples
from .settings import Settings

MOST_DEATHS = 3
"""After so many deaths of its worker, a shard is given up."""
PATIENCE_S = 10.0
"""How long a worker may take to notice that it is no longer needed."""


class Made(NamedTuple):
    """Samples of the present shard that are made."""

    samples: int


class Done(NamedTuple):
    """The present shard is on the disk."""


class Failed(NamedTuple):
    """The worker cannot continue."""

    error: UnnoiseError | OSError


@dataclass(frozen=True)
class _Run:
    """What every worker receives."""

    settings: Settings
    environment: Environment


@dataclass
class _Worker:
    """A process, the shard that it makes, and how many of its samples are made."""

    process: SpawnProcess
    pipe: Connection
    shard: int | None = None
    samples: int = 0


@dataclass
class _Queue:
    """The shards that wait, and how often the worker of each has died."""

    waiting: list[int]
    deaths: dict[int, int] = field(default_factory=dict)

    def give_back(self, shard: int, status: int | None) -> None:
        """Put the shard of a dead worker first. Raises BackendError if too many have died."""
        self.deaths[shard] = self.deaths.get(shard, 0) + 1
        if self.deaths[shard] >= MOST_DEATHS:
            raise BackendError(
                f"{MOST_DEATHS} workers in turn died on shard {shard} (exit status {status}). "
                "The machine may be out of memory: pass fewer workers or a smaller max_batch."
            )
        self.waiting.insert(0, shard)


def make_here(settings: Settings, shards: Iterable[int], on_samples: OnSamples) -> None:
    """Make shards in this process."""
    maker = Maker(settings)
    try:
        for shard in shards:
            maker.make(shard, on_samples)
    finally:
        maker.close()


def make_in_processes(
    settings: Settings,
    environment: Environment,
    shards: Iterable[int],
    workers: int,
    on_samples: OnSamples,
) -> None:
    """Make shards in `workers` processes. The shard of a worker that dies is made by another.

    Args:
        environment: What every worker must have.

    Raises:
        BackendError: Several workers died on the same shard.
        UnnoiseError, OSError: What a worker raised.
    """
    queue = _Queue(list(shards))
    run = _Run(settings, environment)
    with _started(run, min(workers, len(queue.waiting))) as team:
        for worker in team:
            _next(worker, queue)
        while busy := [worker for worker in team if worker.shard is not None]:
            for pipe in wait([worker.pipe for worker in busy]):
                worker = next(worker for worker in busy if worker.pipe is pipe)
                try:
                    message = worker.pipe.recv()
                except (EOFError, OSError):
                    on_samples(-worker.samples)
                    team[team.index(worker)] = _replaced(run, worker, queue)
                    continue
                _received(worker, message, queue, on_samples)


def _received(worker: _Worker, message: object, queue: _Queue, on_samples: OnSamples) -> None:
    """Act on what a worker has sent."""
    if isinstance(message, Failed):
        raise message.error
    if isinstance(message, Made):
        worker.samples += message.samples
        on_samples(message.samples)
    else:
        _next(worker, queue)


def _next(worker: _Worker, queue: _Queue) -> None:
    """Give a worker the next shard, or None to end it."""
    worker.shard = queue.waiting.pop(0) if queue.waiting else None
    worker.samples = 0
    # A worker that has died is noticed when its pipe is read.
    with suppress(OSError):
        worker.pipe.send(worker.shard)


def _replaced(run: _Run, dead: _Worker, queue: _Queue) -> _Worker:
    """Return a new worker in the place of one that has died."""
    dead.pipe.close()
    dead.process.join(PATIENCE_S)
    assert dead.shard is not None
    queue.give_back(dead.shard, dead.process.exitcode)
    worker = _start(run)
    _next(worker, queue)
    return worker


@contextmanager
def _started(run: _Run, count: int) -> Iterator[list[_Worker]]:
    """Yield `count` workers, and end them."""
    team: list[_Worker] = []
    try:
        for _ in range(count):
            team.append(_start(run))
        yield team
    finally:
        # A worker whose pipe is closed removes its draft and ends.
        for worker in team:
            worker.pipe.close()
        for worker in team:
            worker.process.join(PATIENCE_S)
            worker.process.kill()


def _start(run: _Run) -> _Worker:
    # Forked children could not use the inference library of their parent.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(run, there), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here)


def _work(run: _Run, pipe: Connection) -> None:
    """Make the shards that the pipe names, until it names None or is closed."""
    # Ctrl-C reaches all processes of a terminal, and the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        maker = Maker(run.settings)
        maker.check(run.environment)
        while (shard := pipe.recv()) is not None:
            maker.make(shard, lambda samples: pipe.send(Made(samples)))
            pipe.send(Done())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except (UnnoiseError, OSError) as error:
        _fail(pipe, error)
    except Exception as error:  # of any type, which the parent might be unable to unpickle
        _fail(pipe, BackendError(f"a worker failed: {described(error)}."))


def _fail(pipe: Connection, error: UnnoiseError | OSError) -> None:
    # If another worker failed first, nobody reads the pipe.
    with suppress(OSError):
        pipe.send(Failed(error))
