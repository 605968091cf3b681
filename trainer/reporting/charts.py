"""One chart of the page: curves over steps or images, drawn in the browser by Bokeh."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from bokeh.embed import json_item
from bokeh.models import (
    BoxZoomTool,
    ColumnDataSource,
    CrosshairTool,
    DataRange1d,
    GlyphRenderer,
    HoverTool,
    Legend,
    LegendItem,
    NumeralTickFormatter,
    ResetTool,
    Span,
)
from bokeh.palettes import plasma
from bokeh.plotting import figure
from bokeh.resources import Resources
from bokeh.themes import Theme

from .curves import Values, kept, smooth

COLOURS = ("#2f6fdb", "#d9660b", "#168a52", "#a13fc4")
"""Of a few curves: apart for all kinds of colour vision, on white and inverted on black."""
MARK = "#c2261b"
GREY = "#5b6470"
HEIGHT = 270
MOST_MARKED = 40
"""A curve of at most this many points has a dot for each."""
INSIDE = 3
"""A chart with more curves than this has its legend at the side."""
_TEXT = "system-ui, sans-serif"
THEME = Theme(
    json={
        "attrs": {
            "Plot": {
                "background_fill_color": None,
                "border_fill_color": None,
                "outline_line_color": None,
                "min_border_right": 12,
            },
            "Axis": {
                "axis_label_text_color": GREY,
                "axis_label_text_font": _TEXT,
                "axis_label_text_font_size": "12px",
                "axis_label_text_font_style": "normal",
                "axis_line_color": "#aab2bd",
                "major_label_text_color": GREY,
                "major_label_text_font": _TEXT,
                "major_label_text_font_size": "12px",
                "major_tick_line_color": "#aab2bd",
                "minor_tick_line_color": None,
            },
            "Grid": {"grid_line_color": "#dde1e6"},
            "Legend": {
                "background_fill_alpha": 0.7,
                "border_line_color": None,
                "label_text_color": GREY,
                "label_text_font": _TEXT,
                "label_text_font_size": "12px",
                "title_text_color": GREY,
                "title_text_font": _TEXT,
                "title_text_font_size": "12px",
                "title_text_font_style": "normal",
                "spacing": 0,
                "padding": 4,
                "glyph_width": 14,
            },
        }
    }
)


@dataclass(frozen=True)
class Chart:
    """What one panel of the page shows.

    Attributes:
        title: Its heading.
        unit: The label of the vertical axis.
        step: [n].
        images: [n], seen until then.
        lines: [n] by label; one without a finite value is not drawn.
        note: What stands below.
        by_images: Whether the horizontal axis is in images, otherwise in steps.
        logarithmic: Whether the vertical axis is; values of 0 and below have no place on it.
        smoothed: Whether a smoothed curve is drawn over the values.
        low: Where a linear axis begins; NaN fits the values.
        high: Where it ends.
        form: The numeral format of ticks and hover values.
        limit: The height of a dashed line.
        best: The row that is marked.
    """

    title: str
    unit: str
    step: Values
    images: Values
    lines: Mapping[str, Values]
    note: str = ""
    by_images: bool = False
    logarithmic: bool = False
    smoothed: bool = False
    low: float = math.nan
    high: float = math.nan
    form: str = "0.[000]"
    limit: float | None = None
    best: int | None = None

    def drawn(self) -> dict[str, Values]:
        """Return the lines that have a point, [n] by label, NaN where there is none."""
        lines = {
            label: np.where(values > 0, values, math.nan) if self.logarithmic else values
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
    """Return BokehJS as the text of a script, which asks for nothing from elsewhere."""
    return "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)


def item(chart: Chart, target: str) -> Mapping[str, object]:
    """Return what `Bokeh.embed.embed_item` draws in the page's element `target`."""
    return {**json_item(_plot(chart), target, THEME)}


