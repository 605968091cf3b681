"""The shards of a run on a Ray cluster. An actor of Ray Data is a worker."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ray  # type: ignore[import-not-found]
import ray.data  # type: ignore[import-not-found]
from numpy.typing import NDArray

from .environment import Environment
from .maker import Maker, OnSamples
from .settings import Settings


class ShardActor:
    """Makes the shards whose numbers it receives. Ray restarts an actor that dies."""

    def __init__(self, settings: Settings, environment: Environment) -> None:
        self._maker = Maker(settings)
        # The nodes of a cluster may differ, which the driver cannot see.
        self._maker.check(environment)

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[np.int64]]:
        """Make shards: batch["item"] [b]. Returns the number of samples of each, [b]."""
        made = [0] * len(batch["item"])
        for i, shard in enumerate(batch["item"].tolist()):
            made[i] = len(self._maker.layout.samples(shard))
            self._maker.make(shard, lambda _: None)
        return {"samples": np.array(made)}


def make_on_ray(
    settings: Settings,
    environment: Environment,
    shards: Sequence[int],
    workers: int,
    on_samples: OnSamples,
) -> None:
    """Make shards on the cluster that RAY_ADDRESS names, or on this machine.

    Args:
        environment: What every actor must have.
    """
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    # The command has a bar of its own.
    ray.data.DataContext.get_current().enable_progress_bars = False
    # The numbers come from the driver. A task that reads them would need a CPU of its own, and
    # would wait for ever if the actors hold all CPUs.
    numbers = ray.data.from_items(list(shards), override_num_blocks=len(shards))
    made = numbers.map_batches(
        ShardActor,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(shards))),
        num_cpus=settings.threads or 1,
        fn_constructor_args=(settings, environment),
    )
    for row in made.iter_rows():
        on_samples(int(row["samples"]))
