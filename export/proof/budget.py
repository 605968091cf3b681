"""How much of a proof fits into a time: large networks are compared on less, never on nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np

from runtime.engine.probe import HEAVY_S
from runtime.errors.arguments import number
from runtime.terminal.output import say

from ..sources.model import Model
from .card import sheet_steps
from .independence import BATCH
from .plan import LADDER, Plan

MINUTES = 5.0
"""The default time for a proof."""
LONE_PASSES = 60
"""Passes of one sample in `require_independent`, with batches of 4."""
PAIR = 2
"""Samples of a batch in which a slow module is checked for mixing them."""
IMAGES_STEPS = 10
"""The most steps of the images that the levels are compared on."""


@dataclass(frozen=True)
class Work:
    """What a proof has to compare.

    Attributes:
        graphs: Step graphs of a precision: 1, or 2 with guidance.
        trajectories: Solvers that are run to their end, the guided one counted twice.
        backends: Pairs of a backend and a precision.
        steps: Of the samples that the model card shows.
    """

    graphs: int
    trajectories: int
    backends: int
    steps: int


def passes(plan: Plan, work: Work, heavy: bool = False) -> float:
    """Return about how many passes of one sample a proof takes, PyTorch's and the graphs'.

    heavy: Whether calls are never cut into streams, see `check_steps`.
    """
    count = max(plan.batches)
    # Cut calls are compared at all sizes, whole ones again at further sizes alone.
    further = sum(plan.sizes) if heavy else 2 * sum((*plan.sizes, *plan.batches))
    # PyTorch: images, F at every level under the label and the null label, and trajectories.
    images = count * min(IMAGES_STEPS, plan.steps)
    answers = plan.times * count * work.graphs
    runs = work.trajectories * plan.pictures * plan.steps
    # A guided pass is two. Every batch runs twice, for the state and for F.
    per_level = 2 * (3 + sum(plan.batches)) * (1 if work.graphs == 1 else 3)
    sizes = 2 * (count + further) * (1 if work.graphs == 1 else 3)
    judged = plan.judged * sum(steps for _, steps in plan.ways)
    each = plan.times * per_level + sizes + runs + judged
    # The loop graph of the reference runs the trajectories again.
    return images + answers + 2 * runs + work.backends * each + plan.samples * work.steps


@dataclass(frozen=True)
class Fitted:
    """What is compared in the time.

    Attributes:
        plan: How much.
        independent: Samples of the batches in which the module is checked for mixing them.
    """

    plan: Plan
    independent: int = BATCH


def fitting(
    model: Model,
    precisions: Collection[str],
    minutes: float,
    clock: Callable[[], float] = time.perf_counter,
    plan: Plan | None = None,
) -> Fitted:
    """Time a pass of PyTorch, and return what fits.

    Args:
        precisions: What is exported alongside fp32.
        minutes: For the proof.
        plan: Compared even if it does not fit.
        clock: Seconds.

    Raises:
        RequestError: The time cannot be used.
    """
    minutes = number("proof_minutes", minutes, 0.0, 1e6)
    seconds = seconds_of(model, clock)
    if plan is None:
        # fp32 on two libraries, bf16 on one, fp16 on one, and both kinds of int8 on three in all.
        backends = 3 + ("fp16" in precisions) + 3 * ("int8" in precisions)
        plan = largest(seconds, work_of(model, backends), minutes)
        if plan != LADDER[0]:
            say(
                f"a pass takes {seconds:.2g} s: {plan.times} levels, batches up to "
                f"{max(plan.batches)} and {plan.steps} steps fit into {minutes:g} minutes"
            )
    # A fifth of the time is for the module alone.
    slow = LONE_PASSES * seconds > 60 * minutes / 5
    return Fitted(plan, PAIR if slow else BATCH)


def largest(seconds: float, work: Work, minutes: float) -> Plan:
    """Return the largest plan that fits; the least one if none does.

    Args:
        seconds: Of a pass of one sample.
        minutes: For the whole proof.
    """
    work = replace(work, steps=sheet_steps(work.steps, seconds))
    heavy = seconds > HEAVY_S
    fits = (plan for plan in LADDER if passes(plan, work, heavy) * seconds <= 60 * minutes)
    return next(fits, LADDER[-1])


def work_of(model: Model, backends: int) -> Work:
    """Return what the proof of a model has to compare, on so many pairs."""
    guided = model.can_guide
    solvers = {"ddim", "ddpm", model.defaults.solver}
    return Work(1 + guided, len(solvers) + 2 * guided, backends, model.defaults.steps or 50)


def seconds_of(model: Model, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time a pass of PyTorch on one sample: the faster of two. 0 if the module fails."""
    network = model.reference()
    x = np.zeros((1, *model.sample_shape), np.float32)
    times = model.schedule.time[-1:].astype(np.float32)
    label = [np.zeros(1, np.int64)] if model.num_labels else []
    conditions = model.draw_conditions(1)
    spent: list[float] = []
    for _ in range(2):
        begun = clock()
        try:
            network(x, times, *label, **conditions)
        except Exception:  # `require_independent` names the cause
            return 0.0
        spent.append(clock() - begun)
    return min(spent)
