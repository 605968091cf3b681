"""Measure the quality of samples: python -m trainer.evaluate RUN_OR_BUNDLE.

Samples are compared with the data by features; see `trainer.quality.distances`. The numbers of a
run and of the bundle made from it may be compared, and those of runs on the same data. They are the
numbers of the literature only with Inception's features (--features).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from runtime.bundle.bundle import MANIFEST
from runtime.errors import RequestError
from runtime.files import to_json, write_text
from runtime.terminal.output import say
from runtime.terminal.verbs import program, run_verb

from .quality.evaluator import Changes, of_bundle, of_run


def evaluate(what: Path, best: bool, guidance: float | None, device: str, changes: Changes) -> str:
    """Measure a run or a bundle, and return the result as JSON. A run's is written into it.

    Raises:
        RequestError: Guidance was given for a run.
    """
    if (what / MANIFEST).is_file():
        return to_json(of_bundle(what, guidance, device, changes).to_json())
    if guidance is not None:
        raise RequestError("--guidance is for bundles: a run is sampled without.")
    result = to_json(of_run(what, best, device, changes).to_json())
    write_text(what / "evaluation.json", result)
    return result


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog=program("trainer.evaluate"), description=__doc__)
    found.add_argument("what", type=Path, metavar="RUN_OR_BUNDLE")
    found.add_argument(
        "--n", type=int, help="samples, and images of the data [the run's quality-samples]"
    )
    found.add_argument("--solver", help="[the run's sample-solver]")
    found.add_argument("--steps", type=int, help="[the run's sample-steps]")
    found.add_argument("--guidance", type=float, help="of a bundle [none]")
    found.add_argument(
        "--best", action="store_true", help="a run's best checkpoint instead of its newest"
    )
    found.add_argument("--features", help="a TorchScript file of Inception [the run's]")
    found.add_argument("--device", default="auto", help="auto, cpu or cuda [auto]")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_verb(parser(), _act, arguments)


def _act(given: argparse.Namespace) -> None:
    changes = Changes(given.n, given.solver, given.steps, given.features)
    say(evaluate(given.what, given.best, given.guidance, given.device, changes).rstrip("\n"))


if __name__ == "__main__":
    sys.exit(main())
