"""Paths of the teacher from noise to image, made once and kept in the run's folder.

runs/NAME/trajectories/IDENTITY/
  00000.npy            float16 [n, 1 + L, C, H, W], see `Teacher.paths`
  00000.low_res.npy    float32 [n, …], a condition of theirs, for each that the network has

Each is a function of the teacher, the config's seed and its number, so a run that was killed
continues with the same paths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.files import replacing, to_json
from runtime.terminal.progress import Progress

from ..config import Config
from ..data.dataset import Dataset
from ..data.loader import batch_indices
from ..data.tasks import Task
from ..errors import TrainingError
from ..parallel.processes import Processes
from ..randomness import FIRST_TRAJECTORY_SEED
from .teacher import Teacher

CHUNK = 128
"""Paths in a file, unless there are very many: what a kill can lose."""
MOST_FILES = 256
"""A file that is mapped into memory stays open, and systems allow a thousand."""
TOGETHER = 32
"""Paths that are sampled at once, which decides their last bits."""


class Trajectories:
    """The paths of one run. Every process has all of them.

    Attributes:
        labels: [N] int64, those of the data in their proportions.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        teacher: Teacher,
        folder: Path,
        task: Task | None = None,
    ) -> None:
        assert config.distillation is not None
        self.config = config
        self.teacher = teacher
        self.count = config.distillation.trajectories
        self.task = task
        self.shapes = {c.name: c.shape for c in task.conditions} if task else {}
        files = 1 + len(self.shapes)
        self.chunk = max(CHUNK, -(-self.count * files // MOST_FILES))
        # Place i has the label and the conditions of the i-th image of the epochs laid end to end.
        self.images = batch_indices(config.seed, 0, self.count, len(dataset))
        self.labels = dataset.labels[self.images]
        self.folder = folder / identity(config, teacher, self.labels)
        self._parts: list[NDArray[np.float16]] = []
        self._given: list[dict[str, NDArray[np.float32]]] = []

    def make(self, processes: Processes, stop: Callable[[], bool]) -> bool:
        """Make the paths that are not there yet. Every process calls this.

        Returns:
            Whether all are there. Otherwise `stop` said so in one process.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        chunks = range(-(-self.count // self.chunk))
        names = ("", *self.shapes)
        missing = [i for i in chunks if not all(self._path(i, name).exists() for name in names)]
        # All processes have the same list before any of them writes.
        processes.wait()
        done = self.count - sum(len(self._places(i)) for i in missing)
        bar = Progress("sampling the teacher", self.count, done) if processes.main else None
        with bar or nullcontext():
            for first in range(0, len(missing), processes.count):
                if processes.any(stop()):
                    return False
                turn = missing[first : first + processes.count]
                for chunk in turn[processes.index : processes.index + 1]:
                    self._make_chunk(chunk)
                if bar is not None:
                    bar.advance(sum(len(self._places(i)) for i in turn))
        processes.wait()
        assert self.config.distillation is not None
        levels = len(self.config.distillation.levels)
        self._parts = [
            self._read(self._path(i), i, (1 + levels, *self.teacher.sample_shape)) for i in chunks
        ]
        self._given = [
            {name: self._read(self._path(i, name), i, s) for name, s in self.shapes.items()}
            for i in chunks
        ]
        return True

    def take(
        self, indices: NDArray[np.int64], levels: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return ends x_0 and noises eps of paths, each [b, C, H, W].

        Args:
            indices: [b], which paths.
            levels: [b], the number of each one's level, 0 for the noisiest.
        """
        rows = [self._parts[i // self.chunk][i % self.chunk] for i in indices.tolist()]
        ends = np.stack([row[0] for row in rows])
        noise = np.stack([row[1 + k] for row, k in zip(rows, levels.tolist(), strict=True)])
        return ends.astype(np.float32), noise.astype(np.float32)

    def conditions(self, indices: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        """Return the conditions of paths by name, [b, …] each. indices: [b]."""
        return {
            name: np.stack([self._given[i // self.chunk][name][i % self.chunk] for i in indices])
            for name in self.shapes
        }

    def _places(self, chunk: int) -> NDArray[np.int64]:
        """Return the numbers of the paths in a file, [n]."""
        return np.arange(chunk * self.chunk, min((chunk + 1) * self.chunk, self.count))

    def _make_chunk(self, chunk: int) -> None:
        places = self._places(chunk)
        given = self.task.of_data(self.images[places], places.tolist()) if self.task else {}
        paths = [
            self.teacher.paths(
                (FIRST_TRAJECTORY_SEED + places[part]).tolist(),
                self.labels[places[part]],
                {name: value[part] for name, value in given.items()},
            )
            for part in np.split(np.arange(len(places)), range(TOGETHER, len(places), TOGETHER))
        ]
        for name, value in given.items():
            _write(self._path(chunk, name), value)
        _write(self._path(chunk), np.concatenate(paths))

    def _path(self, chunk: int, condition: str = "") -> Path:
        return self.folder / f"{chunk:05d}{'.' if condition else ''}{condition}.npy"

    def _read(self, path: Path, chunk: int, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return the array [n, *shape] of a chunk."""
        count = len(self._places(chunk))
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise TrainingError(
                f"{path} cannot be read ({error}). Delete it and give the same command again."
            ) from error
        if found.shape != (count, *shape):
            raise TrainingError(
                f"{path} holds {found.shape}, which is not what this run wrote. Delete it and give "
                "the same command again."
            )
        return found


def _write(path: Path, array: NDArray[np.generic]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def identity(config: Config, teacher: Teacher, labels: NDArray[np.int64]) -> str:
    """Return the name of the folder of these paths: other paths never have it.

    labels: [N], of all paths.
    """
    assert config.distillation is not None
    program = teacher.program
    digest = hashlib.sha256(
        to_json({"teacher": teacher.sha256, "levels": list(config.distillation.levels)}).encode()
    )
    for table in (program.call, program.update, labels):
        digest.update(np.ascontiguousarray(table).tobytes())
    return digest.hexdigest()[:16]
