"""Train a network: python -m trainer.fit.

Re-run the same command to resume: the final weights are those of an uninterrupted run. In many
processes: accelerate launch --num_processes 8 -m trainer.fit … with the same options.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from runtime.terminal.verbs import program, run_verb

from .config import Config
from .config.presets import add_arguments, from_arguments
from .config.validation import text
from .parallel.processes import join, leave
from .training.limits import enough_memory
from .training.run import Run
from .training.trial import try_out

STOPPED = 130
"""The exit status of a run that was asked to stop, as a shell gives it after Ctrl-C."""


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Yield whether Ctrl-C or a termination signal has come. A second Ctrl-C raises at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals reach the main thread alone
        return
    asked = False

    def note(number: int, _: FrameType | None) -> None:
        nonlocal asked
        # A launcher and its scheduler may each send SIGTERM: only Ctrl-C counts twice.
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        # Ctrl-C also ends `| tee`, which would have read this. Nothing may be raised here: the run
        # would end without its checkpoint.
        with suppress(OSError, ValueError, RuntimeError):
            print(
                "\nstopping after this step; once more to stop at once, without a checkpoint",
                file=sys.stderr,
            )

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def fit(config: Config, runs: Path = Path("runs")) -> bool:
    """Train, or resume training, into runs/NAME. Every process of a run calls this.

    Returns:
        Whether the run is finished. Otherwise it was asked to stop, and a checkpoint is written.

    Raises:
        TrainingError: The loss is not finite, memory ran out, or another process is gone.
    """
    with asked_to_stop() as stop:
        processes = join(config.device)
        with processes.together(), enough_memory(config), ExitStack() as held:
            return Run(config, runs / config.name, processes, held).train(stop)


def dry_run(config: Config) -> None:
    """Do everything but train, and print how long the run would take. Write nothing."""
    with enough_memory(config):
        try_out(config)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog=program("trainer.fit"), description=__doc__)
    add_arguments(found)
    add_runs(found)
    return found


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where a run is, and whether it is tried out only."""
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="the folder that holds the runs [runs]",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="take three steps, print what the run would take, and write nothing",
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return train_verb(parser(), from_arguments, arguments)


def train_verb(
    parser: argparse.ArgumentParser,
    config_of: Callable[[argparse.Namespace], Config],
    arguments: list[str] | None,
) -> int:
    """Run a command that trains, or tries out, the config of its options; see `add_runs`.

    Returns:
        The exit status.
    """

    def act(given: argparse.Namespace) -> int:
        config = config_of(given)
        text("--runs", str(given.runs))
        if given.dry_run:
            dry_run(config)
            return 0
        return 0 if fit(config, given.runs) else STOPPED

    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        return run_verb(parser, act, arguments)
    finally:
        # After an error too: the others then notice at once that this process is gone.
        leave()


if __name__ == "__main__":
    sys.exit(main())
