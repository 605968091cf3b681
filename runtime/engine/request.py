"""A request for one sample, and what it resolves to for a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from threading import Lock
from typing import Self

import numpy as np

from ..backends.base import Float32
from ..bundle.bundle import Bundle
from ..bundle.sampling import ResolvedOptions, SamplingOptions
from ..diffusion.arrays import Array
from ..diffusion.noise import MAX_SEED
from ..errors import RequestError
from ..errors.arguments import array_of, instance, integer, number
from ..errors.keywords import check_options
from ..errors.messages import refused, shown, unwrapped
from .conditions import contrasts, resolved_conditions
from .job import CLEAN, Job, Known, Table, lifted
from .json_arrays import array_from_json, array_to_json

ARRAYS = ("start", "picture", "known", "mask")
"""Fields of a request that are arrays [*S]."""
MAPPINGS = ("options", "conditions")
"""Fields of a request that are dicts."""


@dataclass(frozen=True, eq=False)
class Request(SamplingOptions):
    """One sample, and how it is made. None selects the bundle's default.

    It starts from the seed's noise by default. `start` replaces the noise with an x [*S] at the
    grid's first level; `picture` with an x_0 [*S], noised to that level with q(x_t|x_0).

    Attributes:
        seed: 0 … 2^64 - 1.
        label: A name or a number; None for the null label, which needs no guidance.
        start: float32 [*S].
        picture: float32 [*S].
        known: An image [*S] that x_0 agrees with where `mask` is 1, and as far as it is.
        mask: 0 … 1, [*S].
        conditions: By name, the values [*shape] of the bundle's conditions; None for the null
            value of one.
    """

    seed: int
    label: int | str | None = None
    start: Float32 | None = None
    picture: Float32 | None = None
    known: Float32 | None = None
    mask: Float32 | None = None
    conditions: Mapping[str, object] = field(default_factory=dict)

    def __repr__(self) -> str:
        parts = [f"seed={shown(self.seed)}"]
        for entry in fields(self):
            value = getattr(self, entry.name)
            default = {} if entry.name in MAPPINGS else entry.default
            # Arrays have no one truth value: they are compared by what they are shown as.
            if entry.name != "seed" and shown(value) != shown(default):
                parts.append(f"{entry.name}={shown(value)}")
        return f"Request({', '.join(parts)})"

    def to_json(self) -> dict[str, object]:
        """Return the JSON value: the fields that differ from their defaults.

        An array is its shape and its float32 values, little-endian, in base64.
        """
        found: dict[str, object] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in ARRAYS:
                if value is not None:
                    found[entry.name] = _to_json(entry.name, value, array=True)
            elif entry.name in MAPPINGS:
                if value:
                    found[entry.name] = {name: _to_json(name, v) for name, v in value.items()}
            elif getattr(value, "ndim", 0) or (value is not None and value != entry.default):
                # numpy scalars and arrays have `tolist`; a grid's times may be any sequence.
                many = getattr(value, "tolist", lambda v=value: [*map(unwrapped, v)])
                found[entry.name] = value if isinstance(value, (int, float, str)) else many()
        return found

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Return the request that `to_json` describes.

        Raises:
            RequestError: The value is not an object, names an unknown field, or lacks an array in
                an array field. Everything else is checked when the request is resolved.
        """
        if not isinstance(value, Mapping):
            raise refused("a request", "a JSON object", value)
        given = {name: v for name, v in value.items() if v is not None}
        check_options("Request", given, [entry.name for entry in fields(cls)])
        if "seed" not in given:
            raise RequestError("a request needs `seed`. Pass an integer, such as 0.")
        for name in ARRAYS:
            if name in given:
                given[name] = array_from_json(name, given[name])
        conditions = given.get("conditions")
        if isinstance(conditions, Mapping):
            given["conditions"] = {
                name: array_from_json(name, v) if isinstance(v, Mapping) else v
                for name, v in conditions.items()
            }
        return cls(**given)


def _to_json(name: str, value: object, array: bool = False) -> object:
    """Return a value of a request as JSON. array: Whether it must be an array."""
    plain = unwrapped(value)
    if isinstance(plain, (list, tuple)) and not array:
        plain = [*map(unwrapped, plain)]
        array = any(getattr(part, "shape", None) for part in plain)
    if not (array or getattr(plain, "shape", None)):
        return plain
    try:
        return array_to_json(array_of(plain))
    except Exception:  # the value is the caller's class, or a tensor that needs a gradient
        raise refused(name, "an array of numbers", value) from None


FIELDS = tuple(entry.name for entry in fields(Request) if entry.name != "options")
"""The fields of a request, apart from its solver's options."""


@dataclass(frozen=True, eq=False)
class ResolvedRequest:
    """A request with every default of its bundle filled in, its arrays checked.

    Attributes:
        label: The label's number; the null label is the number of classes.
        conditions: By name, [*shape] each; null values are filled in.
        options: How it is made.
    """

    seed: int
    label: int
    conditions: Mapping[str, Array]
    options: ResolvedOptions
    start: Float32 | None
    picture: Float32 | None
    known: Known | None

    def to_json(self) -> dict[str, object]:
        """Return a readable JSON value, with shapes instead of arrays."""
        arrays = {"start": self.start, "picture": self.picture}
        conditions = {name: list(a.shape) for name, a in self.conditions.items()}
        shapes = {name: list(a.shape) for name, a in arrays.items() if a is not None}
        return {
            "seed": self.seed,
            "label": self.label,
            **({"conditions": conditions} if conditions else {}),
            **self.options.to_json(),
            **shapes,
            "known": self.known is not None,
        }


