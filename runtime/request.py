"""What one sample is asked to be, checked and turned into a job for the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

from .arguments import integer, number
from .backends import Float32
from .bundle import Bundle
from .errors import RequestError
from .loop import Job, Known, Table
from .noise import MAX_SEED, Stream, noise


@dataclass(frozen=True, eq=False)
class Request:
    """One sample. What is None takes the bundle's default; label None is the null label, which needs no guidance.

    guidance_interval: (low, high], in sigma/alpha, where guidance holds. It starts from one of: the seed's noise; `start`, an x [*S] at the
    level where the walk begins; `picture`, an x_0 [*S] noised to that level with q(x_t|x_0). strength: the share of the grid, from its
    clean end, that is walked. up: walk upward and unclipped, from the least noisy knot to the noisiest. known: a picture that x_0 agrees with
    where `mask` is 1, and to the extent that it is, both [*S].
    """

    seed: int
    label: int | str | None = None
    guidance: float | None = None
    solver: str | None = None
    steps: int | None = None
    grid: str | Sequence[float] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    guidance_interval: tuple[float, float] | None = None
    start: Float32 | None = None
    picture: Float32 | None = None
    strength: float = 1.0
    up: bool = False
    known: Float32 | None = None
    mask: Float32 | None = None


class Planner:
    """Turns requests for a bundle into jobs, and keeps the programs that it made. May be used from many threads at once."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._tables: dict[Any, Table] = {}
        self._lock = Lock()

    def job(self, request: Request) -> Job:
        """The request as the loop runs it. Raises RequestError for what makes no sense."""
        seed, bundle = integer("seed", request.seed, 0, MAX_SEED), self.bundle
        label = bundle.label_number(request.label)
        default = bundle.defaults.guidance if bundle.can_guide else 1.0
        guidance = default if request.guidance is None else number("guidance", request.guidance, -1e3, 1e3)
        if guidance != 1 and not bundle.can_guide:
            raise RequestError(
                f"{bundle.name} cannot be guided (guidance {guidance:g}): it needs labels and a trained null label."
            )
        if request.label is None:
            guidance = 1.0  # F_c is F_u: guidance changes no bit, and need not be paid for
        start, picture, known, mask = (
            self._array(name, getattr(request, name)) for name in ("start", "picture", "known", "mask")
        )
        if start is not None and picture is not None:
            raise RequestError("a request starts from `start` or from `picture`, found both.")
        if start is None and picture is None and (request.strength != 1 or request.up):
            raise RequestError("part of a grid, or a way up, starts from a picture: give `picture` or `start` with it.")
        if (known is None) != (mask is None):
            raise RequestError("`known` and `mask` go together, found one of them.")
        table = self._table(request, guidance)
        if picture is not None:
            start = table.level[0] * picture + table.level[1] * noise(seed, Stream.ENCODE, 0, bundle.sample_shape)
        return Job(seed, label, table, start, None if known is None or mask is None else Known(known, mask))

    def _array(self, name: str, value: Any) -> Float32 | None:
        """A request's array, checked."""
        if value is None:
            return None
        array, shape = np.asarray(value), self.bundle.sample_shape
        if array.shape != shape or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise RequestError(
                f"{name} must be finite floats of shape {shape} for each sample, found {array.dtype} {array.shape}."
            )
        return array.astype(np.float32, copy=False)

    def _table(self, request: Request, guidance: float) -> Table:
        grid = request.grid if request.grid is None or isinstance(request.grid, str) else tuple(request.grid)
        settings = {"solver": request.solver, "steps": request.steps, "grid": grid, "guidance": guidance}
        settings |= {
            "guidance_interval": request.guidance_interval,
            "strength": request.strength,
            "up": request.up,
            **request.options,
        }
        # With types: 2.0 and True are equal to 2 and 1, but are refused as numbers of steps.
        key = tuple((name, type(value), value) for name, value in sorted(settings.items()))
        try:
            hash(key)
        except TypeError:
            key = None
        with self._lock:
            if key is not None and key in self._tables:
                return self._tables[key]
        table = Table.of(self.bundle.program(**settings))
        with self._lock:
            if key is not None:
                if len(self._tables) >= 256:
                    self._tables.clear()
                self._tables[key] = table
        return table
