"""Levels and weights of history fitted to one network: Gauss-Newton through its calls.

A tuned solver is about twenty numbers, and its error thousands of numbers a sample. So the Jacobian
is small enough to compute in full, one column a number, by forward differences. A column runs only
the rows that its number changes, half of them on average. A few steps of damped Gauss-Newton
(Levenberg 1944; Marquardt 1963) then replace hundreds of steps of gradient descent.

The trajectories of a few samples fork and would outweigh the others. Errors e therefore count by
Cauchy's loss, s²·log(1 + e²/s²), through its weights 1/(1 + e²/s²).

LOSSES names what e measures: the samples alone ("pixels"), or also how much they vary around each
pixel ("contrast"). By contrast, a blurred sample is further away than one with its detail
elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.bundle import Bundle
from runtime.diffusion.grid import CLOSEST
from runtime.diffusion.program import Program
from runtime.diffusion.schedule import Float64, log_snr_of
from runtime.diffusion.tuned import MEMORY, Tuned
from runtime.errors import RequestError

from .reference import Samples, Walker

LEVEL = 1e-2
WEIGHT = 4e-3
"""By how much a log-SNR and a weight are moved for a difference: far above float32's rounding in D.
"""
REJECTIONS = 5
"""Steps that are tried with rising damping before a fit ends."""
LOSSES = ("pixels", "contrast")
CONTRAST = 2.0
FAINT = 0.02
"""The weight of a difference in local contrast next to one in pixels, and the contrast below which
differences fade."""
ENOUGH = 3e-3
"""A step that lowers the loss by a smaller share of it is the last."""


@dataclass(frozen=True, eq=False)
class Form:
    """The numbers of a tuned solver of `calls` rows as one vector theta [P].

    They are the log-SNRs of all rows but the first, which starts at the last knot, and the weights
    of history. Row k has at most k weights, one for each earlier estimate.
    """

    bundle: Bundle
    calls: int

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Which weights [calls, MEMORY] exist: row k follows k estimates."""
        return np.arange(MEMORY) < np.arange(self.calls)[:, None]

    @property
    def steps(self) -> Float64:
        """By how much each number [P] is moved for a difference."""
        return np.r_[np.full(self.calls - 1, LEVEL), np.full(self.usable.sum(), WEIGHT)]

    def vector(self, program: Program) -> Float64:
        """Return theta [P] of a program that remembers estimates D and nothing else.

        Its grid must start at the last knot.
        """
        # The update multiplies the estimates by alpha'·w, alpha' that of the row's end.
        alpha, sigma = program.moments[:, 0].T
        w = program.update[:, 0, 1 : 1 + MEMORY] / alpha[1:, None]
        return np.r_[log_snr_of(alpha, sigma)[1:-1], w[self.usable]]

    def tuned(self, theta: Float64, made: dict[str, Any] | None = None) -> Tuned:
        """Return the solver of theta [P].

        Raises:
            RequestError: The levels do not fall one after another inside the schedule.
        """
        schedule = self.bundle.schedule
        lam = theta[: self.calls - 1]
        w = np.zeros((self.calls, MEMORY))
        if (np.diff(lam) < CLOSEST).any():
            raise RequestError("the levels of a tuned solver must fall.")
        w[self.usable] = theta[self.calls - 1 :]
        return Tuned(np.r_[schedule.time[-1], schedule.time_at(lam)], w, made or {})

    def table(self, theta: Float64) -> tuple[Float64, Float64]:
        """Return call [K, 6] and update [K, R, R+2] of theta [P]. Guidance is the samples' own.

        Raises:
            RequestError: See `tuned`.
        """
        program = self.tuned(theta).program(
            self.bundle.schedule, self.bundle.prediction, clip=self.bundle.clip
        )
        return program.call, program.update


def errors(
    walker: Walker, table: tuple[Float64, Float64], samples: Samples, loss: str = "pixels"
) -> Float64:
    """Return each sample's root mean square distance [n] from the teacher's, see `looked_at`."""
    found = [
        looked_at(walker.walk(*table, part), loss) - looked_at(part.target, loss)
        for part in samples.batches()
    ]
    return np.sqrt(np.concatenate([(r**2).mean(1) for r in found]))


def rms(error: Float64) -> float:
    """Return the root mean square of errors of any shape."""
    return float(np.sqrt(np.mean(error**2)))


def looked_at(x: NDArray[Any], loss: str) -> Float64:
    """Return the features [n, F] of samples [n, *S] that a loss compares.

    They are all values of a sample. For "contrast" they are also the standard deviation in every
    3×3 window of the last two axes. This is the contrast of Wang et al. 2004's structural
    similarity, which measures how sharp a sample is, but not where.
    """
    x = x.astype(np.float64)
    if loss == "pixels":
        return x.reshape(len(x), -1)
    H, W = (side - 2 for side in x.shape[-2:])
    windows = np.stack([x[..., i : i + H, j : j + W] for i in range(3) for j in range(3)])
    # FAINT keeps the root's slope finite for flat windows.
    contrast = np.sqrt(windows.var(0) + FAINT**2)
    return np.concatenate([x.reshape(len(x), -1), CONTRAST * contrast.reshape(len(x), -1)], 1)


