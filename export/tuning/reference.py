"""What a solver is fitted on: noise, labels, guidance, and the samples of a many-call teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Float32
from runtime.backends.pool import BufferPool
from runtime.backends.registry import open_backend
from runtime.bundle.bundle import Bundle
from runtime.bundle.spec import ModelSpec
from runtime.diffusion.noise import Stream, noise
from runtime.diffusion.program import GUIDANCE, TIME, Network, R, advance, denoise
from runtime.engine.costs import Costs
from runtime.files import replacing
from runtime.terminal.progress import Progress

TEACHER: dict[str, Any] = {"solver": "dpmpp_3m", "steps": 60, "grid": "log_snr"}
"""On emoji32 it ends 0.005 (RMS, guidance 1) from DDIM with 1,000 calls."""
FIRST_SEED = 2**48
"""Of the samples for fitting: far from the seeds that users and benchmarks use."""
BATCH = 16


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples to fit on.

    Attributes:
        x: [n, *S], x_T.
        label: [n].
        guidance: [n].
        target: [n, *S], the teacher's final samples.
    """

    x: Float32
    label: NDArray[np.int64]
    guidance: Float32
    target: Float32

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, part: slice | NDArray[np.generic]) -> Samples:
        return Samples(*(getattr(self, f.name)[part] for f in fields(self)))

    def batches(self) -> list[Samples]:
        """Return the samples in parts of BATCH."""
        return [self[i : i + BATCH] for i in range(0, len(self), BATCH)]


def network_of(bundle: Bundle, threads: int | None = None) -> Network:
    """Return the bundle's own float32 graph as a network of `runtime.run`.

    The row has c_skip = 0 and c_out = 1, so that the graph's D is F.
    """
    backend = open_backend(bundle, threads=threads)
    pool = BufferPool(backend, Costs(bundle, backend).streams)

    def network(x: Float32, time: Float32, label: NDArray[np.int64] | None = None) -> Float32:
        count = len(x)
        with pool.lend(count) as buffers:
            buffers.state[:count] = 0
            buffers.state[:count, 0] = x
            buffers.noise[:count] = 0
            buffers.update[:count] = 0
            buffers.label[:count] = 0 if label is None else label
            buffers.call[:count] = (0, 1, 0, 1, np.inf, 1)
            buffers.call[:count, TIME] = time
            buffers.run(False, 0, count)
            buffers.turn()
            return buffers.denoised[:count].copy()

    return network


@dataclass(frozen=True, eq=False)
class Walker:
    """Runs rows of a program for samples with their own labels and guidance.

    Attributes:
        classes: The number of classes, which is the null label; 0 for a model without labels.
    """

    network: Network
    classes: int

    def denoised(self, call: NDArray[np.floating], x: Float32, samples: Samples) -> Float32:
        """Return D [n, *S] of one row, each sample under its own guidance, see `denoise`."""
        # A tuned table has no guidance of its own: it is fitted for the samples'.
        rows = np.tile(call.astype(np.float32), (len(x), 1))
        rows[:, GUIDANCE] = samples.guidance
        label = samples.label if self.classes else None
        return denoise(rows, self.network, x, label, self.classes)

    def walk(
        self,
        call: NDArray[np.floating],
        update: NDArray[np.floating],
        samples: Samples,
        *,
        before: tuple[int, Float32, Float32 | None] | None = None,
        seen: Callable[[Float32, Float32], object] = lambda state, denoised: None,
    ) -> Float32:
        """Return x [n, *S] after the last row.

        Args:
            call: [K, 6], the program's calls.
            update: [K, R, R+2], the program's updates.
            before: The (row, state [n, R, *S], D if it is known) to continue from.
            seen: Called with state and D at every row.
        """
        if before is None:
            state = np.zeros((len(samples), R, *samples.x.shape[1:]), np.float32)
            state[:, 0] = samples.x
            before = 0, state, None
        first, state, known = before
        for k in range(first, len(call)):
            denoised = self.denoised(call[k], state[:, 0], samples) if known is None else known
            seen(state, denoised)
            known = None
            state = advance(update[k], state, denoised)
        return state[:, 0]


def probe(network: Network, bundle: ModelSpec) -> list[float]:
    """Return four numbers that identify a network.

    They are its outputs for noise, across the schedule, projected onto other noise.
    """
    shape = bundle.sample_shape
    T = len(bundle.schedule)
    classes = bundle.num_classes
    x, along = (
        np.stack([noise(s, stream, 0, shape) for s in range(4)])
        for stream in (Stream.INITIAL, Stream.STEP)
    )
    time = bundle.schedule.time[[0, T // 3, 2 * T // 3, T - 1]].astype(np.float32)
    F = network(x, time, np.arange(4) % classes) if classes else network(x, time)
    return [float(v) for v in (F.astype(np.float64) * along).reshape(4, -1).mean(1)]


def same(a: Any, b: list[float]) -> bool:
    """Whether two probes are of one network, computed in float32 by any library.

    Args:
        a: What may be a probe, perhaps read from a file.
        b: A probe.
    """
    numbers = isinstance(a, list) and all(isinstance(v, float) for v in a)
    return numbers and len(a) == len(b) and bool(np.allclose(a, b, rtol=0, atol=1e-4))


def draw(bundle: Bundle, count: int, first_seed: int) -> Samples:
    """Return samples without targets, under all labels in turn.

    If the bundle is guided, half of them have its default guidance and a class. The others have
    guidance 1, and the null label among their labels.
    """
    classes = bundle.num_classes
    guided = count // 2 if bundle.can_guide and bundle.defaults.guidance != 1 else 0
    turns = np.arange(bundle.num_labels) if classes else np.zeros(1)
    label = np.r_[
        np.resize(turns, count - guided), np.resize(np.arange(max(1, classes)), guided)
    ].astype(np.int64)
    guidance = np.r_[np.ones(count - guided), np.full(guided, bundle.defaults.guidance)].astype(
        np.float32
    )
    start = np.float32(bundle.program("ddim", 1, "trailing").start)
    x = np.stack(
        [
            start * noise(first_seed + i, Stream.INITIAL, 0, bundle.sample_shape)
            for i in range(count)
        ]
    )
    return Samples(x, label, guidance, np.zeros_like(x))


def taught(bundle: Bundle, walker: Walker, samples: Samples, folder: Path, name: str) -> Samples:
    """Return the samples with the teacher's targets.

    `folder` keeps a file for each batch, from which an interrupted search resumes.
    """
    # The teacher's files are kept, because it takes most of the time of a search.
    program = bundle.program(
        TEACHER["solver"], min(TEACHER["steps"], len(bundle.schedule)), TEACHER["grid"]
    )
    batches = samples.batches()
    paths = [folder / f"{name}-{i:03}.npy" for i in range(len(batches))]
    steps = len(program)
    there = sum(path.exists() for path in paths)
    targets = []
    with Progress(f"teacher, {name}", steps * len(paths), steps * there) as bar:
        for path, part in zip(paths, batches, strict=True):
            if not path.exists():
                found = walker.walk(
                    program.call, program.update, part, seen=lambda *_: bar.advance()
                )
                with replacing(path) as temporary, temporary.open("wb") as file:
                    np.save(file, found)
            targets.append(np.load(path))
    return Samples(samples.x, samples.label, samples.guidance, np.concatenate(targets))
