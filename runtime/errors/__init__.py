"""Every error that unnoise raises on purpose. A message names the thing, what was found, what was
expected, and the remedy."""

import difflib
from collections.abc import Iterable


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


class Overloaded(UnnoiseError):
    """An engine has too much work to take more now.

    Attributes:
        retry_after: Predicted seconds until the same request would be accepted.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(UnnoiseError):
    """A request cannot be finished, or was not finished, by its deadline.

    Attributes:
        finish_seconds: Predicted seconds that the request needs, from its submission on.
    """

    def __init__(self, message: str, finish_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.finish_seconds = finish_seconds


class ClosedError(BackendError):
    """An engine is closing, or was closed: it accepts nothing more."""


def unknown(
    kind: str, name: object, known: Iterable[object], error: type[UnnoiseError] = RequestError
) -> UnnoiseError:
    """The error for a name that is not among `known`, with the nearest known name as a
    suggestion."""
    names = [str(k) for k in known]
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return error(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")
