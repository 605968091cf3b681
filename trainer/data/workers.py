"""Batches of streamed images: read ahead by workers, and kept decoded as far as they fit."""

from __future__ import annotations

import mmap
import multiprocessing
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils import data as torch_data
from torch.utils.data import DataLoader, get_worker_info

from runtime.backends.processor import usable_cores

from ..config import Config
from ..errors import DataError
from ..parallel.processes import Processes
from ..randomness import WORKERS
from .dataset import Batch
from .decode import UnreadablePicture
from .image_files import ImageFiles
from .loader import Wanted, share_of

SHARED_MEMORY = "/dev/shm"
"""The directory in which workers put batches for the training process."""
SHARED_MEMORY_WORDS = (
    "shared memory",
    "shm",
    "bus error",
    "no space left",
    "torch_",
    "semaphore",
    "semlock",
)
"""Parts of what torch says when shared memory runs out."""
AHEAD = 4
"""Batches that each worker reads ahead."""
LABEL_BYTES = 8
STAND_INS = 100
"""Images in a row that may be unreadable before a batch fails."""


class Decoded:
    """Decoded images [N, H, W, C], the first ones that fit, in memory that forked processes share.

    Attributes:
        count: How many images fit.
    """

    def __init__(self, count: int, shape: tuple[int, ...], megabytes: int) -> None:
        self.size = int(np.prod(shape))
        self.count = min(count, megabytes * 2**20 // self.size)
        # One byte per image says whether it is there. mmap refuses a length of 0.
        room = mmap.mmap(-1, max(1, self.count * (self.size + 1)))
        whole = np.frombuffer(room, np.uint8)[: self.count * (self.size + 1)]
        self.there = whole[: self.count]
        self.pictures = whole[self.count :].reshape(self.count, *shape)

    def get(self, i: int) -> NDArray[np.uint8] | None:
        """Return image i, [H, W, C], or None if it is not there yet."""
        return self.pictures[i] if i < self.count and self.there[i] else None

    def put(self, i: int, picture: NDArray[np.uint8]) -> None:
        """Keep image i, [H, W, C], if it is among those that fit."""
        if i < self.count:
            self.pictures[i] = picture
            # Last: another process may read at any time, and must not see half an image.
            self.there[i] = 1


class Reading(torch_data.Dataset[Batch]):
    """Images as DataLoader reads them: a batch from what `Wanted` asks for.

    If an image cannot be read, the next one that can be read takes its place.

    Args:
        files: The images, [N].
        labels: [N] int64.
        decoded: The decoded images; None to decode an image each time.
    """

    def __init__(
        self, files: ImageFiles, labels: NDArray[np.int64], decoded: Decoded | None
    ) -> None:
        self.files = files
        self.labels = labels
        self.decoded = decoded

    def __getitems__(self, wanted: list[tuple[int, float]]) -> Batch:
        bad: list[int] = []
        try:
            pictures = [self._picture(i, crop, bad) for i, crop in wanted]
        except DataError as error:
            return _failed(error)
        # The labels are those of the images that were read, not of those that were wanted.
        indices = np.array([i for i, _ in pictures])
        images = np.stack([picture for _, picture in pictures]).transpose(0, 3, 1, 2)
        batch = Batch(
            torch.from_numpy(np.ascontiguousarray(images)),
            torch.from_numpy(self.labels[indices]),
            tuple(sorted(set(bad))),
            tuple(indices.tolist()),
        )
        if get_worker_info() is not None:
            # DataLoader would do this later, in a thread whose errors nobody sees.
            try:
                batch.images.share_memory_()
                batch.labels.share_memory_()
            except (RuntimeError, OSError) as error:
                return _failed(shared_memory_full(error))
        return batch

    def _picture(self, i: int, crop: float, bad: list[int]) -> tuple[int, NDArray[np.uint8]]:
        for k in range(STAND_INS):
            at = (i + k) % len(self.files)
            if self.decoded is not None and (kept := self.decoded.get(at)) is not None:
                return at, kept
            try:
                picture = self.files.read(at, crop)
            except UnreadablePicture:
                bad.append(at)
                continue
            if self.decoded is not None:
                self.decoded.put(at, picture)
            return at, picture
        raise DataError(
            f"{self.files.names[i]} and the {STAND_INS - 1} images after it cannot be read."
        )


def _failed(error: DataError) -> Batch:
    return Batch(torch.empty(0), torch.empty(0), error=str(error))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def shared_memory_full(error: Exception) -> DataError:
    """Return the error for a batch that does not fit in shared memory."""
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
    # Others may fill it later: this finds only what does not fit from the start.
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
    """Collate nothing: `Reading` gives whole batches, which DataLoader's types do not know."""
    return batch


def _worker(_: int) -> None:
    """Ignore Ctrl-C, which reaches every process: the trainer ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class StreamReader:
    """Reads the batches of one process from files, ahead of the steps that follow each other.

    Args:
        files: The images, [N].
        labels: [N] int64.
    """

    def __init__(
        self,
        files: ImageFiles,
        labels: NDArray[np.int64],
        config: Config,
        processes: Processes,
    ) -> None:
        self.files = files
        self.labels = labels
        self.config = config
        self.processes = processes
        self._next = -1
        self._ahead: Iterator[Batch] = iter(())
        # A random crop differs each time, so a decoded image cannot be reused.
        keeps = not files.random_crop and config.cache_mb > 0
        share_mb = config.cache_mb // processes.count
        self._decoded = Decoded(len(files), files.shape, share_mb) if keeps else None

    def take(self, step: int) -> Batch:
        """Return the batch of a step; see `Reader.take`."""
        try:
            if step != self._next:
                self._ahead = iter(self._loader(step))
                self._next = step
            self._next += 1
            batch = next(self._ahead)
        except (RuntimeError, OSError) as error:
            if any(word in str(error).lower() for word in SHARED_MEMORY_WORDS):
                raise shared_memory_full(error) from error
            raise DataError(
                f"a process that reads images is gone ({_first_line(error)}). If memory ran out, "
                "use fewer --workers or a smaller --cache-mb; --workers 0 reads in the process "
                "that trains."
            ) from error
        if batch.error:
            raise DataError(batch.error)
        return batch

    def _workers(self) -> int:
        # Decoded images are in memory that only forked processes share.
        if "fork" not in multiprocessing.get_all_start_methods():
            return 0
        if self.config.workers < 0:
            return min(8, max(1, usable_cores() // self.processes.count))
        return self.config.workers

    def _loader(self, first: int) -> DataLoader[Batch]:
        workers = self._workers()
        mine = share_of(self.config, self.processes)
        image_bytes = int(np.prod(self.files.shape)) + LABEL_BYTES
        require_shared_memory(workers, (mine.stop - mine.start) * image_bytes)
        return DataLoader(
            Reading(self.files, self.labels, self._decoded),
            batch_sampler=Wanted(self.config, len(self.files), self.processes, first),
            collate_fn=_same,
            worker_init_fn=_worker,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
            prefetch_factor=AHEAD if workers else None,
            pin_memory=self.processes.device.type == "cuda",
            generator=WORKERS.generator(self.config.seed),
        )

    def close(self) -> None:
        """Stop the workers: DataLoader ends them when nobody holds its iterator."""
        self._ahead = iter(())
        self._next = -1
