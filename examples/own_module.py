"""Export a PyTorch module of your own, trained by your own loop, and sample it without PyTorch.

    python examples/own_module.py

Learns points on a ring, exports the network with its proof into ring/, and samples it.
"""

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from export import build_bundle
from export.proof.plan import QUICK
from runtime import Sampler, make_schedule

STEPS = int(os.environ.get("STEPS", "3000"))
schedule = make_schedule("cosine", T=1000)
alpha, sigma = torch.tensor(np.stack([schedule.alpha, schedule.sigma]), dtype=torch.float32)


class Ring(nn.Module):
    """Predicts v of a noisy point. x: [B, 2]; time: [B], 0 … 999."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angle = time[:, None] * (math.pi / 2000)
        return self.layers(torch.cat([x, angle.sin(), angle.cos()], 1))


torch.manual_seed(0)
net = Ring()
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
for _ in range(STEPS):
    angle = 2 * math.pi * torch.rand(256)
    x_0 = torch.stack([angle.cos(), angle.sin()], 1)
    eps = torch.randn(256, 2)
    t = torch.randint(1000, (256,))
    x_t = alpha[t, None] * x_0 + sigma[t, None] * eps
    v = alpha[t, None] * eps - sigma[t, None] * x_0
    loss = (net(x_t, t.float()) - v).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

build_bundle(
    net.eval(), Path("ring"), sample_shape=(2,), prediction="v", schedule=schedule, plan=QUICK
)
points = Sampler.load("ring").sample(500, steps=20)
radius = np.hypot(*points.T)
print(f"radius of 500 samples: {radius.mean():.2f} ± {radius.std():.2f}")
