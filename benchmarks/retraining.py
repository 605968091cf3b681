"""A bundle before and after retraining: python benchmarks/retraining.py BEFORE AFTER [--write]

On the emoji, it compares the distances of `trainer.evaluate` and the loss on training images. It
also compares the loss on the held-out emoji, which neither network saw. A sheet shows the same
seeds and labels, with rows of the two bundles in turn.
--write refreshes docs/training.md and its sheet. Takes ten minutes on two cores. The bundle of an
earlier commit: git archive COMMIT bundles/emoji32 | tar -x -C out/before
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import fill, machine, markdown
from numpy.typing import NDArray

from export.sources.bundle import from_bundle
from runtime import Sampler
from runtime.images import from_uint8, save, tile
from trainer.config import Config
from trainer.data.builtin import emoji, held_out
from trainer.data.memory import Pictures
from trainer.objectives.denoising import draw_knots
from trainer.objectives.forward import ForwardProcess
from trainer.quality.distances import compare, frechet
from trainer.quality.judge import Judge

SOLVER, STEPS, DRAWS = "unipc", 12, 8
ROWS = 3
"""Images of each label on the sheet."""
Features = NDArray[np.float32]


def unseen() -> Pictures:
    everything = emoji("all")
    kept = np.repeat(held_out(len(everything.images) // 2), 2)
    return dataclasses.replace(
        everything, images=everything.images[kept], labels=everything.labels[kept]
    )


@torch.inference_mode()
def losses(folder: Path, pictures: Pictures) -> NDArray[np.float64]:
    """[N]: the network's mean squared error on each image, over DRAWS levels, spread evenly within
    a batch; the same noise for every bundle."""
    model = from_bundle(folder)
    process = ForwardProcess(model.schedule, model.prediction)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for at in np.array_split(np.arange(len(pictures.images)), max(1, len(pictures.images) // 64)):
        x0, label = (
            torch.from_numpy(from_uint8(pictures.images[at])),
            torch.from_numpy(pictures.labels[at]),
        )
        each = []
        for _ in range(DRAWS):
            t = draw_knots(Config(batch=len(at), T=len(model.schedule)), model.schedule, generator)
            eps = torch.randn(x0.shape, generator=generator)
            answer = model.module(
                process.network_input(process.jump(x0, t, eps), t), process.time[t], label
            )
            each.append((answer - process.target(x0, t, eps)).square().flatten(1).mean(1))
        errors.append(torch.stack(each).mean(0))
    return torch.cat(errors).double().numpy()


def mean(values: NDArray[np.float64]) -> str:
    return f"{values.mean():+.4f} ± {values.std(ddof=1) / len(values) ** 0.5:.4f}"


def nearer(real: Features, before: Features, after: Features, draws: int = 100) -> str:
    """By how much the Fréchet distance has changed, and its standard error: over samples drawn with
    replacement, both bundles' alike (Efron 1979)."""
    rng, n = np.random.default_rng(0), len(before)

    def change(at: Any = slice(None)) -> float:
        return frechet(real, after[at]) - frechet(real, before[at])

    return f"{change():+.2f} ± {np.std([change(rng.integers(0, n, n)) for _ in range(draws)]):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--write", action="store_true", help="refresh docs/training.md and docs/retraining.png"
    )
    given = parser.parse_args()
    samplers = {name: Sampler.load(getattr(given, name)) for name in ("before", "after")}
    bundle = samplers["after"].bundle
    config = Config.from_json(bundle.provenance["config"])
    trained = emoji(config.split)
    judge = Judge(config, trained, None, torch.device("cpu"))
    few = dataclasses.replace(trained, images=trained.images[::9], labels=trained.labels[::9])
    guidances, rows = (1.0, bundle.defaults.guidance), []
    apart = {name: [losses(getattr(given, name), p) for p in (few, unseen())] for name in samplers}
    made: dict[tuple[str, float], Features] = {}
    for name, sampler in samplers.items():
        for guidance in guidances:

            def sample(
                n: int, seed: int, label: Any, sampler: Any = sampler, guidance: float = guidance
            ) -> Any:
                return sampler.pictures(
                    n,
                    seed=seed,
                    label=label.tolist(),
                    guidance=guidance,
                    solver=SOLVER,
                    steps=STEPS,
                )

            made[name, guidance] = judge.features_of(sample)
            found = compare(judge.real, made[name, guidance])
            distances = [
                f"{found['frechet']:.2f}",
                *(f"{found[k]:.3f}" for k in ("kernel", "precision", "recall")),
            ]
            rows.append(
                [
                    name,
                    f"{guidance:g}",
                    *distances,
                    *(f"{values.mean():.4f}" for values in apart[name]),
                ]
            )
            print(rows[-1], flush=True)
    changes = [nearer(judge.real, made["before", g], made["after", g]) for g in guidances]
    seen, held = (mean(a - b) for b, a in zip(apart["before"], apart["after"], strict=True))
    head = [
        "bundle",
        "guidance",
        "Fréchet",
        "kernel",
        "precision",
        "recall",
        "loss, training",
        "loss, held out",
    ]
    text = (
        f"{markdown(head, rows)}\n\nThe loss changed by {seen} on {len(few.images)} training images and by {held} "
        f"on {len(unseen().images)} held-out ones, with {DRAWS} noise levels each. The Fréchet "
        f"distance changed by {changes[0]} without guidance and by {changes[1]} with it (standard "
        f"errors over samples): {len(judge.labels)} samples against as many training images, "
        f"`{SOLVER}` with {STEPS} steps. "
        f"Measured by `benchmarks/retraining.py` on {machine()}."
    )
    print(text)
    count = bundle.num_classes
    labels = list(range(count))
    strips = [
        sampler.pictures(count, seed=1000 * row, label=labels, solver=SOLVER, steps=STEPS)
        for row in range(ROWS)
        for sampler in samplers.values()
    ]
    docs = Path("docs") if given.write else Path("out")
    save(docs / "retraining.png", tile(np.concatenate(strips), count), 1200)
    if given.write:
        fill(docs / "training.md", "retraining", text)


if __name__ == "__main__":
    main()
