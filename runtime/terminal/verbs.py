"""The verbs of all packages by name: unnoise VERB …, and what `python -m PACKAGE` lists."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UnnoiseError, nearest
from .output import BROKEN_PIPE, be_robust, discard, flush, parse, say

if TYPE_CHECKING:  # which only commands need
    import argparse
    from types import ModuleType

USAGE = 2
"""Exit status for a command line that cannot be parsed, as argparse has it."""


class Verb(NamedTuple):
    """A command.

    Attributes:
        module: The module with its `main`.
        spelled: What `python -m` takes.
        extra: What must be installed for it.
    """

    module: str
    spelled: str
    help: str
    extra: str


VERBS = {
    "sample": Verb("runtime.sample", "runtime.sample", "sample images from a bundle", "cpu"),
    "edit": Verb("runtime.edit", "runtime.edit", "edit images: style, inpainting, …", "cpu"),
    "info": Verb(
        "runtime.info", "runtime.info", "what a bundle holds and this machine runs", "cpu"
    ),
    "bench": Verb(
        "runtime.bench.table", "runtime.bench", "measure how fast a bundle samples", "cpu"
    ),
    "generate": Verb(
        "runtime.generate.__main__", "runtime.generate", "many samples as a folder of shards", "cpu"
    ),
    "serve": Verb("serve.__main__", "serve", "serve bundles over HTTP", "serve"),
    "fit": Verb("trainer.fit", "trainer.fit", "train a network", "train"),
    "evaluate": Verb("trainer.evaluate", "trainer.evaluate", "measure sample quality", "train"),
    "distill": Verb("trainer.distill", "trainer.distill", "make a network of few calls", "train"),
    "average": Verb("trainer.average", "trainer.average", "average the weights of a run", "train"),
    "report": Verb("trainer.report", "trainer.report", "one page on a run", "train"),
    "export": Verb("export.build", "export.build", "write a network as a proved bundle", "export"),
    "export-web": Verb(
        "export.web.__main__", "export.web", "a bundle as a site for browsers", "cpu"
    ),
    "export-triton": Verb("export.triton", "export.triton", "a model repository for Triton", "cpu"),
    "push": Verb("export.push", "export.push", "upload a bundle to the Hugging Face Hub", "hub"),
    "tune": Verb("export.tune", "export.tune", "fit a solver of few calls to a bundle", "export"),
    "engines": Verb("export.engines", "export.engines", "build TensorRT engines", "export"),
}


def program(module: str) -> str:
    """Return how a verb was called, for the usage line: unnoise VERB, or python -m MODULE."""
    called = Path(sys.argv[0]).stem if sys.argv and sys.argv[0] else ""
    if called == "unnoise":
        for name, verb in VERBS.items():
            if verb.spelled == module:
                return f"unnoise {name}"
    return f"python -m {module}"


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """Add the bundle that a command reads."""
    parser.add_argument(
        "bundle",
        type=Path,
        metavar="BUNDLE",
        help="a bundle's folder, made by python -m export.build; or a shipped bundle: emoji32",
    )


def run_verb(
    parser: argparse.ArgumentParser,
    act: Callable[[argparse.Namespace], int | None],
    arguments: list[str] | None,
) -> int:
    """Parse a command line and act on it; return the exit status, see `status`.

    Args:
        act: Takes the parsed arguments; returns the exit status, None for 0.
        arguments: None for those of the process.
    """
    given = parse(parser, arguments)
    return status(lambda: act(given) or 0)


def status(action: Callable[[], int]) -> int:
    """Run a command and return its exit status.

    Characters that standard output cannot encode are spelled out. An error that the user can fix is
    one line on standard error.

    Args:
        action: Returns the exit status.

    Returns:
        The status of `action`; 2 after an error; 130 after Ctrl-C; 141 if the reader of standard
        output has left (`| head`).
    """
    be_robust()
    try:
        code = action()
        # While errors still become messages: Python's own flush at exit would print a traceback.
        flush()
        return code
    except UnnoiseError as error:
        return _failed(f"error: {error}")
    except BrokenPipeError:
        discard()
        return BROKEN_PIPE
    except OSError as error:
        return _failed(
            f"error: {error}. Nothing half-written was left; files written before are whole."
        )
    except KeyboardInterrupt:
        _failed("interrupted")
        return 130


def _failed(message: str) -> int:
    """Print the last line of a command that failed; return the exit status 2."""
    # Standard error may be what failed.
    with contextlib.suppress(OSError):
        say(message, error=True, flush=True)
    discard()
    return 2


def main(arguments: list[str] | None = None) -> int:
    """Run the command `unnoise`; return its exit status."""
    be_robust()
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help", "help"):
        say(listing())
        return 0 if given else USAGE
    name = given[0]
    rest = given[1:]
    if name == "--version":
        say(f"unnoise {metadata.version('unnoise')}")
        return 0
    if name not in VERBS:
        say(
            f"error: unknown verb {name!r}.{nearest(name, VERBS)} Known: {', '.join(VERBS)}.",
            error=True,
        )
        return USAGE
    module = _imported(VERBS[name])
    return USAGE if module is None else module.main(rest)


def _imported(verb: Verb) -> ModuleType | None:
    """The verb's module; None, and an error on standard error, if what it needs is missing."""
    try:
        return importlib.import_module(verb.module)
    except ModuleNotFoundError as error:
        # One of our own modules that is missing is a bug, and not an absent extra.
        if (error.name or "").split(".")[0] in ("runtime", "trainer", "export", "serve"):
            raise
        say(
            f"error: this verb needs {error.name!r}, which is not installed. "
            f"Install it: pip install 'unnoise[{verb.extra}]'.",
            error=True,
        )
        return None


def listing(package: str = "") -> str:
    """List the verbs, one a line; those of one package as `python -m` spells them."""
    chosen = {n: v for n, v in VERBS.items() if v.spelled.startswith(package)}
    spelled = {n: f"python -m {v.spelled}" if package else n for n, v in chosen.items()}
    width = max(map(len, spelled.values()))
    usage = "python -m MODULE" if package else "unnoise VERB"
    lines = [f"usage: {usage} …   (--help after it explains its options)", ""]
    lines += [f"  {spelled[n].ljust(width)}  {v.help}" for n, v in chosen.items()]
    return "\n".join(lines)


def main_of(package: str) -> int:
    """Run `python -m PACKAGE`, which lists its verbs."""
    be_robust()
    say(listing(package))
    return 0 if len(sys.argv) > 1 and sys.argv[1] in ("-h", "--help") else USAGE
