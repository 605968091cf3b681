"""A bundle before and after it was trained again: python benchmarks/retraining.py BEFORE AFTER [--write]

On the emoji: the distances of `trainer.evaluate`, the loss on training pictures and on the held-out emoji, which neither saw, and the same
seeds and labels as pictures, a row of each bundle in turn. --write refreshes docs/training.md and its picture. Ten minutes
on two cores. The bundle of an earlier commit: git archive COMMIT bundles/emoji32 | tar -x -C out/before
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from figures import fill, machine, markdown

from export.from_bundle import from_bundle
from runtime import Sampler
from runtime.pictures import from_uint8, save, tile
from trainer.config import Config
from trainer.data import Pictures, emoji, held_out
from trainer.evaluate import Judge
from trainer.forward import ForwardProcess

SOLVER, STEPS, DRAWS = "unipc", 12, 8
ROWS = 3
"""Pictures of each label on the sheet."""


def unseen() -> Pictures:
    everything = emoji("all")
    kept = np.repeat(held_out(len(everything.images) // 2), 2)
    return dataclasses.replace(everything, images=everything.images[kept], labels=everything.labels[kept])


@torch.inference_mode()
def loss(folder: Path, pictures: Pictures) -> tuple[float, float]:
    """The mean of the network's squared error over levels that cover the schedule evenly, DRAWS for each picture, and its standard error
    over pictures; the same noise for every bundle."""
    model = from_bundle(folder)
    process = ForwardProcess(model.schedule, model.prediction)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for at in np.array_split(np.arange(len(pictures.images)), max(1, len(pictures.images) // 64)):
        x0, label = torch.from_numpy(from_uint8(pictures.images[at])), torch.from_numpy(pictures.labels[at])
        each = []
        for _ in range(DRAWS):
            place = (torch.randperm(len(at), generator=generator) + torch.rand(len(at), generator=generator)) / len(at)
            t = (place * len(model.schedule)).long()
            eps = torch.randn(x0.shape, generator=generator)
            answer = model.module(process.network_input(process.jump(x0, t, eps), t), process.time[t], label)
            each.append((answer - process.target(x0, t, eps)).square().flatten(1).mean(1))
        errors.append(torch.stack(each).mean(0))
    found = torch.cat(errors).double()
    return found.mean().item(), found.std().item() / len(found) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--write", action="store_true", help="refresh docs/training.md and docs/retraining.png")
    given = parser.parse_args()
    samplers = {name: Sampler.load(getattr(given, name)) for name in ("before", "after")}
    bundle = samplers["after"].bundle
    config = Config.from_json(bundle.provenance["config"])
    trained = emoji(config.split)
    judge = Judge(config, trained, None, torch.device("cpu"))
    few = dataclasses.replace(trained, images=trained.images[::9], labels=trained.labels[::9])
    rows = []
    for name, sampler in samplers.items():
        losses = [
            f"{mean:.4f} ± {error:.4f}" for mean, error in (loss(getattr(given, name), p) for p in (few, unseen()))
        ]
        for guidance in (1.0, bundle.defaults.guidance):
            found = judge(
                lambda n, seed, label, sampler=sampler, guidance=guidance: sampler.pictures(
                    n, seed=seed, label=label.tolist(), guidance=guidance, solver=SOLVER, steps=STEPS
                )
            )
            distances = [f"{found['frechet']:.2f}", *(f"{found[k]:.3f}" for k in ("kernel", "precision", "recall"))]
            rows.append([name, f"{guidance:g}", *distances, *losses])
            print(rows[-1], flush=True)
    head = ["bundle", "guidance", "Fréchet", "kernel", "precision", "recall", "loss, training", "loss, held out"]
    text = (
        f"{markdown(head, rows)}\n\n{len(judge.labels)} samples against as many training pictures, `{SOLVER}` with {STEPS} steps; the loss on "
        f"{len(few.images)} training pictures and {len(unseen().images)} held-out ones, {DRAWS} noise levels each. "
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
