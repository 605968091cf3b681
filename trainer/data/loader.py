"""The pictures of each step, in an order that is a function of (seed, step): read ahead in workers
where they are streamed.

Every epoch is a new permutation of all pictures, drawn from (seed, epoch). Step k takes places
k·batch … (k+1)·batch of the epochs put end to end; each process takes its own stretch of these.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ..config import Config
from ..errors import DataError
from ..processes import Processes
from .dataset import Pictures, Source
from .decode import UnreadablePicture
from .stream import Stream

SHARED_MEMORY = "/dev/shm"
"""Where workers put batches for the process that trains."""
SHARED_MEMORY_WORDS = (
    "shared memory",
    "shm",
    "bus error",
    "no space left",
    "torch_",
    "semaphore",
    "semlock",
)
AHEAD = 4
"""Batches that each worker reads ahead."""
LABEL_BYTES = 8


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def batch_indices(seed: int, step: int, batch: int, count: int) -> NDArray[np.int64]:
    """Which pictures step `step` sees, [batch]: every epoch is a new permutation, drawn from (seed,
    epoch)."""
    positions = np.arange(step * batch, (step + 1) * batch)
    found = np.empty(batch, np.int64)
    for epoch in np.unique(positions // count).tolist():
        here = positions // count == epoch
        found[here] = _permutation(seed, epoch, count)[positions[here] % count]
    return found


class Wanted(Sampler[list[tuple[int, float]]]):
    """What one process reads for every step from `first` on: (picture, where to crop), config.batch
    / processes of them."""

    def __init__(self, config: Config, count: int, processes: Processes, first: int) -> None:
        self.config = config
        self.count = count
        self.processes = processes
        self.first = first

    def at(self, step: int) -> list[tuple[int, float]]:
        c = self.config
        share = c.batch // self.processes.count
        mine = slice(self.processes.index * share, (self.processes.index + 1) * share)
        indices = batch_indices(c.seed, step, c.batch, self.count)[mine]
        crops = np.random.Generator(
            np.random.Philox(key=np.array([c.seed, 2**63 + step], np.uint64))
        ).random(c.batch)[mine]
        return list(zip(indices.tolist(), crops.tolist(), strict=True))

    def __iter__(self) -> Iterator[list[tuple[int, float]]]:
        for step in range(self.first, self.config.steps):
            yield self.at(step)

    def __len__(self) -> int:
        return max(0, self.config.steps - self.first)


@dataclass(frozen=True)
class Batch:
    """images [b, C, H, W] uint8, labels [b]; bad: indices of those that could not be read, in whose
    place others stand."""

    images: Tensor
    labels: Tensor
    bad: tuple[int, ...] = ()
    error: str = ""

    def pin_memory(self) -> Batch:
        """For DataLoader, which copies to a GPU from there."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class Decoded:
    """Pictures kept as they were decoded, [N, H, W, C], as many of the first as fit: memory that
    processes forked from this one share."""

    def __init__(self, count: int, shape: tuple[int, ...], megabytes: int) -> None:
        self.size = int(np.prod(shape))
        self.count = min(count, megabytes * 2**20 // self.size)
        room = mmap.mmap(-1, max(1, self.count * (self.size + 1)))
        whole = np.frombuffer(room, np.uint8)[: self.count * (self.size + 1)]
        self.there = whole[: self.count]
        self.pictures = whole[self.count :].reshape(self.count, *shape)

    def get(self, i: int) -> NDArray[np.uint8] | None:
        return self.pictures[i] if i < self.count and self.there[i] else None

    def put(self, i: int, picture: NDArray[np.uint8]) -> None:
        if i < self.count:
            self.pictures[i] = picture
            self.there[i] = 1  # last, so that what is there is whole


class Reading(Dataset[Batch]):
    """A batch of a stream from what `Wanted` asks. The next picture that can be read stands in for
    one that cannot."""

    def __init__(self, stream: Stream, decoded: Decoded | None) -> None:
        self.stream = stream
        self.decoded = decoded

    def __getitems__(self, wanted: list[tuple[int, float]]) -> Batch:
        bad: list[int] = []
        try:
            pictures = [self._picture(i, crop, bad) for i, crop in wanted]
        except DataError as error:  # an exception would come out of DataLoader with a page of traceback for its message
            return Batch(torch.empty(0), torch.empty(0), error=str(error))
        indices = np.array([i for i, _ in pictures])
        images = np.stack([picture for _, picture in pictures]).transpose(0, 3, 1, 2)
        labels = self.stream.labels[indices]
        batch = Batch(
            torch.from_numpy(np.ascontiguousarray(images)),
            torch.from_numpy(labels),
            tuple(sorted(set(bad))),
        )
        if get_worker_info() is not None:
            try:  # here, because DataLoader does it in a thread whose errors nobody sees
                batch.images.share_memory_()
                batch.labels.share_memory_()
            except (RuntimeError, OSError) as error:
                return Batch(torch.empty(0), torch.empty(0), error=str(shared_memory_full(error)))
        return batch

    def _picture(self, i: int, crop: float, bad: list[int]) -> tuple[int, NDArray[np.uint8]]:
        for k in range(100):
            at = (i + k) % len(self.stream)
            if self.decoded is not None and (found := self.decoded.get(at)) is not None:
                return at, found
            try:
                found = self.stream.read(at, crop)
            except UnreadablePicture:
                bad.append(at)
                continue
            if self.decoded is not None:
                self.decoded.put(at, found)
            return at, found
        raise DataError(f"{self.stream.names[i]} and the 99 pictures after it cannot be read.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def shared_memory_full(error: Exception) -> DataError:
    return DataError(
        f"workers cannot pass images to the process that trains, through {SHARED_MEMORY} "
        f"({_first_line(error)}). Make it larger (docker run --shm-size 1g), or use --workers 0."
    )


def require_shared_memory(workers: int, batch_bytes: int) -> None:
    """Check that the batches that workers read ahead fit in shared memory.

    If they do not, the system kills a worker with a bus error in the middle of a run.

    Raises:
        DataError: There is too little room.
    """
    needed = workers * AHEAD * batch_bytes
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:  # not Linux
        return
    if needed > free:
        raise DataError(
            f"{SHARED_MEMORY} has {free / 2**20:.1f} MiB left, and {workers} workers that read "
            f"{AHEAD} batches ahead need {needed / 2**20:.1f} MiB there. Make it larger "
            "(docker run --shm-size 1g), use fewer --workers, or use --workers 0."
        )


def _same(batch: Any) -> Any:
    return batch


def _worker(_: int) -> None:
    """Ctrl-C is the trainer's business, which ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Batches:
    """take(step) gives what this process trains on. In steps that follow each other it has been
    read ahead. `waited`: seconds spent waiting."""

    def __init__(self, config: Config, source: Source, processes: Processes) -> None:
        self.config = config
        self.source = source
        self.processes = processes
        self.waited = 0.0
        self._next = -1
        self._ahead = iter(())
        if isinstance(source, Pictures):
            self._images = torch.from_numpy(source.images).permute(0, 3, 1, 2)  # not a copy
            self._labels = torch.from_numpy(source.labels)
        else:
            fits = not source.random_crop and config.cache_mb
            self._decoded = (
                Decoded(len(source), source.shape, config.cache_mb // processes.count)
                if fits
                else None
            )

    def take(self, step: int) -> Batch:
        """Raises DataError for a picture that is not like the others."""
        begun = time.perf_counter()
        found = (
            self._from_memory(step)
            if isinstance(self.source, Pictures)
            else self._from_stream(step)
        )
        self.waited += time.perf_counter() - begun
        return found

    def _wanted(self, first: int) -> Wanted:
        return Wanted(self.config, len(self.source.labels), self.processes, first)

    def _from_memory(self, step: int) -> Batch:
        share = self.config.batch // self.processes.count
        indices = batch_indices(self.config.seed, step, self.config.batch, len(self._images))
        index = torch.from_numpy(indices[self.processes.index * share :][:share])
        return Batch(self._images[index].contiguous(), self._labels[index])

    def _from_stream(self, step: int) -> Batch:
        try:
            if step != self._next:
                self._ahead = iter(self._loader(step))
                self._next = step
            self._next += 1
            found = next(self._ahead)
        except (RuntimeError, OSError) as error:
            if any(word in str(error).lower() for word in SHARED_MEMORY_WORDS):
                raise shared_memory_full(error) from error
            raise DataError(
                f"a process that reads images is gone ({_first_line(error)}). If memory ran out, "
                f"use "
                "fewer --workers or a smaller --cache-mb; --workers 0 reads in the process that "
                "trains."
            ) from error
        if found.error:
            raise DataError(found.error)
        return found

    def _loader(self, first: int) -> DataLoader[Any]:
        workers = self.config.workers
        if workers < 0:
            workers = min(8, max(1, (os.cpu_count() or 1) // self.processes.count))
        if "fork" not in multiprocessing.get_all_start_methods():
            workers = 0  # what is decoded is kept in memory that only forked processes share
        assert isinstance(self.source, Stream)
        share = self.config.batch // self.processes.count
        require_shared_memory(workers, share * (int(np.prod(self.source.shape)) + LABEL_BYTES))
        return DataLoader(
            Reading(self.source, self._decoded),
            batch_sampler=self._wanted(first),
            collate_fn=_same,
            worker_init_fn=_worker,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
            prefetch_factor=AHEAD if workers else None,
            pin_memory=self.processes.device.type == "cuda",
            generator=torch.Generator(),  # or it would draw from the global one
        )

    def close(self) -> None:
        """End the workers."""
        self._ahead = iter(())
        self._next = -1
