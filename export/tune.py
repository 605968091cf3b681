"""Fit solvers to a bundle's network: python -m export.tune BUNDLE --calls 4,6,8 [--run RUN]

A fitted solver with few network calls ends nearer to what many calls give from the same noise. The
weights do not change.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from runtime.bundle.bundle import Bundle
from runtime.bundle.format import CARD, REPORT, TUNED_IMAGE
from runtime.bundle.hub import is_snapshot
from runtime.bundle.shipped import INSTALLED
from runtime.diffusion.program import Network
from runtime.diffusion.tuned import Tuned
from runtime.errors.arguments import integer
from runtime.files import from_json, replacing_folder
from runtime.terminal.options import integers
from runtime.terminal.output import say
from runtime.terminal.verbs import program, run_verb

from .errors import ExportError
from .proof.card import card
from .proof.folder import write_card, write_manifest, write_report
from .sources.command_line import named
from .sources.options import add_options
from .tuning.gauss_newton import LOSSES
from .tuning.record import checks_to_json, draw_tuned, tuned_checks
from .tuning.reference import network_of, probe, same
from .tuning.search import Settings, fit, prepare

WORK = Path("out/tune")
"""The folder of targets and fits."""


def tune(
    bundle: Bundle,
    calls: Sequence[int],
    network: Network | None = None,
    settings: Settings | None = None,
    work: Path = WORK,
    threads: int | None = None,
) -> Bundle:
    """Fit a solver for each number of calls, and rewrite the bundle with them.

    The bundle keeps the solvers that it has for other numbers of calls.

    Args:
        bundle: What is tuned.
        calls: Numbers of network calls.
        network: The bundle's network from its source; None for the bundle's own graph.
        settings: How the search runs.
        work: The folder of targets and fits, from which an interrupted search resumes.
        threads: Of the bundle's own graph; None for one a core.

    Returns:
        The rewritten bundle.

    Raises:
        RequestError: A number of calls is out of range.
        ExportError: The bundle was distilled or has conditions, the network is not the bundle's, or
            a solver is no nearer to the teacher on held-out samples than the best untuned one.
            Nothing is written.
        BundleError: The bundle's report is missing or damaged.
    """
    _check_tunable(bundle)
    settings = settings or Settings()
    own = network_of(bundle, threads)
    for K in calls:
        integer("calls", K, 2, min(64, len(bundle.schedule)))
    known = probe(own, bundle)
    # Solvers fitted to another network would be stored with this one and be wrong.
    if network is not None and not same(found := probe(network, bundle), known):
        raise ExportError(
            f"the network is not the one in {bundle.path}: to the same noise it returns {found}, "
            f"not {known}."
        )
    tuning = prepare(bundle, network or own, known, settings, work)
    found = {K: fit(tuning, K) for K in sorted(set(calls))}
    # On held-out samples, because a fit always helps on those that it was fitted on.
    if worse := [f"{K} calls: {compared(t)}" for K, t in found.items() if not helps(t)]:
        raise ExportError(
            "tuning does not help on held-out samples, so nothing was written: "
            + "; ".join(worse)
            + ". Leave these calls out, or give more --samples."
        )
    return write(bundle, {**bundle.tuned, **found})


def _check_tunable(bundle: Bundle) -> None:
    """Raises ExportError for a bundle that no solver can be fitted to."""
    # Resolved, as `write` resolves it: a link may lead into the package too.
    if bundle.path.resolve().is_relative_to(INSTALLED.resolve()):
        raise ExportError(
            f"{bundle.path} is the copy inside the installed package, which tuning would rewrite. "
            f"Copy the folder and tune the copy."
        )
    if is_snapshot(bundle.path):
        raise ExportError(
            f"{bundle.path} is in the cache of the Hugging Face Hub, which tuning would change. "
            "Copy the folder and tune the copy."
        )
    if bundle.conditions:
        raise ExportError(
            f"{bundle.path} has conditions ({', '.join(c.name for c in bundle.conditions)}), for "
            "which no solver can be fitted yet. Use another solver."
        )
    if bundle.distilled:
        raise ExportError(
            f"{bundle.path} was distilled: it has no paths of many calls to fit a solver to. Tune "
            "the network that it came from."
        )
    # It gets the solvers' figures; a damaged one fails now, not after the search.
    bundle.read(REPORT)


def helps(tuned: Tuned) -> bool:
    """Whether it is nearer to the teacher than the best untuned solver, on held-out samples."""
    return tuned.made["errors"]["held_out"]["rms"] < tuned.made["untuned"]["held_out"]["rms"]


def compared(tuned: Tuned) -> str:
    """Return its held-out error and the untuned solver's in words."""
    own = tuned.made["errors"]["held_out"]["rms"]
    untuned = tuned.made["untuned"]
    return (
        f"{own:.4f} from the teacher where {untuned['name']} ends {untuned['held_out']['rms']:.4f}"
    )


