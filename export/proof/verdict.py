"""Which checks of a report miss their bounds, and whether that fails the export."""

from __future__ import annotations

from dataclasses import replace

from runtime.bundle.format import step_name
from runtime.terminal.output import say

from ..errors import ExportError
from .report import PrecisionCheck, Report

REFERENCE = "onnxruntime"
"""The backend whose misses fail an export. Another backend that misses is not offered."""
SLACK = 4
LOOP_SLACK = 10
"""Allowances for rounding in precisions other than fp32: of F under guidance, and of the loop
graph, whose bound is that of fp32. In int8 one rounding that differs may grow along a trajectory up
to the size of the precision's own error."""
NO_SAME_BYTES = (
    "The network treats samples alike; the inference library rounds them differently. If you can "
    "do without the same bytes for a seed in any batch, export with --no-same-bytes "
    "(same_bytes=False): the bundle then declares same_bytes: false."
)


def judge(report: Report, same_bytes: bool = True) -> Report:
    """Return the report with what each check missed.

    Args:
        report: The checks, without a verdict.
        same_bytes: Whether a sample must have the same bytes in any batch.

    Raises:
        ExportError: The reference backend, ONNX Runtime, missed something. The message names every
            miss.
    """
    headroom = report.conversion.headroom
    failures = [f"fp16: {miss}" for miss in headroom.beyond] if headroom else []
    # Only then is --no-same-bytes a remedy.
    only_bytes = not failures
    checks: list[PrecisionCheck] = []
    for check in report.checks:
        wrong = _wrong_values(check, report)
        unlike = _unlike(check, same_bytes)
        checks.append(replace(check, missed=(*wrong, *unlike)))
        lines = [f"{check.precision} on {check.backend}: {miss}" for miss in (*wrong, *unlike)]
        if check.backend == REFERENCE:
            failures += lines
            mixes = any(step.mixes_samples for step in check.steps.values())
            only_bytes = only_bytes and not wrong and not mixes
        else:
            for line in lines:
                say(f"not offered: {line}")
    if failures:
        raise ExportError(_message(failures, only_bytes))
    return replace(report, checks=tuple(checks))


def _message(failures: list[str], only_bytes: bool) -> str:
    """Return the message of a failed export; the remedy differs if `only_bytes` were missed."""
    what = "cannot keep the same bytes" if only_bytes else "does not agree with PyTorch"
    lines = [f"the export {what}, and nothing was written:", *(f"  {line}" for line in failures)]
    return "\n".join([*lines, NO_SAME_BYTES] if only_bytes else lines)


def _wrong_values(check: PrecisionCheck, report: Report) -> list[str]:
    """Return the missed limits, apart from bytes that depend on the batch."""
    misses: list[str] = []
    if not check.identity:
        misses.append("an identity row changes the state")
    lost = sum(step.not_finite for step in check.steps.values())
    if lost:
        misses.append(f"{lost} values of F are not finite")
    if check.precision == "fp32":
        return misses + _far_from_pytorch(check)
    misses += _far_from_fp32(check, report.bounds.psnr[check.precision])
    return misses + _far_from_step(check, report.bounds.answer)


def _far_from_pytorch(check: PrecisionCheck) -> list[str]:
    misses: list[str] = []
    for kind in ("answer", "next_state"):
        for step in check.steps.values():
            worst = step.answer if kind == "answer" else step.next_state
            if not worst.passes:
                misses.append(f"{kind}: {worst.error:.3g} > {worst.bound:.3g} at {worst.where}")
    for trajectory in check.trajectories:
        for kind, error in (("error", trajectory.error), ("loop_graph", trajectory.loop_graph)):
            # "not <=" instead of ">": NaN misses every bound.
            if error is not None and not error <= trajectory.bound:
                misses.append(
                    f"{kind} of the trajectory {trajectory.trajectory}: {error:.3g} > "
                    f"{trajectory.bound:.3g}"
                )
    return misses


def _far_from_fp32(check: PrecisionCheck, least: float) -> list[str]:
    return [
        f"final images {psnr:.1f} dB from fp32's, {least:g} needed ({name})"
        for name, psnr in check.psnr_db.items()
        if not psnr >= least
    ]


def _far_from_step(check: PrecisionCheck, least: float) -> list[str]:
    """Return where the guided graph or the loop graph is not what the plain step graph is.

    All of them round alike, so one that is further from it than rounding takes it is wrong.
    """
    misses: list[str] = []
    plain = check.steps.get(step_name(guided=False))
    guided = check.steps.get(step_name(guided=True))
    if plain and guided:
        # F_c + (g - 1)·(F_c - F_u) has the errors of F g times and g - 1 times.
        times = 2 * guided.guidance - 1
        bound = SLACK * times * max(plain.answer.error, least)
        if not guided.answer.error <= bound:
            misses.append(
                f"answer under guidance {guided.guidance:g}: {guided.answer.error:.3g} > "
                f"{bound:.3g}, {SLACK} times what rounding makes of it, at {guided.answer.where}"
            )
    for trajectory in check.trajectories:
        error = trajectory.loop_graph
        bound = max(LOOP_SLACK * trajectory.bound, trajectory.error)
        if error is not None and not error <= bound:
            misses.append(
                f"loop_graph of the trajectory {trajectory.trajectory}: {error:.3g} > {bound:.3g}"
            )
    return misses


def _unlike(check: PrecisionCheck, same_bytes: bool) -> list[str]:
    """Return where a sample's bytes depend on its batch, unless that is allowed."""
    return [
        f"a sample's bytes depend on the batch it stands in: {step.unlike_alone}"
        for step in check.steps.values()
        if not step.batch_invariant and (same_bytes or step.mixes_samples)
    ]
