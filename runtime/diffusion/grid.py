"""Grids: the noise levels that a solver visits, noisiest first.

Fewer steps are another grid. No solver has a rule of its own for finding the level before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import RequestError
from ..errors.arguments import choice, instance, integer, number, numbers
from ..errors.messages import refused, shown, unwrapped
from .arrays import Float64, Int64
from .schedule import Schedule, log_snr_of


@dataclass(frozen=True, eq=False)
class Grid:
    """n intervals between n + 1 levels.

    Attributes:
        time: [n+1]; NaN at the clean end (1, 0), which has no time.
        alpha: [n+1].
        sigma: [n+1].
        schedule: The levels between, for solvers that call the network inside a step.
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
        """[n+1]: time as a number of knots from the least noisy one; NaN at the clean end."""
        schedule = self._of_schedule()
        return np.interp(self.time, schedule.time, np.arange(len(schedule)))

    @property
    def noisiest(self) -> float:
        """The lowest log-SNR that the schedule has."""
        return float(self._of_schedule().log_snr[-1])

    def tail(self, strength: float) -> Grid:
        """Return the last intervals, where a reverse process that is given an image starts.

        strength: The share of intervals that is kept, 0 … 1; at least one is.
        """
        count = max(1, round(number("strength", strength, 0.0, 1.0) * len(self)))
        last = slice(len(self) - count, None)
        return Grid(self.name, self.time[last], self.alpha[last], self.sigma[last], self.schedule)

    def climbing(self) -> Grid:
        """Return the levels upward, from the schedule's least noisy knot.

        Raises:
            RequestError: No level is noisier than that knot.
        """
        schedule = self._of_schedule()
        # x = x_0 at the clean end holds no eps to climb with, so the walk starts one knot above. A
        # level next to that knot would make an interval that solvers divide by.
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
        """Find time [m] and level [m, 2] of the schedule at log_snr [m].

        Raises:
            RequestError: A log-SNR lies outside the schedule, or the grid has no schedule.
        """
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
    """Knots 0, s, 2s, …, (n-1)s with s = ⌊T/n⌋ (the code of Song et al. 2021).

    The grid starts below the last knot unless n = T. "leading(1)" adds 1 to every knot, as code
    that counts knots from 1 does.
    """
    T = len(schedule)
    # The number in a grid's name is parsed as a float: "leading(1)" gives 1.0.
    offset = integer("offset", _whole(offset), 0, len(schedule) - 1)
    knots = offset + np.arange(n - 1, -1, -1) * (T // n)
    if knots[0] >= T:
        raise RequestError(
            f"grid 'leading({offset})' of {n} steps asks for knot {knots[0]} of {T}: take fewer "
            f"steps."
        )
    return schedule.time[knots]


def _trailing(schedule: Schedule, n: int) -> Float64:
    """Knots round(T·i/n) - 1 for i = n, …, 1, which start at the last knot (Lin et al. 2024)."""
    return schedule.time[trailing_knots(len(schedule), n)]


def trailing_knots(T: int, n: int) -> Int64:
    """Return the knots [n] of the grid `trailing` on a schedule of T, noisiest first."""
    return np.round(T * np.arange(n, 0, -1) / n).astype(np.int64) - 1


def _linspace(schedule: Schedule, n: int) -> Float64:
    """n knots evenly from T-1 to 0, both included, rounded (Nichol & Dhariwal 2021).

    For n = 1, the last knot.
    """
    return schedule.time[np.round(np.linspace(len(schedule) - 1, 0, n)).astype(int)]


def _log_snr(schedule: Schedule, n: int, bound: float | None = None) -> Float64:
    """n levels evenly in log-SNR from the last knot to the first (Lu et al. 2022).

    Levels may lie between knots. If the last knot is pure noise (log-SNR = -inf), it is the first
    level, and the even levels start at the knot before it. "log_snr(7)" is the last knot, then
    n - 1 levels evenly from -7 to 7, cut at the schedule's ends. A cosine schedule spends most of
    its log-SNR at levels that decide hardly anything, so the code of Lu et al. 2022 bounds it.
    """
    if bound is None:
        return _finite_part(schedule, n, np.linspace)
    bound = number("bound", bound, 0.1, 1000.0)
    lam = schedule.log_snr
    low = max(-bound, lam[-1])
    high = min(bound, lam[0])
    # If the bound does not cut the noisy end, the last knot is the first of the even levels.
    even = np.linspace(low, high, n)[1:] if low == lam[-1] else np.linspace(low, high, n - 1)
    return np.r_[schedule.time[-1], schedule.time_at(even)]


def _karras(schedule: Schedule, n: int, rho: float = 7.0) -> Float64:
    """n levels evenly in (sigma/alpha)^(1/rho) from the last knot to the first.

    Karras et al. 2022, eq. 5; pure noise as in `log_snr`. rho is 7 in "karras"; "karras(5)" gives
    it.
    """
    rho = number("rho", rho, 0.1, 100.0)

    def even(low: float, high: float, m: int) -> Float64:
        # (sigma/alpha)^(1/rho) = e^(-log-SNR / 2rho), and back.
        ramp = np.linspace(np.exp(-0.5 * low / rho), np.exp(-0.5 * high / rho), m)
        return -2 * rho * np.log(ramp)

    return _finite_part(schedule, n, even)


def _finite_part(
    schedule: Schedule, n: int, even: Callable[[float, float, int], Float64]
) -> Float64:
    """Times [n] of the levels even(lowest log-SNR, highest log-SNR, count).

    If the schedule ends in pure noise, its last knot comes before them and is one of the n.
    """
    lam = schedule.log_snr
    if np.isfinite(lam[-1]):
        return schedule.time_at(even(lam[-1], lam[0], n))
    return np.r_[schedule.time[-1], schedule.time_at(even(lam[-2], lam[0], n - 1)) if n > 1 else []]


CLOSEST = 1e-7
"""Least difference of log-SNR between neighbours: solvers divide by it."""
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
"""The grids that take a number, with what it is and an example."""


def make_grid(schedule: Schedule, spacing: str | Sequence[float], steps: int | None = None) -> Grid:
    """Make the grid of `steps` intervals that ends clean.

    Args:
        spacing: A name, see `GRIDS`, or falling times in the network's unit. "karras(5)" gives rho,
            "leading(1)" the offset, "log_snr(7)" the bound.
        steps: 1 … T; None only with times.

    Raises:
        RequestError: The name is unknown, `steps` is out of range, or times do not fall or leave
            the schedule.
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
    # Checked on levels, not on times: different times may have equal levels after rounding.
    if (np.diff(log_snr_of(alpha, sigma)) < CLOSEST).any():
        raise RequestError(
            f"grid {name!r} has neighbours of the same level: their log-SNR must differ by "
            f"{CLOSEST:g}. Leave some out."
        )
    return Grid(name, np.r_[time, np.nan], np.r_[alpha, 1.0], np.r_[sigma, 0.0], schedule)


def spacing_of(value: object) -> str | tuple[float, ...]:
    """Return a grid that a user gave: its name, or its times as floats.

    Raises:
        RequestError: It is neither.
    """
    plain = unwrapped(value)
    if isinstance(plain, str):
        return str(plain)
    rule = f"a name ({', '.join(GRIDS)}) or a list of strictly falling times"
    time = numbers("grid", value, rule)
    if time.ndim != 1 or time.size == 0 or not (np.diff(time) < 0).all():
        raise refused("grid", rule, value)
    return tuple(time.tolist())


def _named(spacing: str) -> tuple[str, list[float]]:
    """ "karras(5)" → "karras", [5.0].

    Raises RequestError for an unknown name, and for a number that the grid does not take.
    """
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
