"""How good the samples are: python -m trainer.evaluate RUN_OR_BUNDLE. Distances from the data by
features, see `trainer.quality.distances`.

The numbers of a run and of the bundle made from it may be compared, and those of runs on the same
data; with the features of the classifier that is trained here they are not those of the literature,
which are Inception's.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.bundle import MANIFEST
from runtime.errors import RequestError, status
from runtime.files import to_json, write_text

from .config import Config
from .data import dataset as data
from .data.dataset import Source
from .errors import CheckpointError
from .processes import join
from .quality.distances import NEIGHBOURS, compare
from .quality.features import features_of, read_some
from .runs import checkpoint as checkpoints
from .runs.folder import read_run
from .step import Trainer

Sample = Callable[[int, int, NDArray[np.int64]], NDArray[np.uint8]]
"""sample(n, seed, label [n]) → pictures [n, H, W, C]."""


def require_comparable(config: Config, source: Source) -> None:
    """Before training. Raises RequestError where a `Judge` would have nothing to judge by: too few
    pictures, or no file of features."""
    require_enough(min(config.quality_samples, len(source.labels)))
    if config.features and not Path(config.features).is_file():
        raise RequestError(f"--features {config.features}: there is no such file.")


def require_enough(count: int) -> None:
    if count <= NEIGHBOURS:
        raise RequestError(
            f"{count} pictures are too few to compare with: more than {NEIGHBOURS} are needed."
        )


class Judge:
    """Pictures of the data, chosen once, and their features; calling it with a sampler gives
    frechet, kernel, precision, recall."""

    def __init__(
        self, config: Config, source: Source, folder: Path | None, device: torch.device
    ) -> None:
        self.config = config
        self.features = features_of(config, source, folder, device)
        order = np.random.Generator(np.random.Philox(key=[0, 1])).permutation(len(source.labels))
        chosen = order[: config.quality_samples]
        self.labels = source.labels[chosen]
        self.real = self.features(read_some(source, chosen))
        require_enough(len(self.real))  # those that cannot be read are left out

    def __call__(self, sample: Sample) -> dict[str, float]:
        return compare(self.real, self.features_of(sample))

    def features_of(self, sample: Sample) -> NDArray[np.float32]:
        """Of samples that have the labels of the pictures, and seeds 0, 1, 2, …"""
        size = self.config.quality_batch
        made = []
        for i in range(0, len(self.labels), size):
            labels = self.labels[i : i + size]
            made.append(self.features(sample(len(labels), i, labels)))
        return np.concatenate(made)


def of_run(run: Path, best: bool, device: str, **changes: Any) -> dict[str, Any]:
    """Of a run's newest checkpoint, or its best. Raises CheckpointError where it has none."""
    config, _ = read_run(run)
    config = dataclasses.replace(config, device=device, precision="fp32", **changes)
    source = data.load(config)
    trainer = Trainer(config, source)
    checkpoint = checkpoints.newest(run / ("best" if best else "checkpoints"))
    if checkpoint is None:
        raise CheckpointError(f"{run} has no {'best ' if best else ''}checkpoint yet.")
    trainer.resume(checkpoint)
    found = Judge(config, source, run, trainer.device)(
        lambda n, seed, label: trainer.sample(n, seed=seed, label=label)
    )
    return {"of": str(run), "step": checkpoint.step, "samples": config.quality_samples, **found}


def of_bundle(folder: Path, guidance: float | None, device: str, **changes: Any) -> dict[str, Any]:
    """Of a bundle made from a run, whose data must be here. Raises RequestError for a bundle from
    elsewhere."""
    from runtime.sampler import Sampler

    sampler = Sampler.load(folder)
    record = sampler.bundle.provenance.get("config")
    if not isinstance(record, Mapping):
        raise RequestError(
            f"{folder} did not come from a run of trainer.fit: nothing says what data it is to be "
            f"held against."
        )
    config = dataclasses.replace(Config.from_json(record), **changes)
    source = data.load(config)
    labelled = bool(sampler.bundle.num_classes)

    def sample(n: int, seed: int, label: NDArray[np.int64]) -> NDArray[np.uint8]:
        how: dict[str, Any] = (
            {"label": label.tolist(), "guidance": guidance or 1.0} if labelled else {}
        )
        return sampler.pictures(
            n, seed=seed, solver=config.sample_solver, steps=config.sample_steps, **how
        )

    found = Judge(config, source, None, join(device).device)(sample)
    return {"of": str(folder), "samples": config.quality_samples, **found}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate", description=__doc__)
    parser.add_argument("what", type=Path, metavar="RUN_OR_BUNDLE")
    parser.add_argument(
        "--n", type=int, help="samples, and pictures of the data [the run's quality-samples]"
    )
    parser.add_argument("--solver", help="[the run's sample-solver]")
    parser.add_argument("--steps", type=int, help="[the run's sample-steps]")
    parser.add_argument("--guidance", type=float, help="of a bundle [none]")
    parser.add_argument(
        "--best", action="store_true", help="a run's best checkpoint in place of its newest"
    )
    parser.add_argument("--features", help="a TorchScript file of Inception [the run's]")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda [auto]")
    given = parser.parse_args(arguments)
    named = {
        "quality_samples": given.n,
        "sample_solver": given.solver,
        "sample_steps": given.steps,
        "features": given.features,
    }
    changes = {k: v for k, v in named.items() if v is not None}

    def action() -> int:
        if (given.what / MANIFEST).is_file():
            found = of_bundle(given.what, given.guidance, given.device, **changes)
        elif given.guidance is not None:
            raise RequestError("--guidance is for bundles: a run is sampled without.")
        else:
            found = of_run(given.what, given.best, given.device, **changes)
            write_text(given.what / "evaluation.json", to_json(found))
        print(to_json(found), end="")
        return 0

    return status(action)


if __name__ == "__main__":
    sys.exit(main())
