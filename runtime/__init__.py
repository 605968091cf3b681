"""Sample from an unnoise bundle: numpy and one inference library, never torch."""

from .batch import Batch
from .bundle import Bundle
from .diffusion.noise import Stream, noise
from .diffusion.program import Program, run
from .diffusion.schedule import Schedule, make_schedule
from .diffusion.solvers import make_program
from .errors import BackendError, BundleError, RequestError, UnnoiseError
from .images import to_uint8
from .loop import Cancelled, Preview
from .request import Request, ResolvedRequest, resolve
from .sampler import Inversion, Sampler
from .spec import SamplingOptions

__all__ = [
    "BackendError",
    "Batch",
    "Bundle",
    "BundleError",
    "Cancelled",
    "Inversion",
    "Preview",
    "Program",
    "Request",
    "RequestError",
    "ResolvedRequest",
    "Sampler",
    "SamplingOptions",
    "Schedule",
    "Stream",
    "UnnoiseError",
    "make_program",
    "make_schedule",
    "noise",
    "resolve",
    "run",
    "to_uint8",
]
