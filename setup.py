"""Lay a reduced copy of each shipped bundle into the wheel; pyproject.toml says everything else.

pip runs this file where numpy is missing, so it uses the standard library and setuptools alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

BUNDLES = Path(__file__).parent / "bundles"
SHIPPED = {"emoji32": ("fp32", "int8")}
"""The bundles in the wheel, and the precisions of each: those that CPU backends load."""
REPORT_IMAGE = "report.png"
"""Left out: it shows all precisions, and is large."""
TUNED_IMAGE = "tuned.png"
"""Left out, too: the card has its figures."""
COMPUTED_FROM = {"bf16": "fp32"}
"""Precisions without files of their own, and whose files they are computed from."""


class BuildPy(build_py):
    """Builds the packages, then lays the bundles into runtime/shipped/."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout's own bundles/ are found by the same names
            return
        for name, precisions in SHIPPED.items():
            reduce(BUNDLES / name, Path(self.build_lib) / "runtime" / "shipped" / name, precisions)


def reduce(source: Path, target: Path, precisions: tuple[str, ...]) -> None:
    """Copy a bundle with some of its precisions; its reports and its card say only what is there.

    Args:
        source: The whole bundle.
        target: The folder to write. A folder that is there is replaced.
        precisions: fp32 and others that the bundle has.
    """
    shutil.rmtree(target, ignore_errors=True)
    value = json.loads((source / "bundle.json").read_bytes())
    left_out = {name.split("/")[0] for name in value["files"] if "/" in name} - {*precisions}
    unwanted = {*left_out, REPORT_IMAGE, TUNED_IMAGE}
    files = [name for name in value["files"] if name.split("/")[0] not in unwanted]
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)

    # The two files that speak of all precisions are rewritten, so their hashes change.
    report = json.loads((source / "report.json").read_bytes())
    for part in ("precisions", "int8"):
        report[part] = _without(report[part], left_out)
    if "fp16" in left_out:
        report.pop("headroom", None)  # float16's
    _write_json(target / "report.json", report)
    card = (source / "README.md").read_text(encoding="utf-8")
    (target / "README.md").write_text(_card(card, precisions, left_out), encoding="utf-8")

    value["report"] = _without(value["report"], left_out)
    value["files"] = {name: _entry(target / name) for name in files}
    _write_json(target / "bundle.json", value)


def _without(report: dict[str, Any], left_out: set[str]) -> dict[str, Any]:
    """Return the figures by precision, without those of precisions that cannot be computed."""
    return {p: found for p, found in report.items() if COMPUTED_FROM.get(p, p) not in left_out}


def _card(text: str, precisions: tuple[str, ...], left_out: set[str]) -> str:
    """Return the card without the rows of the other precisions, and with a line that says so."""
    rows = tuple(f"| {precision} |" for precision in left_out)
    text = text.replace(f"see `report.json` and `{REPORT_IMAGE}`", "see `report.json`")
    text = text.replace(f" (`{TUNED_IMAGE}`)", "")
    lines = [line for line in text.splitlines() if not line.startswith(rows)]
    note = (
        f"This copy comes with the package and has {', '.join(precisions)}. The project's "
        f"repository has {', '.join(sorted(left_out))} too, and `{REPORT_IMAGE}`, which compares "
        "them."
    )
    place = lines.index("## Checked") + 1
    return "\n".join([*lines[:place], "", note, *lines[place:]]) + "\n"


def _entry(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildPy})
