"""What the times of runtime.bench depend on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from ..backends.survey import BackendState, Machine, machine
from ..bundle.bundle import Bundle
from .workload import Effort, Workload

BUSY = 0.5
"""The load of each core from which on the machine counts as busy."""


@dataclass(frozen=True)
class Facts:
    """The workload in short, and the machine.

    Attributes:
        calls: Of the network, for one sample.
        load_before: The system's load average before the measurement; None if it has none.
        versions: Of Python and the libraries.
    """

    bundle: str
    shape: tuple[int, ...]
    solver: str
    steps: int
    grid: str | tuple[float, ...] | None
    calls: int
    guided_calls: int
    guidance: float
    seed: int
    pictures: int
    threads: int | None
    machine: Machine
    load_before: float | None
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, object]:
        """Return the JSON value."""
        return asdict(self)

    @property
    def sampled(self) -> str:
        """Return one line that describes the workload."""
        calls = f"{self.calls} calls"
        if self.guided_calls:
            calls += f", {self.guided_calls} of them guided"
        return (
            f"{self.bundle}, {'×'.join(map(str, self.shape))}: {self.solver}, "
            f"{self.steps} steps ({calls}), "
            f"seeds {self.seed} …; PSNR of {self.pictures}"
        )

    @property
    def measured_on(self) -> str:
        """One line that says on what machine, with which versions."""
        cores = self.machine["cores"]
        threads = self.threads or 0
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        line = (
            f"{self.machine['processor']}, {cores} cores "
            f"({', '.join(self.machine['instructions'])}), "
            f"{threads} thread{'s' * (threads > 1)}; {versions}"
        )
        if self.load_before:
            line += f"; load before {self.load_before:.1f}"
            if self.load_before > BUSY * (cores or 1):
                line += ": the machine was busy"
        return line


def facts_of(
    bundle: Bundle, workload: Workload, effort: Effort, here: Mapping[str, BackendState]
) -> Facts:
    """Collect the facts, before anything is measured.

    here: What `backends.survey.backends` returned.
    """
    options = workload.options
    found = machine()
    libraries = {name: v for name, state in here.items() if (v := state["version"])}
    return Facts(
        bundle=bundle.name,
        shape=bundle.sample_shape,
        solver=options.solver,
        # A grid that is given by its times has its own number of steps.
        steps=len(options.grid or ()) if options.steps is None else options.steps,
        grid=options.grid,
        calls=len(workload.table),
        guided_calls=int(workload.table.guided.sum()),
        guidance=options.guidance,
        seed=workload.seed,
        pictures=effort.pictures,
        threads=effort.threads or found["cores"],
        machine=found,
        load_before=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        versions={
            "python": platform.python_version(),
            "numpy": np.__version__,
            **libraries,
        },
    )
