"""A small module with a condition of every kind, and its bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export import Condition, Plan, build_bundle
from runtime.bundle.bundle import Bundle
from runtime.diffusion.schedule import make_schedule

SHAPE = (1, 8, 8)
CONDITIONS = (
    Condition("low_res", (1, 8, 8), range=(-1.0, 1.0), meaning="the image, blurred", null=0.0),
    Condition("text", (3, 4), meaning="an embedding", null="learned"),
    Condition("style", (), "int64", (0, 4), meaning="a style's number"),
)
PLAN = Plan(
    batches=(1, 3),
    sizes=(2,),
    quantized_sizes=(2, 4),
    times=3,
    pictures=2,
    steps=4,
    samples=4,
    judged=2,
    ways=(("ddim", 4),),
)
NULL = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


class Net(nn.Module):
    """The image is concatenated, the embedding is attended to, and the style is added."""

    def __init__(self, classes: int = 0, fault: str = "") -> None:
        super().__init__()
        self.inner = nn.Conv2d(2, 16, 3, padding=1)
        self.keys = nn.Linear(4, 16)
        self.style = nn.Embedding(5, 16)
        self.label = nn.Embedding(classes + 1, 16) if classes else None
        self.time = nn.Linear(1, 16)
        self.outer = nn.Conv2d(16, 1, 3, padding=1)
        self.fault = fault

    def forward(self, x: Tensor, time: Tensor, *label: Tensor, **given: Tensor) -> Tensor:
        low_res, text, style = given["low_res"], given["text"], given["style"]
        if self.fault == "low_res":
            low_res = low_res.mean(0, keepdim=True).expand_as(x)
        if self.fault == "text":
            text = text[:1].expand_as(text)
        h = self.inner(torch.cat([x, low_res], 1))
        added = self.style(style) + self.time(time[:, None] / 1000)
        if self.label is not None:
            added = added + self.label(label[0])
        h = torch.nn.functional.silu(h + added[:, :, None, None])
        keys = self.keys(text)
        weights = torch.softmax(torch.einsum("bchw,bkc->bkhw", h, keys), 1)
        return self.outer(h + torch.einsum("bkhw,bkc->bchw", weights, keys))


def net(classes: int = 0, fault: str = "") -> Net:
    torch.manual_seed(0)
    return Net(classes, fault).eval().requires_grad_(False)


def described(**more: Any) -> dict[str, Any]:
    """The arguments of `build_bundle` besides the module and the folder."""
    return {
        "sample_shape": SHAPE,
        "prediction": "v",
        "schedule": make_schedule("cosine", T=20),
        "conditions": CONDITIONS,
        "nulls": {"text": NULL},
        "clip": 1.0,
        "steps": 4,
        "plan": PLAN,
        "winograd": False,
        **more,
    }


def write_conditioned(out: Path, **more: Any) -> Bundle:
    """Export the module."""
    classes = more.get("num_classes", 0)
    return build_bundle(net(classes), out, **described(**more))
