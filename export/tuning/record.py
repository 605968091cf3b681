"""A bundle's tuned solvers: kept when it is exported again, shown in its report and card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle.bundle import Bundle
from runtime.bundle.format import TUNED_IMAGE
from runtime.diffusion.tuned import Tuned
from runtime.errors import BundleError
from runtime.files import to_json
from runtime.terminal.output import say

from ..sources.model import Model
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
    if not old.tuned or model.conditions:
        return {}
    now = probe(model.reference(), model)
    # The same network under another description would be sampled otherwise, so that must agree too.
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


@dataclass(frozen=True)
class HeldOut:
    """Distances of final samples from the teacher's, on samples that were not fitted on.

    Attributes:
        rms: The root mean square over samples.
        median: The median over samples.
        guidance: The root mean square by guidance scale.
    """

    rms: float
    median: float
    guidance: Mapping[str, float]

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> HeldOut:
        """Read the summary that `search.summary` wrote. It comes from a file, so it is checked."""
        guidance = {str(g): float(entry["rms"]) for g, entry in record["guidance"].items()}
        return cls(float(record["rms"]), float(record["median"]), guidance)

    def to_json(self) -> dict[str, object]:
        """Return the distances as report.json has them."""
        return {"rms": self.rms, "median": self.median, "guidance": dict(self.guidance)}


@dataclass(frozen=True)
class TunedCheck:
    """How a tuned solver compares with the best untuned one of as many calls."""

    tuned: HeldOut
    untuned: HeldOut
    untuned_solver: str

    @classmethod
    def of(cls, tuned: Tuned) -> TunedCheck:
        """Read what a solver's record says.

        Raises:
            BundleError: The record does not have the errors on held-out samples.
        """
        try:
            untuned = tuned.made["untuned"]
            return cls(
                tuned=HeldOut.read(tuned.made["errors"]["held_out"]),
                untuned=HeldOut.read(untuned["held_out"]),
                untuned_solver=str(untuned["name"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(
                f"the tuned solver of {len(tuned)} calls does not say how it was made ({error!r}). "
                f"Fit it again: python -m export.tune"
            ) from error

    def to_json(self) -> dict[str, object]:
        """Return the check as report.json has it."""
        return {
            "tuned": self.tuned.to_json(),
            "untuned": self.untuned.to_json(),
            "untuned_solver": self.untuned_solver,
        }


def tuned_checks(bundle: Bundle) -> dict[int, TunedCheck]:
    """Return the check of each tuned solver by its number of calls, the fewest first.

    Raises:
        BundleError: See `TunedCheck.of`.
    """
    return {calls: TunedCheck.of(bundle.tuned[calls]) for calls in sorted(bundle.tuned)}


def checks_to_json(checks: Mapping[int, TunedCheck]) -> dict[str, object]:
    """Return what report.json says under "tuned"."""
    return {str(calls): check.to_json() for calls, check in checks.items()}


def draw_tuned(folder: Path, name: str, checks: Mapping[int, TunedCheck]) -> None:
    """Draw the held-out error against network calls, one colour per guidance scale."""
    # Without pyplot, which belongs to the caller and may need a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = figure.subplots()
    calls = list(checks)
    every = list(checks.values())
    for i, g in enumerate(every[0].tuned.guidance):
        curves = (
            ("tuned", "o-", [check.tuned for check in every]),
            ("untuned", "s--", [check.untuned for check in every]),
        )
        for side, style, held_out in curves:
            # A solver fitted before the bundle's guidance changed lacks this scale: a gap.
            error = [errors.guidance.get(g, np.nan) for errors in held_out]
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
    # Without matplotlib's version in it, so that the same figures give the same bytes.
    figure.savefig(folder / TUNED_IMAGE, dpi=110, metadata={"Software": None})


def tuned_lines(bundle: Bundle) -> list[str]:
    """Return the model card's lines on tuned solvers."""
    if not bundle.tuned:
        return []
    rows = []
    for calls, check in tuned_checks(bundle).items():
        cells = " | ".join(f"{e.rms:.3f} ({e.median:.3f})" for e in (check.tuned, check.untuned))
        rows.append(f"| {calls} | {cells} | {check.untuned_solver} |")
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
