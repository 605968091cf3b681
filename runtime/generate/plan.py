"""A plan: which samples are made. Sample i is a function of the plan and i alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import cast

import numpy as np

from ..bundle.bundle import Bundle
from ..bundle.sampling import SamplingOptions
from ..diffusion.noise import MAX_SEED
from ..engine.request import Planner, Request, resolve
from ..errors import RequestError
from ..errors.arguments import integer, path_of
from ..errors.keywords import check_options
from ..errors.messages import refused, shown_path, unwrapped
from ..files import from_json
from .tables import Table, read_tables

MAX_SHARES = 1_000_000
"""The largest sum of all shares: the length of the pattern in which labels take turns."""
OPTIONS = ("solver", "steps", "grid", "guidance", "guidance_interval", "options")
"""The fields of a plan that are those of `SamplingOptions`."""
FIELDS = ("seed", "labels", "conditions", *OPTIONS)
ALL = "all"
Label = int | str | None


@dataclass(frozen=True)
class Share:
    """A label, and how many of each sum(shares) samples have it. None is the null label."""

    label: Label = None
    share: int = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How samples are made. Sample i has seed + i.

    Attributes:
        labels: The labels take turns, by their shares; empty for the null label alone, None for
            every label of the bundle in equal shares.
        conditions: Tables of the bundle's conditions.
    """

    seed: int = 0
    labels: tuple[Share, ...] | None = ()
    conditions: tuple[Table, ...] = ()
    options: SamplingOptions = field(default_factory=SamplingOptions)

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Read a plan from a JSON file.

        Raises:
            RequestError: The file cannot be read, is not JSON or not a plan.
        """
        path = path_of("plan", path)
        try:
            value = from_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise RequestError(
                f"the plan {shown_path(path)} cannot be read as JSON ({error}). "
                'Write one such as {"labels": "all", "steps": 10}.'
            ) from error
        return cls.from_json(value, path.parent)

    @classmethod
    def from_json(cls, value: object, folder: str | Path = ".") -> Plan:
        """Return the plan that a JSON value describes.

        Args:
            folder: Paths of tables are relative to it.

        Raises:
            RequestError: The value is not a plan. A bundle checks the options, see `Series`.
        """
        if not isinstance(value, Mapping):
            raise refused("plan", "a JSON object", value, "Write {} for the defaults.")
        check_options("a plan", value, FIELDS)
        given = {name: v for name, v in value.items() if name in OPTIONS and v is not None}
        # JSON has no tuples, and only hashable options can share a cached program.
        for name in ("guidance_interval", "grid"):
            if isinstance(given.get(name), list):
                given[name] = tuple(given[name])
        if not isinstance(given.get("options", {}), Mapping):
            raise refused("options", "a JSON object", given["options"])
        return cls(
            seed=integer("seed", value.get("seed", 0), 0, MAX_SEED),
            labels=_labels(value.get("labels", [])),
            conditions=read_tables(value.get("conditions", {}), path_of("folder", folder)),
            options=SamplingOptions(**given),
        )

    def to_json(self) -> dict[str, object]:
        """Return the JSON value: the seed, the labels, and what else is given.

        The tables of conditions are named by their hashes: where they are makes no difference.
        """
        labels: object = ALL
        if self.labels is not None:
            labels = [{"label": part.label, "share": part.share} for part in self.labels]
        found: dict[str, object] = {"seed": self.seed, "labels": labels}
        for name in OPTIONS:
            value = unwrapped(getattr(self.options, name))
            if value is not None and value != {}:
                found[name] = list(value) if isinstance(value, tuple) else value
        if self.conditions:
            found["conditions"] = {table.name: table.sha256 for table in self.conditions}
        return found


def _labels(value: object) -> tuple[Share, ...] | None:
    """Return the shares that a plan's `labels` describe."""
    if value == ALL:
        return None
    if not isinstance(value, list):
        rule = f'"{ALL}" or a list'
        raise refused("labels", rule, value, 'Write ["cat", {"label": "dog", "share": 3}].')
    return tuple(_share(entry) for entry in value)


def _share(entry: object) -> Share:
    if not isinstance(entry, Mapping):
        return Share(_label(entry))
    check_options("a label's share", entry, [each.name for each in fields(Share)])
    share = integer("share", entry.get("share", 1), 1, MAX_SHARES)
    return Share(_label(entry.get("label")), share)


def _label(value: object) -> Label:
    if isinstance(value, bool) or not isinstance(value, (int, str, type(None))):
        raise refused("label", "a name, a number or null", value)
    return value


class Series:
    """The samples of a plan for a bundle."""

    def __init__(self, bundle: Bundle, plan: Plan, n: int) -> None:
        """Check the plan against the bundle.

        Args:
            n: Number of samples, at least 1.

        Raises:
            RequestError: The bundle cannot be sampled like this.
        """
        self.plan = plan
        shares = plan.labels
        if shares is None:
            shares = tuple(Share(number) for number in range(bundle.num_classes))
            if not shares:
                raise RequestError(f'{bundle.name} has no labels. Leave out "labels": "{ALL}".')
        self._labels = [_numbered(bundle, part.label) for part in shares or (Share(),)]
        self._turns = turns([part.share for part in shares] or [1])
        self._tables = {table.name: table.open() for table in plan.conditions}
        integer("seed", plan.seed, 0, MAX_SEED - n + 1)
        # Every label once: whether it can be used, guided or not, is known only to the bundle.
        planner = Planner(bundle)
        for label in self._labels:
            planner.job(self._request(0, 0, label))
        self.resolved = [resolve(bundle, self._request(0, 0, label)) for label in self._labels]

    def label(self, index: int) -> int | None:
        """Return the number of a sample's label; None is the null label."""
        return self._labels[self._turns[index % len(self._turns)]]

    def seed(self, index: int) -> int:
        """Return a sample's seed."""
        return self.plan.seed + index

    def request(self, index: int) -> Request:
        """Return the request for sample `index`, counted from 0."""
        return self._request(index, self.seed(index), self.label(index))

    def _request(self, index: int, seed: int, label: int | None) -> Request:
        conditions = {name: rows[index % len(rows)] for name, rows in self._tables.items()}
        return Request(seed=seed, label=label, conditions=conditions, **vars(self.plan.options))


def _numbered(bundle: Bundle, label: Label) -> int | None:
    # Names and numbers of one label are one: they make the same samples.
    return None if unwrapped(label) is None else bundle.label_number(label)


def turns(shares: list[int]) -> list[int]:
    """Return one period of the pattern in which entries take turns, spread evenly.

    Entry l appears shares[l] times among sum(shares) positions. Appearance j has the ideal place
    (j + 1/2) / shares[l] of the period; ties go to the first entry.

    Raises:
        RequestError: The sum of the shares is above `MAX_SHARES`.
    """
    total = sum(shares)
    if total > MAX_SHARES:
        raise RequestError(
            f"the shares of a plan must sum to at most {MAX_SHARES}, got {total}. "
            "Divide them by a common factor."
        )
    # Quotients of such small integers are equal as floats only if they are equal exactly, so the
    # order is the same on every machine.
    places = np.concatenate([(2 * np.arange(share) + 1) / (2 * share) for share in shares])
    owners = np.repeat(np.arange(len(shares)), shares)
    return cast("list[int]", owners[np.argsort(places, kind="stable")].tolist())
