"""Untuned programs: those that a tuned solver must beat, and those that its search starts from."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np

from runtime.bundle.bundle import Bundle
from runtime.diffusion.program import Program
from runtime.errors import RequestError

SOLVERS: dict[str, dict[str, Any]] = {
    "ddim": {},
    "dpmpp_2m": {},
    "dpmpp_3m": {},
    "unipc 2": {"order": 2},
    "unipc 3": {"order": 3},
}
"""Solvers whose rows are also a tuned solver's: they remember estimates D, or nothing."""
NAMED = ("trailing", "log_snr", "karras", *(f"log_snr({bound})" for bound in range(3, 8)))
LOWS = (-6, -5, -4, -3, -2)
HIGHS = (2, 3, 4, 5, 6)
"""Ends, in log-SNR, of the evenly spaced levels to start from, which follow the last knot."""


def named_programs(bundle: Bundle, calls: int) -> dict[str, Program]:
    """Return every untuned program of so many calls that is compared, by solver and grid."""
    found = {}
    for (name, options), grid in itertools.product(SOLVERS.items(), NAMED):
        # Some grids do not have every number of levels.
        with contextlib.suppress(RequestError):
            found[f"{name} on {grid}"] = bundle.program(name.split()[0], calls, grid, **options)
    return found


def even_programs(bundle: Bundle, calls: int) -> dict[str, Program]:
    """Return UniPC's programs on evenly spaced log-SNRs after the last knot, by their ends."""
    found = {}
    schedule = bundle.schedule
    for low, high in itertools.product(LOWS, HIGHS):
        # Some schedules do not reach all of these ends.
        with contextlib.suppress(RequestError):
            times = np.r_[schedule.time[-1], schedule.time_at(np.linspace(low, high, calls - 1))]
            found[f"levels from {low} to {high}"] = bundle.program(
                "unipc", grid=times.tolist(), order=min(3, max(2, calls - 1))
            )
    return found
