"""Bounds on what a request may cost, checked before anything is built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from runtime import Bundle, Request, ResolvedRequest, resolve
from runtime.bundle.spec import ResolvedOptions
from runtime.diffusion.solvers import most_rows
from runtime.errors import RequestError
from runtime.errors.messages import shown

from .settings import Settings


class Checked(NamedTuple):
    """Requests of one submission with every default filled in, and a bound of their rows."""

    resolved: list[ResolvedRequest]
    rows: int  # of the network: a guided row counts 2


def rows_of(options: ResolvedOptions) -> int:
    """Bound the rows of a program from its options, without making it."""
    if options.grid is None:
        return options.steps or 0
    intervals = len(options.grid) if isinstance(options.grid, tuple) else options.steps
    if not isinstance(intervals, int):
        return 0  # which is refused when the grid is made
    # As `Grid.tail` counts.
    used = max(1, round(options.strength * intervals))
    return most_rows(options.solver, used, options.options)


def checked_rows(options: ResolvedOptions, settings: Settings) -> int:
    """Bound the rows of a program. Raises RequestError if there are too many."""
    rows = rows_of(options)
    if rows > settings.rows:
        raise RequestError(
            f"a sample may have at most {settings.rows} rows, got {shown(rows)} of solver "
            f"{options.solver!r}. Take fewer steps, or a smaller `resample`."
        )
    return rows


def check_frames(bundle: Bundle, n: int, rows: int, settings: Settings) -> None:
    """Refuse an animation that is too large. Raises RequestError.

    Args:
        n: Samples.
        rows: Of each sample's program, after each of which there is a frame.
    """
    size = 4 * math.prod(bundle.sample_shape) * n * (rows + 1)
    if size > settings.animation_bytes:
        raise RequestError(
            f"the frames of an animation may have at most {settings.animation_bytes} bytes as "
            f"float32, got up to {size}. Take fewer steps or fewer samples."
        )


def checked(bundle: Bundle, requests: Sequence[Request], settings: Settings) -> Checked:
    """Resolve requests, and refuse those that are too large.

    Args:
        bundle: Its defaults fill in what a request leaves out.
        requests: Those of one submission.
        settings: The bounds.

    Raises:
        RequestError: A field cannot be used, or there are too many samples or rows.
    """
    if len(requests) > settings.samples:
        raise RequestError(
            f"`n` must be at most {settings.samples}, got {len(requests)}. Ask for fewer at a time."
        )
    # Defaults are filled in, and nothing is built yet.
    resolved = [resolve(bundle, request) for request in requests]
    total = 0
    for entry in resolved:
        rows = checked_rows(entry.options, settings)
        total += rows * (1 if entry.options.guidance == 1 else 2)
    if total > settings.request_rows:
        raise RequestError(
            f"a request may have at most {settings.request_rows} rows of the network, got {total}. "
            "Take fewer steps or fewer samples."
        )
    return Checked(resolved, total)


def check_job(bundle: Bundle, n: int, settings: Settings) -> None:
    """Refuse a job of n samples whose result would not be kept, and would push out all others.

    Raises RequestError.
    """
    size = 4 * math.prod(bundle.sample_shape) * n
    if size > settings.job_bytes:
        raise RequestError(
            f"the result of a job may have at most {settings.job_bytes} bytes as float32, got "
            f"{size}. Take fewer samples, or wait for the result without a job."
        )
