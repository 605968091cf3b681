"""The page that python -m runtime.bench --plot draws.

It is the only module of the runtime that imports matplotlib, when it draws.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..backends.base import missing
from ..errors import RequestError
from ..errors.messages import shown_path
from ..files import replacing
from ..images import is_image, to_uint8
from .facts import Facts
from .results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis
    from matplotlib.figure import Figure, SubFigure

COLORS = {
    "fp32": "#444444",
    "bf16": "#0072b2",
    "fp16": "#009e73",
    "int8": "#d55e00",
    "int8-trt": "#cc79a7",
}
MARKERS = "os^Dv<>"
LINES = ("-", "--", ":", "-.")
SHOWN = 16
"""The most images in a row."""
SAME_DB = 80.0
"""A PSNR from which on differences are rounding. Such results are drawn next to the reference."""
ENDINGS = (".png", ".svg", ".pdf")


class Style(NamedTuple):
    """How a pair is drawn: its precision has a color, its backend a marker and a line."""

    color: str
    marker: str
    line: str


def check(path: Path) -> None:
    """Check, before anything is measured, that the page can be drawn.

    Raises:
        RequestError: The file's name has an unsupported ending, or no file can be written there.
        BackendError: matplotlib is missing.
    """
    if path.suffix.lower() not in ENDINGS:
        raise RequestError(
            f"--plot writes {', '.join(ENDINGS)}, got {path.name!r}. Use a name that ends in "
            f"one of these."
        )
    place = next(p for p in path.absolute().parents if p.exists())
    if path.is_dir() or not place.is_dir() or not os.access(place, os.W_OK):
        raise RequestError(f"--plot {shown_path(path)} cannot be written. Name another file.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise missing("matplotlib, which --plot needs,", "plot", error) from error


def draw(
    path: Path, facts: Facts, results: Sequence[Result], data_range: tuple[float, float]
) -> None:
    """Draw latency by batch, speed by nearness, the first image, and the images themselves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    styles = styles_of(results)
    images = pictured(results, facts.shape)
    cold = any(r.cold for r in results)
    # The sheet of images grows with the number of pairs, the diagrams above it do not.
    height = 0.62 * len(results) + 0.3
    figure = Figure(figsize=(14, 5.2 + (height if images else 0)), layout="constrained", dpi=110)
    # A canvas of its own: pyplot would look for a display, and keep the figure for ever.
    FigureCanvasAgg(figure)
    top: Figure | SubFigure = figure
    if images:
        top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=[4.6, height]))
        sheet(bottom, results, styles, data_range)
    count = 3 if cold else 2
    axes = top.subplots(1, count, width_ratios=[1.15, 1, 1.1][:count])
    latency(axes[0], results, styles)
    quality(axes[1], results, styles)
    if cold:
        first(axes[2], results, styles)
    # A bundle's name may hold dollars, which are no formula.
    figure.suptitle(f"{facts.sampled}\n", fontsize=13, x=0.01, ha="left", parse_math=False)
    figure.text(0.01, 0.97, facts.measured_on, fontsize=8.5, color="#666666", va="top")
    with replacing(path) as temporary:
        # Without the version of matplotlib, the same figures give the same bytes.
        metadata = {"Software": None} if path.suffix.lower() == ".png" else None
        figure.savefig(os.fspath(temporary), format=path.suffix[1:].lower(), metadata=metadata)


def styles_of(results: Sequence[Result]) -> dict[str, Style]:
    """Choose a style for each pair, by its name."""
    backends = list(dict.fromkeys(r.backend for r in results))
    styles: dict[str, Style] = {}
    for r in results:
        i = backends.index(r.backend)
        color = COLORS.get(r.precision, "#777777")
        styles[r.name] = Style(color, MARKERS[i % len(MARKERS)], LINES[i % len(LINES)])
    return styles


def pictured(results: Sequence[Result], shape: Sequence[int]) -> bool:
    """Whether samples of this shape are images, and were kept."""
    return is_image(shape) and all(r.samples is not None for r in results)


def latency(axis: Axes, results: Sequence[Result], styles: Mapping[str, Style]) -> None:
    """Draw p50 by batch, with p50 … p95 shaded. On a flat line a larger batch is free."""
    for r in results:
        color, marker, line = styles[r.name]
        batch = [s.batch for s in r.speeds]
        p50 = [s.latency_ms["p50"] for s in r.speeds]
        p95 = [s.latency_ms["p95"] for s in r.speeds]
        axis.plot(
            batch, p50, line, color=color, marker=marker, markersize=6, linewidth=1.6, label=r.name
        )
        axis.fill_between(batch, p50, p95, color=color, alpha=0.15, linewidth=0)
    every = sorted({s.batch for r in results for s in r.speeds})
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="batch",
        title="latency of a whole call, ms (p50, shaded to p95)",
    )
    axis.minorticks_off()
    axis.set_xticks(every, [str(b) for b in every])
    plain(axis.yaxis, [s.latency_ms[p] for r in results for s in r.speeds for p in ("p50", "p95")])
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9, loc="upper left", frameon=False)


