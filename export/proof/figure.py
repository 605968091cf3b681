"""report.png: errors by level, final images side by side, and the figures of every precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.bundle import Bundle
from runtime.bundle.format import step_name
from runtime.images import is_image, to_uint8

from ..sources.model import ONNX_FILE
from .check import PYTORCH, Proof
from .report import PrecisionCheck, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("precision", "backend", "F", "PSNR to fp32, dB", "ms a call")
LEAST = 1e-9
"""The value at which the logarithmic axis puts an error of zero."""
LINE_STYLES = ("-", "--", ":", "-.")
CHANNELS = 4
"""How many channels of a signal are drawn."""


def draw(path: Path, bundle: Bundle, proof: Proof) -> None:
    """Draw a proof into the file `path`."""
    # Without pyplot, which belongs to the caller and may need a display.
    from matplotlib.figure import Figure

    report = proof.report
    rows = len(report.checks)
    figure = Figure(
        figsize=(14, 5.2 + 0.25 * rows + 0.6 * len(report.precisions)),
        layout="constrained",
    )
    axes = figure.subplot_mosaic(
        [["step", "strip"], ["table", "lines"]],
        width_ratios=(1.2, 1),
        height_ratios=(4, 0.6 + 0.25 * rows),
    )
    _draw_steps(axes["step"], bundle.name, report)
    _draw_samples(axes["strip"], bundle, report, proof.images)
    _draw_trajectories(axes["lines"], report)
    _draw_table(axes["table"], report)
    # Without matplotlib's version in it, so that the same figures give the same bytes.
    figure.savefig(path, dpi=110, metadata={"Software": None})


def compared_with(bundle: Bundle) -> str:
    """Return what the graphs were compared with, for people: PyTorch, or the file."""
    return "the ONNX file" if ONNX_FILE in bundle.provenance else "PyTorch"


def in_words(ms_a_call: Mapping[str, float]) -> str:
    """Return milliseconds by batch size in words."""
    return ", ".join(f"{spent:.1f} at batch {batch}" for batch, spent in ms_a_call.items())


def _draw_steps(axes: Axes, name: str, report: Report) -> None:
    """Draw the largest difference of F against the timestep; for fp32 next_state too."""
    for i, check in enumerate(report.checks):
        color = f"C{i}"
        axes.plot([], [], color=color, label=f"{check.precision} {check.backend}")
        for graph, step in check.steps.items():
            marker = "o" if graph == step_name(guided=False) else "^"
            time = [level.time for level in step.by_time]
            # A logarithmic axis has no zero, and bit-exact levels are common.
            answer = [max(level.answer, LEAST) for level in step.by_time]
            axes.plot(time, answer, marker + "-", color=color, markersize=3, linewidth=1)
            if check.precision == "fp32":
                state = [max(level.next_state, LEAST) for level in step.by_time]
                axes.plot(time, state, marker + ":", color=color, markersize=3, linewidth=1)
    graphs = dict.fromkeys(graph for check in report.checks for graph in check.steps)
    markers = [("o" if graph == step_name(guided=False) else "^", graph) for graph in graphs]
    for style, label in [*markers, ("-", "F"), (":", "next_state")]:
        axes.plot([], [], style, color="black", markersize=3, linewidth=1, label=label)
    bound = report.bounds.answer
    axes.axhline(max(bound, LEAST), color="black", linewidth=1)
    axes.annotate(
        f"bound of F in fp32: {bound:g}",
        (0.99, max(bound, LEAST)),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=8,
    )
    axes.set(yscale="log", xlabel="timestep", ylabel="largest difference from the original")
    axes.set_title(f"{name}: one step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _draw_samples(
    axes: Axes, bundle: Bundle, report: Report, samples: Mapping[str, NDArray[np.float32]]
) -> None:
    axes.set_axis_off()
    if is_image(bundle.sample_shape):
        _draw_images(axes, bundle, report.precisions, samples)
    elif len(bundle.sample_shape) <= 2:
        _draw_signals(axes, samples)
    axes.set_title(f"whole trajectories (bound of fp32: {report.bounds.trajectory:g})")


def _draw_images(
    axes: Axes,
    bundle: Bundle,
    precisions: Sequence[str],
    images: Mapping[str, NDArray[np.float32]],
) -> None:
    """Draw PyTorch's final images, then each precision's and their difference, enlarged."""
    reference = images[PYTORCH]
    rows = [reference]
    names = [compared_with(bundle)]
    for precision in precisions:
        # Differences are invisible unless enlarged; the label says by how much.
        found = np.nan_to_num(images[precision])
        delta = found - reference
        largest = float(np.abs(delta).max())
        rows += [found, delta * (0.8 / max(largest, 1e-12))]
        names += [f"ONNX {precision}", f"difference,\nlargest {largest:.1e}"]
    strips = [np.concatenate(list(to_uint8(row, *bundle.sample_range)), axis=1) for row in rows]
    sheet = np.concatenate(strips)
    axes.imshow(
        sheet.squeeze(),
        cmap="gray" if sheet.shape[2] == 1 else None,
        interpolation="nearest",
        vmin=0,
        vmax=255,
    )
    height = bundle.sample_shape[1]
    left = -0.02 * sheet.shape[1]
    for i, name in enumerate(names):
        axes.text(left, (i + 0.5) * height, name, ha="right", va="center", fontsize=7)


def _draw_signals(axes: Axes, samples: Mapping[str, NDArray[np.float32]]) -> None:
    """Draw the first sample of each side as lines, one a channel, over each other."""
    for name, style in zip(samples, LINE_STYLES, strict=False):
        channels = samples[name][0].reshape(-1, samples[name].shape[-1])[:CHANNELS]
        label = "original" if name == PYTORCH else f"ONNX {name}"
        for i, values in enumerate(channels):
            axes.plot(values, style, color=f"C{i}", linewidth=1, label=label if i == 0 else None)
    axes.set_axis_on()
    axes.legend(fontsize=7)


def _draw_trajectories(axes: Axes, report: Report) -> None:
    lines = [
        f"{t.trajectory}: largest difference {t.error:.1e}, {t.psnr_db:.0f} dB"
        for t in report.checks[0].trajectories
    ]
    text = "\n".join(["fp32 and the original:", *lines, *_conversion_lines(report)])
    axes.set_axis_off()
    axes.text(0, 1, text, va="top", fontsize=9)


def _conversion_lines(report: Report) -> list[str]:
    """Return how near float16's range is, and which layers int8 leaves in float32."""
    lines: list[str] = []
    headroom = report.conversion.headroom
    if headroom is not None:
        node, share = next(iter(headroom.nearest.items()))
        lines.append(
            f"fp16: the largest value seen is {share:.2%} of float16's range,\n    at {node}"
        )
    for name, choice in report.conversion.int8.items():
        lines.append(
            f"{name}: {len(choice.keep)} layers stay float32 ({choice.float_share:.1%} of "
            f"multiply-adds) {', '.join(choice.keep[:3])}"
        )
    return lines


def _draw_table(axes: Axes, report: Report) -> None:
    axes.set_axis_off()
    table = axes.table(
        [_row(check) for check in report.checks],
        colLabels=COLUMNS,
        loc="upper left",
        cellLoc="center",
        edges="horizontal",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    table.auto_set_column_width(list(range(len(COLUMNS))))


def _row(check: PrecisionCheck) -> list[str]:
    """Return a check's figures under COLUMNS."""
    psnr = [f"{value:.0f} {name.partition(',')[0]}" for name, value in check.psnr_db.items()]
    return [
        check.precision,
        check.backend,
        f"{check.largest_answer:.1e}",
        ", ".join(psnr),
        in_words(check.ms_a_call),
    ]
