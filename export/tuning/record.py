"""A bundle's tuned solvers: kept when it is exported again, shown in its report and card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle.bundle import Bundle
from runtime.bundle.format import REPORT, TUNED_IMAGE
from runtime.diffusion.tuned import Tuned
from runtime.errors import BundleError
from runtime.files import from_json, to_json
from runtime.terminal.output import say

from ..sources.model import Model, torch_network
from .reference import probe, same


def kept(model: Model, out: Path) -> Mapping[int, Tuned]:
    """Return the solvers of the bundle in `out`, which is about to be replaced.

    They are kept if the network is the same, else dropped, and a line says so.
    """
    if not out.exists():
        return {}
    try:
        old = Bundle.load(out)
    except BundleError as error:
        say(f"tuned solvers, if {out} had some, are dropped: {error}")
        return {}
    if not old.tuned:
        return {}
    now = probe(torch_network(model), model)
    facts = [
        (b.prediction, b.clip, b.sample_shape, to_json(b.schedule.to_json())) for b in (old, model)
    ]
    if facts[0] == facts[1] and all(same(t.made.get("network"), now) for t in old.tuned.values()):
        return old.tuned
    say(
        f"{out} has solvers fitted to another network; they are dropped. To fit new ones: python "
        f"-m export.tune {out}"
    )
    return {}


def add_tuned(folder: Path, bundle: Bundle) -> None:
    """Add the curve of a bundle's tuned solvers, if any, to report.json, and draw it."""
    if not bundle.tuned:
        return
    report = from_json((folder / REPORT).read_bytes())
    report["tuned"] = {str(K): _held_out(t) for K, t in sorted(bundle.tuned.items())}
    (folder / REPORT).write_text(to_json(report), encoding="utf-8")
    _draw_tuned(folder / TUNED_IMAGE, bundle.name, report["tuned"])


def _held_out(tuned: Tuned) -> dict[str, Any]:
    """Return the errors on held-out samples of a tuned solver and of the untuned one.

    Raises:
        BundleError: The solver's record does not have them.
    """

    def numbers(record: Mapping[str, Any]) -> dict[str, Any]:
        found = {name: float(record[name]) for name in ("rms", "median")}
        return found | {
            "guidance": {str(g): float(e["rms"]) for g, e in record["guidance"].items()}
        }

    try:
        untuned = tuned.made["untuned"]
        record = {
            "tuned": numbers(tuned.made["errors"]["held_out"]),
            "untuned": numbers(untuned["held_out"]),
        }
        return record | {"untuned_solver": str(untuned["name"])}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(
            f"the tuned solver of {len(tuned)} calls does not say how it was made ({error!r}). "
            f"Fit it again: python -m export.tune"
        ) from error


def _draw_tuned(path: Path, name: str, curve: Mapping[str, Any]) -> None:
    """Draw the held-out error against network calls, one colour a guidance scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    calls = [int(K) for K in curve]
    for i, g in enumerate(next(iter(curve.values()))["tuned"]["guidance"]):
        for side, style in (("tuned", "o-"), ("untuned", "s--")):
            error = [entry[side]["guidance"].get(g, np.nan) for entry in curve.values()]
            axis.plot(calls, error, style, color=f"C{i}", label=f"{side}, guidance {g}")
    axis.set(
        yscale="log",
        xlabel="calls of the network",
        ylabel="RMS distance to the teacher, held out",
        title=f"{name}: tuned solvers and the best untuned ones",
    )
    axis.set_xticks(calls)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def tuned_lines(bundle: Bundle) -> list[str]:
    """Return the model card's lines on tuned solvers."""
    if not bundle.tuned:
        return []
    rows = []
    for K, t in sorted(bundle.tuned.items()):
        record = _held_out(t)
        cells = " | ".join(
            f"{e['rms']:.3f} ({e['median']:.3f})" for e in (record["tuned"], record["untuned"])
        )
        rows.append(f"| {K} | {cells} | {record['untuned_solver']} |")
    return [
        f'With few calls: `solver="tuned"`, `steps={" | ".join(map(str, sorted(bundle.tuned)))}`, '
        f"fitted to this network (`tuned.png`). "
        "RMS distance (median) to what many calls make of the same noise, on samples that were "
        "not fitted on:",
        "",
        "| calls | tuned | best untuned | which is |",
        "|---|---|---|---|",
        *rows,
        "",
    ]
