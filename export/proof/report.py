"""What a person reads of an export: the report's picture and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.images import to_uint8
from runtime.progress import clock

from ..tuning.record import tuned_lines


def can_be_shown(shape: Sequence[int]) -> bool:
    """Whether samples of this shape are pictures."""
    return len(shape) == 3 and shape[0] in (1, 3)


def draw(
    path: Path, bundle: Bundle, report: Mapping[str, Any], pictures: Mapping[str, NDArray[Any]]
) -> None:
    """report.png: error against time for every graph, and the pictures side by side with their
    difference enlarged."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    pairs = [
        (p, b, entry) for p, entries in report["precisions"].items() for b, entry in entries.items()
    ]
    figure, axes = plt.subplot_mosaic(
        [["step", "strip"], ["table", "lines"]],
        figsize=(14, 5.2 + 0.25 * len(pairs) + 0.6 * len(report["precisions"])),
        width_ratios=(1.2, 1),
        height_ratios=(4, 0.6 + 0.25 * len(pairs)),
        layout="constrained",
    )
    _draw_steps(axes["step"], bundle.name, pairs, report["bounds"]["answer"])
    strip = axes["strip"]
    strip.set_axis_off()
    if can_be_shown(bundle.sample_shape):
        _draw_pictures(strip, bundle, list(report["precisions"]), pictures)
    elif len(bundle.sample_shape) <= 2:
        _draw_lines(strip, pictures)
    strip.set_title(f"whole trajectories (bound of fp32: {report['bounds']['trajectory']:g})")
    records = pairs[0][2]["trajectories"]
    lines = "\n".join(
        f"{t['trajectory']}: largest difference {t['error']:.1e}, {t['psnr_db']:.0f} dB"
        for t in records
    )
    axes["lines"].set_axis_off()
    axes["lines"].text(
        0, 1, f"fp32 and PyTorch:\n{lines}\n{_nearest(report)}", va="top", fontsize=9
    )
    axes["table"].set_axis_off()
    rows = [[p, b, *_row(entry)] for p, b, entry in pairs]
    drawn = axes["table"].table(
        rows, colLabels=COLUMNS, loc="upper left", cellLoc="center", edges="horizontal"
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)
    drawn.auto_set_column_width(list(range(len(COLUMNS))))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


COLUMNS = ("precision", "backend", "F", "PSNR to fp32, dB", "ms a call")


def _row(entry: Mapping[str, Any]) -> list[str]:
    """An entry's figures under COLUMNS: largest difference of F, PSNR of final pictures by way,
    milliseconds by batch."""
    answer = max(step["answer"]["error"] for step in entry["steps"].values())
    psnr = ", ".join(
        f"{found:.0f} {name.partition(',')[0]}" for name, found in entry["psnr_db"].items()
    )
    return [f"{answer:.1e}", psnr, _times(entry["ms_a_call"])]


def _times(ms: Mapping[str, float]) -> str:
    """Milliseconds by batch in words."""
    return ", ".join(f"{time:.1f} at batch {batch}" for batch, time in ms.items())


def _nearest(report: Mapping[str, Any]) -> str:
    """How near float16's range is, and what int8 leaves in float32, in a line each."""
    lines = []
    if "headroom" in report:
        name, found = next(iter(report["headroom"]["nearest"].items()))
        lines.append(
            f"fp16: the largest value seen is {found:.2%} of float16's range,\n    at {name}"
        )
    for name, made in report.get("int8", {}).items():
        kept, share = made["float32_layers"], made["float32_share_of_multiply_adds"]
        lines.append(
            f"{name}: {len(kept)} layers stay float32 ({share:.1%} of multiply-adds) "
            f"{', '.join(kept[:3])}"
        )
    return "\n".join(lines)


