"""A solver as data: one row a network call, all decided before the loop starts; and the loop that
runs every solver.

    for row in program:
        D     = clip(c_skip·x + c_out·F(c_in·x, time, label))        x = state[0]
        state = M @ [state ; D ; z]

The loop holds R registers of the sample's shape. Register 0 is x; the others hold what the solver
remembers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from ..errors.arguments import choice, function, instance, is_many, many, number, refused
from .grid import Grid
from .schedule import Float64, Schedule, log_snr_of

R = 4
"""Registers of the loop, in every graph and engine."""
D = R
Z = R + 1
"""Columns of M that multiply the denoised estimate and the noise."""
TIME, C_IN, C_SKIP, C_OUT, CLIP, GUIDANCE = range(6)
"""Columns of `Program.call`."""
CLEAN = (1.0, 0.0)


@dataclass(frozen=True, eq=False)
class Update:
    """What a solver decides on a grid, for any network: the moves of the registers, and what they
    must come to.

    time [K]: where the network is asked. M [K, R, R+2]: the update. moments [K+1, R, 2]: what the
    registers hold before each row and at the end, as (signal, noise) in units of (x_0, eps): x at a
    level is (alpha, sigma), D is (1, 0), eps is (0, 1), unused is (0, 0). bias, excess [K]: signal
    and variance of x beyond its level that the row adds on purpose.
    """

    time: Float64
    M: Float64
    moments: Float64
    excess: Float64
    bias: Float64

    @classmethod
    def blank(cls, levels: Float64, time: Float64) -> Update:
        """Zero coefficients for x that walks along levels [K+1, 2], to be filled in."""
        K = len(levels) - 1
        moments = np.zeros((K + 1, R, 2))
        moments[:, 0] = levels
        return cls(
            np.array(time, np.float64), np.zeros((K, R, R + 2)), moments, np.zeros(K), np.zeros(K)
        )


@dataclass(frozen=True, eq=False)
class Program:
    """A frozen table that runs a reverse process: K rows, one network call each. Made by
    `make_program`.

    call [K, 6]: time, c_in, c_skip, c_out, clip bound (inf: none), guidance. update [K, R, R+2]: M.
    start: x_T = start · eps. moments, excess, bias: see `Update`; moments[k, 0] is the level
    (alpha, sigma) at which row k is evaluated.
    answer [K, 2]: what a perfect network returns at each row, in units of (x_0, eps).

    Raises RequestError when made if, for a perfect network, the numbers do not keep the moments
    that they declare. This proves marginals, not accuracy: weights of history that are wrong but
    sum right pass it.
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
        finite = np.delete(self.call, CLIP, axis=1)
        if not (np.isfinite(finite).all() and np.isfinite(self.update).all()):
            raise RequestError(
                f"solver {self.solver!r}: a coefficient is not finite; it cannot use one of the "
                f"grid's levels."
            )
        c_skip = self.call[:, [C_SKIP]]
        c_out = self.call[:, [C_OUT]]
        level = self.moments[:-1, 0]
        self._require(
            "the denoised estimate",
            c_skip * level,
            c_out * self.answer,
            np.broadcast_to(CLEAN, level.shape),
        )

        M = self.update[:, :, :R]
        before = self.moments[:-1]
        after = self.moments[1:]
        terms = M[..., None] * before[:, None]  # [K, R to, R from, 2]
        size = np.abs(terms).sum(2)
        # An eps register shares x's noise, so noise adds up with its sign; z alone is independent.
        size[..., 1] = size[..., 1] ** 2
        target = after.copy()
        target[..., 1] **= 2
        target[:, 0] += np.stack([self.bias, self.excess], -1)
        size[:, 0] += np.abs(np.stack([self.bias, self.excess], -1))
        self._require(
            "the signal", terms[..., 0].sum(2), self.update[:, :, D], target[..., 0], size[..., 0]
        )
        self._require(
            "the variance",
            terms[..., 1].sum(2) ** 2,
            self.update[:, :, Z] ** 2,
            target[..., 1],
            size[..., 1],
        )

    def _require(
        self, what: str, a: Float64, b: Float64, declared: Float64, scale: Float64 | None = None
    ) -> None:
        size = (np.abs(a) if scale is None else scale) + np.abs(b) + np.abs(declared)
        wrong = np.abs(a + b - declared) > 1e-12 * size
        if wrong.any():
            row = int(np.argwhere(wrong)[0, 0])
            raise RequestError(
                f"solver {self.solver!r}, row {row}: {what} comes to {(a + b)[row]}, but "
                f"{declared[row]} is declared."
            )

    def __len__(self) -> int:
        return len(self.call)

    @property
    def level(self) -> Float64:
        """[K, 2]: (alpha, sigma) at which each row is evaluated."""
        return self.moments[:-1, 0]

    @property
    def noisy(self) -> NDArray[np.bool_]:
        """[K]: whether the row adds fresh noise."""
        return (self.update[:, :, Z] != 0).any(axis=1)


