"""What one sample is asked to be, checked and turned into a job for the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from threading import Lock
from typing import Any

import numpy as np

from .arguments import array_of, flag, instance, integer, number, refused, shown, unwrapped
from .backends.base import Float32
from .batch import Job, Known, Table
from .bundle import Bundle
from .diffusion.grid import spacing_of
from .diffusion.noise import MAX_SEED, Stream, noise
from .errors import RequestError


@dataclass(frozen=True, eq=False)
class Request:
    """One sample. What is None takes the bundle's default; label None is the null label, which
    needs no guidance.

    guidance_interval: (low, high], in sigma/alpha, where guidance holds. It starts from one of: the
    seed's noise; `start`, an x [*S] at the level where the walk begins; `picture`, an x_0 [*S]
    noised to that level with q(x_t|x_0). strength: the share of the grid, from its clean end, that
    is walked. up: walk upward and unclipped, from the least noisy knot to the noisiest. known: a
    picture that x_0 agrees with where `mask` is 1, and to the extent that it is, both [*S].
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


FIELDS = tuple(entry.name for entry in fields(Request) if entry.name != "options")
"""What a request says beside its solver's options."""


class Planner:
    """Turns requests for a bundle into jobs, and keeps the programs that it made. May be used from
    many threads at once."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._tables: dict[Any, Table] = {}
        self._lock = Lock()

    def job(self, request: Request) -> Job:
        """The request as the loop runs it. Raises RequestError for a field that cannot be used."""
        instance("request", request, Request, "Pass runtime.Request(seed=…).")
        bundle = self.bundle
        seed = integer("seed", request.seed, 0, MAX_SEED)
        label = bundle.label_number(request.label)
        default = bundle.defaults.guidance if bundle.can_guide else 1.0
        guidance = (
            default if request.guidance is None else number("guidance", request.guidance, -1e3, 1e3)
        )
        if guidance != 1 and not bundle.can_guide:
            raise RequestError(
                f"{bundle.name} cannot be guided (guidance {guidance:g}): it needs labels and a "
                f"trained null label."
            )
        if unwrapped(request.label) is None:
            guidance = 1.0  # F_c is F_u: guidance changes no bit, and need not be paid for
        start, picture, known, mask = (
            self._array(name, getattr(request, name))
            for name in ("start", "picture", "known", "mask")
        )
        if start is not None and picture is not None:
            raise RequestError(
                "a request starts from `start` or from `picture`, got both. Pass one of them."
            )
        strength = number("strength", request.strength, 0.0, 1.0)
        up = flag("up", request.up)
        if start is None and picture is None and (strength != 1 or up):
            raise RequestError(
                "`strength` and `up` need an image to start from. Pass `picture` or `start` too."
            )
        if (known is None) != (mask is None):
            raise RequestError("`known` and `mask` go together, got one of them. Pass both.")
        if mask is not None and not ((mask >= 0) & (mask <= 1)).all():
            raise RequestError(f"`mask` must lie in 0 … 1, got {mask.min():g} … {mask.max():g}.")
        table = self._table(request, guidance, strength, up)
        if picture is not None:
            start = table.level[0] * picture + table.level[1] * noise(
                seed, Stream.ENCODE, 0, bundle.sample_shape
            )
        return Job(
            seed, label, table, start, None if known is None or mask is None else Known(known, mask)
        )

    def _array(self, name: str, value: Any) -> Float32 | None:
        """A request's array, checked."""
        if value is None:
            return None
        shape = self.bundle.sample_shape
        rule = f"finite floats of shape {shape} for each sample"
        try:
            array = array_of(value)
        except Exception:  # the value is somebody's own class, or a tensor that needs a gradient
            raise refused(name, rule, value) from None
        if array.shape != shape or array.dtype.kind != "f":
            raise refused(name, rule, value)
        with np.errstate(over="ignore"):
            array = array.astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise RequestError(
                f"`{name}` must be {rule}, got NaN, infinities or values beyond float32."
            )
        return array

    def _table(self, request: Request, guidance: float, strength: float, up: bool) -> Table:
        if not isinstance(request.options, Mapping):
            raise refused(
                "options", "a dict of the solver's options", request.options, "Pass {} for none."
            )
        self.bundle.check_options(request.solver, request.options, FIELDS)
        settings = {
            "solver": request.solver,
            "steps": request.steps,
            "grid": None if request.grid is None else spacing_of(request.grid),
            "guidance": guidance,
            "guidance_interval": request.guidance_interval,
            "strength": strength,
            "up": up,
            **request.options,
        }
        key = _key(settings)
        with self._lock:
            if key is not None and key in self._tables:
                return self._tables[key]
        try:
            table = Table.of(self.bundle.program(**settings))
        except MemoryError as error:
            raise RequestError(
                f"a program of {shown(settings)} does not fit in memory. Take fewer steps."
            ) from error
        with self._lock:
            if key is not None:
                if len(self._tables) >= 256:
                    self._tables.clear()
                self._tables[key] = table
        return table


def _key(settings: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The settings as a dictionary's key; None if they hold anything but plain values.

    Types are part of it: 2.0 and True are equal to 2 and 1, but are refused as numbers of steps.
    """
    key = []
    for name, value in sorted(settings.items()):
        parts = value if type(value) is tuple else (value,)
        if not all(type(part) in (int, float, str, bool, type(None)) for part in parts):
            return None
        key.append((name, type(value), tuple(map(type, parts)), value))
    return tuple(key)
