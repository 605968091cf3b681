"""Networks other than the U-Net with classes are exported, and proved by the same checks."""

from pathlib import Path

import pytest
import torch

from export.build import build
from export.proof.plan import QUICK
from export.sources.bundle import from_bundle
from export.sources.run import from_run
from runtime import Sampler
from trainer.config import Config
from trainer.fit import fit

BASE = {
    "data": "digits",
    "name": "made",
    "steps": 12,
    "batch": 16,
    "warmup": 2,
    "sample_every": 0,
    "device": "cpu",
}
MADE = {
    "dit": {"network": "dit", "width": 32, "depth": 1, "heads": 4, "schedule": "flow", "prediction": "flow"},
    "edm": {"channels": (8, 16), "attention": (4,), "schedule": "edm", "prediction": "edm", "labels": False, "dropout": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["dit", pytest.param("edm", marks=pytest.mark.slow)])
def test_it_is_exported_and_proved(kind: str, tmp_path: Path) -> None:
    assert fit(Config(**BASE, **MADE[kind]), tmp_path)
    model = from_run(tmp_path / "made", guidance=2.0)
    build(model, tmp_path / "bundle", plan=QUICK)
    sampler = Sampler.load(tmp_path / "bundle")
    assert sampler.sample(2, seed=0, steps=4).shape == (2, 1, 8, 8)
    assert (sampler.bundle.num_classes, sampler.bundle.can_guide) == (
        (10, True) if kind == "dit" else (0, False)
    )
    again = from_bundle(tmp_path / "bundle").module.state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.module.state_dict().items())
