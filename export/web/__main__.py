"""A bundle as a static site that samples in the browser: python -m export.web BUNDLE --out site"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from runtime.bundle.bundle import Bundle
from runtime.diffusion.solvers import SOLVERS
from runtime.terminal.options import integers
from runtime.terminal.output import say
from runtime.terminal.verbs import add_bundle, program, run_verb

from .libraries import VERSION
from .tables import STEPS
from .write import PRECISIONS, Site, write_site


def main(arguments: list[str] | None = None) -> int:
    return run_verb(_parser(), _run, arguments)


def _run(given: argparse.Namespace) -> None:
    """Run the command line."""
    site = Site(
        bundle=Bundle.load(given.bundle),
        precision=given.precision,
        solvers=given.solvers.split(",") if given.solvers else (),
        steps=given.steps or (),
        webgpu=not given.no_webgpu,
        package=given.library,
    )
    # Writing replaces the current folder, if it is that one.
    out = given.out.resolve()
    programs = write_site(site, out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    say(
        f"{site.bundle.name} {given.precision} with {len(programs.entries)} programs, "
        f"{size / 1e6:.1f} MB: {given.out}\n"
        f"look at it: python -m http.server --directory {given.out}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program("export.web"), description=__doc__)
    add_bundle(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="the folder of the site")
    add("--precision", default="fp32", help=f"{', '.join(PRECISIONS)} [fp32]")
    add("--solvers", metavar="NAMES", help=f"of {', '.join(SOLVERS)}, tuned [all of them]")
    add(
        "--steps",
        type=integers,
        metavar="NUMBERS",
        help=f"numbers of steps in the menu [{','.join(map(str, STEPS))}]",
    )
    add("--no-webgpu", action="store_true", help="leave out the 27 MB that WebGPU needs")
    add(
        "--library",
        type=Path,
        metavar="FILE",
        help=f"the package of onnxruntime-web {VERSION} [npm fetches it]",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
