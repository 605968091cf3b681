"""The proof: every precision on every backend against the PyTorch module that it came from."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field

from runtime.backends.base import Backend
from runtime.backends.memory import is_heavy, trim
from runtime.backends.onnxruntime import OnnxRuntime
from runtime.backends.registry import BACKENDS
from runtime.backends.streams import bind, whole
from runtime.bundle.bundle import Bundle
from runtime.bundle.format import step_name
from runtime.engine.probe import HEAVY_S
from runtime.errors import BackendError, BundleError
from runtime.sampler import Sampler
from runtime.terminal.output import say
from runtime.terminal.progress import Progress

from ..errors import ExportError
from ..graph.sensitivity import median_psnr
from ..sources.model import Model
from .examples import Examples
from .plan import Bounds, Plan
from .report import Conversion, PrecisionCheck, Report, StepCheck
from .steps import check_steps, filled, graphs_of, identity_holds
from .trajectories import (
    Compared,
    Float32,
    Trajectory,
    by_pytorch,
    check_trajectory,
    judged_images,
    milliseconds,
    trajectories,
    with_loop_graphs,
)
from .verdict import REFERENCE, judge

PYTORCH = "pytorch"
"""The key of PyTorch's own images."""
UNITS = 10
"""What a trajectory counts on the progress bar, where a batch counts 1."""


@dataclass(frozen=True, eq=False)
class Proof:
    """A report that passed, and the images that it shows.

    Attributes:
        images: [`plan.pictures`, *S] for each precision, and PyTorch's.
    """

    report: Report
    images: Mapping[str, Float32] = field(default_factory=dict)


def check(
    model: Model,
    bundle: Bundle,
    bounds: Bounds | None = None,
    plan: Plan | None = None,
    conversion: Conversion | None = None,
    same_bytes: bool = True,
) -> Proof:
    """Compare every precision of the bundle, on every backend there is, with its model.

    Args:
        model: The exported model.
        bundle: Its graphs on disk. A bundle.json is not needed.
        bounds: The largest differences that pass.
        plan: How much is compared.
        conversion: How other precisions were made, which goes into the report.
        same_bytes: Whether a sample must have the same bytes in any batch.

    Raises:
        ExportError: A difference exceeds its bound. The message names the worst case.
    """
    bounds = bounds or Bounds()
    plan = plan or Plan()
    examples = Examples(model, bundle, plan)
    runs = trajectories(bundle, plan)
    checks: list[PrecisionCheck] = []
    images: dict[str, Float32] = {}
    expected: Mapping[str, Float32] = {}
    batches = len(graphs_of(bundle)) * len(examples) * len(plan.batches)
    # All of PyTorch's results come first: its memory is free before a backend takes some.
    known = by_pytorch(model, bundle, runs, plan.pictures)
    for guided in graphs_of(bundle):
        examples.prepare(guided)
    _free(bundle)
    pairs = _pairs(bundle)
    units = batches + len(runs) * UNITS
    with Progress("checking", len(pairs) * units) as bar:
        # One at a time: each holds the weights.
        for name, precision in pairs:
            backend = opened(bundle, name, precision)
            if backend is None:
                # The bar counts those that can be opened.
                bar.total -= units
                continue
            one = _compare(examples, Sampler(bundle, backend), runs, bounds, bar, known)
            # What it held is free before the next one opens.
            del backend
            _free(bundle)
            compared = one.trajectories
            if name == REFERENCE:
                compared = with_loop_graphs(model, bundle, precision, runs, compared)
                _free(bundle)
            # The reference backend comes first, in fp32, and its images are the ones that are
            # shown and that others are compared with.
            images.setdefault(PYTORCH, compared[0].expected)
            images.setdefault(precision, compared[0].samples)
            expected = expected or one.judged
            checks.append(one.check(compared, expected, bundle))
    report = Report(bounds, plan, tuple(checks), conversion or Conversion())
    return Proof(judge(report, same_bytes), images)


def _free(bundle: Bundle) -> None:
    """Free a sampler, which its own loop refers to, and what its backend held.

    Python frees small ones in its own time: looking for them takes as long as their proof.
    """
    if is_heavy(bundle, "fp32"):
        gc.collect()
        trim()


