"""The page that python -m runtime.bench --plot draws. The one module of the runtime that asks for
matplotlib, and only when it is called."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.base import missing
from ..errors import RequestError
from ..files import replacing
from ..images import to_uint8

if TYPE_CHECKING:
    from .measure import Result

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
"""Pictures a row, at most."""
SAME_DB = 80.0
"""From here on what is apart is rounding: drawn beside the reference."""
ENDINGS = (".png", ".svg", ".pdf")


def check(path: Path) -> None:
    """Raises RequestError for a file that cannot be drawn into, BackendError where matplotlib is
    missing: before anything is measured."""
    if path.suffix.lower() not in ENDINGS:
        raise RequestError(
            f"--plot writes {', '.join(ENDINGS)}, found {path.name!r}: use a name that ends in "
            f"one of these."
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise missing("matplotlib, which --plot needs,", "plot", error) from error


def draw(
    path: Path, found: Mapping[str, Any], results: Sequence[Result], data_range: tuple[float, float]
) -> None:
    """Latency against batch, speed against nearness, the first picture, and the pictures
    themselves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from .table import heading

    backends = list(dict.fromkeys(r.backend for r in results))
    style = {
        r.name: (
            COLORS.get(r.precision, "#777777"),
            MARKERS[(i := backends.index(r.backend)) % 7],
            LINES[i % 4],
        )
        for r in results
    }
    images = pictured(results, found["shape"])
    cold = any(r.cold for r in results)
    figure = Figure(
        figsize=(14, 5.2 + (0.62 * len(results) + 0.3 if images else 0)),
        layout="constrained",
        dpi=110,
    )
    FigureCanvasAgg(figure)
    top: Any = figure
    bottom: Any = None
    if images:
        parts: Any = figure.subfigures(2, 1, height_ratios=[4.6, 0.62 * len(results) + 0.3])
        top, bottom = parts
    axes = top.subplots(1, 3 if cold else 2, width_ratios=[1.15, 1, 1.1][: 3 if cold else 2])
    latency(axes[0], results, style)
    quality(axes[1], results, style)
    if cold:
        first(axes[2], results, style)
    if bottom is not None:
        sheet(bottom, results, style, data_range)
    what, where = heading(found)
    figure.suptitle(f"{what}\n", fontsize=13, x=0.01, ha="left")
    figure.text(0.01, 0.97, where, fontsize=8.5, color="#666666", va="top")
    with replacing(path) as temporary:
        metadata = {"Software": None} if path.suffix.lower() == ".png" else None
        figure.savefig(os.fspath(temporary), format=path.suffix[1:].lower(), metadata=metadata)


def pictured(results: Sequence[Result], shape: Sequence[int]) -> bool:
    """Whether the samples can be shown."""
    return len(shape) == 3 and shape[0] in (1, 3) and all(r.samples is not None for r in results)


def latency(
    axis: Any, results: Sequence[Result], style: Mapping[str, tuple[str, str, str]]
) -> None:
    """p50 against batch, with p50 … p95 shaded; straight and steep is proportional, flat is
    free."""
    for r in results:
        color, marker, line = style[r.name]
        batch = [s.batch for s in r.speeds]
        p50, p95 = ([s.latency_ms[p] for s in r.speeds] for p in ("p50", "p95"))
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


def quality(
    axis: Any, results: Sequence[Result], style: Mapping[str, tuple[str, str, str]]
) -> None:
    """Pictures a second, small to large batch, against the PSNR to fp32; the reference and what
    equals it on top."""
    known = [
        r.psnr_db
        for r in results
        if r.psnr_db is not None and np.isfinite(r.psnr_db) and r.psnr_db < SAME_DB
    ]
    top = 10 * np.ceil(max([40.0, *known]) / 10) + 10
    low = min([35.0, *known]) - 6
    for i, r in enumerate(results):
        color, marker, _ = style[r.name]
        near = (
            top
            if r.psnr_db is None or r.psnr_db >= SAME_DB
            else float(np.clip(r.psnr_db, low + 2, top))
        )
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
            (0, -16 if i % 2 else 9),
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


def first(axis: Any, results: Sequence[Result], style: Mapping[str, tuple[str, str, str]]) -> None:
    """Seconds from the start of a fresh process to its first picture, by what they are spent on."""
    rows = [r for r in results if r.cold]
    shades = {"start of Python": 0.25, "import": 0.45, "load": 0.7, "sample": 1.0}
    for i, r in enumerate(rows):
        c = r.cold
        assert c is not None
        start = max(0.0, c.first_picture_s - c.import_s - c.load_s - c.sample_s)
        left = 0.0
        for part, alpha in zip(
            (start, c.import_s, c.load_s, c.sample_s), shades.values(), strict=True
        ):
            axis.barh(
                i, part, left=left, color=style[r.name][0], alpha=alpha, height=0.6, linewidth=0
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
    figure: Any,
    results: Sequence[Result],
    style: Mapping[str, tuple[str, str, str]],
    data_range: tuple[float, float],
) -> None:
    """A row of pictures each, the same seeds under each other, with the distance beside it."""
    from .table import nearness

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
        images = to_uint8(r.samples[:SHOWN], *data_range)
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
        words.text(1, 0.72, r.name, ha="right", va="center", fontsize=9.5, color=style[r.name][0])
        words.text(
            1, 0.28, f"{nearness(r)}{rms}", ha="right", va="center", fontsize=8, color="#666666"
        )


def plain(axis: Any, values: Sequence[float]) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5, 10, …, as plain numbers, around the values."""
    low = min(values) / 1.4
    high = max(values) * 1.6
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})
    axis.set_ticks(ticks, [f"{t:,g}" for t in ticks])
