"""Memory: whether a run fits, and what to say when it does not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..config import Config
from ..errors import TrainingError
from ..networks.cost import Cost
from ..parallel.processes import Processes

BYTES_OF_FLOAT = 4
OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "Storage size calculation overflowed",
)
"""Parts of what torch says when memory runs out."""
COPIES = 4
"""Of the weights: themselves, their average, and both moments of the optimizer."""


@contextmanager
def enough_memory(config: Config) -> Iterator[None]:
    """Turn what torch and NumPy raise when memory runs out into a TrainingError with the remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has no error of its own for a CPU without memory: only the text shows it.
        if not isinstance(error, MemoryError) and not any(
            word in str(error) for word in OUT_OF_MEMORY
        ):
            raise
        raise TrainingError(
            f"memory ran out ({' '.join(str(error).split())[:200] or 'MemoryError'}). Use a "
            f"smaller --batch (now {config.batch}), more --accumulate (now {config.accumulate}), "
            "a smaller network or --size, or --checkpointing."
        ) from error


def require_memory(spent: Cost, processes: Processes) -> None:
    """Check that weights, average and optimizer fit in this machine's memory.

    Otherwise the system kills the process without a message. GPUs raise an error, and FSDP splits
    the memory counted here, so neither is checked.

    Raises:
        TrainingError: They do not fit.
    """
    # Not on systems that do not say how much memory there is, such as Windows.
    if processes.device.type != "cpu" or processes.sharding or not hasattr(os, "sysconf"):
        return
    needed = spent.parameters * COPIES * BYTES_OF_FLOAT
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise TrainingError(
            f"a network of {spent.parameters / 1e6:.0f} M parameters needs at least "
            f"{needed / 2**30:.0f} GiB to train, and this machine has {there / 2**30:.0f} GiB. "
            "Use smaller --channels, "
            f"--width or --depth."
        )
