"""The model card, and the result of a proof in a few lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.bundle.bundle import Bundle
from runtime.bundle.format import MANIFEST, REPORT, REPORT_IMAGE, SAMPLES_IMAGE
from runtime.images import is_image
from runtime.terminal.progress import clock

from ..tuning.record import tuned_lines
from .figure import compared_with, in_words
from .plan import Bounds
from .verdict import REFERENCE

MOST_CALLS = 100
"""More network calls than this an image of the card is not worth."""
MOST_SECONDS = 60.0
"""For all calls of an image of the card."""
FEWEST = 10
"""Steps of an image of the card, however long a call takes."""
UNLIKE = (
    "**A seed may give other last bits in another batch**: an inference library rounds a node of "
    "this network differently there. The bundle declares `same_bytes: false`."
)


def sheet_settings(bundle: Bundle) -> dict[str, Any]:
    """Return how the card's image is sampled: by the defaults, or faster if they are slow."""
    # That of the pair which samples it.
    checked = bundle.report.get("fp32", {}).get(REFERENCE, {})
    seconds = checked.get("ms_a_call", {}).get("1", 0.0) / 1e3
    steps = sheet_steps(bundle.defaults.steps, seconds)
    return {} if steps == bundle.defaults.steps else {"solver": "ddim", "steps": steps}


def sheet_steps(steps: int, seconds: float) -> int:
    """Return the steps of the card's image. seconds: of one call."""
    if steps <= MOST_CALLS and steps * seconds <= MOST_SECONDS:
        return steps
    return min(steps, 50, max(FEWEST, int(MOST_SECONDS / max(seconds, 1e-3))))


def card(bundle: Bundle) -> str:
    """Return the model card in Markdown: what the model is, how to use it, how it was checked."""
    lines = [
        f"# {bundle.name}",
        "",
        *_description(bundle),
        *_usage(bundle),
        *_distilled(bundle),
        *([] if bundle.same_bytes else [UNLIKE, ""]),
        *tuned_lines(bundle),
        *_origin(bundle.provenance),
        *_checked(bundle),
        *_labels(bundle),
        *_conditions(bundle),
    ]
    return "\n".join(lines)


def proof_lines(bundle: Bundle, bounds: Bounds) -> str:
    """Return the worst case of each precision and backend, for the terminal."""
    lines: list[str] = []
    for precision, entries in bundle.report.items():
        for backend, worst in entries.items():
            original = compared_with(bundle)
            found = f"agrees with {original}, largest differences:"
            if worst["missed"]:
                found = f"not offered, because it missed bounds. Differences from {original}:"
            lines.append(
                f"{precision} on {backend}: {in_words(worst['ms_a_call'])} ms a call; {found}"
            )
            # Other precisions differ from PyTorch on purpose; only their images have a bound.
            if precision == "fp32":
                lines += [
                    f"  network's output F  {worst['answer']:.1e}  (bound {bounds.answer:g})",
                    f"  next state          {worst['next_state']:.1e}  (bound "
                    f"{bounds.next_state:g}·max(1, σ) beyond F's share)",
                    f"  whole trajectory    {worst['trajectory']:.1e}  (bound "
                    f"{bounds.trajectory:g}·max(1, |x|))",
                ]
            else:
                lines += [
                    f"  network's output F  {worst['answer']:.1e}",
                    f"  final images        {worst['psnr_db']:.1f} dB from fp32's  (bound "
                    f"{bounds.psnr[precision]:g} dB)",
                ]
    return "\n".join(lines)


def _description(bundle: Bundle) -> list[str]:
    shape = "×".join(map(str, bundle.sample_shape))
    low, high = bundle.sample_range
    kind = f"{bundle.num_classes} classes" if bundle.labels else "no classes"
    lines = [
        f"A diffusion model for samples of {shape} in {low:g} … {high:g}, {kind}. "
        f"Prediction `{bundle.prediction}`, schedule `{bundle.schedule.name}` with "
        f"{len(bundle.schedule)} knots.",
        "",
    ]
    if is_image(bundle.sample_shape):
        lines += [f"![samples]({SAMPLES_IMAGE})", ""]
    return lines