def quality(axis: Axes, results: Sequence[Result], styles: Mapping[str, Style]) -> None:
    """Draw images a second, small to large batch, by the PSNR to fp32."""
    # The reference has no PSNR. It is drawn above all others, with what equals it up to rounding.
    known = [
        r.psnr_db
        for r in results
        if r.psnr_db is not None and np.isfinite(r.psnr_db) and r.psnr_db < SAME_DB
    ]
    top = 10 * np.ceil(max([40.0, *known]) / 10) + 10
    low = min([35.0, *known]) - 6
    for i, r in enumerate(results):
        color, marker, _ = styles[r.name]
        near = top
        if r.psnr_db is not None and r.psnr_db < SAME_DB:
            near = float(np.clip(r.psnr_db, low + 2, top))
        speed = [s.samples_per_s for s in r.speeds]
        axis.plot(speed, [near] * len(speed), color=color, linewidth=1.2, alpha=0.6)
        axis.scatter(
            speed,
            [near] * len(speed),
            s=[18 + 14 * np.log2(2 * s.batch) for s in r.speeds],
            c=color,
            marker=marker,
        )
        axis.annotate(
            f"{max(speed):.3g}/s",
            (max(speed), near),
            (0, -16 if i % 2 else 9),  # below and above in turn, so that neighbours do not overlap
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=color,
        )
    axis.axhline(top, color="#bbbbbb", linewidth=0.8, linestyle="--", zorder=0)
    axis.set(
        xscale="log",
        ylim=(low, top + 4),
        xlabel="pictures a second (small to large batch)",
        title="speed against nearness to fp32, dB",
    )
    ticks = np.arange(10 * np.ceil(low / 10), top - 4, 10)
    axis.set_yticks([*ticks, top], [*[f"{t:g}" for t in ticks], f"fp32 and\nabove {SAME_DB:g}"])
    axis.minorticks_off()
    plain(axis.xaxis, [s.samples_per_s for r in results for s in r.speeds])
    axis.grid(alpha=0.25)


def first(axis: Axes, results: Sequence[Result], styles: Mapping[str, Style]) -> None:
    """Draw the seconds to the first image of a fresh process, by what they are spent on."""
    rows = [r for r in results if r.cold]
    shades = {"start of Python": 0.25, "import": 0.45, "load": 0.7, "sample": 1.0}
    for i, r in enumerate(rows):
        c = r.cold
        assert c is not None
        # The remainder is Python's own start. Noise may make it negative, so 0 is its minimum.
        start = max(0.0, c.first_picture_s - c.import_s - c.load_s - c.sample_s)
        left = 0.0
        for part, alpha in zip(
            (start, c.import_s, c.load_s, c.sample_s), shades.values(), strict=True
        ):
            axis.barh(
                i, part, left=left, color=styles[r.name].color, alpha=alpha, height=0.6, linewidth=0
            )
            left += part
        memory = "" if c.peak_mib is None else f", {c.peak_mib:.0f} MiB"
        axis.text(left, i, f" {c.first_picture_s:.2f} s{memory}", va="center", fontsize=9)
    for name, alpha in shades.items():
        axis.bar(0, 0, color="#444444", alpha=alpha, label=name)
    longest = max(r.cold.first_picture_s for r in rows if r.cold)
    axis.set(
        xlim=(0, 1.45 * longest),
        ylim=(len(rows) - 0.4, -0.6),
        xlabel="seconds",
        title="first picture of a fresh process; peak memory",
    )
    axis.set_yticks(range(len(rows)), [r.name.replace(" ", "\n") for r in rows], fontsize=9)
    axis.legend(
        fontsize=8, loc="lower right", frameon=False, ncols=4, columnspacing=0.9, handlelength=1.2
    )
    axis.set_ylim(len(rows) + 0.1, -0.6)


def sheet(
    figure: SubFigure,
    results: Sequence[Result],
    styles: Mapping[str, Style],
    data_range: tuple[float, float],
) -> None:
    """Draw a row of images for each pair, with the same seeds in a column."""
    axes = figure.subplots(len(results), 2, squeeze=False, width_ratios=[1, 8])
    figure.suptitle(
        "the same seeds, and the distance from the reference's",
        fontsize=10,
        x=0.01,
        ha="left",
        color="#666666",
    )
    for (words, axis), r in zip(axes, results, strict=True):
        assert r.samples is not None
        # One image for the whole row, with white lines between: axes for each would be slow.
        # NaN is black: the figures say that it is there.
        images = to_uint8(np.nan_to_num(r.samples[:SHOWN], nan=data_range[0]), *data_range)
        row = np.concatenate(
            [np.pad(i, ((0, 0), (0, 2), (0, 0)), constant_values=255) for i in images], axis=1
        )
        axis.imshow(
            row if row.shape[-1] == 3 else row[..., 0],
            cmap="gray",
            vmin=0,
            vmax=255,
            interpolation="nearest",
        )
        axis.set_anchor("W")
        axis.set_axis_off()
        words.set_axis_off()
        rms = "" if not r.rms else f", RMS {r.rms:.1e}"
        words.text(
            1, 0.72, r.name, ha="right", va="center", fontsize=9.5, color=styles[r.name].color
        )
        words.text(
            1, 0.28, f"{r.nearness}{rms}", ha="right", va="center", fontsize=8, color="#666666"
        )


def plain(axis: XAxis | YAxis, values: Sequence[float]) -> None:
    """Set ticks of a logarithmic axis at 1, 2, 5, 10, …, as plain numbers, around the values."""
    low = min(values) / 1.4
    high = max(values) * 1.6
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})
    axis.set_ticks(ticks, [f"{t:,g}" for t in ticks])
