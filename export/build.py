"""Export a network as a bundle, and prove it: python -m export.build [RUN] [--out DIR]

RUN is a run of trainer.fit, a bundle made from one, or a diffusers folder; with --module the
network is any PyTorch module.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import logging
import platform
import sys
import time
from collections.abc import Callable, Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from onnx import ModelProto
from torch import nn

from runtime.arguments import (
    check_options,
    choice,
    file_path,
    flag,
    instance,
    option_names,
    refused,
)
from runtime.bundle import Bundle
from runtime.errors import status, unknown
from runtime.files import replacing_folder, to_json
from runtime.format import MANIFEST, PIXELS
from runtime.images import save, tile
from runtime.manifest import File
from runtime.output import parse, say
from runtime.sampler import Sampler

from . import engines
from .errors import ExportError
from .graph import trace as graph
from .graph.calibrate import QUICK_CALIBRATION, Calibration, Judge, choose, ranges
from .graph.folding import fold_upsampling
from .graph.pixels import pixels_first
from .graph.precision import quantize, to_float16
from .graph.rounding import same_alone, same_in_any_batch
from .graph.write import write_all
from .proof.check import QUICK, Bounds, Plan, check, headroom, summary
from .proof.independence import require_independent, torch_inputs
from .proof.report import can_be_shown, card, draw, sheet_settings, worst_of
from .sources.command_line import add_options, named
from .sources.model import Model
from .sources.module import from_module
from .tuning.record import add_tuned, kept

PRECISIONS = ("fp16", "int8")
"""What can be asked for beside fp32."""
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
) -> Bundle:
    """Convert a model, compare it with PyTorch, and write it as a bundle.

    Args:
        model: what is exported.
        out: the bundle's folder. A bundle that is there is replaced.
        bounds: how far ONNX may be from PyTorch.
        plan: how much is compared. The report states both.
        precisions: "fp16" and "int8", alongside fp32, which every bundle has. int8 is written for
            CPUs (int8) and for TensorRT (int8-trt).
        calibration: how int8 is made.
        winograd: whether a CPU may compute large convolutions so, see `export.graph.pixels`.
        same_bytes: whether a sample must have the same bytes in any batch. If false, a library may
            round it differently there, and the bundle declares `same_bytes: false`.

    Raises:
        ExportError: the module mixes samples, the export does not agree with PyTorch, or `out` is
            something else than a bundle. Nothing is written.
    """
    for precision in precisions:
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
    if out.exists() and not (out / MANIFEST).is_file():
        raise ExportError(
            f"{out} exists and is no bundle, so it is not replaced. Give another --out."
        )
    begun, bounds, calibration = (
        time.perf_counter(),
        bounds or Bounds(),
        calibration or Calibration(),
    )
    require_independent(model, torch_inputs(model), bounds.answer)
    model = dataclasses.replace(model, tuned=model.tuned or kept(model, out))
    with replacing_folder(out) as folder:
        say("converting", flush=True)
        steps = {name: same_in_any_batch(step) for name, step in graph.steps(model).items()}
        folded = {name: same_alone(fold_upsampling(step)) for name, step in steps.items()}
        faster = _for_cpus(steps) if winograd else {}
        write_all(folded, model.sample_shape, folder / "fp32", faster)
        bundle = _write_manifest(folder, model, {})
        made = _other_precisions(steps, bundle, precisions, bounds, calibration)
        bundle = _write_manifest(folder, model, {})
        try:
            report, pictures = check(model, bundle, bounds, plan, made, same_bytes)
        except ExportError as error:
            if not faster:
                raise
            raise ExportError(
                f"{error} Large convolutions were computed by Winograd's algorithm, which rounds "
                f"a little more: "
                "if it is fp32 that misses, try --no-winograd."
            ) from error
        report["versions"] = versions()
        (folder / "report.json").write_text(to_json(report), encoding="utf-8")
        draw(folder / "report.png", bundle, report, pictures)
        bundle = dataclasses.replace(
            bundle, report=summary(report), same_bytes=report["same_bytes"]
        )
        if can_be_shown(model.sample_shape):
            save(folder / "samples.png", _sheet(bundle, (plan or Plan()).samples), least=512)
        add_tuned(folder, bundle)
        (folder / "README.md").write_text(
            card(dataclasses.replace(bundle, name=out.name)), encoding="utf-8"
        )
        _write_manifest(folder, model, bundle.report, bundle.same_bytes)
    found = Bundle.load(out)
    say(worst_of(found.report, report["bounds"]))
    size = sum(file.size for file in found.files.values())
    say(
        f"{out}: {size / 1e6:.1f} MB in {time.perf_counter() - begun:.0f} s; see "
        f"{out / 'report.png'}"
    )
    return found


def _for_cpus(steps: Mapping[str, ModelProto]) -> dict[str, ModelProto]:
    """The step graphs pixels first, by their names; none where nothing in them is large enough to
    gain."""
    made = {name: pixels_first(step) for name, step in steps.items()}
    return {
        name.replace(".onnx", f"{PIXELS}.onnx"): fold_upsampling(step)
        for name, step in made.items()
        if step
    }


def _other_precisions(
    steps: Mapping[str, ModelProto],
    bundle: Bundle,
    precisions: Collection[str],
    bounds: Bounds,
    calibration: Calibration,
) -> dict[str, Any]:
    """Write the step graphs in other precisions beside fp32; what the report says of how they were
    made."""
    step, found = steps["step.onnx"], {}

    def write(name: str, change: Callable[[ModelProto], ModelProto]) -> None:
        write_all(
            {file: change(proto) for file, proto in steps.items()},
            bundle.sample_shape,
            bundle.path / name,
        )

    if "fp16" in precisions:
        found["headroom"] = headroom(step, bundle, calibration)
        write("fp16", to_float16)
    if "int8" in precisions:
        both, judge = ranges(step, bundle, calibration), Judge(step, bundle, calibration)
        for name, signed in (("int8", False), ("int8-trt", True)):
            seen = [pair[signed] for pair in both]
            chosen = choose(step, judge, seen, signed, bounds.psnr[name])
            write(name, lambda proto, s=seen, k=chosen.keep, g=signed: quantize(proto, s, k, g))
            found.setdefault("int8", {})[name] = chosen.to_json()
    return found


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
    """Export any PyTorch module, module(x [B, *S], time [B] float32[, label [B] int64]) → F [B,
    *S], and prove it.

    out: the bundle's folder, bundles/ and the name if left out. bounds, plan, precisions,
    calibration, winograd, same_bytes: see `build`. The rest says what the module is: sample_shape,
    prediction, schedule, and whatever else `from_module` takes. Raises ExportError and
    RequestError.
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


