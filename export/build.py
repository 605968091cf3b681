"""Export a trained run as a bundle, and prove it: python -m export.build [RUN] [--out DIR]"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import logging
import platform
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from runtime.bundle import MANIFEST, Bundle, File
from runtime.errors import status
from runtime.files import replacing_folder, to_json
from runtime.pictures import save, tile
from runtime.sampler import Sampler

from . import graph
from .check import check, summary
from .errors import ExportError
from .model import Model, from_run, newest_run
from .report import card, draw


def build(model: Model, out: Path) -> Bundle:
    """Convert, check, write: the bundle in the folder `out`, which takes the place of one that is there.

    Raises ExportError, with nothing written, where the export does not agree with PyTorch or `out` is something else than a bundle.
    """
    if out.exists() and not (out / MANIFEST).is_file():
        raise ExportError(f"{out} exists and is no bundle, so it is not replaced. Give another --out.")
    begun = time.perf_counter()
    with replacing_folder(out) as folder:
        print("converting", flush=True)
        graph.convert(model, folder / "fp32")
        bundle = _write_manifest(folder, model, {})
        report, pictures = check(model, bundle)
        report["versions"] = versions()
        (folder / "report.json").write_text(to_json(report), encoding="utf-8")
        draw(folder / "report.png", bundle, report, pictures)
        bundle = dataclasses.replace(bundle, report=summary(report))
        if len(model.sample_shape) == 3 and model.sample_shape[0] in (1, 3):
            save(folder / "samples.png", _sheet(bundle), least=512)
        (folder / "README.md").write_text(card(dataclasses.replace(bundle, name=out.name)), encoding="utf-8")
        _write_manifest(folder, model, bundle.report)
    found = Bundle.load(out)
    for precision, worst in found.report.items():
        print(f"{precision} agrees with PyTorch; largest differences:")
        for kind, unit in (("answer", ""), ("next_state", "·max(1, σ)"), ("trajectory", "")):
            print(f"  {kind:10}  {worst[kind]:.1e}  (bound {report['bounds'][kind]:g}{unit})")
    size = sum(file.size for file in found.files.values())
    print(f"{out}: {size / 1e6:.1f} MB in {time.perf_counter() - begun:.0f} s; see {out / 'report.png'}")
    return found


def _sheet(bundle: Bundle) -> Any:
    """Samples for the model card on one sheet: every label in turn, the same labels under each other."""
    classes = bundle.num_classes
    count = classes * max(1, 36 // classes) if classes else 16
    fitting = max((c for c in range(4, 13) if classes and classes % c == 0), default=None)
    labels = [i % classes for i in range(count)] if classes else None
    return tile(Sampler(bundle).pictures(count, label=labels), fitting)


def _write_manifest(folder: Path, model: Model, report: Mapping[str, Any]) -> Bundle:
    """Write bundle.json over the files that are there, and read it back as a user would."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            data = path.read_bytes()
            files[name] = File(hashlib.sha256(data).hexdigest(), len(data))
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
        files=files,
        provenance={**model.provenance, "versions": versions()},
        report=report,
    )
    (folder / MANIFEST).write_text(to_json(bundle.to_json()), encoding="utf-8")
    return Bundle.load(folder)


def versions() -> dict[str, str]:
    """The versions that made and checked the export."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("numpy", "onnx", "onnxruntime", "torch")},
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m export.build", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="a run's folder [the newest under runs/]")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the bundle's folder [bundles/ and the run's name]")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="the folder that holds the runs [runs]"
    )
    parser.add_argument(
        "--weights", choices=("ema", "weights"), default="ema", help="the moving average, or the last step's own [ema]"
    )
    parser.add_argument(
        "--guidance", type=float, default=2.0, help="the bundle's default guidance scale, 1 for none [2]"
    )
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")

    def action() -> int:
        run = given.run or newest_run(given.runs)
        print(f"exporting {run}, {given.weights}")
        model = from_run(run, given.guidance, given.weights)
        build(model, given.out or Path("bundles") / model.name)
        return 0

    return status(action)


if __name__ == "__main__":
    sys.exit(main())
