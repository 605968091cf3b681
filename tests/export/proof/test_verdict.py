"""Each kind of miss fails an export by itself, and so does a figure that is not a number."""

from dataclasses import replace
from typing import Any

import pytest

from export.errors import ExportError
from export.proof.plan import Bounds, Plan
from export.proof.report import (
    NONE,
    PrecisionCheck,
    Report,
    StepCheck,
    TrajectoryCheck,
    Worst,
)
from export.proof.verdict import judge

NAN = float("nan")
STEP = StepCheck(answer=NONE, next_state=NONE)
RUN = TrajectoryCheck("ddim, 4 steps", error=0.5, bound=1.0, psnr_db=60.0, loop_graph=0.5)
LEAST = Bounds().psnr["int8"]


def report_of(precision: str, **changes: Any) -> Report:
    """A report of one check on ONNX Runtime, within its bounds but for the changes."""
    sound = PrecisionCheck(
        precision, "onnxruntime", {"step": STEP}, (RUN,), True, {"ddim, 4 steps": LEAST}
    )
    return Report(Bounds(), Plan(), (replace(sound, **changes),))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_figures_on_their_bounds_pass(precision: str) -> None:
    edge = replace(RUN, error=1.0, loop_graph=1.0)
    (check,) = judge(report_of(precision, trajectories=(edge,))).checks
    assert check.missed == ()


@pytest.mark.parametrize(
    ("precision", "changes", "miss"),
    [
        ("fp32", {"identity": False}, "an identity row changes the state"),
        ("int8", {"identity": False}, "an identity row changes the state"),
        ("fp32", {"steps": {"step": replace(STEP, not_finite=5)}}, "5 values of F are not finite"),
        ("int8", {"steps": {"step": replace(STEP, not_finite=5)}}, "5 values of F are not finite"),
        (
            "fp32",
            {"steps": {"step": replace(STEP, answer=Worst(2.0, 1.0, "time 9"))}},
            "answer: 2 > 1 at time 9",
        ),
        (
            "fp32",
            {"steps": {"step": replace(STEP, next_state=Worst(2.0, 1.0, "time 9"))}},
            "next_state: 2 > 1 at time 9",
        ),
        ("fp32", {"trajectories": (replace(RUN, error=1.5),)}, "error of the trajectory"),
        ("fp32", {"trajectories": (replace(RUN, error=NAN),)}, "error of the trajectory"),
        ("fp32", {"trajectories": (replace(RUN, loop_graph=1.5),)}, "loop_graph of the trajectory"),
        ("fp32", {"trajectories": (replace(RUN, loop_graph=NAN),)}, "loop_graph of the trajectory"),
        ("int8", {"psnr_db": {"ddim, 4 steps": LEAST - 0.1}}, "final images"),
        ("int8", {"psnr_db": {"ddim, 4 steps": NAN}}, "final images"),
    ],
)
def test_a_miss_fails_the_export_and_is_named(
    precision: str, changes: dict[str, Any], miss: str
) -> None:
    with pytest.raises(ExportError) as refused:
        judge(report_of(precision, **changes))
    assert f"{precision} on onnxruntime: {miss}" in str(refused.value)
    assert "--no-same-bytes" not in str(refused.value)
