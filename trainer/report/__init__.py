"""One page about a run: python -m trainer.report RUN writes RUN/report.html."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.resources
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np

from runtime.files import write_text
from runtime.terminal.output import say
from runtime.terminal.progress import clock
from runtime.terminal.verbs import program, run_verb

from ..config import Config
from ..config.distillation import Distillation
from ..config.options import Options
from ..config.text import printable
from ..errors import CheckpointError
from ..runs.folder import read_run
from ..runs.starts import read_starts
from . import curves
from .charts import item, library
from .grids import grids
from .panels import best_row, sections

LARGEST = 1e30
"""Of the figures of a start."""
Record = Mapping[str, object]
"""What a JSON file of a run holds: its values may be of any type."""


@dataclass(frozen=True)
class Card:
    """A figure at the top of the page, and what stands below it."""

    title: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Option:
    """A row of the table of options."""

    name: str
    value: str
    changed: bool
    doc: str


def report(run: Path) -> str:
    """Return the page as HTML. It needs no other file and asks for nothing from elsewhere.

    What cannot be read of the logs is left out, and the page says so.

    Raises:
        CheckpointError: `run` is not a run.
    """
    config, rest = read_run(run)
    log = curves.read(run / "log.csv")
    quality = curves.read(run / "quality.csv")
    starts, fault = _starts(run)
    images = rest["data_record"]["pictures"]
    shown = sections(config, log, quality, images if type(images) is int else 0)
    # Each chart is drawn into the element of this id.
    targets = iter(f"chart-{i}" for i in range(sum(len(s.charts) for s in shown)))
    panels = [(s.title, [(next(targets), chart) for chart in s.charts]) for s in shown]
    return _template().render(
        name=printable(run.resolve().name),
        data=rest["data_record"],
        shape=" × ".join(map(str, rest["sample_shape"])),
        classes=rest["classes"],
        cards=_cards(config, log, quality, starts),
        faults=[text for text in (log.fault, quality.fault, fault) if text],
        grids=grids(run / "samples"),
        config=config,
        panels=panels,
        items=[item(chart, target) for _, charts in panels for target, chart in charts],
        options=_options(config),
        starts=[(start, _machine(start)) for start in starts],
        library=library(),
        # Scripts without it do not run, even if a name in a log got into the page as one.
        nonce=secrets.token_urlsafe(16),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # Bokeh reads references in the order that its JSON has them.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    page = importlib.resources.files("trainer.report") / "page.html"
    return environment.from_string(page.read_text(encoding="utf-8"))


def _starts(run: Path) -> tuple[list[Record], str]:
    try:
        return list(read_starts(run)), ""
    except CheckpointError as error:
        return [], str(error)


def _cards(
    config: Config, log: curves.Log, quality: curves.Log, starts: Sequence[Record]
) -> list[Card]:
    cards = []
    if len(log.step):
        step = int(log.step[-1])
        images = f"{step * config.batch:,} images"
        cards.append(Card("Steps", f"{step:,} of {config.steps:,}", images))
    if "seconds" in log.columns:
        cards.append(Card("Time", clock(_last(log.get("seconds"))), "spent on training steps"))
    if "loss" in log.columns:
        loss = _last(curves.smooth(log.get("loss")))
        cards.append(Card("Loss", f"{loss:.4g}", "at the end, smoothed"))
    if "pictures_per_s" in log.columns:
        speed = np.nanmedian(log.get("pictures_per_s"))
        cards.append(Card("Throughput", f"{speed:,.1f}", "images/s, median"))
    if "bad" in log.columns and (bad := _last(log.get("bad"))):
        cards.append(Card("Unreadable", f"{bad:,.0f}", "images"))
    if (best := best_row(quality)) is not None:
        value = f"{quality.get('frechet')[best]:.3g}"
        cards.append(Card("Best Fréchet distance", value, f"step {quality.step[best]:,.0f}"))
    return cards + (_network(starts[-1]) if starts else [])


def _last(values: curves.Values) -> float:
    """Return the last finite value of a column, [n]."""
    return float(values[np.isfinite(values)][-1])


def _network(start: Record) -> list[Card]:
    """Return a card on the network of a start, if it says how large it is."""
    parameters = start.get("parameters")
    flops = start.get("flops")
    if not isinstance(parameters, int | float) or not 0 <= parameters < LARGEST:
        return []
    note = ""
    if isinstance(flops, int | float) and 0 <= flops < LARGEST:
        note = f"{flops / 1e9:.3g} GFLOP an image"
    return [Card("Parameters", f"{parameters / 1e6:.3g} M", note)]


def _options(config: Config) -> list[Option]:
    """Return every option, those of a distillation first, and whether it has its default."""
    records: list[Options | Distillation] = [config]
    if config.distillation:
        records.insert(0, config.distillation)
    return [
        Option(f.name, str(value), value != f.default, str(f.metadata["doc"]))
        for record in records
        for f in dataclasses.fields(record)
        if f.metadata and (value := getattr(record, f.name)) is not None
    ]


def _machine(start: Record) -> dict[str, object]:
    """Return the machine and the versions of a start, by name."""
    machine: dict[str, object] = {}
    for key in ("environment", "versions"):
        part = start.get(key)
        machine |= part if isinstance(part, dict) else {}
    rest = ("commit", "parameters", "flops", "peak_flops", "start_sha256")
    return machine | {key: start[key] for key in rest if key in start}


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog=program("trainer.report"), description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    return run_verb(parser, _act, arguments)


def _act(given: argparse.Namespace) -> None:
    page = given.run / "report.html"
    write_text(page, report(given.run))
    say(page)
