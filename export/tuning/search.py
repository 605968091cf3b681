"""How a solver is searched for: a few fits from several starts, and the best of them to its end.

The state of the search is stored after every step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.bundle import Bundle
from runtime.diffusion.program import Network, Program
from runtime.diffusion.tuned import Tuned
from runtime.errors import RequestError, unknown
from runtime.errors.arguments import integer
from runtime.files import from_json, to_json, write_text
from runtime.terminal.progress import Progress

from ..sources.model import versions
from .candidates import even_programs, named_programs
from .gauss_newton import LOSSES, Fit, Form, begin, errors, rms, step
from .reference import FIRST_SEED, TEACHER, Samples, Walker, draw, same, taught


@dataclass(frozen=True)
class Settings:
    """How a search runs.

    Args:
        samples: How many samples are fitted on.
        held_out: How many others the solvers are judged by.
        seed: Which samples.
        starts: How many programs to start from.
        tries: Steps of Gauss-Newton from each start, on a part of the samples.
        iterations: The most steps from the best of them, on all samples.
        loss: What is minimized, one of `gauss_newton.LOSSES`; "auto" is contrast for images and
            pixels otherwise. The errors that are recorded are in pixels in any case.

    Raises:
        RequestError: A number is below 1, or the loss is unknown.
    """

    samples: int = 48
    held_out: int = 32
    seed: int = 0
    starts: int = 4
    tries: int = 3
    iterations: int = 10
    loss: str = "auto"

    def __post_init__(self) -> None:
        if self.loss not in (known := ("auto", *LOSSES)):
            raise unknown("loss", self.loss, known)
        for name, value in vars(self).items():
            if name != "loss":
                integer(name, value, 0 if name == "seed" else 1, 2**16)


PARTS = ("train", "held_out")
FEW = 16
"""Samples on which untuned programs and starts are compared."""


@dataclass(frozen=True, eq=False)
class Tuning:
    """What all fits of one bundle share.

    Attributes:
        settings: With a loss of `gauss_newton.LOSSES`.
        network: The probe of the network.
        folder: The folder of targets and fits, from which a killed search resumes.
    """

    bundle: Bundle
    walker: Walker
    settings: Settings
    train: Samples
    held_out: Samples
    network: list[float]
    folder: Path


def prepare(
    bundle: Bundle, network: Network, known: list[float], settings: Settings, work: Path
) -> Tuning:
    """Return samples and their targets, computed or read from the folder of these settings.

    Raises:
        RequestError: The loss does not fit samples of this shape.
    """
    shape = bundle.sample_shape
    pictures = len(shape) >= 2 and min(shape[-2:]) >= 3
    if settings.loss == "auto":
        settings = dataclasses.replace(settings, loss="contrast" if pictures else "pixels")
    if settings.loss == "contrast" and not pictures:
        raise RequestError(
            f"the loss contrast needs samples of at least 3×3 pixels, got {shape}. Use pixels."
        )
    # A folder for each search that must not be mixed with another, and started afresh if it holds
    # the targets of another network.
    facts = bundle.to_json()
    what = {name: facts[name] for name in ("sample", "prediction", "clip", "labels", "schedule")}
    what |= {"guidance": bundle.defaults.guidance, "teacher": TEACHER, "settings": vars(settings)}
    folder = work / f"{bundle.name}-{hashlib.sha256(to_json(what).encode()).hexdigest()[:12]}"
    record = folder / "network.json"
    if not (record.exists() and same(from_json(record.read_bytes()), known)):
        shutil.rmtree(folder, ignore_errors=True)
        write_text(record, to_json(known))
    walker = Walker(network, bundle.num_classes)
    first = FIRST_SEED + settings.seed * 2**20
    train = taught(bundle, walker, draw(bundle, settings.samples, first), folder, "train")
    held_out = taught(
        bundle, walker, draw(bundle, settings.held_out, first + 2**19), folder, "held-out"
    )
    return Tuning(bundle, walker, settings, train, held_out, known, folder)


def fit(tuning: Tuning, calls: int) -> Tuned:
    """Return the solver of so many calls, from the stored state of its fit if there is one."""
    form = Form(tuning.bundle, calls)
    settings = tuning.settings
    path = tuning.folder / f"calls-{calls}.json"
    state = State.read(path) if path.exists() else survey(tuning, form)
    done = sum(f.steps for f in (*state.tries, *([state.final] if state.final else [])))
    with Progress(
        f"{calls} calls", settings.starts * settings.tries + settings.iterations, done
    ) as bar:
        while not state.done(settings):
            write_text(path, to_json(state.to_json()))
            state = advance(tuning, form, state)
            bar.advance(note=state.note)
        write_text(path, to_json(state.to_json()))
    return _result(tuning, form, state)


@dataclass(frozen=True)
class State:
    """The state of the search for one number of calls.

    Attributes:
        untuned: The best untuned program, and its errors.
        scale: That of Cauchy's loss.
        names: The programs that the tries start from.
        tries: The fit from each start, on a part of the samples.
        final: The fit from the best of them, on all samples.
        note: The errors of the last step, for the progress bar.
    """

    untuned: dict[str, Any]
    scale: float
    names: list[str]
    tries: list[Fit]
    final: Fit | None = None
    note: str = ""

    def done(self, settings: Settings) -> bool:
        """Whether the final fit has ended or has had all its steps."""
        return self.final is not None and (
            self.final.ended or self.final.steps >= settings.iterations
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON value."""
        return {
            **vars(self),
            "tries": [f.to_json() for f in self.tries],
            "final": self.final and self.final.to_json(),
        }

    @classmethod
    def read(cls, path: Path) -> State:
        """Read a file that holds what `to_json` returned."""
        value = from_json(path.read_bytes())
        value["tries"] = [Fit.from_json(f) for f in value["tries"]]
        return cls(**{**value, "final": value["final"] and Fit.from_json(value["final"])})