def _draw_steps(
    axes: Any, name: str, pairs: Sequence[tuple[str, str, Mapping[str, Any]]], bound: float
) -> None:
    """Largest difference of F from PyTorch against time, for every precision, backend and graph;
    for fp32 next_state too."""
    for i, (precision, backend, entry) in enumerate(pairs):
        axes.plot([], [], color=f"C{i}", label=f"{precision} {backend}")
        for graph, step in entry["steps"].items():
            time = [row["time"] for row in step["by_time"]]
            for kind in ("answer", "next_state") if precision == "fp32" else ("answer",):
                values = [max(row[kind], 1e-9) for row in step["by_time"]]
                style = ("o" if graph == "step" else "^") + ("-" if kind == "answer" else ":")
                axes.plot(time, values, style, color=f"C{i}", markersize=3, linewidth=1)
    graphs = dict.fromkeys(graph for _, _, entry in pairs for graph in entry["steps"])
    for style, label in [
        *(("o" if g == "step" else "^", g) for g in graphs),
        ("-", "F"),
        (":", "next_state"),
    ]:
        axes.plot([], [], style, color="black", markersize=3, linewidth=1, label=label)
    axes.axhline(bound, color="black", linewidth=1)
    place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom", "fontsize": 8}
    axes.annotate(f"bound of F in fp32: {bound:g}", (0.99, bound), **place)
    axes.set(
        yscale="log",
        xlabel="time (what the network is told)",
        ylabel="largest difference from PyTorch",
    )
    axes.set_title(f"{name}: one step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _draw_pictures(
    axes: Any, bundle: Bundle, precisions: Sequence[str], pictures: Mapping[str, NDArray[Any]]
) -> None:
    """PyTorch's final pictures, then each precision's and what is different, enlarged."""
    reference, rows, names = pictures["pytorch"], [pictures["pytorch"]], ["PyTorch"]
    for precision in precisions:
        delta = pictures[precision] - reference
        rows += [pictures[precision], delta * (0.8 / max(float(np.abs(delta).max()), 1e-12))]
        names += [f"ONNX {precision}", f"difference,\nlargest {np.abs(delta).max():.1e}"]
    sheet = np.concatenate(
        [np.concatenate(list(to_uint8(row, *bundle.sample_range)), axis=1) for row in rows]
    )
    axes.imshow(
        sheet.squeeze(),
        cmap="gray" if sheet.shape[2] == 1 else None,
        interpolation="nearest",
        vmin=0,
        vmax=255,
    )
    height = bundle.sample_shape[1]
    for i, name in enumerate(names):
        axes.text(
            -0.02 * sheet.shape[1], (i + 0.5) * height, name, ha="right", va="center", fontsize=7
        )


def worst_of(report: Mapping[str, Any], bounds: Mapping[str, Any]) -> str:
    """The report's summary in a few lines for the terminal."""
    lines = []
    for precision, entries in report.items():
        for backend, worst in entries.items():
            lines.append(
                f"{precision} on {backend}: {_times(worst['ms_a_call'])} ms a call; agrees with "
                f"PyTorch, largest differences:"
            )
            lines.append(
                f"  network's answer F  {worst['answer']:.1e}"
                + (f"  (bound {bounds['answer']:g})" if precision == "fp32" else "")
            )
            if precision == "fp32":
                lines.append(
                    f"  next state          {worst['next_state']:.1e}  (bound "
                    f"{bounds['next_state']:g}·max(1, σ) beyond F's share)"
                )
                lines.append(
                    f"  whole trajectory    {worst['trajectory']:.1e}  (bound "
                    f"{bounds['trajectory']:g}·max(1, |x|))"
                )
            else:
                lines.append(
                    f"  final pictures      {worst['psnr_db']:.1f} dB from fp32's  (bound "
                    f"{bounds['psnr'][precision]:g} dB)"
                )
    return "\n".join(lines)


def sheet_settings(bundle: Bundle) -> dict[str, Any]:
    """How the card's picture is sampled: by the bundle's defaults, or where those take more than a
    hundred calls, by fewer."""
    return {"solver": "ddim", "steps": 50} if bundle.defaults.steps > 100 else {}


def _draw_lines(axes: Any, samples: Mapping[str, NDArray[Any]]) -> None:
    """The first sample of each side as lines, a channel each, over each other."""
    for name, style in zip(samples, ("-", "--", ":", "-."), strict=False):
        first = samples[name][0].reshape(-1, samples[name].shape[-1])[:4]
        label = "PyTorch" if name == "pytorch" else f"ONNX {name}"
        for channel, values in enumerate(first):
            axes.plot(
                values,
                style,
                color=f"C{channel}",
                linewidth=1,
                label=label if channel == 0 else None,
            )
    axes.set_axis_on()
    axes.legend(fontsize=7)


