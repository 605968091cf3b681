"""Sample from an unnoise bundle: numpy and one inference library, never torch."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bundle.bundle import Bundle
    from .bundle.conditions import Condition
    from .bundle.sampling import SamplingOptions
    from .diffusion.noise import Stream, noise
    from .diffusion.program import Program, run
    from .diffusion.schedule import Schedule, make_schedule
    from .diffusion.solvers import make_program
    from .engine.admission import Limits
    from .engine.batch import Batch
    from .engine.loop import Cancelled, Preview
    from .engine.request import Request, ResolvedRequest, resolve
    from .engine.service import Engine
    from .engine.ticket import Ticket
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
    from .sampler.inversion import Inversion

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

_HOMES = {
    ".bundle.bundle": ["Bundle"],
    ".bundle.conditions": ["Condition"],
    ".bundle.sampling": ["SamplingOptions"],
    ".diffusion.noise": ["Stream", "noise"],
    ".diffusion.program": ["Program", "run"],
    ".diffusion.schedule": ["Schedule", "make_schedule"],
    ".diffusion.solvers": ["make_program"],
    ".sampler.inversion": ["Inversion"],
    ".engine.admission": ["Limits"],
    ".engine.batch": ["Batch"],
    ".engine.loop": ["Cancelled", "Preview"],
    ".engine.request": ["Request", "ResolvedRequest", "resolve"],
    ".engine.service": ["Engine"],
    ".engine.ticket": ["Ticket"],
    ".errors": [
        "BackendError",
        "BundleError",
        "ClosedError",
        "DeadlineError",
        "Overloaded",
        "RequestError",
        "UnnoiseError",
    ],
    ".images": ["to_uint8"],
    ".sampler": ["Sampler"],
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    # On first use: a program that only needs schedules or solvers pays for nothing else.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