@dataclass(frozen=True)
class Fit:
    """The state of a fit.

    Attributes:
        theta: The numbers [P] so far.
        damping: That of the next step.
        error: The distance [n] of each sample.
        steps: How many steps led here.
        ended: Whether there is nothing more to gain.
    """

    theta: Float64
    damping: float
    error: Float64
    steps: int = 0
    ended: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the JSON value."""
        return {**vars(self), "theta": self.theta.tolist(), "error": self.error.tolist()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Fit:
        """Read what `to_json` returned."""
        return cls(
            **{**value, "theta": np.array(value["theta"]), "error": np.array(value["error"])}
        )

    def loss(self, scale: float) -> float:
        """Return Cauchy's loss of the errors, the mean of s²·log(1 + e²/s²) with s = `scale`."""
        return float(np.mean(scale**2 * np.log1p((self.error / scale) ** 2)))


def begin(form: Form, walker: Walker, theta: Float64, samples: Samples, loss: str) -> Fit:
    """Return the fit at theta [P], before its first step."""
    return Fit(theta, 1e-2, errors(walker, form.table(theta), samples, loss))


def step(form: Form, walker: Walker, fit: Fit, samples: Samples, scale: float, loss: str) -> Fit:
    """Return the fit after one step of damped Gauss-Newton that lowers the loss.

    If no step lowers it, the result has the same theta and is ended.
    """
    H, gradient = _normal_equations(form, walker, fit.theta, samples, scale, loss)
    # Marquardt's damping scales with each number's own curvature. If a step fails, more damping
    # makes it shorter and turns it towards the gradient.
    damping = fit.damping
    for _ in range(REJECTIONS):
        theta = fit.theta - np.linalg.solve(
            H + damping * np.diag(np.diag(H)) + 1e-9 * np.eye(len(H)), gradient
        )
        try:
            found = Fit(
                theta, max(damping / 5, 1e-5), errors(walker, form.table(theta), samples, loss)
            )
        except RequestError:  # levels that cross
            found = None
        # The next step starts with less damping, and so nearer to a full Gauss-Newton step.
        if found and found.loss(scale) < fit.loss(scale):
            ended = found.loss(scale) > (1 - ENOUGH) * fit.loss(scale)
            return Fit(found.theta, found.damping, found.error, fit.steps + 1, ended)
        damping *= 4
    return Fit(fit.theta, damping, fit.error, fit.steps + 1, ended=True)


def _normal_equations(
    form: Form, walker: Walker, theta: Float64, samples: Samples, scale: float, loss: str
) -> tuple[Float64, Float64]:
    """Return (JᵀWJ [P, P], JᵀWr [P]) of the residuals r at theta, W Cauchy's weights.

    Both are means over samples and their features.
    """
    base = form.table(theta)
    P = len(theta)
    moved = [form.table(theta + np.eye(P)[p] * form.steps[p]) for p in range(P)]
    H = np.zeros((P, P))
    gradient = np.zeros(P)
    for part in samples.batches():
        # The unmoved trajectory, with the state and D of every row to start columns from.
        rows: list[tuple[Any, Any]] = []
        x = walker.walk(
            *base, part, seen=lambda state, denoised, rows=rows: rows.append((state, denoised))
        )
        looks = looked_at(x, loss)
        J = np.empty((P, *looks.shape), np.float32)
        for p, table in enumerate(moved):
            # Rows before the first one that moved are the same. If that row calls the network as
            # before, so is its D.
            k = _first_moved(base, table)
            state, denoised = rows[k]
            asked = None if (table[0][k] != base[0][k]).any() else denoised
            J[p] = (
                looked_at(walker.walk(*table, part, before=(k, state, asked)), loss) - looks
            ) / form.steps[p]
        r = looks - looked_at(part.target, loss)
        # A weight for each sample, by its distance, so that forked trajectories hardly count.
        w = 1 / (1 + (r**2).mean(1) / scale**2) / r.shape[1]
        for i in range(len(x)):
            # float32 holds the Jacobian in memory; its products are added up in float64.
            columns = J[:, i].astype(np.float64)
            H += w[i] * columns @ columns.T
            gradient += w[i] * columns @ r[i]
    return H / len(samples), gradient / len(samples)


def _first_moved(a: tuple[Float64, Float64], b: tuple[Float64, Float64]) -> int:
    """Return the first row in which two tables differ."""
    differ = (a[0] != b[0]).any(1) | (a[1] != b[1]).any((1, 2))
    return int(np.argmax(differ))