UNLIKE = (
    "**A seed may give other last bits in another batch**: an inference library rounds a node of "
    "this "
    "network differently there. The bundle declares `same_bytes: false`."
)


def card(bundle: Bundle) -> str:
    """The model card, Markdown: what it is, what it was trained on, licence, a picture, how to use
    it, how it was checked."""
    d, pictures = bundle.defaults, can_be_shown(bundle.sample_shape)
    shape = "×".join(map(str, bundle.sample_shape))
    kind = f"{bundle.num_classes} classes" if bundle.labels else "no classes"
    solver = (
        f"{d.solver}({', '.join(f'{k}={v}' for k, v in d.options.items())})"
        if d.options
        else d.solver
    )
    lines = [
        f"# {bundle.name}",
        "",
        f"A diffusion model for samples of {shape} in {bundle.sample_range[0]:g} … "
        f"{bundle.sample_range[1]:g}, {kind}. "
        f"Prediction `{bundle.prediction}`, schedule `{bundle.schedule.name}` with "
        f"{len(bundle.schedule)} knots.",
        "",
        *(["![samples](samples.png)", ""] if pictures else []),
        "```python",
        "from runtime import Sampler",
        f'sampler = Sampler.load("{bundle.name}")',
        f"{'pictures' if pictures else 'samples'} = sampler.{'pictures' if pictures else 'sample'}"
        f"(8, seed=0{', label=0' if bundle.labels else ''})",
        "```",
        "",
        f"Default: `{solver}`, {d.steps} steps on the `{d.grid}` grid, guidance {d.guidance:g}."
        + (" The picture: `ddim`, 50 steps." if pictures and sheet_settings(bundle) else ""),
        "",
        *([] if bundle.same_bytes else [UNLIKE, ""]),
        *tuned_lines(bundle),
        *_origin(bundle.provenance),
        "## Checked",
        "",
        "Largest differences from PyTorch (see `report.json` and `report.png`):",
        "",
        "| precision | backend | network's answer F | next state | whole trajectory | PSNR to "
        "fp32, dB |",
        "|---|---|---|---|---|---|",
        *(
            f"| {precision} | {backend} | {worst['answer']:.1e} | {worst['next_state']:.1e} | "
            f"{worst['trajectory']:.1e} | "
            f"{'–' if precision == 'fp32' else format(worst['psnr_db'], '.1f')} |"
            for precision, entries in bundle.report.items()
            for backend, worst in entries.items()
        ),
        "",
    ]
    if bundle.labels:
        lines += [
            "## Labels",
            "",
            ", ".join(f"{i} `{name}`" for i, name in enumerate(bundle.labels.names)),
            "",
        ]
    return "\n".join(lines)


def _origin(provenance: Mapping[str, Any]) -> list[str]:
    """The card's lines on data, licence and training, as far as they are known."""
    data, source = provenance.get("data", {}), provenance.get("source")
    note = f": {data['note']}" if "note" in data else ""
    lines = ["## Trained on", "", f"{data.get('name', 'Not stated.')}{note}"]
    if "pictures" in data:
        lines[-1] += (
            f" ({data['pictures']} pictures, fingerprint `{str(data.get('fingerprint'))[:16]}`)."
        )
    lines += ["", f"Licence of the data: {data.get('licence', 'not stated')}", ""]
    if "step" in provenance:
        config, seconds = provenance.get("config", {}), provenance.get("training_seconds", 0)
        start = (
            f", begun with the weights that were then in `{config['start_from']}`"
            if config.get("start_from")
            else ""
        )
        lines += [
            f"{provenance.get('pictures_seen', '?')} pictures seen in {provenance['step']} steps "
            f"of {config.get('batch', '?')}, "
            f"{clock(seconds)} of training{start}; the full config is in `bundle.json` under "
            f"`provenance`.",
            "",
        ]
    if source:
        lines += [
            f"Exported from {source}; its settings are in `bundle.json` under `provenance`.",
            "",
        ]
    return lines
