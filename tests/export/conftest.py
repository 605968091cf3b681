"""Fixtures of the exporter's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from export.proof import documents

from ..traces import operators_read_once


@pytest.fixture(scope="session", autouse=True)
def _operators_read_once() -> Iterator[None]:
    with operators_read_once():
        yield


@pytest.fixture(autouse=True)
def _no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an export within a test leave out the figure, a third of the work on a small network.

    Bundles of fixtures that live longer than a test have theirs, and tests look at those.
    """

    def blank(path: Path, *_: object) -> None:
        Image.new("L", (1, 1)).save(path)

    monkeypatch.setattr(documents, "draw", blank)
