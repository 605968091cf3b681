"""One chart of the page: curves over steps or images, drawn in the browser by Bokeh."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from bokeh.core.types import ID
from bokeh.embed import json_item
from bokeh.models import (
    BasicTicker,
    BoxZoomTool,
    ColumnDataSource,
    CrosshairTool,
    DataRange1d,
    FixedTicker,
    GlyphRenderer,
    HoverTool,
    Legend,
    LegendItem,
    NumeralTickFormatter,
    PrintfTickFormatter,
    ResetTool,
    Span,
)
from bokeh.plotting import figure
from bokeh.resources import Resources

from .curves import Values, kept, smooth
from .theme import GREY, THEME

COLOURS = ("#2f6fdb", "#d9660b", "#168a52", "#a13fc4")
"""Of a few curves: distinct for all kinds of colour vision, on white and inverted on black."""
MARK = "#c2261b"
HEIGHT = 270
MOST_MARKED = 40
"""A curve of at most this many points has a dot for each, unless it is smoothed."""
LEAST = 1e-30
"""Values up to this have no place on a logarithmic axis: float32 takes them for 0."""
EVEN = 2.5
"""If the values on a logarithmic axis differ by less than this factor, its ticks are even."""
NARROW = 1.2
WIDE = 3.0
"""Decades of a logarithmic axis, from which it has fewer labels in each."""
MOST_DECADES = 7
INSIDE = 3
"""A chart with more curves than this has its legend at the side."""


@dataclass(frozen=True)
class Chart:
    """What one panel of the page shows.

    Attributes:
        title: Its heading.
        unit: The label of the vertical axis.
        step: [n].
        batch: Images per step.
        lines: [n] by label; one without a finite value is not drawn.
        note: The text below the panel.
        by_images: Whether the horizontal axis is in images, otherwise in steps.
        logarithmic: Whether the vertical axis is; values of 0 and below have no place on it.
        smoothed: Whether a smoothed curve is drawn over the values.
        low: Start of a linear axis; NaN fits the values.
        high: End of a linear axis.
        form: The format of ticks and hover values: printf's if it begins with %, otherwise that of
            numeral.js.
        limit: The height of a dashed line.
        best: The row that is marked.
    """

    title: str
    unit: str
    step: Values
    batch: int
    lines: Mapping[str, Values]
    note: str = ""
    by_images: bool = False
    logarithmic: bool = False
    smoothed: bool = False
    low: float = math.nan
    high: float = math.nan
    form: str = "%.4g"
    limit: float | None = None
    best: int | None = None

    @property
    def images(self) -> Values:
        """The images seen until each row, [n]: every step takes a whole batch."""
        return self.step * self.batch

    def drawn(self) -> dict[str, Values]:
        """Return the lines that have a point, [n] by label, NaN where there is none."""
        lines = {
            label: np.where(values > LEAST, values, math.nan) if self.logarithmic else values
            for label, values in self.lines.items()
        }
        return {label: values for label, values in lines.items() if np.isfinite(values).any()}


@dataclass(frozen=True)
class _Curve:
    """A line of a chart as it is drawn: its values and the smoothed ones, both [n]."""

    label: str
    colour: str
    values: Values
    smoothed: Values


def library() -> str:
    """Return BokehJS as the text of a script, which loads nothing from elsewhere."""
    return "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)


def item(chart: Chart, target: str) -> Mapping[str, object]:
    """Return what `Bokeh.embed.embed_item` draws in the page's element `target`."""
    return {**json_item(_plot(chart), ID(target), THEME)}


def _curves(chart: Chart) -> list[_Curve]:
    lines = chart.drawn()
    colours = COLOURS if len(lines) <= len(COLOURS) else _rainbow(len(lines))
    curves = []
    for (label, values), colour in zip(lines.items(), colours, strict=False):
        if not chart.smoothed:
            smoothed = values
        elif chart.logarithmic:
            # What the eye smooths on a logarithmic axis are logarithms.
            smoothed = 10 ** smooth(np.log10(values))
        else:
            smoothed = smooth(values)
        curves.append(_Curve(label, colour, values, smoothed))
    return curves


def _rainbow(count: int) -> list[str]:
    """Return colours from teal over purple to red: all dark on white, and light once inverted."""
    hues = [(0.5 + 0.55 * i / (count - 1)) % 1 for i in range(count)]
    made = [colorsys.hls_to_rgb(hue, 0.46, 0.75) for hue in hues]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in colour) for colour in made]


def ticks(low: float, high: float) -> list[float]:
    """Return ticks of a logarithmic axis, which Bokeh alone would set at powers of 10 only.

    Args:
        low: The least value, above 0.
        high: The greatest.
    """
    span = math.log10(high) - math.log10(low)
    mantissas: tuple[float, ...] = (1,)
    if span < WIDE:
        mantissas = (1, 1.5, 2, 3, 4, 5, 7) if span < NARROW else (1, 2, 5)
    first = math.floor(math.log10(low))
    last = math.ceil(math.log10(high))
    decades = range(first, last + 1, max(1, round(span / MOST_DECADES)))
    return [float(f"{mantissa}e{k}") for k in decades for mantissa in mantissas]


