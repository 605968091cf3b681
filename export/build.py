"""Export a network as a bundle, and prove it: python -m export.build RUN --out DIR

RUN is a run of trainer.fit, a bundle made from one, or a diffusers folder; with --module the
network is any PyTorch module, and with --onnx one in an ONNX file.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.bundle.bundle import Bundle
from runtime.bundle.format import MANIFEST, REPORT_IMAGE, SAMPLES_IMAGE, TUNED_IMAGE
from runtime.errors import RequestError, unknown
from runtime.errors.arguments import choice, file_path, flag, instance
from runtime.errors.keywords import check_options, option_names
from runtime.errors.messages import refused
from runtime.files import copy_others, replacing_folder
from runtime.terminal.output import say
from runtime.terminal.verbs import program, run_verb

from . import engines
from .errors import ExportError
from .graph.calibrate import QUICK_CALIBRATION, Calibration
from .graph.convert import INT8, batched, converted
from .proof.budget import MINUTES, fitting
from .proof.card import proof_lines
from .proof.check import check
from .proof.documents import write_documents
from .proof.folder import bundle_in
from .proof.independence import require_independent, whole_inputs
from .proof.plan import QUICK, Bounds, Plan
from .sources.command_line import named
from .sources.model import Model
from .sources.onnx_file.model import from_onnx
from .sources.options import add_options
from .sources.settings import fields_of
from .tuning.record import kept

if TYPE_CHECKING:
    from torch import nn

PRECISIONS = ("fp16", "int8")
"""What can be asked for alongside fp32."""
OWN = ("fp16", *INT8, "nulls", SAMPLES_IMAGE, TUNED_IMAGE)
"""What an earlier bundle may have that this one lacks."""
HELP = {
    "fp16": "also the network in float16, for GPUs; norms, softmax and the time embedding stay "
    "float32",
    "int8": "also in int8, for CPUs and for TensorRT, calibrated on the model's own trajectories",
}


def build(
    model: Model,
    out: Path,
    bounds: Bounds | None = None,
    plan: Plan | None = None,
    precisions: Collection[str] = (),
    calibration: Calibration | None = None,
    winograd: bool = True,
    same_bytes: bool = True,
    proof_minutes: float = MINUTES,
) -> Bundle:
    """Convert a model, compare it with PyTorch, and write it as a bundle.

    Args:
        model: What is exported.
        out: The bundle's folder. A bundle that is there is replaced; other files there stay.
        bounds: The largest differences from PyTorch that pass.
        plan: How much is compared. The report states both. None is what fits `proof_minutes`.
        precisions: "fp16" and "int8", alongside fp32, which every bundle has. int8 is written for
            CPUs (int8) and for TensorRT (int8-trt).
        calibration: How int8 is made.
        winograd: Whether a CPU may compute large convolutions so, see `export.graph.pixels`.
        same_bytes: Whether a sample must have the same bytes in any batch. If false, a library may
            round it differently there, and the bundle declares `same_bytes: false`.
        proof_minutes: The time for the proof, if no plan is given. A pass of PyTorch is timed
            first; the least plan may take longer.

    Returns:
        The bundle, read from disk.

    Raises:
        ExportError: The module mixes samples, the export differs from PyTorch, or `out` is not a
            bundle. Nothing is written.
    """
    _check_request(out, precisions)
    begun = time.perf_counter()
    bounds = bounds or Bounds()
    fitted = fitting(model, precisions, proof_minutes, plan=plan)
    # Checked on the module, where the cause of mixed samples can still be named.
    require_independent(
        model, whole_inputs(model, batched(model)), bounds.answer, fitted.independent
    )
    model = replace(model, tuned=model.tuned or kept(model, out))
    # A hidden sibling, renamed at the end: a failure leaves the old folder unchanged.
    place = out.resolve()  # a link, or ".", is the folder that it leads to
    with replacing_folder(place) as folder:
        say("converting", flush=True)
        # In a function of its own: the graphs, with their weights, are gone when the proof begins.
        made, faster = converted(folder, model, precisions, bounds.psnr, calibration, winograd)
        bundle = bundle_in(folder, model)
        # The proof runs the files on disk, as a user will, not the graphs in memory.
        try:
            proof = check(model, bundle, bounds, fitted.plan, made, same_bytes)
        except ExportError as error:
            if faster:
                raise _with_advice(error) from error
            raise
        write_documents(place.name, model, bundle, proof)
        copy_others(place, folder, OWN)
    return _said(Bundle.load(place), bounds, out, time.perf_counter() - begun)


def _said(bundle: Bundle, bounds: Bounds, out: Path, seconds: float) -> Bundle:
    """Print the result, and return the bundle."""
    say(proof_lines(bundle, bounds))
    megabytes = sum(file.size for file in bundle.files.values()) / 1e6
    say(f"{out}: {megabytes:.1f} MB in {seconds:.0f} s; see {out / REPORT_IMAGE}")
    return bundle


def _check_request(out: Path, precisions: Collection[str]) -> None:
    """Raises RequestError for an unknown precision, ExportError if `out` must not be replaced."""
    for precision in precisions:
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
    if out.exists() and not (out / MANIFEST).is_file():
        raise ExportError(
            f"{out} exists and is not a bundle, so it is not replaced. Give another --out."
        )


def _with_advice(error: ExportError) -> ExportError:
    """Return an error of the proof with the option that may help."""
    return ExportError(
        f"{error} Large convolutions were computed by Winograd's algorithm, which rounds a little "
        "more: if it is fp32 that misses, try --no-winograd."
    )


def build_bundle(
    module: nn.Module | str | Path,
    out: str | Path | None = None,
    *,
    bounds: Bounds | None = None,
    plan: Plan | None = None,
    precisions: Collection[str] = (),
    calibration: Calibration | None = None,
    winograd: bool = True,
    same_bytes: bool = True,
    proof_minutes: float = MINUTES,
    **described: Any,
) -> Bundle:
    """Export any PyTorch module or ONNX file as a bundle, and prove it.

    Args:
        module: module(x [B, *S], time [B] float32[, label [B] int64], **conditions) → F [B, *S], or
            the path of an ONNX file of such a network. PyTorch is not imported for a file.
        out: The bundle's folder [bundles/ and the name].
        bounds, plan, precisions, calibration, winograd, same_bytes, proof_minutes: See `build`.
        described: What the module is: sample_shape, prediction, schedule, and what else
            `export.sources.settings.fields_of` takes; for a file, also what `from_onnx` of
            `export.sources.onnx_file.model` does.

    Raises:
        RequestError: An argument is invalid.
        ExportError: See `build`.
    """
    described_by = _source_of(module)
    known = [*option_names(described_by, 1)[:-1], *option_names(fields_of, 0)]
    check_options("build_bundle", described, known, option_names(build_bundle, 1)[:-1])
    # A file has the shape itself.
    needed = ("prediction", "schedule", *(() if described_by is from_onnx else ("sample_shape",)))
    if missing := [name for name in needed if name not in described]:
        raise RequestError(
            f"build_bundle needs {', '.join(missing)}, got none. Pass what they are."
        )
    for name, value, kind in (
        ("bounds", bounds, Bounds),
        ("plan", plan, Plan),
        ("calibration", calibration, Calibration),
    ):
        if value is not None:
            instance(name, value, kind, "Leave it out for the default.")
    if not isinstance(precisions, (list, tuple, set, frozenset)):
        raise refused(
            "precisions", "a list of names", precisions, f"Pass some of {', '.join(PRECISIONS)}."
        )
    chosen = [choice("precisions", precision, PRECISIONS, "precision") for precision in precisions]
    winograd = flag("winograd", winograd)
    same_bytes = flag("same_bytes", same_bytes)
    folder = None if out is None else file_path("out", out)
    model = described_by(module, **described)
    folder = folder or Path("bundles") / model.name
    return build(
        model, folder, bounds, plan, chosen, calibration, winograd, same_bytes, proof_minutes
    )


def _source_of(network: object) -> Callable[..., Model]:
    """Return what describes a network: that of ONNX files for a path, or that of modules."""
    if isinstance(network, (str, Path)):
        return from_onnx
    # Imports PyTorch.
    from .sources.module import from_module

    return from_module


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program("export.build"), description=__doc__)
    add_options(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the bundle's folder [bundles/ and the name]"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="compare less, for a large network: fewer levels, batches and steps",
    )
    parser.add_argument(
        "--proof-minutes",
        type=float,
        default=MINUTES,
        metavar="N",
        help="compare as much as fits into this time, and never less than every promise once [5]",
    )
    parser.add_argument(
        "--no-winograd",
        action="store_true",
        help="no second fp32 graph for CPUs, which computes large convolutions faster",
    )
    parser.add_argument(
        "--no-same-bytes",
        action="store_true",
        help="export although a library rounds a sample differently in other batches; "
        "the bundle then declares same_bytes: false",
    )
    for precision in PRECISIONS:
        parser.add_argument(f"--{precision}", action="store_true", help=HELP[precision])
    engines.add_engine_options(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return run_verb(_parser(), _act, arguments)


def _act(given: argparse.Namespace) -> None:
    # An engine that cannot be built here fails now, not after the export.
    order = engines.ordered(given)
    engines.prepare(order)
    model = named(given)
    precisions = [name for name in PRECISIONS if getattr(given, name)]
    bundle = build(
        model,
        given.out or Path("bundles") / model.name,
        plan=QUICK if given.quick else None,
        precisions=precisions,
        calibration=QUICK_CALIBRATION if given.quick else None,
        winograd=not given.no_winograd,
        same_bytes=not given.no_same_bytes,
        proof_minutes=given.proof_minutes,
    )
    engines.after_export(bundle, order, bool(precisions))


if __name__ == "__main__":
    sys.exit(main())
