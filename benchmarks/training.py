"""Images per second of one training step: ours, two other trainers', and our network alone.

    python benchmarks/training.py --write      (fills docs/training.md)

The other steps are those of diffusers' `train_unconditional.py` (its UNet2DModel, scheduler, EMA
and data loading) and of lucidrains' denoising-diffusion-pytorch (its Unet, GaussianDiffusion and
Trainer). Their networks have three resolutions, attention at the last, and the width whose
operations are nearest to ours. Both sides train on the same batch in float32, with images in
memory, in turn in one run. "the network alone" is forward, backward, clipping and optimizer on
existing tensors: the rest is overhead. Needs what `make .venv/.bench` installs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from figures import ROUNDS, fill, machine, ratio
from systems import denoising_diffusion_pytorch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from runtime.terminal.progress import Progress
from trainer.config import Config
from trainer.data.builtin import emoji
from trainer.data.memory import Pictures
from trainer.networks.cost import cost
from trainer.objectives.forward import ForwardProcess
from trainer.training.step import Trainer

Step = Callable[[], object]


class Picturewise(Dataset[Tensor]):
    """Images made into tensors one by one, as torchvision's ToTensor and Normalize do; half of them
    mirrored."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        x = torch.from_numpy(self.images[i]).permute(2, 0, 1).contiguous().float().div(255)
        x = x.flip(2) if torch.rand(()) < 0.5 else x
        return (x - 0.5) / 0.5


def endless(images: np.ndarray, batch: int) -> Iterator[Tensor]:
    loader = DataLoader(Picturewise(images), batch_size=batch, shuffle=True, drop_last=True)
    while True:
        yield from loader


def ours(config: Config, source: Pictures) -> Step:
    return Trainer(config, source).train_step


def network_alone(config: Config, source: Pictures) -> Step:
    """Forward, backward, clipping, optimizer; the inputs of a step already exist."""
    trainer = Trainer(config, source)
    draws = trainer.draw(0)
    network = trainer.state.network
    optimizer = trainer.state.optimizer
    process = ForwardProcess(trainer.schedule, config.prediction)
    x = process.jump(draws.x0, draws.t, draws.eps).contiguous(memory_format=torch.channels_last)
    time = process.time[draws.t]
    target = process.target(draws.x0, draws.t, draws.eps)

    def step() -> None:
        F.mse_loss(network(x, time, draws.label), target).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def diffusers_step(config: Config, source: Pictures, flops: int) -> tuple[Step, int]:
    """One pass through the loop of examples/unconditional_image_generation/train_unconditional.py;
    and its network's operations."""
    import diffusers
    from diffusers.training_utils import EMAModel

    def made(width: int) -> nn.Module:
        return diffusers.UNet2DModel(
            sample_size=source.sample_shape[1],
            in_channels=source.sample_shape[0],
            out_channels=source.sample_shape[0],
            layers_per_block=1,
            block_out_channels=(width, 2 * width, 4 * width),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        )

    network, found = _same_cost(made, 4, source, flops)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, (0.95, 0.999), weight_decay=1e-6)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100_000)
    ema: Any = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True)
    batches = endless(source.images, config.batch)

    def step() -> float:
        clean = next(batches)
        noise = torch.randn(clean.shape)
        t = torch.randint(0, 1000, (len(clean),))
        loss = F.mse_loss(network(scheduler.add_noise(clean, noise, t), t).sample, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        return loss.detach().item()

    return step, found


def lucidrains_step(config: Config, source: Pictures, flops: int) -> tuple[Step, int]:
    """One step of denoising-diffusion-pytorch's own Trainer around its own Unet and
    GaussianDiffusion; and its network's operations.

    Its images are taken from memory, in this process, in place of its folder; it draws no bar.
    """
    theirs = denoising_diffusion_pytorch()
    network, found = _same_cost(
        lambda width: theirs.Unet(width, dim_mults=(1, 2, 4)), 2, source, flops
    )
    diffusion = theirs.GaussianDiffusion(
        network, image_size=source.sample_shape[1], auto_normalize=False
    )
    theirs.Dataset, theirs.cpu_count = lambda *_, **__: Picturewise(source.images), lambda: 0
    theirs.tqdm = mock.MagicMock()
    made = {"train_batch_size": config.batch, "calculate_fid": False, "results_folder": "out"}
    trainer = theirs.Trainer(diffusion, "", **made)
    trainer.accelerator.print = lambda *_: None

    def step() -> None:
        trainer.train_num_steps = trainer.step + 1
        trainer.train()

    return step, found


def _same_cost(
    make: Callable[[int], nn.Module], apart: int, source: Pictures, flops: int
) -> tuple[Any, int]:
    """make(width) of the width whose operations are nearest to `flops`, with widths in steps of
    `apart`; and their number.
    """

    def made(width: int) -> tuple[Any, int]:
        network = make(width)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, *source.sample_shape), torch.zeros(1, dtype=torch.int64))
        return network, counter.get_total_flops()

    return min(
        (made(width) for width in range(16, 64, apart)), key=lambda pair: abs(pair[1] - flops)
    )


def measure(batch: int) -> str:
    source = emoji()
    config = Config(batch=batch, device="cpu", precision="fp32")
    flops = cost(config, source.sample_shape, len(source.classes)).flops
    others = {
        "diffusers' train_unconditional.py": diffusers_step(config, source, flops),
        "lucidrains' Trainer": lucidrains_step(config, source, flops),
        "the network alone": (network_alone(config, source), flops),
    }
    rows = []
    with Progress("training steps", ROUNDS * len(others)) as bar:
        for name, (other, count) in others.items():
            found = ratio(ours(config, source), other, 2, bar)
            rows.append(
                f"| ours / {name} | {found['ratio']:.3f} ({found['quartile_low']:.3f} … "
                f"{found['quartile_high']:.3f}) "
                f"| {1e3 * batch / found['a_ms']:.1f} / {1e3 * batch / found['b_ms']:.1f} "
                f"| {flops / 1e9:.3f} / {count / 1e9:.3f} |"
            )
    head = "| time of a step, float32 | ratio (quartiles) | images/s | GFLOP per image, forward |\n|---|---|---|---|"
    how = f"Batch {batch}, {ROUNDS} rounds of 2 interleaved steps each"
    said = f"Measured by `benchmarks/training.py` on {machine()}, torch {torch.__version__}. {how}."
    return "\n".join([head, *rows, "", said])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/training.py", description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--write", action="store_true", help="put the figures into docs/training.md"
    )
    given = parser.parse_args()
    text = measure(given.batch)
    print(text)
    if given.write:
        fill(Path("docs/training.md"), "steps", text)


if __name__ == "__main__":
    main()
