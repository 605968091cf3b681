"""Sampling: pictures from seeds, in any batch, from any thread, with the same bytes every time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arguments import integer, number
from .backends import BufferPool, Buffers, Float32, open_backend
from .bundle import Bundle
from .errors import RequestError, UnnoiseError
from .noise import MAX_SEED, Stream, noise
from .pictures import UInt8, to_uint8
from .program import GUIDANCE, Program


class Cancelled(UnnoiseError):
    """The step callback asked to stop."""


@dataclass(frozen=True)
class Request:
    """One sample. What is None takes the bundle's default; label None is the null label, which needs no guidance."""

    seed: int
    label: int | str | None = None
    guidance: float | None = None
    solver: str | None = None
    steps: int | None = None
    grid: str | Sequence[float] | None = None
    options: dict[str, Any] = field(default_factory=dict)


class Preview(NamedTuple):
    """What a step callback gets: which samples of the call are under way, how far, and what each would look like if it stopped here."""

    samples: NDArray[np.int64]  # [b], positions in the call's result
    step: int  # rows done, 1 … steps
    steps: int  # rows of the longest program
    denoised: Float32  # [b, *S], the denoised estimates D; a copy


StepCallback = Callable[[Preview], object]
"""Called after every step. Returning False cancels the call, which then raises `Cancelled`."""


class _Table(NamedTuple):
    """A program in the step graph's own type."""

    call: Float32  # [K, 6]
    update: Float32  # [K, R, R+2]
    guided: NDArray[np.bool_]  # [K]
    noisy: NDArray[np.bool_]  # [K]
    start: np.float32


def _table(program: Program) -> _Table:
    call = program.call.astype(np.float32)
    return _Table(
        call, program.update.astype(np.float32), call[:, GUIDANCE] != 1, program.noisy, np.float32(program.start)
    )


class _Job(NamedTuple):
    seed: int
    label: int
    table: _Table


