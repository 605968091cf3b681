"""Fixtures of the trainer's tests."""

from collections.abc import Iterator
from unittest import mock

import pytest

from runtime.bundle.conditions import Condition
from trainer.config import Config
from trainer.networks.cost import Cost
from trainer.training import run

NETWORK = ("network", "patch", "width", "depth", "heads", "channels", "blocks", "attention")
"""The options that decide the size of a network."""


@pytest.fixture(autouse=True)
def _quick_exports(operators_read_once: None, quickly_proved: None) -> None:
    pass


@pytest.fixture(scope="session", autouse=True)
def _counted_once() -> Iterator[None]:
    """Have runs of the same network count its operations once: a quarter of a short run."""
    count = run.cost
    counted: dict[tuple[object, ...], Cost] = {}

    def cost(
        config: Config,
        sample_shape: tuple[int, int, int],
        num_classes: int,
        conditions: tuple[Condition, ...] = (),
    ) -> Cost:
        key = (*(getattr(config, name) for name in NETWORK), sample_shape, num_classes, conditions)
        if key not in counted:
            counted[key] = count(config, sample_shape, num_classes, conditions)
        return counted[key]

    with mock.patch.object(run, "cost", cost):
        yield
