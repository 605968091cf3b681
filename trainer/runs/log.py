"""The log of a run: tables, TensorBoard events, and Weights & Biases if it is installed and asked
for."""

from __future__ import annotations

import csv
import itertools
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.files import replacing

from ..errors import CheckpointError

log = logging.getLogger(__name__)
BUCKETS = 10
"""Equal stretches of the schedule whose loss is logged."""
BUCKET_COLUMNS = tuple(f"loss_{i}" for i in range(BUCKETS))
TIME_COLUMNS = ("pictures_per_s", "seconds", "waiting", "of_peak")
"""Columns that depend on time; all others are the same for every run of one config."""
COLUMNS = (
    "step",
    "pictures",
    "loss",
    "grad_norm",
    "learning_rate",
    *TIME_COLUMNS,
    "bad",
    *BUCKET_COLUMNS,
)
"""waiting: share of the time spent waiting for images. of_peak: share of the operations that this
machine was measured to do. bad: images that could not be read so far. loss_i: mean loss in the i-th
tenth of the schedule since the row before."""
QUALITY_COLUMNS = ("step", "frechet", "kernel", "precision", "recall")


class Table:
    """A CSV file of rows by step, to which a resumed run adds.

    Rows after `step` are cut, so that no step is there twice. A damaged file is moved aside: a log
    must not keep a run from resuming.

    Attributes:
        rows: Those that are in the file, if `keeps` is set: a long run has very many.
    """

    def __init__(self, path: Path, columns: Sequence[str], step: int, keeps: bool = False) -> None:
        self.columns = columns
        self.keeps = keeps
        try:
            rows = read(path)
        except CheckpointError as error:
            rows = []
            move_aside(path, str(error))
        rows = [row for row in rows if int(row["step"]) <= step]
        self.rows = rows if keeps else []
        with (
            replacing(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, columns, extrasaction="ignore", restval="")
            writer.writeheader()
            writer.writerows(rows)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns, restval="")

    def row(self, values: Mapping[str, float]) -> None:
        """Write a row. Columns without a value stay empty."""
        row = {k: _text(values[k]) for k in self.columns if k in values}
        if self.keeps:
            self.rows.append(row)
        self._writer.writerow(row)
        self._file.flush()  # a kill then loses no row

    def close(self) -> None:
        self._file.close()


def _text(value: float) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return str(value)


def read(path: Path) -> list[dict[str, str]]:
    """Return the whole rows of a table, none if there is no file.

    A row that a kill cut short is left out.

    Raises:
        CheckpointError: The file is not a table with a column `step` whose values are numbers.
    """
    if not os.path.lexists(path):
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            if "step" not in (table.fieldnames or ()):
                raise ValueError("its first line names no column `step`")
            rows = [row for row in table if row["step"] and None not in row.values()]
        for row in rows:
            int(row["step"])
            for value in row.values():
                float(value or 0)
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise CheckpointError(f"{path} is not a log that trainer.fit wrote ({error}).") from error
    return rows


def move_aside(path: Path, reason: str) -> None:
    """Rename a damaged file that is a mere record to a free name next to it, with a warning."""
    others = (path.with_name(f"{path.name}.damaged{i or ''}") for i in itertools.count())
    aside = next(other for other in others if not os.path.lexists(other))
    path.rename(aside)
    log.warning("%s It was moved to %s, and the run continues without it.", reason, aside.name)


class Log:
    """log.csv, quality.csv and the TensorBoard events of a run, and its Weights & Biases.

    Args:
        step: The step that the run resumes after. Later rows and events are cut.
    """

    def __init__(self, folder: Path, step: int, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes long to import

        self.steps = Table(folder / "log.csv", COLUMNS, step)
        self.quality = (
            Table(folder / "quality.csv", QUALITY_COLUMNS, step, keeps=True)
            if config["quality_every"]
            else None
        )
        events = folder / "tensorboard"
        if os.path.lexists(events) and not events.is_dir():
            move_aside(events, f"{events} is not a folder.")
        self._events: Any = SummaryWriter(str(events), purge_step=step + 1)
        self._wandb = _wandb(folder, config)

    def row(self, values: Mapping[str, float]) -> None:
        self.steps.row(values)
        self._scalars(
            {k: v for k, v in values.items() if k not in ("step", "pictures", "seconds")},
            values["step"],
        )

    def quality_row(self, values: Mapping[str, float]) -> None:
        assert self.quality is not None
        self.quality.row(values)
        self._scalars({f"quality/{k}": v for k, v in values.items() if k != "step"}, values["step"])

    def _scalars(self, values: Mapping[str, float], step: float) -> None:
        # A value that is not finite is not a point of a curve.
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for name, value in finite.items():
            self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(finite, step=int(step))

    def picture(self, sheet: np.ndarray, step: int) -> None:
        """Log a sheet of samples, [H, W, C] uint8."""
        self._events.add_image("samples", sheet, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            self._wandb.log({"samples": wandb.Image(sheet.squeeze())}, step=step)

    def close(self) -> None:
        self.steps.close()
        if self.quality is not None:
            self.quality.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb(folder: Path, config: Mapping[str, Any]) -> Any:
    """Return a run of Weights & Biases if it is installed and WANDB_PROJECT is set, else None."""
    if not os.environ.get("WANDB_PROJECT"):
        return None
    try:
        from wandb import init  # pyright: ignore[reportMissingImports]
    except ImportError:  # a folder of this name, which its runs leave, can be imported, too
        return None
    return init(
        name=folder.name, id=folder.name, resume="allow", dir=str(folder), config=dict(config)
    )
