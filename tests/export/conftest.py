"""Fixtures of the exporter's tests."""

import functools
from collections.abc import Iterator
from unittest import mock

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry


@pytest.fixture(scope="session", autouse=True)
def operators_read_once() -> Iterator[None]:
    """Have torch's exporter build its table of operators once, not for every graph.

    The table depends on the opset alone. Building it takes a second, most of what a small network
    needs.
    """
    read = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
    with mock.patch.object(ONNXRegistry, "from_torchlib", read):
        yield
