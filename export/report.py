"""What a person reads of an export: the report's picture and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.pictures import to_uint8
from runtime.progress import clock


def draw(path: Path, bundle: Bundle, report: Mapping[str, Any], pictures: Mapping[str, NDArray[Any]]) -> None:
    """report.png: error against time for every graph, and the pictures side by side with their difference enlarged."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    show = bundle.sample_shape[0] in (1, 3) and len(bundle.sample_shape) == 3
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
        f"bound {bound:g}", (0.99, bound), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
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
    first = next(iter(report["precisions"].values()))["trajectories"]
    lines = "\n".join(f"{t['trajectory']}: largest difference {t['error']:.1e}, {t['psnr_db']:.0f} dB" for t in first)
    axes["lines"].set_axis_off()
    axes["lines"].text(0, 1, lines, va="top", fontsize=9)
    right.set_title(f"whole trajectories (bound {report['bounds']['trajectory']:g})")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def card(bundle: Bundle) -> str:
    """The model card, Markdown: what it is, what it was trained on, licence, a picture, how to use it, how it was checked."""
    p, d = bundle.provenance, bundle.defaults
    data, config = p.get("data", {}), p.get("config", {})
    shape = "×".join(map(str, bundle.sample_shape))
    kind = f"{bundle.num_classes} classes" if bundle.labels else "no classes"
    lines = [
        f"# {bundle.name}",
        "",
        f"A diffusion model for samples of {shape} in {bundle.sample_range[0]:g} … {bundle.sample_range[1]:g}, {kind}. "
        f"Prediction `{bundle.prediction}`, schedule `{bundle.schedule.name}` with {len(bundle.schedule)} knots.",
        "",
        "![samples](samples.png)" if len(bundle.sample_shape) == 3 else "",
        "",
        "```python",
        "from runtime import Sampler",
        f'sampler = Sampler.load("{bundle.name}")',
        f"pictures = sampler.pictures(8, seed=0{', label=0' if bundle.labels else ''})",
        "```",
        "",
        f"Default: `{d.solver}`, {d.steps} steps on the `{d.grid}` grid, guidance {d.guidance:g}.",
        "",
        "## Trained on",
        "",
        f"{data.get('name', 'not stated')}: {data.get('note', 'not stated')} "
        f"({data.get('pictures', '?')} pictures, fingerprint `{str(data.get('fingerprint'))[:16]}`).",
        "",
        f"Licence of the data: {data.get('licence', 'not stated')}",
        "",
        f"{p.get('pictures_seen', '?')} pictures seen in {p.get('step', '?')} steps of {config.get('batch', '?')}, "
        f"{clock(p.get('training_seconds', 0))} of training; the full config is in `bundle.json` under `provenance`.",
        "",
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