def _curves(chart: Chart) -> list[_Curve]:
    lines = chart.drawn()
    # Noise levels are ordered, and so are the colours of a map; the yellow end is hard to see.
    colours = COLOURS if len(lines) <= len(COLOURS) else plasma(len(lines) + 2)
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
    plot.xaxis.ticker.desired_num_ticks = 5
    plot.yaxis.formatter = NumeralTickFormatter(format=chart.form)
    items = [LegendItem(label=c.label, renderers=_draw(plot, chart, c)) for c in curves]
    if chart.limit is not None:
        plot.add_layout(Span(location=chart.limit, line_dash="dashed", line_color=GREY))
    if chart.best is not None:
        _mark(plot, chart, curves, chart.best)
    if len(curves) > 1:
        aside = len(curves) > INSIDE
        legend = Legend(items=items, orientation="vertical" if aside else "horizontal")
        legend.click_policy = "hide"
        plot.add_layout(legend, "right" if aside else "above")
    _add_tools(plot, chart, curves)
    return plot


def _across(chart: Chart) -> Values:
    return chart.images if chart.by_images else chart.step


def _draw(plot: figure, chart: Chart, curve: _Curve) -> list[GlyphRenderer]:
    """Add a curve to the plot, and return what it is made of."""
    rows = kept(curve.values, curve.smoothed)
    rows = rows[np.isfinite(curve.values[rows])]
    # Seven digits are enough for a curve, and half the size.
    columns = {"raw": curve.values[rows].astype(np.float32)}
    if chart.smoothed:
        columns["smooth"] = curve.smoothed[rows].astype(np.float32)
    source = ColumnDataSource({"x": _across(chart)[rows], **columns})
    made = []
    # Beside others the values themselves would be a thicket.
    if chart.smoothed and len(chart.lines) <= INSIDE:
        made.append(plot.line("x", "raw", source=source, color=curve.colour, alpha=0.3))
    line = "smooth" if chart.smoothed else "raw"
    made.append(plot.line("x", line, source=source, color=curve.colour, width=2))
    if len(rows) <= MOST_MARKED:
        made.append(plot.scatter("x", "raw", source=source, color=curve.colour, size=5))
    return made


def _mark(plot: figure, chart: Chart, curves: Sequence[_Curve], row: int) -> None:
    """Mark a row by a line down the plot and a star on each curve."""
    x = float(_across(chart)[row])
    plot.add_layout(Span(location=x, dimension="height", line_dash="dotted", line_color=MARK))
    heights = [float(curve.values[row]) for curve in curves]
    plot.scatter([x] * len(heights), heights, marker="star", size=15, color=MARK)


def _add_tools(plot: figure, chart: Chart, curves: Sequence[_Curve]) -> None:
    """Let the plot show the values under the pointer, and zoom when asked to."""
    rows = kept(curves[0].values, curves[0].smoothed)
    columns = {f"y{i}": c.smoothed[rows].astype(np.float32) for i, c in enumerate(curves)}
    position = {"x": _across(chart)[rows], "step": chart.step[rows], "images": chart.images[rows]}
    # One invisible line carries the values of all, so that there is one tooltip and not ten.
    unseen = plot.line(
        "x", "y0", source=ColumnDataSource({**position, **columns}), alpha=0, level="underlay"
    )
    form = f"{{{chart.form}}}"
    shown = [(c.label, f"@y{i}{form}") for i, c in enumerate(curves)]
    hover = HoverTool(
        renderers=[unseen],
        tooltips=[("step", "@step{0,0}"), ("images", "@images{0,0}"), *shown],
        mode="vline",
        line_policy="nearest",
        limit=1,
    )
    plot.add_tools(hover, CrosshairTool(dimensions="height", line_color=GREY, line_alpha=0.4))
    plot.add_tools(BoxZoomTool(dimensions="width"), ResetTool())
    # An active drag or wheel would keep a phone from scrolling over the chart.
    plot.toolbar.active_drag = None
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