def precondition(
    prediction: str, alpha: Float64, sigma: Float64, sigma_data: float = 0.5
) -> tuple[Float64, Float64]:
    """How to read a network's answer F at levels (alpha, sigma), each [K].

    Returns (c [K, 3], answer [K, 2]): c_in, c_skip, c_out of D = c_skip·x + c_out·F(c_in·x), and
    what a perfect network answers in units of (x_0, eps). Raises RequestError for an unknown
    prediction and for `epsilon` at alpha = 0, where it says nothing.

    epsilon: F = eps (Ho et al. 2020). v: F = alpha·eps - sigma·x_0 (Salimans & Ho 2022). x0: F =
    x_0.
    flow: F = eps - x_0 (Liu et al. 2023). edm: Karras et al. 2022, table 1, applied to x/alpha at
    noise sigma/alpha.
    """
    zero = np.zeros_like(alpha)
    one = np.ones_like(alpha)
    if prediction == "epsilon":
        if (alpha == 0).any():
            raise RequestError(
                "an epsilon network says nothing at zero terminal SNR (alpha = 0): "
                "use a grid that starts lower, or a v, x0 or flow network."
            )
        c = (one, 1 / alpha, -sigma / alpha)
        answer = (zero, one)
    elif prediction == "v":
        square = alpha**2 + sigma**2
        c = (one, alpha / square, -sigma / square)
        answer = (-sigma, alpha)
    elif prediction == "x0":
        c = (one, zero, one)
        answer = (one, zero)
    elif prediction == "flow":
        c = (one, 1 / (alpha + sigma), -sigma / (alpha + sigma))
        answer = (-one, one)
    elif prediction == "edm":
        # Multiplied through by alpha, so that alpha = 0 needs no special case.
        norm = np.hypot(sigma, alpha * sigma_data)
        c = (1 / norm, alpha * sigma_data**2 / norm**2, sigma * sigma_data / norm)
        answer = (sigma / (sigma_data * norm), -alpha * sigma_data / norm)
    else:
        choice("prediction", prediction, PREDICTIONS)
        raise AssertionError(prediction)
    return np.stack(c, -1), np.stack(answer, -1)


PREDICTIONS = ("epsilon", "v", "x0", "flow", "edm")


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
    """The program of a solver's update for one kind of network, with its proof. Raises RequestError
    where the proof fails."""
    alpha, sigma = update.moments[:-1, 0].T
    c, answer = precondition(prediction, alpha, sigma, schedule.parameters.get("sigma_data", 0.5))
    bound = np.full(len(alpha), np.inf if clip is None else clip)
    scale = np.full(len(alpha), guidance)
    if guidance_interval is not None:
        low, high = _interval(guidance_interval)
        rho = np.exp(-0.5 * log_snr_of(alpha, sigma))
        scale[(rho <= low) | (rho > high)] = 1.0
    call = np.column_stack([update.time, c, bound, scale])
    at_time = np.stack(schedule.level(update.time), -1)
    if not np.allclose(at_time, np.stack([alpha, sigma], -1), rtol=1e-9, atol=1e-12):
        raise RequestError(
            f"solver {solver!r}: a row asks the network at a time that is not the time of its "
            f"level."
        )
    start = 1.0 if schedule.variance_preserving else float(sigma[0])
    return Program(
        solver, call, update.M, update.moments, update.excess, update.bias, answer, start
    )


def _interval(value: Any) -> tuple[float, float]:
    """(low, high) of a guidance interval. Raises RequestError where it is not two numbers that rise
    from 0 or above; high may be infinite."""
    rule = "two noise levels (low, high) of sigma/alpha"
    if not is_many(value) or len(value) != 2:
        raise refused("guidance_interval", rule, value)
    low, high = (
        number("guidance_interval", level, 0.0, np.inf)
        for level in many("guidance_interval", value, 2)
    )
    if not low < high:
        raise RequestError(
            f"`guidance_interval` must rise from low to high, got ({low:g}, {high:g})."
        )
    return low, high


Network = Callable[..., Any]
"""F(x, time) or F(x, time, label): x [B, *S], time [B], label [B] → [B, *S]."""