def _sheet(bundle: Bundle, most: int) -> Any:
    """Samples for the model card on one sheet: every label in turn, the same labels under each
    other."""
    classes = min(bundle.num_classes, most)
    count = classes * (most // classes) if classes else min(16, most)
    fitting = max((c for c in range(4, 13) if classes and classes % c == 0), default=None)
    labels = [i % classes for i in range(count)] if classes else None
    return tile(Sampler(bundle).pictures(count, label=labels, **sheet_settings(bundle)), fitting)


def _write_manifest(
    folder: Path, model: Model, report: Mapping[str, Any], same_bytes: bool = True
) -> Bundle:
    """Write bundle.json over the files that are there, and read it back as a user would."""
    bundle = Bundle(
        path=folder,
        name=model.name,
        sample_shape=model.sample_shape,
        sample_range=model.sample_range,
        prediction=model.prediction,
        schedule=model.schedule,
        clip=model.clip,
        labels=model.labels,
        defaults=model.defaults,
        files=listed(folder),
        provenance={**model.provenance, "versions": versions()},
        report=report,
        tuned=model.tuned,
        same_bytes=same_bytes,
    )
    (folder / MANIFEST).write_text(to_json(bundle.to_json()), encoding="utf-8")
    return Bundle.load(folder)


def listed(folder: Path) -> dict[str, File]:
    """Every file of a bundle's folder but bundle.json, by its path inside."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            data = path.read_bytes()
            files[name] = File(hashlib.sha256(data).hexdigest(), len(data))
    return files


def versions() -> dict[str, str]:
    """The versions that made and checked the export."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("numpy", "onnx", "onnxruntime", "torch")},
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m export.build", description=__doc__)
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
    given = parse(parser, arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")

    def action() -> int:
        order = engines.ordered(given)
        engines.prepare(order)
        model = named(given)
        precisions = [name for name in PRECISIONS if getattr(given, name)]
        plan, calibration = (QUICK, QUICK_CALIBRATION) if given.quick else (None, None)
        out = given.out or Path("bundles") / model.name
        bundle = build(
            model,
            out,
            plan=plan,
            precisions=precisions,
            calibration=calibration,
            winograd=not given.no_winograd,
            same_bytes=not given.no_same_bytes,
        )
        engines.after_export(bundle, order, bool(precisions))
        return 0

    return status(action)


if __name__ == "__main__":
    sys.exit(main())
