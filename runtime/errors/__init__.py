"""The errors that unnoise raises. A message names the thing, the rule, the value and the remedy."""

import difflib
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


def unknown(
    kind: str, name: object, known: Iterable[object], error: type[UnnoiseError] = RequestError
) -> UnnoiseError:
    """Return the error for a name that is not `known`; it suggests the nearest known name."""
    names = [str(k) for k in known]
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return error(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")
