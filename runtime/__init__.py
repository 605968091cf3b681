"""Sample from an unnoise bundle: numpy and one inference library, never torch."""

from .bundle import Bundle
from .errors import BackendError, BundleError, RequestError, UnnoiseError
from .loop import Cancelled, Preview
from .noise import Stream, noise
from .pictures import to_uint8
from .program import Program, run
from .request import Request
from .sampler import Inversion, Sampler
from .schedule import Schedule, make_schedule
from .solvers import make_program

__all__ = [
    "BackendError",
    "Bundle",
    "BundleError",
    "Cancelled",
    "Inversion",
    "Preview",
    "Program",
    "Request",
    "RequestError",
    "Sampler",
    "Schedule",
    "Stream",
    "UnnoiseError",
    "make_program",
    "make_schedule",
    "noise",
    "run",
    "to_uint8",
]
