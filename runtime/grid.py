"""Grids: the noise levels that a solver visits, noisiest first. Fewer steps is another grid, never another rule for the previous step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .arguments import integer
from .errors import RequestError, unknown
from .schedule import Float64, Schedule, log_snr_of


@dataclass(frozen=True, eq=False)
class Grid:
    """n intervals between n + 1 levels: time, alpha, sigma, each [n+1]. The clean end (1, 0) has no time: NaN."""

    name: str
    time: Float64
    alpha: Float64
    sigma: Float64

    def __len__(self) -> int:
        return len(self.alpha) - 1

    @property
    def log_snr(self) -> Float64:
        """[n+1]: log(alpha² / sigma²), +inf at the clean end."""
        return log_snr_of(self.alpha, self.sigma)


def _leading(schedule: Schedule, n: int) -> Float64:
    """Knots 0, s, 2s, …, (n-1)s with s = ⌊T/n⌋ (Song et al. 2021's code). Starts below the last knot unless n divides into it."""
    return schedule.time[np.arange(n - 1, -1, -1) * (len(schedule) // n)]


def _trailing(schedule: Schedule, n: int) -> Float64:
    """Knots round(T·i/n) - 1 for i = n, …, 1 (Lin et al. 2024, table 2): always starts at the last knot."""
    return schedule.time[np.round(len(schedule) * np.arange(n, 0, -1) / n).astype(int) - 1]


def _linspace(schedule: Schedule, n: int) -> Float64:
    """n knots evenly from T-1 to 0, both ends called, rounded (Nichol & Dhariwal 2021); n = 1 is the last knot."""
    return schedule.time[np.round(np.linspace(len(schedule) - 1, 0, n)).astype(int)]


def _log_snr(schedule: Schedule, n: int) -> Float64:
    """n levels evenly in log-SNR from the last knot to the first (Lu et al. 2022), between knots where need be.

    Where the last knot is pure noise (log-SNR = -inf) it is the first level, and the even levels start at the knot before it.
    """
    lam = schedule.log_snr
    if np.isfinite(lam[-1]):
        wanted, first = np.linspace(lam[-1], lam[0], n), []
    else:
        wanted, first = np.linspace(lam[-2], lam[0], n - 1) if n > 1 else np.empty(0), [schedule.time[-1]]
    return np.r_[first, schedule.time_at(wanted)]


GRIDS: Mapping[str, Callable[[Schedule, int], Float64]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "log_snr": _log_snr,
}


def make_grid(schedule: Schedule, spacing: str | Sequence[float], steps: int | None = None) -> Grid:
    """The grid of `steps` intervals that ends clean, named (`GRIDS`) or as explicit falling times in the network's unit.

    Raises RequestError for an unknown name, for steps outside 1 … T, and for times that do not fall or leave the schedule.
    """
    if isinstance(spacing, str):
        if spacing not in GRIDS:
            raise unknown("grid", spacing, GRIDS)
        name, time = spacing, GRIDS[spacing](schedule, integer("steps", steps, 1, len(schedule)))
    else:
        try:
            name, time = "explicit", np.array(spacing, np.float64)
        except (TypeError, ValueError):
            raise RequestError(
                f"grid must be a name ({', '.join(GRIDS)}) or a list of times, found {spacing!r}."
            ) from None
        if time.ndim != 1 or time.size == 0 or not (np.diff(time) < 0).all():
            raise RequestError(f"an explicit grid must be a list of strictly falling times, found {spacing!r}.")
        if steps is not None and steps != time.size:
            raise RequestError(f"an explicit grid of {time.size} times takes {time.size} steps, found steps={steps!r}.")
    alpha, sigma = schedule.level(time)
    return Grid(name, np.r_[time, np.nan], np.r_[alpha, 1.0], np.r_[sigma, 0.0])
