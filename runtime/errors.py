"""Every error that unnoise raises on purpose. A message names the thing, what was found, what was
expected, and the remedy."""

import contextlib
import difflib
from collections.abc import Callable, Iterable

from . import output


class UnnoiseError(Exception):
    """Base of all errors that unnoise raises on purpose."""


class BundleError(UnnoiseError):
    """A file is missing, damaged, unsafe, or of a format that this version does not read."""


class BackendError(UnnoiseError):
    """This machine cannot run what was asked for: a library, a driver or a device is missing or
    refused."""


class NoDriverError(BackendError):
    """There is no NVIDIA driver, or one too old for the CUDA that is installed."""


class NoGpuError(BackendError):
    """There is a driver, and no GPU that it lets this process use."""


class GpuError(BackendError):
    """A call into CUDA or TensorRT failed."""


class GpuMemoryError(GpuError):
    """The GPU's memory does not hold what was asked for."""


class CaptureError(GpuError):
    """Work could not be captured into a CUDA graph."""


class EngineError(BackendError):
    """No engine that this machine can run: none was built, or it is for another GPU, driver or
    version, or it is not whole."""


class RequestError(UnnoiseError, ValueError):
    """The caller asked for something that does not exist or makes no sense."""


def unknown(
    kind: str, name: object, known: Iterable[object], error: type[UnnoiseError] = RequestError
) -> UnnoiseError:
    """The error for a name that is not among `known`, with the nearest known name as a
    suggestion."""
    names = [str(k) for k in known]
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return error(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")


def status(action: Callable[[], int]) -> int:
    """Run a command and return its exit status.

    Characters that standard output cannot encode are spelled out. An error that the user can
    mend is one line on standard error.

    Args:
        action: returns the exit status.

    Returns:
        The status of `action`; 2 after an error; 130 after Ctrl-C; 141 if the reader of standard
        output has left (`| head`).
    """
    output.be_robust()
    try:
        code = action()
        output.flush()
        return code
    except UnnoiseError as error:
        return _failed(f"error: {error}")
    except BrokenPipeError:
        output.discard()
        return output.BROKEN_PIPE
    except OSError as error:
        return _failed(
            f"error: {error}. Nothing half-written was left; files written before are whole."
        )
    except KeyboardInterrupt:
        _failed("interrupted")
        return 130


def _failed(message: str) -> int:
    """Print the last line of a command that failed. Returns the exit status 2."""
    with contextlib.suppress(OSError):
        output.say(message, error=True, flush=True)
    output.discard()
    return 2