def _pairs(bundle: Bundle) -> list[tuple[str, str]]:
    """The (backend, precision) pairs to compare, the reference first."""
    pairs = [(REFERENCE, precision) for precision in bundle.precisions]
    for name, kind in BACKENDS.items():
        if not kind.gpu and name != REFERENCE:
            pairs += [
                (name, p) for p, folder in kind.folders.items() if folder in bundle.precisions
            ]
    return pairs


def opened(bundle: Bundle, name: str, precision: str) -> Backend | None:
    """Open a precision of the bundle on a backend of this machine; None if the backend lacks it.

    GPU backends are left out: engines are built once the bundle is written (export.engines), and
    tests/runtime/backends/nvidia/test_gpu.py compares them. If its CPU kernels have no fp16 or
    int8-trt, ONNX Runtime computes them in float32: that proves the graph, not what a GPU rounds.

    Raises:
        ExportError: ONNX Runtime cannot run a graph.
    """
    try:
        # The registry offers on the reference only what a user can choose there.
        if name == REFERENCE:
            return OnnxRuntime(bundle, precision, None)
        return BACKENDS[name].open(bundle, precision, None, None)
    except (BackendError, BundleError) as error:
        if name == REFERENCE:
            # The runtime's remedy is for users of a bundle; an exporter needs the cause alone.
            reason = str(error).partition("onnxruntime cannot load it: ")[2] or str(error)
            raise ExportError(
                f"{bundle.name}: ONNX Runtime cannot run the {precision} network: {reason}"
            ) from error
        # A precision that another library lacks is not a failure: it is not offered there.
        say(f"not checked: {precision} on {name}: {error}")
        return None


@dataclass(frozen=True, eq=False)
class _Pair:
    """What one backend computed.

    Attributes:
        steps: The comparisons of its step graphs, by name.
        trajectories: Its trajectories, without the loop graph.
        identity: Whether an identity row changes nothing.
        judged: Its images, by solver and steps.
        ms_a_call: By batch size.
    """

    precision: str
    backend: str
    steps: Mapping[str, StepCheck]
    trajectories: list[Compared]
    identity: bool
    judged: Mapping[str, Float32]
    ms_a_call: Mapping[str, float]

    def check(
        self, compared: list[Compared], expected: Mapping[str, Float32], bundle: Bundle
    ) -> PrecisionCheck:
        """Return the check, with the PSNR of the images against fp32's.

        Args:
            compared: The trajectories.
            expected: fp32's images, by solver and steps.
        """
        psnr = {
            name: median_psnr(samples, expected[name], bundle.sample_range)
            for name, samples in self.judged.items()
        }
        return PrecisionCheck(
            self.precision,
            self.backend,
            self.steps,
            tuple(one.check for one in compared),
            self.identity,
            psnr,
            self.ms_a_call,
        )


def _compare(
    examples: Examples,
    sampler: Sampler,
    runs: list[Trajectory],
    bounds: Bounds,
    bar: Progress,
    known: list[Float32],
) -> _Pair:
    """Compare one backend, with buffers of one size of batches at a time."""
    bundle = examples.bundle
    backend = sampler.backend
    model = examples.model
    plan = examples.plan
    steps = {
        step_name(guided): check_steps(examples, backend, guided, bounds, bar)
        for guided in graphs_of(bundle)
    }
    identity = identity_holds(bundle, backend)
    compared: list[Compared] = []
    for run, samples in zip(runs, known, strict=True):
        compared.append(check_trajectory(model, sampler, run, bounds.trajectory, samples))
        bar.advance(UNITS)
    judged = judged_images(model, sampler, plan)
    # Its buffers are freed.
    sampler.close()
    return _Pair(
        backend.precision,
        backend.name,
        steps,
        compared,
        identity,
        judged,
        _ms_a_call(sampler, plan),
    )


def _ms_a_call(sampler: Sampler, plan: Plan) -> dict[str, float]:
    """Return the time of a call by batch size: of one sample, and of the largest batch."""
    bundle = sampler.bundle
    spent = {"1": milliseconds(filled(bind(sampler.backend, 1, whole), bundle))}
    largest = max(plan.batches)
    if largest > 1:
        # How calls are cut is measured, unless they are too heavy to be cut at all.
        cut = whole if spent["1"] > 1e3 * HEAVY_S else sampler.costs.streams
        spent[str(largest)] = milliseconds(filled(bind(sampler.backend, largest, cut), bundle))
    return spent