def write(bundle: Bundle, tuned: Mapping[int, Tuned]) -> Bundle:
    """Rewrite the bundle with these solvers, their curve in the report, and a new card."""
    with replacing_folder(bundle.path.resolve()) as folder:
        shutil.copytree(bundle.path, folder, dirs_exist_ok=True)
        found = dataclasses.replace(bundle, path=folder, tuned=tuned)
        checks = tuned_checks(found)
        # The proof is not repeated: its part of the report stays as it was read.
        report = from_json(bundle.read(REPORT))
        write_report(folder, {**report, "tuned": checks_to_json(checks)})
        draw_tuned(folder, found.name, checks)
        write_card(folder, card(dataclasses.replace(found, name=bundle.path.name)))
        # Others are listed as before: a user's own files are not, and a damaged one stays so.
        write_manifest(found, (CARD, REPORT, TUNED_IMAGE))
    return Bundle.load(bundle.path)


SETTINGS = {
    "samples": "that are fitted on",
    "held_out": "others, to judge by",
    "seed": "which samples",
    "starts": "programs to start from",
    "tries": "steps from each, on some of the samples",
    "iterations": "steps of the best, at most, on all",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program("export.tune"), description=__doc__)
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder; it is overwritten")
    add(
        "--calls",
        type=integers,
        default=(4, 6, 8),
        metavar="K,K,…",
        help="a solver for each number of calls [4,6,8]",
    )
    for name, text in SETTINGS.items():
        add(
            f"--{name.replace('_', '-')}",
            type=int,
            default=getattr(Settings(), name),
            metavar="N",
            help=f"{text} [{getattr(Settings(), name)}]",
        )
    add(
        "--loss",
        choices=("auto", *LOSSES),
        default="auto",
        help="the loss to minimize: contrast also includes the sharpness of a sample [contrast for "
        "images, pixels otherwise]",
    )
    add(
        "--work",
        type=Path,
        default=WORK,
        metavar="DIR",
        help=f"folder for targets and fits, from which the same command resumes [{WORK}]",
    )
    add("--threads", type=int, help="threads for the bundle's own graph [one per core]")
    add_options(parser, flag="--run")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return run_verb(_parser(), _act, arguments)


def _act(given: argparse.Namespace) -> None:
    bundle = Bundle.load(given.bundle)
    stated = any(source is not None for source in (given.run, given.module, given.onnx))
    network = named(given).reference() if stated else None
    begun = time.perf_counter()
    settings = Settings(**{name: getattr(given, name) for name in SETTINGS}, loss=given.loss)
    found = tune(bundle, given.calls, network, settings, given.work, given.threads)
    for K in given.calls:
        say(f"{K} calls: {compared(found.tuned[K])}")
    say(
        f'{given.bundle}: written in {time.perf_counter() - begun:.0f} s; solver="tuned" and '
        f"steps={'|'.join(map(str, found.tuned))} choose them"
    )


if __name__ == "__main__":
    sys.exit(main())