def survey(tuning: Tuning, form: Form) -> State:
    """Return the state before the first step: the best untuned program, and the starts."""
    few = _part(tuning.train)
    walker = tuning.walker
    K = form.calls
    loss = tuning.settings.loss
    untuned = named_programs(tuning.bundle, K)
    starts = even_programs(tuning.bundle, K)

    def best(programs: Mapping[str, Program], count: int, loss: str = "pixels") -> list[str]:
        error = {}
        for name, program in programs.items():
            error[name] = rms(errors(walker, (program.call, program.update), few, loss))
            bar.advance()
        return sorted(error, key=error.__getitem__)[:count]

    # The untuned solver is chosen by the error that is reported, the starts by the loss.
    with Progress(f"{K} calls, untuned", len(untuned) + len(starts)) as bar:
        found = best(untuned, 1)[0]
        names = best(starts, tuning.settings.starts - 1, loss)
    program = untuned[found]
    all_errors = {
        part: errors(walker, (program.call, program.update), getattr(tuning, part))
        for part in PARTS
    }
    record = {
        "name": found,
        **{part: summary(getattr(tuning, part), e) for part, e in all_errors.items()},
    }
    programs = {found: program, **{name: starts[name] for name in names}}
    tries = [begin(form, walker, form.vector(p), few, loss) for p in programs.values()]
    # Errors of the untuned solver's size count fully; much larger ones are forks.
    scale = rms(errors(walker, (program.call, program.update), tuning.train, loss))
    return State(record, scale, list(programs), tries)


def advance(tuning: Tuning, form: Form, state: State) -> State:
    """Return the state after one more step: of the first unfinished try, then of the best one."""
    walker = tuning.walker
    scale = state.scale
    loss = tuning.settings.loss
    for i, found in enumerate(state.tries):
        if not found.ended and found.steps < tuning.settings.tries:
            after = step(form, walker, found, _part(tuning.train), scale, loss)
            tries = [*state.tries[:i], after, *state.tries[i + 1 :]]
            return dataclasses.replace(
                state, tries=tries, note=f"from {state.names[i]}: train {rms(after.error):.4f}"
            )
    if state.final is None:
        best = min(state.tries, key=lambda f: f.loss(scale))
        final = begin(form, walker, best.theta, tuning.train, loss)
    else:
        final = step(form, walker, state.final, tuning.train, scale, loss)
    held_out = rms(errors(walker, form.table(final.theta), tuning.held_out))
    untuned = state.untuned["held_out"]["rms"]
    note = f"train {rms(final.error):.4f}, held out {held_out:.4f}, untuned {untuned:.4f}"
    return dataclasses.replace(state, final=final, note=note)


def _part(samples: Samples) -> Samples:
    """Return some of the samples, with and without guidance."""
    return samples[np.linspace(0, len(samples) - 1, min(FEW, len(samples))).astype(int)]


def summary(samples: Samples, error: NDArray[Any]) -> dict[str, Any]:
    """Return the root mean square and the median of errors [n], over all and by guidance."""
    both = lambda e: {"rms": rms(e), "median": float(np.median(e))}  # noqa: E731
    by_guidance = {
        f"{g:g}": both(error[samples.guidance == g]) for g in np.unique(samples.guidance)
    }
    return {**both(error), "guidance": by_guidance}


def _result(tuning: Tuning, form: Form, state: State) -> Tuned:
    assert state.final is not None
    table = form.table(state.final.theta)
    settings = tuning.settings
    made = {
        "errors": {
            part: summary(s, errors(tuning.walker, table, s))
            for part in PARTS
            for s in [getattr(tuning, part)]
        },
        "untuned": state.untuned,
        "start": state.names[
            min(range(len(state.tries)), key=lambda i: state.tries[i].loss(state.scale))
        ],
        "iterations": state.final.steps,
        "teacher": TEACHER,
        "settings": vars(settings),
        "network": tuning.network,
        "versions": versions(),
    }
    return form.tuned(state.final.theta, made)
