"""The proof: every precision on every backend against the PyTorch module that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from runtime.backends.base import Backend
from runtime.backends.onnxruntime import OnnxRuntime
from runtime.backends.registry import BACKENDS
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
    backends = candidates(bundle)
    checks: list[PrecisionCheck] = []
    images: dict[str, Float32] = {}
    batches = len(graphs_of(bundle)) * len(examples) * len(plan.batches)
    with Progress("checking", len(backends) * (batches + len(runs) * UNITS)) as bar:
        for backend in backends:
            compared, shown = _compare(examples, backend, runs, bounds, bar)
            checks.append(compared)
            # The reference backend comes first, and its images are the ones that are shown.
            for name, samples in shown.items():
                images.setdefault(name, samples)
    report = Report(
        bounds,
        plan,
        tuple(_against_fp32(checks, backends, model, bundle, plan)),
        conversion or Conversion(),
    )
    return Proof(judge(report, same_bytes), images)


def candidates(bundle: Bundle) -> list[Backend]:
    """Return every precision of the bundle on every backend of this machine, the reference first.

    GPU backends are left out: engines are built once the bundle is written (export.engines), and
    tests/runtime/backends/nvidia/test_gpu.py compares them. If its CPU kernels have no fp16 or
    int8-trt, ONNX Runtime computes them in float32: that proves the graph, not what a GPU rounds.

    Raises:
        ExportError: ONNX Runtime cannot run a graph.
    """
    backends: list[Backend] = []
    for precision in bundle.precisions:
        try:
            backends.append(OnnxRuntime(bundle, precision, None))
        except BundleError as error:
            # The runtime's remedy is for users of a bundle; an exporter needs the cause alone.
            reason = str(error).partition("onnxruntime cannot load it: ")[2] or str(error)
            raise ExportError(
                f"{bundle.name}: ONNX Runtime cannot run the {precision} network: {reason}"
            ) from error
    # A precision that another library lacks is not a failure: it is not offered there.
    for name, kind in BACKENDS.items():
        if kind.gpu or name == REFERENCE:
            continue
        for precision, folder in kind.folders.items():
            if folder in bundle.precisions:
                try:
                    backends.append(kind.open(bundle, precision, None))
                except (BackendError, BundleError) as error:
                    say(f"not checked: {precision} on {name}: {error}")
    return backends


def _compare(
    examples: Examples,
    backend: Backend,
    runs: list[Trajectory],
    bounds: Bounds,
    bar: Progress,
) -> tuple[PrecisionCheck, dict[str, Float32]]:
    """Return one backend's check, and the final images of the first trajectory."""
    bundle = examples.bundle
    sampler = Sampler(bundle, backend)
    steps = {
        step_name(guided): check_steps(examples, backend, guided, bounds, bar)
        for guided in graphs_of(bundle)
    }
    compared = []
    for run in runs:
        compared.append(
            check_trajectory(
                examples.model, sampler, run, bounds.trajectory, examples.plan.pictures
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
    checks: list[PrecisionCheck],
    backends: list[Backend],
    model: Model,
    bundle: Bundle,
    plan: Plan,
) -> list[PrecisionCheck]:
    """Return the checks with the PSNR of final images against fp32's, and the time of a call."""
    found: list[PrecisionCheck] = []
    expected: dict[str, Float32] = {}
    for check, backend in zip(checks, backends, strict=True):
        images = judged_images(model, Sampler(bundle, backend), plan)
        # The first backend is the reference in fp32.
        expected = expected or images
        psnr = {
            name: median_psnr(samples, expected[name], bundle.sample_range)
            for name, samples in images.items()
        }
        sizes = (1, max(plan.batches))
        spent = {str(batch): milliseconds(backend.bind(batch)) for batch in sizes}
        found.append(replace(check, psnr_db=psnr, ms_a_call=spent))
    return found