def _usage(bundle: Bundle) -> list[str]:
    defaults = bundle.defaults
    images = is_image(bundle.sample_shape)
    noun = "pictures" if images else "samples"
    method = "pictures" if images else "sample"
    label = ", label=0" if bundle.labels else ""
    named = ", ".join(f'"{c.name}": {c.name}' for c in bundle.conditions)
    given = f", conditions={{{named}}}" if named else ""
    options = ", ".join(f"{name}={value}" for name, value in defaults.options.items())
    solver = f"{defaults.solver}({options})" if options else defaults.solver
    settings = sheet_settings(bundle) if images else {}
    faster = f" The image: `ddim`, {settings['steps']} steps." if settings else ""
    return [
        "```python",
        "from runtime import Sampler",
        f'sampler = Sampler.load("{bundle.name}")',
        f"{noun} = sampler.{method}(8, seed=0{label}{given})",
        "```",
        "",
        f"Default: `{solver}`, {defaults.steps} steps on the `{defaults.grid}` grid, guidance "
        f"{defaults.guidance:g}.{faster}",
        "",
    ]


def _distilled(bundle: Bundle) -> list[str]:
    """Return what the network was distilled for, and from what."""
    if not bundle.distilled:
        return []
    calls = ", ".join(map(str, sorted(bundle.distilled.levels)))
    made = ", ".join(f"{name} {value}" for name, value in bundle.distilled.made.items())
    return [
        f"Distilled for {calls} network calls: `steps` is one of these numbers. Guidance is built "
        f"in, so `guidance` is 1. It was made by: {made}.",
        "",
    ]


def _origin(provenance: Mapping[str, Any]) -> list[str]:
    """Return the lines on data, licence and training, as far as they are known."""
    data = _object(provenance, "data")
    note = f": {data['note']}" if "note" in data else ""
    name = f"{data.get('name', 'Not stated.')}{note}"
    if "pictures" in data:
        fingerprint = str(data.get("fingerprint"))[:16]
        name += f" ({data['pictures']} images, fingerprint `{fingerprint}`)."
    lines = ["## Trained on", "", name]
    lines += ["", f"Licence of the data: {data.get('licence', 'not stated')}", ""]
    if "step" in provenance:
        config = _object(provenance, "config")
        seconds = provenance.get("training_seconds")
        spent = clock(seconds if isinstance(seconds, int | float) else 0)
        start = config.get("start_from")
        started = f", started from the weights that were then in `{start}`" if start else ""
        lines += [
            f"{provenance.get('pictures_seen', '?')} images seen in {provenance['step']} steps "
            f"of {config.get('batch', '?')}, {spent} of training{started}; the full config is in "
            f"`{MANIFEST}` under `provenance`.",
            "",
        ]
    source = provenance.get("source")
    if source:
        lines += [
            f"Exported from {source}; its settings are in `{MANIFEST}` under `provenance`.",
            "",
        ]
    return lines


def _object(provenance: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return an entry of several values. Users may write provenance of any form."""
    value = provenance.get(name, {})
    return value if isinstance(value, Mapping) else {"name": value}


def _checked(bundle: Bundle) -> list[str]:
    lines = [
        "## Checked",
        "",
        f"Largest differences from {compared_with(bundle)} (see `{REPORT}` and `{REPORT_IMAGE}`):",
        "",
        "| precision | backend | network's output F | next state | whole trajectory | PSNR to "
        "fp32, dB |",
        "|---|---|---|---|---|---|",
    ]
    # fp32 is the reference of the PSNR, so it has none.
    for precision, entries in bundle.report.items():
        for backend, worst in entries.items():
            psnr = "–" if precision == "fp32" else format(worst["psnr_db"], ".1f")
            note = " (not offered: missed bounds)" if worst.get("missed") else ""
            lines.append(
                f"| {precision} | {backend}{note} | "
                f"{worst['answer']:.1e} | {worst['next_state']:.1e} | "
                f"{worst['trajectory']:.1e} | {psnr} |"
            )
    return [*lines, ""]


def _conditions(bundle: Bundle) -> list[str]:
    """Return what the network is conditioned on, besides its labels."""
    if not bundle.conditions:
        return []
    lines = ["## Conditions", "", "| name | shape | range | null value | meaning |"]
    lines += ["|---|---|---|---|---|"]
    for c in bundle.conditions:
        shape = "×".join(map(str, c.shape)) or "a number"
        ends = f"{c.range[0]:g} … {c.range[1]:g}" if c.range else "any"
        null = "none" if c.null is None else c.null
        meaning = c.meaning.replace("|", "/").replace("\n", " ")
        lines.append(f"| `{c.name}` | {shape}, {c.dtype} | {ends} | {null} | {meaning} |")
    return [*lines, ""]


def _labels(bundle: Bundle) -> list[str]:
    if bundle.labels is None:
        return []
    names = ", ".join(f"{i} `{name}`" for i, name in enumerate(bundle.labels.names))
    return ["## Labels", "", names, ""]
