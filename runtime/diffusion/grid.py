"""Grids: the noise levels that a solver visits, noisiest first. Fewer steps is another grid, never
another rule for the previous step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import RequestError
from ..errors.arguments import choice, instance, integer, number, numbers, refused, unwrapped
from ..errors.messages import shown
from .schedule import Float64, Schedule, log_snr_of


@dataclass(frozen=True, eq=False)
class Grid:
    """n intervals between n + 1 levels: time, alpha, sigma, each [n+1]. The clean end (1, 0) has no
    time: NaN.

    schedule: where solvers find the levels between, which those that call more than once a step ask
    for.
    """

    name: str
    time: Float64
    alpha: Float64
    sigma: Float64
    schedule: Schedule | None = None

    def __len__(self) -> int:
        return len(self.alpha) - 1

    @property
    def log_snr(self) -> Float64:
        """[n+1]: log(alpha² / sigma²), +inf at the clean end."""
        return log_snr_of(self.alpha, self.sigma)

    @property
    def knot(self) -> Float64:
        """[n+1]: time counted in the schedule's knots from the least noisy one; NaN at the clean
        end."""
        schedule = self._of_schedule()
        return np.interp(self.time, schedule.time, np.arange(len(schedule)))

    @property
    def noisiest(self) -> float:
        """The lowest log-SNR that the schedule has."""
        return float(self._of_schedule().log_snr[-1])

    def tail(self, strength: float) -> Grid:
        """The grid's last intervals, a share `strength` of them (0 … 1, at least one): where a
        reverse process starts that is given a picture."""
        count = max(1, round(number("strength", strength, 0.0, 1.0) * len(self)))
        last = slice(len(self) - count, None)
        return Grid(self.name, self.time[last], self.alpha[last], self.sigma[last], self.schedule)

    def climbing(self) -> Grid:
        """The grid's levels upward, from the schedule's least noisy knot: at the clean end itself
        eps is lost."""
        schedule = self._of_schedule()
        inner = self.log_snr[:-1][::-1] < schedule.log_snr[0] - CLOSEST
        levels = zip(
            (schedule.time, schedule.alpha, schedule.sigma),
            (self.time, self.alpha, self.sigma),
            strict=True,
        )
        time, alpha, sigma = (np.r_[knots[0], mine[:-1][::-1][inner]] for knots, mine in levels)
        if len(time) < 2:
            raise RequestError(
                f"grid {self.name!r} has no level above the least noisy one to climb to: take "
                f"more steps, or a higher strength."
            )
        return Grid(self.name, time, alpha, sigma, schedule)

    def between(self, log_snr: Float64) -> tuple[Float64, Float64]:
        """time [m] and level [m, 2] of the schedule at log_snr [m]. Raises RequestError outside the
        schedule."""
        schedule = self._of_schedule()
        time = schedule.time_at(log_snr)
        return time, np.stack(schedule.level(time), -1)

    def _of_schedule(self) -> Schedule:
        if self.schedule is None:
            raise RequestError(
                f"grid {self.name!r} has no schedule to find levels between its own on: make it "
                f"with one."
            )
        return self.schedule


def _leading(schedule: Schedule, n: int, offset: float = 0) -> Float64:
    """Knots 0, s, 2s, …, (n-1)s with s = ⌊T/n⌋ (Song et al. 2021's code). Starts below the last
    knot unless n divides into it.

    "leading(1)" starts at knot 1 and goes on from there, as code that counts its knots from 1 does.
    """
    T = len(schedule)
    offset = integer("offset", _whole(offset), 0, len(schedule) - 1)
    knots = offset + np.arange(n - 1, -1, -1) * (T // n)
    if knots[0] >= T:
        raise RequestError(
            f"grid 'leading({offset})' of {n} steps asks for knot {knots[0]} of {T}: take fewer "
            f"steps."
        )
    return schedule.time[knots]


def _trailing(schedule: Schedule, n: int) -> Float64:
    """Knots round(T·i/n) - 1 for i = n, …, 1 (Lin et al. 2024, table 2): always starts at the last
    knot."""
    return schedule.time[np.round(len(schedule) * np.arange(n, 0, -1) / n).astype(int) - 1]


def _linspace(schedule: Schedule, n: int) -> Float64:
    """n knots evenly from T-1 to 0, both ends called, rounded (Nichol & Dhariwal 2021); n = 1 is
    the last knot."""
    return schedule.time[np.round(np.linspace(len(schedule) - 1, 0, n)).astype(int)]


def _log_snr(schedule: Schedule, n: int, bound: float | None = None) -> Float64:
    """n levels evenly in log-SNR from the last knot to the first (Lu et al. 2022), between knots
    where need be.

    Where the last knot is pure noise (log-SNR = -inf) it is the first level, and the even levels
    start at the knot before it. "log_snr(7)" is the last knot, and then n - 1 levels evenly from -7
    to 7, cut at the schedule's ends: a cosine schedule spends most of its log-SNR where hardly
    anything is decided (Lu et al. 2022's code bounds it for this reason).
    """
    if bound is None:
        return _finite_part(schedule, n, np.linspace)
    bound = number("bound", bound, 0.1, 1000.0)
    lam = schedule.log_snr
    low = max(-bound, lam[-1])
    high = min(bound, lam[0])
    even = np.linspace(low, high, n)[1:] if low == lam[-1] else np.linspace(low, high, n - 1)
    return np.r_[schedule.time[-1], schedule.time_at(even)]


def _karras(schedule: Schedule, n: int, rho: float = 7.0) -> Float64:
    """n levels evenly in (sigma/alpha)^(1/rho) from the last knot to the first (Karras et al. 2022,
    eq. 5); pure noise as in `log_snr`.

    rho is 7 in "karras"; "karras(5)" gives it.
    """
    rho = number("rho", rho, 0.1, 100.0)

    def even(low: float, high: float, m: int) -> Float64:
        return (
            -2 * rho * np.log(np.linspace(np.exp(-0.5 * low / rho), np.exp(-0.5 * high / rho), m))
        )

    return _finite_part(schedule, n, even)


def _finite_part(
    schedule: Schedule, n: int, even: Callable[[float, float, int], Float64]
) -> Float64:
    """The times of n levels, even(lowest, highest log-SNR, count), with the schedule's own pure
    noise before them where it has some."""
    lam = schedule.log_snr
    if np.isfinite(lam[-1]):
        return schedule.time_at(even(lam[-1], lam[0], n))
    return np.r_[schedule.time[-1], schedule.time_at(even(lam[-2], lam[0], n - 1)) if n > 1 else []]


CLOSEST = 1e-7
"""Least log-SNR between neighbours: solvers divide by it."""
GRIDS: Mapping[str, Callable[..., Float64]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "log_snr": _log_snr,
    "karras": _karras,
}
PARAMETER = {
    "karras": ("rho", "karras(5)"),
    "leading": ("its offset in knots", "leading(1)"),
    "log_snr": ("its bound", "log_snr(7)"),
}
"""The grids that take a number, what it is, and an example."""


def make_grid(schedule: Schedule, spacing: str | Sequence[float], steps: int | None = None) -> Grid:
    """The grid of `steps` intervals that ends clean: named (`GRIDS`), or explicit falling times in
    the network's unit.

    "karras(5)" gives rho, "leading(1)" the offset, "log_snr(7)" the bound.

    Raises RequestError for an unknown name, for steps outside 1 … T, and for times that do not fall
    or leave the schedule.
    """
    instance("schedule", schedule, Schedule, "Make one with make_schedule.")
    spacing = spacing_of(spacing)
    if isinstance(spacing, str):
        family, parameters = _named(spacing)
        count = integer("steps", steps, 1, len(schedule))
        name = spacing
        time = GRIDS[family](schedule, count, *parameters)
    else:
        name = "explicit"
        time = np.array(spacing)
        if steps is not None and integer("steps", steps, 1) != time.size:
            raise RequestError(
                f"an explicit grid of {time.size} times takes {time.size} steps, got "
                f"steps={shown(steps)}. Leave `steps` out."
            )
    alpha, sigma = schedule.level(time)
    if (np.diff(log_snr_of(alpha, sigma)) < CLOSEST).any():
        raise RequestError(
            f"grid {name!r} has neighbours of the same level: their log-SNR must differ by "
            f"{CLOSEST:g}. Leave some out."
        )
    return Grid(name, np.r_[time, np.nan], np.r_[alpha, 1.0], np.r_[sigma, 0.0], schedule)


def spacing_of(value: Any) -> str | tuple[float, ...]:
    """A grid as a caller gives it: a name, or its times as floats. Raises RequestError for anything
    else."""
    plain = unwrapped(value)
    if isinstance(plain, str):
        return str(plain)
    rule = f"a name ({', '.join(GRIDS)}) or a list of strictly falling times"
    time = numbers("grid", value, rule)
    if time.ndim != 1 or time.size == 0 or not (np.diff(time) < 0).all():
        raise refused("grid", rule, value)
    return tuple(time.tolist())


def _named(spacing: str) -> tuple[str, list[float]]:
    """ "karras(5)" → "karras", [5.0]. Raises RequestError for an unknown name, and for a number
    where the grid takes none."""
    found = re.fullmatch(r"(\w+)\((.*)\)", spacing)
    name, inner = found.groups() if found else (spacing, None)
    if name not in GRIDS:
        choice("grid", spacing, GRIDS)  # raises, with the nearest name
    if inner is None:
        return name, []
    if name not in PARAMETER:
        raise RequestError(f"grid {name!r} takes no number, got {shown(spacing)}.")
    try:
        return name, [float(inner)]
    except ValueError:
        parameter, example = PARAMETER[name]
        raise RequestError(
            f"grid {name!r} takes {parameter} as a number, such as {example!r}, got "
            f"{shown(spacing)}."
        ) from None


def _whole(value: float) -> float | int:
    return int(value) if math.isfinite(value) and float(value).is_integer() else value
