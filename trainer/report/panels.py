"""What the page shows of a run's logs: which columns, in which charts, under which headings."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from ..config import Config
from ..runs.log import BUCKET_COLUMNS, BUCKETS, COLUMNS, QUALITY_COLUMNS
from .charts import Chart
from .curves import Log, Values

MOST_UNKNOWN = 12
"""Columns of a log that are shown though this version does not know them."""


@dataclass(frozen=True)
class Section:
    """Charts under a heading."""

    title: str
    charts: tuple[Chart, ...]


def best_row(quality: Log) -> int | None:
    """Return the row of the least Fréchet distance, None if there is none."""
    frechet = quality.get("frechet")
    return int(np.nanargmin(frechet)) if np.isfinite(frechet).any() else None


def sections(config: Config, log: Log, quality: Log, images: int) -> list[Section]:
    """Return the charts that have something to show, by heading.

    images: How many the data has, 0 if that is unknown.
    """
    every = [
        Section("Quality", _quality(config, quality, images)),
        Section("Learning", _learning(config, log)),
        Section("Speed", _speed(config, log)),
        Section("Also logged", _others(config, log, quality)),
    ]
    drawn = [replace(s, charts=tuple(c for c in s.charts if c.drawn())) for s in every]
    return [section for section in drawn if section.charts]


def _quality(config: Config, log: Log, images: int) -> tuple[Chart, ...]:
    best = best_row(log)

    def chart(title: str, unit: str, lines: dict[str, Values], note: str) -> Chart:
        return Chart(title, unit, log.step, config.batch, lines, note, by_images=True, best=best)

    samples = min(config.quality_samples, images or config.quality_samples)
    of = f"{samples:,} samples compared with as many images."
    star = (
        ""
        if best is None
        else f" ★ marks the smallest Fréchet distance, step {log.step[best]:,.0f}."
    )
    distance = chart("Fréchet distance", "distance", {"Fréchet": log.get("frechet")}, of + star)
    shares = {"precision": log.get("precision"), "recall": log.get("recall")}
    both = "Precision: samples near an image. Recall: images near a sample."
    share = chart("Precision and recall", "share", shares, f"{both}{star}")
    kernel = chart("Kernel distance", "distance", {"kernel": log.get("kernel")}, "")
    return (
        replace(distance, logarithmic=True),
        replace(share, low=0.0, high=1.0, form="0.00"),
        replace(kernel, note="Squared maximum mean discrepancy; it may fall below 0."),
    )


def _learning(config: Config, log: Log) -> tuple[Chart, ...]:
    losses = {"training": log.get("loss")}
    # A log may have other losses too, such as one of held-out images.
    losses |= {_plain(name): log.columns[name] for name in _unknown(log) if "loss" in name}
    tenths = {str(i + 1): log.get(column) for i, column in enumerate(BUCKET_COLUMNS)}

    def chart(title: str, unit: str, lines: dict[str, Values], note: str = "") -> Chart:
        return Chart(title, unit, log.step, config.batch, lines, note)

    loss = chart("Loss", "loss", losses, "Thin: as logged. Bold: smoothed over neighbouring rows.")
    levels = chart("Loss by noise level", "loss", tenths)
    gradient = chart("Gradient norm", "norm before clipping", {"norm": log.get("grad_norm")})
    rate = chart("Learning rate", "learning rate", {"rate": log.get("learning_rate")})
    note = f"Tenths of the schedule: 1 is the least noisy, {BUCKETS} nearly pure noise. Smoothed."
    return (
        replace(loss, logarithmic=True, smoothed=True),
        replace(levels, logarithmic=True, smoothed=True, note=note),
        replace(
            gradient,
            logarithmic=True,
            smoothed=True,
            limit=config.gradient_clip,
            note=f"Gradients above {config.gradient_clip:g} are clipped to it (dashed).",
        ),
        replace(rate, low=0.0),
    )


def _speed(config: Config, log: Log) -> tuple[Chart, ...]:
    def chart(title: str, unit: str, column: str, note: str = "") -> Chart:
        lines = {unit: log.get(column)}
        return Chart(title, unit, log.step, config.batch, lines, note, smoothed=True, low=0.0)

    peak = "Of the arithmetic that this machine was measured to do."
    percent = "0.[0]%"
    unread = chart("Unreadable images", "images", "bad")
    return (
        replace(chart("Throughput", "images per second", "pictures_per_s"), form="0,0.[0]"),
        replace(chart("Use of the machine", "share of peak", "of_peak", peak), form=percent),
        replace(chart("Waiting for data", "share of time", "waiting"), form=percent),
        # Almost every run reads all of its images, and needs no chart to say so.
        *((replace(unread, smoothed=False),) if log.get("bad").any() else ()),
    )


def _others(config: Config, log: Log, quality: Log) -> tuple[Chart, ...]:
    """Return a chart for each column that this version does not know."""
    return tuple(
        Chart(_plain(name), "value", table.step, config.batch, {"value": values})
        for table in (log, quality)
        for name in _unknown(table)
        for values in [table.columns[name]]
        if table is quality or "loss" not in name
    )


def _unknown(log: Log) -> list[str]:
    known = {*COLUMNS, *QUALITY_COLUMNS}
    return [name for name in log.columns if name not in known][:MOST_UNKNOWN]


def _plain(name: str) -> str:
    """Return a column's name without what a chart could take for markup."""
    return re.sub(r"[^\w .,%/()-]", "", name)[:40] or "unnamed"