def resolve(bundle: Bundle, request: Request) -> ResolvedRequest:
    """Check a request and fill in the bundle's defaults.

    Raises:
        RequestError: A field cannot be used; the message names it, the rule and the value.
    """
    instance("bundle", bundle, Bundle, "Pass a Bundle, such as Sampler.bundle.")
    instance("request", request, Request, "Pass runtime.Request(seed=…).")
    label = bundle.label_number(request.label)
    conditions = resolved_conditions(bundle, request.conditions)
    options = bundle.resolve(request)
    options = _guided(bundle, request, options)
    arrays = {name: _array(bundle, name, getattr(request, name)) for name in ARRAYS}
    start, picture, known, mask = (arrays[name] for name in ARRAYS)
    if start is not None and picture is not None:
        raise RequestError(
            "a request starts from `start` or from `picture`, got both. Pass one of them."
        )
    if start is None and picture is None and (options.strength != 1 or options.up):
        raise RequestError(
            "`strength` and `up` need an image to start from. Pass `picture` or `start` too."
        )
    if (known is None) != (mask is None):
        raise RequestError("`known` and `mask` go together, got one of them. Pass both.")
    if mask is not None and not ((mask >= 0) & (mask <= 1)).all():
        raise RequestError(f"`mask` must lie in 0 … 1, got {mask.min():g} … {mask.max():g}.")
    return ResolvedRequest(
        seed=integer("seed", request.seed, 0, MAX_SEED),
        label=label,
        conditions=conditions,
        options=options,
        start=start,
        picture=picture,
        known=None if known is None or mask is None else Known(known, mask),
    )


def _guided(bundle: Bundle, request: Request, options: ResolvedOptions) -> ResolvedOptions:
    """Return the options with the guidance scale that holds for the request's conditions."""
    guidance = number("guidance", options.guidance, -1e3, 1e3)
    if guidance != 1 and not bundle.can_guide:
        raise RequestError(
            f"{bundle.name} cannot be guided (guidance {guidance:g}): it needs labels and a "
            "trained null label, or a condition with a null value. Pass guidance=1."
        )
    if not contrasts(bundle, unwrapped(request.label), request.conditions):
        guidance = 1.0  # F_c is F_u: guidance changes no bit, and would cost a second call
    return ResolvedOptions(**{**vars(options), "guidance": guidance})


def _array(bundle: Bundle, name: str, value: object) -> Float32 | None:
    """Return a request's array [*S] as float32, checked."""
    if value is None:
        return None
    shape = bundle.sample_shape
    rule = f"finite floats of shape {shape} for each sample"
    try:
        array = array_of(value)
    except Exception:  # the value is the caller's class, or a tensor that needs a gradient
        raise refused(name, rule, value) from None
    if array.shape != shape or array.dtype.kind != "f":
        raise refused(name, rule, value)
    # What overflows becomes infinite, and the next check names it.
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise RequestError(
            f"`{name}` must be {rule}, got NaN, infinities or values beyond float32."
        )
    return array


class Planner:
    """Turns requests for a bundle into jobs, and keeps the programs that it made.

    May be used from many threads at once.
    """

    MOST = 256
    """The most programs that are kept."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._tables: dict[object, Table] = {}
        self._lock = Lock()

    def job(self, request: Request) -> Job:
        """Return the request as the loop runs it.

        Raises:
            RequestError: A field cannot be used, see `resolve`.
        """
        resolved = resolve(self.bundle, request)
        table = self._table(resolved.options)
        start, low = resolved.start, table.level
        if resolved.picture is not None:
            start, low = resolved.picture, CLEAN
        elif start is not None and resolved.options.solver == "edm":
            # Its first lift is the start's own noise; heun begins at the grid's level.
            low = self._table(replace(resolved.options, solver="heun", options={})).level
        start = lifted(start, low, table.level, resolved.seed)
        ports = {c.name: c.port for c in self.bundle.conditions}
        conditions = {ports[name]: value for name, value in resolved.conditions.items()}
        return Job(resolved.seed, resolved.label, table, start, resolved.known, conditions)

    def _table(self, options: ResolvedOptions) -> Table:
        key = _key({**vars(options), "options": None, **options.options})
        with self._lock:
            if key is not None and key in self._tables:
                return self._tables[key]
        # Outside the lock: a long program takes milliseconds, and others need not wait for it.
        try:
            table = Table.of(self.bundle.program_of(options))
        except MemoryError as error:
            raise RequestError(
                f"a program of {shown(options.to_json())} does not fit in memory. Take fewer steps."
            ) from error
        with self._lock:
            if key is not None:
                if len(self._tables) >= self.MOST:
                    self._tables.clear()
                self._tables[key] = table
        return table


def _key(settings: Mapping[str, object]) -> tuple[object, ...] | None:
    """Return the settings as a dictionary's key, or None if they hold anything but plain values.

    Types are part of it: 2.0 and True are equal to 2 and 1, but are refused as numbers of steps.
    """
    key: list[object] = []
    for name, value in sorted(settings.items()):
        parts = value if type(value) is tuple else (value,)
        if not all(type(part) in (int, float, str, bool, type(None)) for part in parts):
            return None
        key.append((name, type(value), tuple(map(type, parts)), value))
    return tuple(key)
