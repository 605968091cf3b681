"""What counts as a miss; each kind of miss fails an export by itself, and so does a figure that is
not a number."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from export.errors import ExportError
from export.proof.examples import Example
from export.proof.plan import QUICK, Bounds, Plan
from export.proof.report import (
    NONE,
    PrecisionCheck,
    Report,
    StepCheck,
    TrajectoryCheck,
    Worst,
)
from export.proof.steps import Output, _Comparison
from export.proof.trajectories import Trajectory, check_trajectory, trajectories
from export.proof.verdict import judge
from runtime import Sampler, make_schedule
from runtime.diffusion.program import R

from ...small_bundle import SmallBackend, write_small_bundle

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


def test_the_loop_graph_in_int8_may_be_as_far_off_as_int8_itself() -> None:
    """Its kernels round another batch differently on some processors, which steps amplify."""
    for far in (replace(RUN, error=20.0, loop_graph=20.0), replace(RUN, loop_graph=10.0)):
        (check,) = judge(report_of("int8", trajectories=(far,))).checks
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
        ("int8", {"trajectories": (replace(RUN, loop_graph=11.0),)}, "loop_graph of the traj"),
        ("int8", {"trajectories": (replace(RUN, loop_graph=NAN),)}, "loop_graph of the traj"),
        (
            "int8",
            {"trajectories": (replace(RUN, error=20.0, loop_graph=21.0),)},
            "loop_graph of the traj",
        ),
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


@pytest.mark.parametrize(("sigma", "times"), [(0.5, 1.0), (4.0, 4.0)])
@pytest.mark.parametrize(("share", "passes"), [(0.9, True), (1.1, False)])
def test_a_state_may_be_off_by_its_bound_times_the_noise_level(
    sigma: float, times: float, share: float, passes: bool
) -> None:
    shape = (1, 2, 2)
    state = np.zeros((1, R, *shape), np.float32)
    flat = np.zeros((1, *shape), np.float32)
    example = Example(
        knots=np.array([2]),
        sigma=np.array([sigma]),
        call=np.zeros((1, 6)),
        update=np.zeros((1, R, R + 2)),
        label=np.zeros(1, np.int64),
        conditions={},
        state=state,
        noise=flat,
        answer=flat,
        next_state=state,
    )
    comparison = _Comparison("step.onnx", Bounds(), make_schedule("cosine", T=4))
    off = np.full_like(state, share * times * Bounds().next_state)
    comparison.compare(example, np.array([0]), Output(off, flat))
    assert comparison.next_state.passes is passes


@pytest.mark.parametrize(("share", "passes"), [(0.5, True), (1.5, False)])
def test_a_final_sample_may_be_off_by_its_bound(share: float, passes: bool, tmp_path: Path) -> None:
    bundle = write_small_bundle(tmp_path / "bundle")
    sampler = Sampler(bundle, SmallBackend(bundle))
    model: Any = SimpleNamespace(draw_conditions=lambda _: {})
    bound = Bounds().trajectory
    samples = sampler.sample(3, label=[0, 1, 2], guidance=1.0, solver="ddim", steps=3)
    expected = samples - np.float32(share * bound) * np.sign(samples)  # no larger than 1
    run = Trajectory("ddim", 3, 1.0)
    check = check_trajectory(model, sampler, run, bound, expected).check
    assert check.error == pytest.approx(share * bound, rel=1e-3)
    assert (check.error <= check.bound) is passes


def test_a_model_that_can_be_guided_runs_guided_to_its_end(tmp_path: Path) -> None:
    runs = trajectories(write_small_bundle(tmp_path / "bundle"), QUICK)
    assert {(run.solver, run.guidance) for run in runs} == {
        ("ddim", 1.0),
        ("ddpm", 1.0),
        ("ddim", 2.0),
    }
