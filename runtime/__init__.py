"""Sample from an unnoise bundle: numpy and one inference library, never torch."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from .bundle.bundle import Bundle
from .bundle.conditions import Condition
from .bundle.sampling import SamplingOptions
from .diffusion.noise import Stream, noise
from .diffusion.program import Program, run
from .diffusion.schedule import Schedule, make_schedule
from .diffusion.solvers import make_program
from .editing.inversion import Inversion
from .engine.batch import Batch
from .engine.loop import Cancelled, Preview
from .engine.request import Request, ResolvedRequest, resolve
from .errors import (
    BackendError,
    BundleError,
    ClosedError,
    DeadlineError,
    Overloaded,
    RequestError,
    UnnoiseError,
)
from .images import to_uint8
from .sampler import Sampler

if _TYPE_CHECKING:
    from .engine.admission import Limits
    from .engine.service import Engine
    from .engine.ticket import Ticket

__all__ = [
    "BackendError",
    "Batch",
    "Bundle",
    "BundleError",
    "Cancelled",
    "ClosedError",
    "Condition",
    "DeadlineError",
    "Engine",
    "Inversion",
    "Limits",
    "Overloaded",
    "Preview",
    "Program",
    "Request",
    "RequestError",
    "ResolvedRequest",
    "Sampler",
    "SamplingOptions",
    "Schedule",
    "Stream",
    "Ticket",
    "UnnoiseError",
    "make_program",
    "make_schedule",
    "noise",
    "resolve",
    "run",
    "to_uint8",
]

_LAZY = {"Engine": "service", "Limits": "admission", "Ticket": "ticket"}
"""Names that most programs do not need, by their module in `runtime.engine`: imported on use."""


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f".engine.{_LAZY[name]}", __name__), name)
