"""The proof: every precision on every backend against the PyTorch module that it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from runtime.backends.base import Backend
from runtime.backends.onnxruntime import OnnxRuntime
from runtime.backends.registry import BACKENDS
from runtime.backends.streams import bind
from runtime.bundle.bundle import Bundle
from runtime.bundle.format import step_name
from runtime.errors import BackendError, BundleError
from runtime.sampler import Sampler
from runtime.terminal.output import say
from runtime.terminal.progress import Progress

from ..errors import ExportError
from ..graph.sensitivity import median_psnr
from ..sources.model import Model
from .examples import Examples
from .plan import Bounds, Plan
from .report import Conversion, PrecisionCheck, Report
from .steps import check_steps, graphs_of, identity_holds
from .trajectories import (
    Float32,
    Trajectory,
    check_trajectory,
    judged_images,
    milliseconds,
    trajectories,
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
    known: dict[str, Float32] = {}
    expected: dict[str, Float32] = {}
    batches = len(graphs_of(bundle)) * len(examples) * len(plan.batches)
    with Progress("checking", len(_pairs(bundle)) * (batches + len(runs) * UNITS)) as bar:
        # One at a time: each holds the weights.
        for backend in candidates(bundle):
            sampler = Sampler(bundle, backend)
            compared, shown = _compare(examples, sampler, runs, bounds, bar, known)
            # The reference backend comes first, in fp32, and its images are the ones that are
            # shown and that others are compared with.
            for name, samples in shown.items():
                images.setdefault(name, samples)
            judged = judged_images(model, sampler, plan)
            expected = expected or judged
            checks.append(_against_fp32(compared, sampler, judged, expected, plan))
            del backend, sampler
    report = Report(bounds, plan, tuple(checks), conversion or Conversion())
    return Proof(judge(report, same_bytes), images)


def _pairs(bundle: Bundle) -> list[tuple[str, str]]:
    """The (backend, precision) pairs to compare, the reference first."""
    pairs = [(REFERENCE, precision) for precision in bundle.precisions]
    for name, kind in BACKENDS.items():
        if not kind.gpu and name != REFERENCE:
            pairs += [
                (name, p) for p, folder in kind.folders.items() if folder in bundle.precisions
            ]
    return pairs


def candidates(bundle: Bundle) -> Iterator[Backend]:
    """Open every precision of the bundle on every backend of this machine, the reference first.

    GPU backends are left out: engines are built once the bundle is written (export.engines), and
    tests/runtime/backends/nvidia/test_gpu.py compares them. If its CPU kernels have no fp16 or
    int8-trt, ONNX Runtime computes them in float32: that proves the graph, not what a GPU rounds.

    Raises:
        ExportError: ONNX Runtime cannot run a graph.
    """
    for name, precision in _pairs(bundle):
        try:
            # The registry offers on the reference only what a user can choose there.
            if name == REFERENCE:
                yield OnnxRuntime(bundle, precision, None)
            else:
                yield BACKENDS[name].open(bundle, precision, None, None)
        except (BackendError, BundleError) as error:
            if name == REFERENCE:
                # The runtime's remedy is for users of a bundle; an exporter needs the cause alone.
                reason = str(error).partition("onnxruntime cannot load it: ")[2] or str(error)
                raise ExportError(
                    f"{bundle.name}: ONNX Runtime cannot run the {precision} network: {reason}"
                ) from error
            # A precision that another library lacks is not a failure: it is not offered there.
            say(f"not checked: {precision} on {name}: {error}")


def _compare(
    examples: Examples,
    sampler: Sampler,
    runs: list[Trajectory],
    bounds: Bounds,
    bar: Progress,
    known: dict[str, Float32],
) -> tuple[PrecisionCheck, dict[str, Float32]]:
    """Return one backend's check, and the final images of the first trajectory."""
    bundle = examples.bundle
    backend = sampler.backend
    steps = {
        step_name(guided): check_steps(examples, backend, guided, bounds, bar)
        for guided in graphs_of(bundle)
    }
    compared = []
    for run in runs:
        compared.append(
            check_trajectory(
                examples.model, sampler, run, bounds.trajectory, examples.plan.pictures, known
            )
        )
        bar.advance(UNITS)
    first = compared[0]
    check = PrecisionCheck(
        backend.precision,
        backend.name,
        steps,
        tuple(trajectory.check for trajectory in compared),
        identity_holds(bundle, backend),
    )
    return check, {PYTORCH: first.expected, backend.precision: first.samples}


def _against_fp32(
    check: PrecisionCheck,
    sampler: Sampler,
    images: Mapping[str, Float32],
    expected: Mapping[str, Float32],
    plan: Plan,
) -> PrecisionCheck:
    """Return the check with the PSNR of final images against fp32's, and the time of a call."""
    bundle = sampler.bundle
    psnr = {
        name: median_psnr(samples, expected[name], bundle.sample_range)
        for name, samples in images.items()
    }
    spent = {
        str(batch): milliseconds(bind(sampler.backend, batch, sampler.costs.streams))
        for batch in (1, max(plan.batches))
    }
    return replace(check, psnr_db=psnr, ms_a_call=spent)