class Sampler:
    """A bundle ready to sample. May be used from many threads at once.

    The same bundle, precision, backend, machine, versions and thread count give the same bytes for the same request, whatever
    else is in the batch and wherever in it the request stands.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        max_batch: int = 16,
    ) -> None:
        self.bundle = bundle
        self.max_batch = integer("max_batch", max_batch, 1)
        self.backend = open_backend(bundle, backend, precision, threads)
        self._pool = BufferPool(self.backend)
        self._tables: dict[Any, _Table] = {}
        self._lock = Lock()

    @classmethod
    def load(
        cls,
        path: str | Path,
        backend: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        max_batch: int = 16,
    ) -> Sampler:
        """Open the bundle in the folder `path`.

        threads: of the inference library, None for one a core. max_batch: larger requests run in chunks of this many.
        Raises BundleError (the files), BackendError (the machine), RequestError (the arguments).
        """
        return cls(Bundle.load(path), backend, precision, threads, max_batch)

    def sample(
        self,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        *,
        label: int | str | Sequence[int | str | None] | None = None,
        guidance: float | Sequence[float | None] | None = None,
        solver: str | None = None,
        steps: int | None = None,
        grid: str | Sequence[float] | None = None,
        on_step: StepCallback | None = None,
        **options: Any,
    ) -> Float32:
        """n samples, float32 [n, *S] in the data's range.

        seed: sample i has seed + i, or a sequence of n. label: a name or number for all, a sequence of n, None for the null label.
        guidance: classifier-free guidance scale, one or n, 1 is none. solver, steps, grid, options: see `runtime.solvers`.
        Raises RequestError for what makes no sense, Cancelled where on_step returns False.
        """
        n = integer("n", n, 1)
        seeds = (
            _each("seed", seed, n)
            if _many(seed)
            else [integer("seed", seed, 0, MAX_SEED - n + 1) + i for i in range(n)]
        )
        labels, scales = _each("label", label, n), _each("guidance", guidance, n)
        requests = [
            Request(s, lab, g, solver, steps, grid, options) for s, lab, g in zip(seeds, labels, scales, strict=True)
        ]
        return self.sample_requests(requests, on_step)

    def pictures(self, n: int = 1, seed: int | Sequence[int] = 0, **arguments: Any) -> UInt8:
        """n pictures, uint8 [n, H, W, C]; the arguments are those of `sample`."""
        return to_uint8(self.sample(n, seed, **arguments), *self.bundle.sample_range)

    def sample_requests(self, requests: Iterable[Request], on_step: StepCallback | None = None) -> Float32:
        """One sample a request, float32 [n, *S]; requests of different solvers, steps and guidance run in one batch."""
        jobs = [self._job(request) for request in requests]
        result = np.empty((len(jobs), *self.bundle.sample_shape), np.float32)
        for first in range(0, len(jobs), self.max_batch):
            chunk = slice(first, first + self.max_batch)
            result[chunk] = self._run(jobs[chunk], first, on_step)
        return result

    def _job(self, request: Request) -> _Job:
        seed, bundle = integer("seed", request.seed, 0, MAX_SEED), self.bundle
        label = bundle.label_number(request.label)
        can_guide = bundle.labels is not None and bundle.labels.null_trained
        default = bundle.defaults.guidance if can_guide else 1.0
        guidance = default if request.guidance is None else number("guidance", request.guidance, -1e3, 1e3)
        if guidance != 1 and not can_guide:
            raise RequestError(
                f"{bundle.name} cannot be guided (guidance {guidance:g}): it needs labels and a trained null label."
            )
        if request.label is None:
            guidance = 1.0  # F_c is F_u: guidance changes no bit, and need not be paid for
        return _Job(seed, label, self._program(request, guidance))

    def _program(self, request: Request, guidance: float) -> _Table:
        grid = request.grid if request.grid is None or isinstance(request.grid, str) else tuple(request.grid)
        # With types: 2.0 and True are equal to 2 and 1, but are refused as numbers of steps.
        options = tuple((name, type(value), value) for name, value in sorted(request.options.items()))
        key = (request.solver, type(request.steps), request.steps, grid, guidance, options)
        try:
            hash(key)
        except TypeError:
            key = None
        with self._lock:
            if key is not None and key in self._tables:
                return self._tables[key]
        table = _table(self.bundle.program(request.solver, request.steps, grid, guidance, **request.options))
        with self._lock:
            if key is not None:
                if len(self._tables) >= 256:
                    self._tables.clear()
                self._tables[key] = table
        return table

    def _run(self, jobs: list[_Job], first: int, on_step: StepCallback | None) -> Float32:
        """The reverse loop over one chunk, its first sample the call's number `first`."""
        shape, longest = self.bundle.sample_shape, max(len(job.table.call) for job in jobs)
        lengths = np.array([len(job.table.call) for job in jobs])
        with self._pool.lend(len(jobs)) as buffers:
            buffers.state[:] = 0
            buffers.noise[:] = 0
            for i, job in enumerate(jobs):
                buffers.state[i, 0] = job.table.start * noise(job.seed, Stream.INITIAL, 0, shape)
                buffers.label[i] = job.label
            quiet = np.ones(len(jobs), bool)  # whose noise buffer is zero
            for k in range(longest):
                active = np.flatnonzero(lengths > k)
                guided = np.zeros(len(jobs), bool)
                for i in active:
                    table = jobs[i].table
                    buffers.call[i], buffers.update[i], guided[i] = table.call[k], table.update[k], table.guided[k]
                    if table.noisy[k]:
                        buffers.noise[i], quiet[i] = noise(jobs[i].seed, Stream.STEP, k, shape), False
                    elif not quiet[i]:
                        buffers.noise[i], quiet[i] = 0, True
                for scaled in (False, True):
                    rows = active[guided[active] == scaled]
                    if len(rows) == len(jobs):
                        buffers.step(scaled)
                    elif len(rows):
                        self._step_some(buffers, rows, scaled)
                if on_step and on_step(Preview(first + active, k + 1, longest, buffers.denoised[active])) is False:
                    raise Cancelled(f"cancelled after step {k + 1} of {longest}.")
            return buffers.state[:, 0].copy()

    def _step_some(self, buffers: Buffers, rows: NDArray[np.int64], guided: bool) -> None:
        """One step of some of the batch's samples: the others are finished, or run the other graph."""
        with self._pool.lend(len(rows)) as part:
            part.state[:] = buffers.state[rows]
            for name in ("noise", "call", "update", "label"):
                getattr(part, name)[:] = getattr(buffers, name)[rows]
            part.step(guided)
            buffers.state[rows] = part.state
            buffers.denoised[rows] = part.denoised


def _many(value: object) -> bool:
    return isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str)


def _each(name: str, value: Any, n: int) -> list[Any]:
    """`value` for each of n samples. Raises RequestError where it is a sequence of another length."""
    if not _many(value):
        return [value] * n
    if len(value) != n:
        raise RequestError(f"{name} must be one value or {n} of them, found {len(value)}.")
    return list(value)
