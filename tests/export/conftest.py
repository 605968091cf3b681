"""Fixtures of the exporter's tests."""

import pytest


@pytest.fixture(autouse=True)
def _quick_exports(operators_read_once: None, quickly_proved: None) -> None:
    pass
