"""Fixtures of the service's tests."""

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from runtime import Sampler

from .services import client_of, gate_of, small_sampler


@pytest.fixture(scope="session")
def _small(tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    return small_sampler(tmp_path_factory.mktemp("served"))


@pytest.fixture
def small(_small: Sampler) -> Iterator[Sampler]:
    """The small bundle; its gate is open at the start and at the end."""
    gate_of(_small).open()
    yield _small
    gate_of(_small).open()


@pytest.fixture
def client(small: Sampler) -> Iterator[TestClient]:
    """A client of a service of the small bundle."""
    with client_of([small]) as found:
        yield found
