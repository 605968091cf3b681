"""The errors that unnoise raises. A message names the thing, the rule, the value and the remedy."""

from collections.abc import Iterable


class UnnoiseError(Exception):
    """Base of all errors that unnoise raises on purpose."""


class BundleError(UnnoiseError):
    """A file is missing, damaged, unsafe, or of a format that this version does not read."""


class BackendError(UnnoiseError):
    """This machine cannot run the request: a library, a driver or a device is missing or fails."""


class NoDriverError(BackendError):
    """There is no NVIDIA driver, or it is too old for the installed CUDA."""


class NoGpuError(BackendError):
    """There is a driver, but no GPU that it lets this process use."""


class CudaLibraryError(BackendError):
    """A shared library of CUDA or cuDNN cannot be loaded."""


class GpuError(BackendError):
    """A call into CUDA or TensorRT failed."""


class GpuMemoryError(GpuError):
    """The request does not fit in the GPU's memory."""


class CaptureError(GpuError):
    """Work could not be captured into a CUDA graph."""


class EngineError(BackendError):
    """There is no engine that this machine can run.

    None was built, or it is damaged, or it is for another GPU, driver or version.
    """


# Also a ValueError, so that callers need not import it to catch a wrong argument.
class RequestError(UnnoiseError, ValueError):
    """An argument names something that does not exist, or has a value that cannot be used."""


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


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest of the known names, or "" if none is near."""
    # Here, because only mistakes need it, and importing it takes time.
    from difflib import get_close_matches

    near = get_close_matches(name, [*known], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown(
    kind: str, name: object, known: Iterable[object], error: type[UnnoiseError] = RequestError
) -> UnnoiseError:
    """Return the error for a name that is not `known`; it suggests the nearest known name."""
    names = [str(k) for k in known]
    hint = nearest(str(name), names)
    return error(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")