def column(values: NDArray[Any], rank: int) -> NDArray[Any]:
    """A number a sample, [B], as [B, 1, …] of so many dimensions."""
    return values.reshape(-1, *[1] * (rank - 1))


def denoise(
    call: NDArray[Any],
    network: Network,
    x: NDArray[Any],
    label: NDArray[np.int64] | None = None,
    null_label: int | None = None,
) -> NDArray[Any]:
    """The denoised estimate of one row, D = clip(c_skip·x + c_out·F(c_in·x, time, label)), [B, *S].

    Where guidance differs from 1, F = F_c + (g - 1)·(F_c - F_u) with F_u under `null_label`
    (Ho & Salimans 2022, eq. 6, with g = 1 + w). The network is asked for F_u of those samples only.

    Args:
        call: `Program.call` of the row, [6], or of each sample's own row, [B, 6].
        x: [B, *S], any float dtype, which is kept.
        label: [B], or None for a network without labels.
        null_label: the number of the null label.
    """
    rows = np.broadcast_to(call, (len(x), call.shape[-1])).astype(x.dtype)
    time, c_in, c_skip, c_out, bound, guidance = (
        rows[:, TIME] if i == TIME else column(rows[:, i], x.ndim) for i in range(GUIDANCE + 1)
    )
    scaled = c_in * x
    if label is None:
        F = network(scaled, time)
    else:
        F = network(scaled, time, label)
        guided = np.flatnonzero(rows[:, GUIDANCE] != 1)
        if len(guided):
            null = np.full(len(guided), null_label, label.dtype)
            F_u = network(scaled[guided], time[guided], null)
            F = F.copy()
            F[guided] += (guidance[guided] - 1) * (F[guided] - F_u)
    return np.clip(c_skip * x + c_out * F, -bound, bound)


def advance(
    M: NDArray[Any], state: NDArray[Any], denoised: NDArray[Any], z: NDArray[Any] | None = None
) -> NDArray[Any]:
    """The registers after one row, M @ [state ; D ; z], [B, R, *S].

    Args:
        M: `Program.update` of the row, [R, R+2], or of each sample's own row, [B, R, R+2].
        state: the registers, [B, R, *S].
        denoised: D, [B, *S].
        z: the row's noise, [B, *S]; None for none.
    """
    M = np.broadcast_to(M, (len(state), R, R + 2)).astype(state.dtype)
    # The size is said, because -1 stands for nothing in a batch of none.
    flat = M[:, :, :R] @ state.reshape(len(state), R, math.prod(state.shape[2:]))
    found = flat.reshape(state.shape)
    for source, weights in ((denoised, M[:, :, D]), (z, M[:, :, Z])):
        if source is not None:
            found += weights.reshape(len(state), R, *[1] * (source.ndim - 1)) * source[:, None]
    return found


def run(
    program: Program,
    network: Network,
    x: NDArray[Any],
    noise: Callable[[int], NDArray[Any]] | None = None,
    *,
    label: NDArray[np.int64] | None = None,
    null_label: int | None = None,
    on_step: Callable[[int, NDArray[Any]], None] | None = None,
) -> NDArray[Any]:
    """The reverse loop in numpy, the reference for every backend. Returns x at the program's end,
    [B, *S].

    x: [B, *S], any float dtype, which the whole loop keeps: x_T = program.start · eps. noise(k) → z
    [B, *S] for row k; asked for noisy rows only. Where guidance differs from 1, F = F_c + (g -
    1)·(F_c - F_u) with F_u under `null_label` (Ho & Salimans 2022, eq. 6, with g = 1 + w).
    on_step(k, D) is called after each row.
    """
    instance("program", program, Program, "Make one with make_program.")
    function("network", network)
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f" or x.ndim == 0:
        raise refused("x", "a float array [B, *S]", x)
    if label is not None and (not isinstance(label, np.ndarray) or label.shape != x.shape[:1]):
        raise refused("label", f"an array of {len(x)} labels", label)
    state = np.zeros((len(x), R, *x.shape[1:]), x.dtype)
    state[:, 0] = x
    noisy = program.noisy
    for k in range(len(program)):
        denoised = denoise(program.call[k], network, state[:, 0], label, null_label)
        z = noise(k) if noise is not None and noisy[k] else None
        state = advance(program.update[k], state, denoised, z)
        if on_step is not None:
            on_step(k, denoised)
    return state[:, 0].copy()


def levels(grid: Grid) -> Float64:
    """[n+1, 2]: (alpha, sigma) along the grid."""
    return np.stack([grid.alpha, grid.sigma], -1)
