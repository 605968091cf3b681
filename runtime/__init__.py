"""Sample from an unnoise bundle: numpy and one inference library, never torch."""

from .bundle import Bundle
from .diffusion.noise import Stream, noise
from .diffusion.program import Program, run
from .diffusion.schedule import Schedule, make_schedule
from .diffusion.solvers import make_program
from .errors import BackendError, BundleError, RequestError, UnnoiseError
from .images import to_uint8
from .loop import Cancelled, Preview
from .request import Request
from .sampler import Inversion, Sampler

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
