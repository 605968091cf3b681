"""A solver as a table: one row per network call, all decided before the loop that runs it starts.

    for row in program:
        D     = clip(c_skip·x + c_out·F(c_in·x, time, label))        x = state[0]
        state = M @ [state ; D ; z]

The loop holds R registers of the sample's shape. Register 0 is x; the others hold what the solver
remembers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ..errors import RequestError
from ..errors.arguments import choice, function, instance
from ..errors.messages import refused
from .arrays import Array, Bool, Float64, Int64
from .guidance import guidance_scales
from .marginals import prove
from .precondition import PREDICTIONS as PREDICTIONS
from .precondition import precondition
from .schedule import Schedule
from .update import D, R, Update, Z

TIME, C_IN, C_SKIP, C_OUT, CLIP, GUIDANCE = range(6)
"""Columns of `Program.call`."""


@dataclass(frozen=True, eq=False)
class Program:
    """A frozen table that runs a reverse process: K rows, one network call each.

    `make_program` makes one. Construction proves that for a perfect network the numbers keep the
    moments that they declare. The proof covers marginals, not accuracy: weights of history that are
    wrong but have the right sum pass it.

    Attributes:
        call: [K, 6]: time, c_in, c_skip, c_out, clip bound (inf: none), guidance.
        update: [K, R, R+2], M.
        moments: [K+1, R, 2], see `Update`; moments[k, 0] is the level (alpha, sigma) of row k.
        excess: [K], see `Update`.
        bias: [K], see `Update`.
        answer: [K, 2], what a perfect network predicts in each row, in units of (x_0, eps).
        start: x_T = start · eps.

    Raises:
        RequestError: A coefficient is not finite, or the proof fails.
    """

    solver: str
    call: Float64
    update: Float64
    moments: Float64
    excess: Float64
    bias: Float64
    answer: Float64
    start: float

    def __post_init__(self) -> None:
        for name in ("call", "update", "moments", "excess", "bias", "answer"):
            getattr(self, name).setflags(write=False)
        # Only the clip bound may be infinite.
        finite = np.delete(self.call, CLIP, axis=1)
        if not (np.isfinite(finite).all() and np.isfinite(self.update).all()):
            raise RequestError(
                f"solver {self.solver!r}: a coefficient is not finite; it cannot use one of the "
                f"grid's levels."
            )
        prove(
            self.solver,
            self.call[:, [C_SKIP]],
            self.call[:, [C_OUT]],
            self.answer,
            Update(self.call[:, TIME], self.update, self.moments, self.excess, self.bias),
        )

    def __len__(self) -> int:
        return len(self.call)

    @property
    def level(self) -> Float64:
        """[K, 2]: (alpha, sigma) at which each row is evaluated."""
        return self.moments[:-1, 0]

    @property
    def noisy(self) -> Bool:
        """[K]: whether the row adds fresh noise."""
        return (self.update[:, :, Z] != 0).any(axis=1)


def assemble(
    solver: str,
    update: Update,
    schedule: Schedule,
    prediction: str,
    *,
    clip: float | None = None,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
) -> Program:
    """Make the program of a solver's update for networks of one prediction.

    Args:
        solver: The solver's name, for messages.
        prediction: See `precondition`.
        clip: The bound on |D|; None for no bound.
        guidance: The classifier-free guidance scale; 1 is none.
        guidance_interval: (low, high], in sigma/alpha, where guidance holds; None for everywhere.

    Raises:
        RequestError: The program's proof fails, see `Program`.
    """
    alpha, sigma = update.moments[:-1, 0].T
    c, answer = precondition(prediction, alpha, sigma, schedule.parameters.get("sigma_data", 0.5))
    bound = np.full(len(alpha), np.inf if clip is None else clip)
    scale = guidance_scales(guidance, guidance_interval, alpha, sigma)
    call = np.column_stack([update.time, c, bound, scale])
    # The network must be asked at the time of the level that x is at.
    at_time = np.stack(schedule.level(update.time), -1)
    if not np.allclose(at_time, np.stack([alpha, sigma], -1), rtol=1e-9, atol=1e-12):
        raise RequestError(
            f"solver {solver!r}: a row asks the network at a time that is not the time of its "
            f"level."
        )
    # A variance-preserving schedule starts at unit variance even if its alpha there is not yet 0.
    start = 1.0 if schedule.variance_preserving else float(sigma[0])
    return Program(
        solver, call, update.M, update.moments, update.excess, update.bias, answer, start
    )


Network: TypeAlias = Callable[..., Array]
"""F(x, time[, label], **conditions): x [B, *S], time [B], label [B] → [B, *S]."""


def column(values: Array, rank: int) -> Array:
    """Reshape one number a sample, [B], to [B, 1, …] of `rank` dimensions."""
    return values.reshape(-1, *[1] * (rank - 1))


def denoise(
    call: Array,
    network: Network,
    x: Array,
    label: Int64 | None = None,
    null_label: int | None = None,
    conditions: Mapping[str, Array] | None = None,
    null_conditions: Mapping[str, Array] | None = None,
) -> Array:
    """Compute the denoised estimate D of one row, [B, *S], in the dtype of x.

    D = clip(c_skip·x + c_out·F(c_in·x, time, label)). If guidance g differs from 1,
    F = F_c + (g - 1)·(F_c - F_u) with F_u under the null values (Ho & Salimans 2022, eq. 6, with
    g = 1 + w). The network is called for F_u of those samples only.

    Args:
        call: `Program.call` of the row, [6], or of each sample's own row, [B, 6].
        x: [B, *S], any float dtype.
        label: [B], or None for a network without labels.
        null_label: the number of the null label; None keeps the label for F_u.
        conditions: [B, …] each, which the network takes by name.
        null_conditions: for F_u, [*shape] each; other conditions are kept.

    Raises:
        RequestError: The network's output has another shape than x.
    """
    # Rounded to the dtype of x once, so that nothing below is computed in another.
    rows = np.broadcast_to(call, (len(x), call.shape[-1])).astype(x.dtype)
    time, c_in, c_skip, c_out, bound, guidance = (
        rows[:, TIME] if i == TIME else column(rows[:, i], x.ndim) for i in range(GUIDANCE + 1)
    )
    scaled = c_in * x
    given = () if label is None else (label,)
    named = dict(conditions or {})
    F = _like(x, "network", "F", network(scaled, time, *given, **named))
    guided = np.flatnonzero(rows[:, GUIDANCE] != 1)
    # Without a label or a null value there is nothing to guide away from.
    if len(guided) and (given or null_conditions):
        kept = tuple(array[guided] for array in given)
        null = kept if null_label is None else tuple(np.full_like(a, null_label) for a in kept)
        without = {name: array[guided] for name, array in named.items()}
        for name, value in (null_conditions or {}).items():
            without[name] = np.broadcast_to(value, without[name].shape)
        unguided = network(scaled[guided], time[guided], *null, **without)
        F_u = _like(x[guided], "network", "F", unguided)
        F = F.copy()  # the network's own output may be memory that it uses again
        F[guided] += (guidance[guided] - 1) * (F[guided] - F_u)
    return np.clip(c_skip * x + c_out * F, -bound, bound)


def _like(x: Array, name: str, what: str, value: Array) -> Array:
    """Return what the caller's function returned. Raises RequestError unless it has x's shape."""
    # Any other shape may broadcast, to numbers that look right.
    if getattr(value, "shape", None) != x.shape:
        raise refused(name, f"a function that returns {what} of x's shape {list(x.shape)}", value)
    return value


def advance(M: Array, state: Array, denoised: Array, z: Array | None = None) -> Array:
    """Compute the registers after one row, M @ [state ; D ; z], [B, R, *S].

    Args:
        M: `Program.update` of the row, [R, R+2], or of each sample's own row, [B, R, R+2].
        state: the registers, [B, R, *S].
        denoised: D, [B, *S].
        z: the row's noise, [B, *S]; None for none.
    """
    M = np.broadcast_to(M, (len(state), R, R + 2)).astype(state.dtype)
    # The size is given, because -1 is undefined for a batch of none.
    flat = M[:, :, :R] @ state.reshape(len(state), R, math.prod(state.shape[2:]))
    after = flat.reshape(state.shape)
    # D and z are added on their own: stacking them below the registers would copy the state.
    for source, weights in ((denoised, M[:, :, D]), (z, M[:, :, Z])):
        if source is not None:
            after += weights.reshape(len(state), R, *[1] * (source.ndim - 1)) * source[:, None]
    return after


def run(
    program: Program,
    network: Network,
    x: Array,
    noise: Callable[[int], Array] | None = None,
    *,
    label: Int64 | None = None,
    null_label: int | None = None,
    conditions: Mapping[str, Array] | None = None,
    null_conditions: Mapping[str, Array] | None = None,
    on_step: Callable[[int, Array], None] | None = None,
) -> Array:
    """Run the reverse loop in numpy, the reference for every backend.

    Args:
        x: [B, *S], any float dtype, which the whole loop keeps: x_T = program.start · eps.
        noise: noise(k) returns z [B, *S] of row k; it is called for noisy rows only. None is for
            programs without them.
        label: [B], or None for a network without labels.
        null_label: The number of the null label, for guided rows, see `denoise`.
        conditions: [B, …] each, which the network takes by name.
        null_conditions: Their null values, for guided rows, [*shape] each.
        on_step: on_step(k, D) is called after each row, with D [B, *S].

    Returns:
        x at the program's end, [B, *S].

    Raises:
        RequestError: An argument is of the wrong type or shape, or `noise` is needed.
    """
    instance("program", program, Program, "Make one with make_program.")
    function("network", network)
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f" or x.ndim == 0:
        raise refused("x", "a float array [B, *S]", x)
    if label is not None and (not isinstance(label, np.ndarray) or label.shape != x.shape[:1]):
        raise refused("label", f"an array of {len(x)} labels", label)
    _check_conditions(conditions, null_conditions, len(x))
    contrasts = (label is not None and null_label is not None) or bool(null_conditions)
    _check_needs(program, noise, contrasts)
    given = (label, null_label, conditions, null_conditions)
    state = np.zeros((len(x), R, *x.shape[1:]), x.dtype)
    state[:, 0] = x
    for k, noisy in enumerate(program.noisy):
        denoised = denoise(program.call[k], network, state[:, 0], *given)
        z = _like(x, "noise", "z", noise(k)) if noise is not None and noisy else None
        state = advance(program.update[k], state, denoised, z)
        if on_step is not None:
            on_step(k, denoised)
    return state[:, 0].copy()


def _check_conditions(given: object, null: object, count: int) -> None:
    """Raise RequestError unless conditions are `count` values each, and null values are of them."""
    known: Mapping[str, Array] = instance("conditions", {} if given is None else given, Mapping)
    for name, values in known.items():
        if not isinstance(values, np.ndarray) or values.shape[:1] != (count,):
            raise refused(f"conditions[{name!r}]", f"an array of {count} values", values)
    for name in instance("null_conditions", {} if null is None else null, Mapping):
        choice("null_conditions", name, known, "condition")


def _check_needs(program: Program, noise: object, contrasts: bool) -> None:
    """Raise RequestError if a program needs noise, or something to guide away from, without any."""
    noisy = program.noisy
    if noise is not None:
        function("noise", noise)
    elif noisy.any():
        raise RequestError(
            f"solver {program.solver!r} adds noise in {noisy.sum()} of {len(noisy)} rows, got no "
            "`noise`. Pass a function of the row."
        )
    if not contrasts and (program.call[:, GUIDANCE] != 1).any():
        raise RequestError(
            "the program is guided, and there is nothing to guide away from. Pass label and "
            "null_label, or null_conditions; or make a program with guidance 1."
        )