def _plot(chart: Chart) -> figure:
    curves = _curves(chart)
    plot = figure(
        height=HEIGHT,
        sizing_mode="stretch_width",
        tools="",
        x_axis_label="images seen" if chart.by_images else "step",
        y_axis_label=chart.unit,
        y_axis_type="log" if chart.logarithmic else "linear",
        y_range=DataRange1d(start=chart.low, end=chart.high),
    )
    plot.xaxis.formatter = NumeralTickFormatter(format="0.[0]a" if chart.by_images else "0,0")
    plot.xaxis.ticker = BasicTicker(desired_num_ticks=5)
    numeral = not chart.form.startswith("%")
    plot.yaxis.formatter = (NumeralTickFormatter if numeral else PrintfTickFormatter)(
        format=chart.form
    )
    if chart.logarithmic:
        every = np.concatenate([curve.values for curve in curves])
        low, high = float(np.nanmin(every)), float(np.nanmax(every))
        # Over a small range Bokeh sets good ticks, at equal distances.
        if high > EVEN * low:
            plot.yaxis.ticker = FixedTicker(ticks=ticks(low, high))
    # Many curves hide each other's values, so only their smoothed versions are drawn.
    both = chart.smoothed and len(curves) <= INSIDE
    items = [LegendItem(label=c.label, renderers=_draw(plot, chart, c, both)) for c in curves]
    if chart.limit is not None:
        plot.add_layout(Span(location=chart.limit, line_dash="dashed", line_color=GREY))
    if chart.best is not None:
        _mark(plot, chart, curves, chart.best)
    if len(curves) > 1:
        aside = len(curves) > INSIDE
        legend = Legend(
            items=items,
            click_policy="hide",
            orientation="vertical" if aside else "horizontal",
            spacing=0 if aside else 14,
        )
        plot.add_layout(legend, "right" if aside else "above")
    _add_tools(plot, chart, curves)
    return plot


def _across(chart: Chart) -> Values:
    return chart.images if chart.by_images else chart.step


def _draw(plot: figure, chart: Chart, curve: _Curve, both: bool) -> list[GlyphRenderer]:
    """Add a curve to the plot, its values too if `both`, and return what it is made of."""
    rows = kept(curve.values)
    rows = rows[np.isfinite(curve.values[rows])]
    # Seven digits are enough for a curve, and half the size.
    columns = {"y": curve.smoothed[rows].astype(np.float32)}
    if both:
        columns["raw"] = curve.values[rows].astype(np.float32)
    source = ColumnDataSource({"x": _across(chart)[rows], **columns})
    made = []
    if both:
        made.append(plot.line("x", "raw", source=source, color=curve.colour, alpha=0.3))
    made.append(plot.line("x", "y", source=source, color=curve.colour, line_width=2))
    if len(rows) <= (1 if chart.smoothed else MOST_MARKED):
        made.append(plot.scatter("x", "y", source=source, color=curve.colour, size=5))
    return made


def _mark(plot: figure, chart: Chart, curves: Sequence[_Curve], row: int) -> None:
    """Mark a row by a line down the plot and a star on each curve."""
    # A span has no part in the ranges of the axes, which the curves alone decide.
    x = float(_across(chart)[row])
    plot.add_layout(Span(location=x, dimension="height", line_dash="dotted", line_color=MARK))
    heights = [float(curve.values[row]) for curve in curves]
    plot.scatter([x] * len(heights), heights, marker="star", size=15, color=MARK)


def _add_tools(plot: figure, chart: Chart, curves: Sequence[_Curve]) -> None:
    """Let the plot show the values under the pointer, and zoom when asked to."""
    rows = kept(curves[0].values)
    position = {"x": _across(chart)[rows], "step": chart.step[rows], "images": chart.images[rows]}
    shown = {c.label: c.values for c in curves}
    if chart.smoothed and len(curves) > INSIDE:
        shown = {c.label: c.smoothed for c in curves}
    elif chart.smoothed:
        shown |= {f"{c.label}, smoothed": c.smoothed for c in curves}
    columns = {f"y{i}": values[rows].astype(np.float32) for i, values in enumerate(shown.values())}
    # One invisible line carries the values of all, so that there is one tooltip and not ten.
    unseen = plot.line(
        "x", "y0", source=ColumnDataSource({**position, **columns}), alpha=0, level="underlay"
    )
    kind = "printf" if chart.form.startswith("%") else "numeral"
    values = [(label, f"@y{i}{{{chart.form}}}") for i, label in enumerate(shown)]
    hover = HoverTool(
        renderers=[unseen],
        tooltips=[("step", "@step{0,0}"), ("images", "@images{0,0}"), *values],
        formatters={f"@{column}": kind for column in columns},
        mode="vline",
        line_policy="nearest",
        limit=1,
        visible=False,
    )
    cross = CrosshairTool(dimensions="height", line_color=GREY, line_alpha=0.4, visible=False)
    plot.add_tools(hover, cross, BoxZoomTool(dimensions="width"), ResetTool())
    # An active drag or wheel would keep a phone from scrolling over the chart.
    plot.toolbar.active_drag = None
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
