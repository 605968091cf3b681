"""What a person reads of an export: the report's picture and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.pictures import to_uint8
from runtime.progress import clock

from .tuned import tuned_lines


def can_be_shown(shape: Sequence[int]) -> bool:
    """Whether samples of this shape are pictures."""
    return len(shape) == 3 and shape[0] in (1, 3)


def draw(path: Path, bundle: Bundle, report: Mapping[str, Any], pictures: Mapping[str, NDArray[Any]]) -> None:
    """report.png: error against time for every graph, and the pictures side by side with their difference enlarged."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    show = can_be_shown(bundle.sample_shape)
    figure, axes = plt.subplot_mosaic(
        [["step", "strip"], ["step", "lines"]],
        figsize=(13, 5.2),
        width_ratios=(1.1, 1),
        height_ratios=(4, 1),
        layout="constrained",
    )
    left, right = axes["step"], axes["strip"]
    for precision, entry in report["precisions"].items():
        for name, step in entry["steps"].items():
            time = [row["time"] for row in step["by_time"]]
            for kind, style in (("answer", "o-"), ("next_state", "s--")):
                label = f"{precision} {name}: {'F' if kind == 'answer' else kind}"
                left.plot(
                    time,
                    [max(row[kind], 1e-9) for row in step["by_time"]],
                    style,
                    markersize=4,
                    linewidth=1,
                    label=label,
                )
    bound = report["bounds"]["answer"]
    left.axhline(bound, color="black", linewidth=1)
    left.annotate(
        f"bound of F: {bound:g}", (0.99, bound), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
    )
    left.set(
        yscale="log",
        xlabel="time (what the network is told)",
        ylabel="largest difference from PyTorch",
        title=f"{bundle.name}: one step",
    )
    left.grid(alpha=0.3)
    left.legend(fontsize=7, loc="lower right")
    right.set_axis_off()
    if show:
        reference, rows, names = pictures["pytorch"], [pictures["pytorch"]], ["PyTorch"]
        for precision in report["precisions"]:
            delta = pictures[precision] - reference
            rows += [pictures[precision], delta * (0.8 / max(float(np.abs(delta).max()), 1e-12))]
            names += [f"ONNX {precision}", f"difference,\nlargest {np.abs(delta).max():.1e}"]
        sheet = np.concatenate([np.concatenate(list(to_uint8(row, *bundle.sample_range)), axis=1) for row in rows])
        right.imshow(
            sheet.squeeze(), cmap="gray" if sheet.shape[2] == 1 else None, interpolation="nearest", vmin=0, vmax=255
        )
        height = bundle.sample_shape[1]
        for i, name in enumerate(names):
            right.text(-0.02 * sheet.shape[1], (i + 0.5) * height, name, ha="right", va="center", fontsize=9)
    elif len(bundle.sample_shape) <= 2:
        _draw_lines(right, pictures)
    first = next(iter(report["precisions"].values()))["trajectories"]
    lines = "\n".join(f"{t['trajectory']}: largest difference {t['error']:.1e}, {t['psnr_db']:.0f} dB" for t in first)
    axes["lines"].set_axis_off()
    axes["lines"].text(0, 1, lines, va="top", fontsize=9)
    right.set_title(f"whole trajectories (bound {report['bounds']['trajectory']:g})")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def sheet_settings(bundle: Bundle) -> dict[str, Any]:
    """How the card's picture is sampled: by the bundle's defaults, or where those take more than a hundred calls, by fewer."""
    return {"solver": "ddim", "steps": 50} if bundle.defaults.steps > 100 else {}


def _draw_lines(axes: Any, samples: Mapping[str, NDArray[Any]]) -> None:
    """The first sample of each side as lines, a channel each, over each other."""
    for name, style in zip(samples, ("-", "--", ":", "-."), strict=False):
        first = samples[name][0].reshape(-1, samples[name].shape[-1])[:4]
        label = "PyTorch" if name == "pytorch" else f"ONNX {name}"
        for channel, values in enumerate(first):
            axes.plot(values, style, color=f"C{channel}", linewidth=1, label=label if channel == 0 else None)
    axes.set_axis_on()
    axes.legend(fontsize=7)


def card(bundle: Bundle) -> str:
    """The model card, Markdown: what it is, what it was trained on, licence, a picture, how to use it, how it was checked."""
    d, pictures = bundle.defaults, can_be_shown(bundle.sample_shape)
    shape = "×".join(map(str, bundle.sample_shape))
    kind = f"{bundle.num_classes} classes" if bundle.labels else "no classes"
    solver = f"{d.solver}({', '.join(f'{k}={v}' for k, v in d.options.items())})" if d.options else d.solver
    lines = [
        f"# {bundle.name}",
        "",
        f"A diffusion model for samples of {shape} in {bundle.sample_range[0]:g} … {bundle.sample_range[1]:g}, {kind}. "
        f"Prediction `{bundle.prediction}`, schedule `{bundle.schedule.name}` with {len(bundle.schedule)} knots.",
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
        *tuned_lines(bundle),
        *_origin(bundle.provenance),
        "## Checked",
        "",
        "Largest differences from PyTorch (see `report.json` and `report.png`):",
        "",
        "| precision | network's answer F | next state | whole trajectory |",
        "|---|---|---|---|",
        *(
            f"| {k} | {v['answer']:.1e} | {v['next_state']:.1e} | {v['trajectory']:.1e} |"
            for k, v in bundle.report.items()
        ),
        "",
    ]
    if bundle.labels:
        lines += ["## Labels", "", ", ".join(f"{i} `{name}`" for i, name in enumerate(bundle.labels.names)), ""]
    return "\n".join(lines)


def _origin(provenance: Mapping[str, Any]) -> list[str]:
    """The card's lines on data, licence and training, as far as they are known."""
    data, source = provenance.get("data", {}), provenance.get("source")
    note = f": {data['note']}" if "note" in data else ""
    lines = ["## Trained on", "", f"{data.get('name', 'Not stated.')}{note}"]
    if "pictures" in data:
        lines[-1] += f" ({data['pictures']} pictures, fingerprint `{str(data.get('fingerprint'))[:16]}`)."
    lines += ["", f"Licence of the data: {data.get('licence', 'not stated')}", ""]
    if "step" in provenance:
        batch, seconds = provenance.get("config", {}).get("batch", "?"), provenance.get("training_seconds", 0)
        lines += [
            f"{provenance.get('pictures_seen', '?')} pictures seen in {provenance['step']} steps of {batch}, "
            f"{clock(seconds)} of training; the full config is in `bundle.json` under `provenance`.",
            "",
        ]
    if source:
        lines += [f"Exported from {source}; its settings are in `bundle.json` under `provenance`.", ""]
    return lines
