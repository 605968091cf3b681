"""Levels and weights of history fitted to one network: Gauss-Newton through its calls.

A tuned solver is some twenty numbers, and its error thousands a sample; so the Jacobian is small
enough to have whole, a column a number, by forward differences: a column walks only the rows that
its number changes, which is half of them on average. A few steps of damped Gauss-Newton (Levenberg
1944; Marquardt 1963) then do what takes gradient descent hundreds. A few samples' trajectories
fork, and would outweigh the
others: errors count by Cauchy's loss, s²·log(1 + e²/s²), through its weights 1/(1 + e²/s²).

What e is the distance of is one of LOSSES: of the samples themselves; or of these and of how much
they vary around each place, so that a blurred sample is further away than one whose detail lies
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
LOSSES = ("pixels", "contrast")
CONTRAST = 2.0
FAINT = 0.02
"""contrast: what a difference of local contrast weighs beside one of pixels, and the contrast below
which differences fade."""
ENOUGH = 3e-3
"""A step that lowers the loss by a smaller share of it is the last."""


@dataclass(frozen=True, eq=False)
class Form:
    """The numbers of a tuned solver of `calls` rows as one vector: the log-SNR of rows 1 …, the
    first being the last knot's; and the weights that a row can have, row k of at most k estimates
    before its own."""

    bundle: Bundle
    calls: int

    @property
    def usable(self) -> NDArray[np.bool_]:
        return np.arange(MEMORY) < np.arange(self.calls)[:, None]

    @property
    def steps(self) -> Float64:
        """By how much each number is moved for a difference."""
        return np.r_[np.full(self.calls - 1, LEVEL), np.full(self.usable.sum(), WEIGHT)]

    def vector(self, program: Program) -> Float64:
        """Of a program that remembers estimates D and nothing else, on a grid from the last knot:
        its row's weights of them are alpha'·w."""
        alpha, sigma = program.moments[:, 0].T
        w = program.update[:, 0, 1 : 1 + MEMORY] / alpha[1:, None]
        return np.r_[log_snr_of(alpha, sigma)[1:-1], w[self.usable]]

    def tuned(self, theta: Float64, made: dict[str, Any] | None = None) -> Tuned:
        """Raises RequestError where the levels do not fall one after another inside the
        schedule."""
        schedule = self.bundle.schedule
        lam = theta[: self.calls - 1]
        w = np.zeros((self.calls, MEMORY))
        if (np.diff(lam) < CLOSEST).any():
            raise RequestError("the levels of a tuned solver must fall.")
        w[self.usable] = theta[self.calls - 1 :]
        return Tuned(np.r_[schedule.time[-1], schedule.time_at(lam)], w, made or {})

    def table(self, theta: Float64) -> tuple[Float64, Float64]:
        """call [K, 6] and update [K, R, R+2]; guidance is the samples' own. Raises RequestError,
        see `tuned`."""
        program = self.tuned(theta).program(
            self.bundle.schedule, self.bundle.prediction, clip=self.bundle.clip
        )
        return program.call, program.update


def errors(
    walker: Walker, table: tuple[Float64, Float64], samples: Samples, loss: str = "pixels"
) -> Float64:
    """[n]: root mean square distance of each sample from the teacher's, in what `loss` looks at."""
    found = [
        looked_at(walker.walk(*table, part), loss) - looked_at(part.target, loss)
        for part in samples.batches()
    ]
    return np.sqrt(np.concatenate([(r**2).mean(1) for r in found]))


def rms(error: Float64) -> float:
    """Over samples and all that they consist of."""
    return float(np.sqrt(np.mean(error**2)))


def looked_at(x: NDArray[Any], loss: str) -> Float64:
    """[n, F] of samples [n, *S]: all their numbers; for "contrast" also the standard deviation in
    every 3×3 window of the last two axes (the contrast of Wang et al. 2004's structural
    similarity), which says how sharp a sample is and not where."""
    x = x.astype(np.float64)
    if loss == "pixels":
        return x.reshape(len(x), -1)
    H, W = (side - 2 for side in x.shape[-2:])
    windows = np.stack([x[..., i : i + H, j : j + W] for i in range(3) for j in range(3)])
    contrast = np.sqrt(windows.var(0) + FAINT**2)
    return np.concatenate([x.reshape(len(x), -1), CONTRAST * contrast.reshape(len(x), -1)], 1)


@dataclass(frozen=True)
class Fit:
    """Where fitting has come to: theta after so many steps, the damping of the next, the errors
    [n], and whether there is nothing more to gain."""

    theta: Float64
    damping: float
    error: Float64
    steps: int = 0
    ended: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "theta": self.theta.tolist(), "error": self.error.tolist()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Fit:
        return cls(
            **{**value, "theta": np.array(value["theta"]), "error": np.array(value["error"])}
        )

    def loss(self, scale: float) -> float:
        return float(np.mean(scale**2 * np.log1p((self.error / scale) ** 2)))


def begin(form: Form, walker: Walker, theta: Float64, samples: Samples, loss: str) -> Fit:
    return Fit(theta, 1e-2, errors(walker, form.table(theta), samples, loss))


def step(form: Form, walker: Walker, fit: Fit, samples: Samples, scale: float, loss: str) -> Fit:
    """One step of damped Gauss-Newton that lowers the loss; the same theta, ended, where none was
    found."""
    H, gradient = _normal_equations(form, walker, fit.theta, samples, scale, loss)
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
        if found and found.loss(scale) < fit.loss(scale):
            ended = found.loss(scale) > (1 - ENOUGH) * fit.loss(scale)
            return Fit(found.theta, found.damping, found.error, fit.steps + 1, ended)
        damping *= 4
    return Fit(fit.theta, damping, fit.error, fit.steps + 1, ended=True)


def _normal_equations(
    form: Form, walker: Walker, theta: Float64, samples: Samples, scale: float, loss: str
) -> tuple[Float64, Float64]:
    """(JᵀWJ, JᵀWr) of the residuals r at theta, W Cauchy's weights; means over samples and what
    they consist of."""
    base = form.table(theta)
    P = len(theta)
    moved = [form.table(theta + np.eye(P)[p] * form.steps[p]) for p in range(P)]
    H = np.zeros((P, P))
    gradient = np.zeros(P)
    for part in samples.batches():
        rows: list[tuple[Any, Any]] = []
        x = walker.walk(
            *base, part, seen=lambda state, denoised, rows=rows: rows.append((state, denoised))
        )
        looks = looked_at(x, loss)
        J = np.empty((P, *looks.shape), np.float32)
        for p, table in enumerate(moved):
            k = _first_moved(base, table)
            state, denoised = rows[k]
            asked = None if (table[0][k] != base[0][k]).any() else denoised
            J[p] = (
                looked_at(walker.walk(*table, part, before=(k, state, asked)), loss) - looks
            ) / form.steps[p]
        r = looks - looked_at(part.target, loss)
        w = 1 / (1 + (r**2).mean(1) / scale**2) / r.shape[1]
        for i in range(len(x)):
            columns = J[:, i].astype(np.float64)
            H += w[i] * columns @ columns.T
            gradient += w[i] * columns @ r[i]
    return H / len(samples), gradient / len(samples)


def _first_moved(a: tuple[Float64, Float64], b: tuple[Float64, Float64]) -> int:
    """The first row in which two tables differ."""
    differ = (a[0] != b[0]).any(1) | (a[1] != b[1]).any((1, 2))
    return int(np.argmax(differ))
