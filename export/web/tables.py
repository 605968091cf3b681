"""The programs of a menu of solvers and steps as one table, so that JavaScript needs no solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.bundle.bundle import Bundle
from runtime.diffusion.solvers import SOLVERS
from runtime.diffusion.tuned import TUNED
from runtime.engine.job import Table
from runtime.errors import RequestError
from runtime.errors.arguments import choice, integer

STEPS = (5, 10, 20, 50)
"""Numbers of steps of the default menu."""


@dataclass(frozen=True)
class Entry:
    """A program of the menu.

    Attributes:
        steps: As the user chooses them.
        offset: Place of its first number in the table.
        start: x_T = start · eps.
        noisy: For each row, whether it takes noise.
    """

    solver: str
    steps: int
    rows: int
    offset: int
    start: float
    noisy: tuple[bool, ...]

    def to_json(self) -> dict[str, object]:
        """Return the JSON value."""
        return {**vars(self), "noisy": "".join("01"[taken] for taken in self.noisy)}


@dataclass(frozen=True)
class Menu:
    """Programs, and their numbers: for each row `call` [6], then `update` [R, R+2], as float32,
    little-endian. A guided sample writes its scale into `call`."""

    entries: tuple[Entry, ...]
    table: bytes


def menu(bundle: Bundle, solvers: Sequence[str] = (), steps: Sequence[int] = ()) -> Menu:
    """Return the programs of every solver with every number of steps.

    Args:
        solvers: Their names; none for all that the bundle has.
        steps: Numbers of steps; none for `STEPS`. A number that the network or a tuned solver does
            not know is replaced by those that it knows.

    Raises:
        RequestError: A name or a number cannot be used.
    """
    names = solvers or [*SOLVERS, *([TUNED] if bundle.tuned else [])]
    for name in names:
        choice("solver", name, bundle.solvers)
    counts = [integer("steps", count, 1) for count in steps or STEPS]
    entries: list[Entry] = []
    parts: list[bytes] = []
    offset = 0
    for name in names:
        for count in _allowed(bundle, name, counts):
            table = _table(bundle, name, count)
            # A solver may need more levels than a short grid has.
            if table is None:
                continue
            numbers = np.concatenate([table.call, table.update.reshape(len(table), -1)], axis=1)
            noisy = tuple(map(bool, table.noisy))
            start = float(table.start)
            entries.append(Entry(name, count, len(table), offset, start, noisy))
            parts.append(numbers.astype("<f4").tobytes())
            offset += numbers.size
    if not entries:
        raise RequestError("no solver of the menu can take these steps. Pass more steps.")
    return Menu(tuple(entries), b"".join(parts))


def _allowed(bundle: Bundle, solver: str, counts: Sequence[int]) -> list[int]:
    if solver == TUNED:
        return sorted(bundle.tuned)
    if bundle.distilled:
        return sorted(bundle.distilled.levels)
    return sorted({bundle.allowed_steps(count) for count in counts})


def _table(bundle: Bundle, solver: str, steps: int) -> Table | None:
    default = bundle.defaults
    options: dict[str, Any] = {**default.options} if solver == default.solver else {}
    try:
        return Table.of(bundle.program(solver, steps, **options))
    except RequestError:
        return None
