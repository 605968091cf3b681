"""Export a network as a bundle, and prove it: python -m export.build RUN --out DIR

RUN is a run of trainer.fit, a bundle made from one, or a diffusers folder; with --module the
network is any PyTorch module.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnx import ModelProto
from torch import nn

from runtime.bundle.bundle import Bundle
from runtime.bundle.format import MANIFEST, REPORT_IMAGE, STEP, step_file
from runtime.errors import unknown
from runtime.errors.arguments import choice, file_path, flag, instance
from runtime.errors.keywords import check_options, option_names
from runtime.errors.messages import refused
from runtime.files import replacing_folder
from runtime.terminal.output import say
from runtime.terminal.verbs import program, run_verb

from . import engines
from .errors import ExportError
from .graph import trace as graph
from .graph.calibrate import QUICK_CALIBRATION, Calibration, ranges
from .graph.folding import fold_upsampling
from .graph.pixels.rewrite import pixels_first
from .graph.precision import to_float16
from .graph.quantization import quantize
from .graph.rounding.batches import same_in_any_batch
from .graph.rounding.convolutions import same_alone
from .graph.sensitivity import Choice, Judge, choose
from .graph.write import write_all
from .proof.card import proof_lines
from .proof.check import check
from .proof.documents import write_documents
from .proof.folder import bundle_in
from .proof.headroom import headroom
from .proof.independence import require_independent, torch_inputs
from .proof.plan import QUICK, Bounds, Plan
from .proof.report import Conversion
from .sources.command_line import add_options, named
from .sources.model import Model
from .sources.module import from_module
from .tuning.record import kept

PRECISIONS = ("fp16", "int8")
"""What can be asked for alongside fp32."""
HELP = {
    "fp16": "also the network in float16, for GPUs; norms, softmax and the time embedding stay "
    "float32",
    "int8": "also in int8, for CPUs and for TensorRT, calibrated on the model's own trajectories",
}
INT8 = {"int8": False, "int8-trt": True}
"""The kinds of int8 and whether their activations are signed, as TensorRT asks."""


def build(
    model: Model,
    out: Path,
    bounds: Bounds | None = None,
    plan: Plan | None = None,
    precisions: Collection[str] = (),
    calibration: Calibration | None = None,
    winograd: bool = True,
    same_bytes: bool = True,
) -> Bundle:
    """Convert a model, compare it with PyTorch, and write it as a bundle.

    Args:
        model: What is exported.
        out: The bundle's folder. A bundle that is there is replaced.
        bounds: The largest differences from PyTorch that pass.
        plan: How much is compared. The report states both.
        precisions: "fp16" and "int8", alongside fp32, which every bundle has. int8 is written for
            CPUs (int8) and for TensorRT (int8-trt).
        calibration: How int8 is made.
        winograd: Whether a CPU may compute large convolutions so, see `export.graph.pixels`.
        same_bytes: Whether a sample must have the same bytes in any batch. If false, a library may
            round it differently there, and the bundle declares `same_bytes: false`.

    Returns:
        The bundle, read from disk.

    Raises:
        ExportError: The module mixes samples, the export differs from PyTorch, or `out` is not a
            bundle. Nothing is written.
    """
    _check_request(out, precisions)
    begun = time.perf_counter()
    bounds = bounds or Bounds()
    plan = plan or Plan()
    # Checked on the module, where the cause of mixed samples can still be named.
    require_independent(model, torch_inputs(model), bounds.answer)
    model = replace(model, tuned=model.tuned or kept(model, out))
    # A hidden sibling of `out`, renamed at the end: a failure leaves the old folder unchanged.
    with replacing_folder(out) as folder:
        say("converting", flush=True)
        steps = {name: same_in_any_batch(step) for name, step in graph.steps(model).items()}
        faster = _for_cpus(steps) if winograd else {}
        # Folding and groups hold for float32 only, so the other precisions start from `steps`.
        folded = {name: same_alone(fold_upsampling(step)) for name, step in steps.items()}
        write_all(folded, model.sample_shape, folder / "fp32", faster)
        conversion = _other_precisions(folder, model, steps, precisions, bounds, calibration)
        bundle = bundle_in(folder, model)
        # The proof runs the files on disk, as a user will, not the graphs in memory.
        try:
            proof = check(model, bundle, bounds, plan, conversion, same_bytes)
        except ExportError as error:
            if faster:
                raise _with_advice(error) from error
            raise
        write_documents(out.name, model, bundle, proof)
    written = Bundle.load(out)
    _say_result(written, bounds, out, time.perf_counter() - begun)
    return written


def _say_result(bundle: Bundle, bounds: Bounds, out: Path, seconds: float) -> None:
    say(proof_lines(bundle, bounds))
    megabytes = sum(file.size for file in bundle.files.values()) / 1e6
    say(f"{out}: {megabytes:.1f} MB in {seconds:.0f} s; see {out / REPORT_IMAGE}")


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


def _for_cpus(steps: Mapping[str, ModelProto]) -> dict[str, ModelProto]:
    """Return the CPU variants of the step graphs by file name, if anything is large enough."""
    variants: dict[str, ModelProto] = {}
    for guided in (False, True):
        step = steps.get(step_file(guided))
        variant = pixels_first(step) if step else None
        if variant:
            variants[step_file(guided, pixels=True)] = fold_upsampling(variant)
    return variants


def _other_precisions(
    folder: Path,
    model: Model,
    steps: Mapping[str, ModelProto],
    precisions: Collection[str],
    bounds: Bounds,
    calibration: Calibration | None,
) -> Conversion:
    """Write the step graphs in other precisions, and return how they were made."""
    calibration = calibration or Calibration()

    def write(name: str, change: Callable[[ModelProto], ModelProto]) -> None:
        changed = {file: change(proto) for file, proto in steps.items()}
        write_all(changed, model.sample_shape, folder / name)

    step = steps[STEP]
    room = None
    choices: dict[str, Choice] = {}
    if "fp16" in precisions:
        # float16 fails quietly beyond 65504: the report says how near the values come.
        room = headroom(step, model, calibration)
        write("fp16", to_float16)
    if "int8" in precisions:
        # One set of trajectories gives the ranges of both kinds, and one of reference images.
        pairs = ranges(step, model, calibration)
        judge = Judge(step, model, calibration)
        for name, signed in INT8.items():
            # The layers are chosen on the plain graph; both graphs hold the same ones.
            own = [pair[signed] for pair in pairs]
            chosen = choose(step, judge, own, signed, bounds.psnr[name])
            write(name, lambda proto, r=own, k=chosen.keep, s=signed: quantize(proto, r, k, s))
            choices[name] = chosen
    return Conversion(room, choices)


def build_bundle(
    module: nn.Module,
    out: str | Path | None = None,
    *,
    bounds: Bounds | None = None,
    plan: Plan | None = None,
    precisions: Collection[str] = (),
    calibration: Calibration | None = None,
    winograd: bool = True,
    same_bytes: bool = True,
    **described: Any,
) -> Bundle:
    """Export any PyTorch module as a bundle, and prove it.

    Args:
        module: module(x [B, *S], time [B] float32[, label [B] int64], **conditions) → F [B, *S].
        out: The bundle's folder [bundles/ and the name].
        bounds, plan, precisions, calibration, winograd, same_bytes: See `build`.
        described: What the module is: sample_shape, prediction, schedule, and what else
            `export.sources.module.from_module` takes.

    Raises:
        RequestError: An argument is invalid.
        ExportError: See `build`.
    """
    check_options(
        "build_bundle", described, option_names(from_module, 1), option_names(build_bundle, 1)[:-1]
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
    model = from_module(module, **described)
    folder = folder or Path("bundles") / model.name
    return build(model, folder, bounds, plan, chosen, calibration, winograd, same_bytes)


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
    )
    engines.after_export(bundle, order, bool(precisions))


if __name__ == "__main__":
    sys.exit(main())
