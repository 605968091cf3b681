"""Sample from an unnoise bundle: numpy and one inference library, never torch."""

from .bundle.bundle import Bundle
from .bundle.sampling import SamplingOptions
from .diffusion.noise import Stream, noise
from .diffusion.program import Program, run
from .diffusion.schedule import Schedule, make_schedule
from .diffusion.solvers import make_program
from .editing.inversion import Inversion
from .engine.batch import Batch
from .engine.loop import Cancelled, Preview
from .engine.request import Request, ResolvedRequest, resolve
from .errors import BackendError, BundleError, RequestError, UnnoiseError
from .images import to_uint8
from .sampler import Sampler

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
