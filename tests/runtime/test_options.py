"""runtime.options: what the commands' options mean."""

import argparse

import pytest

from runtime.options import assignment


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("corrector=false", False),
        ("order=2", 2),
        ("eta=0.5", 0.5),
        ("eta=.5", 0.5),
        ("times=[999, 0]", [999, 0]),
        ("variance=fixed_large", "fixed_large"),
        ("note=a=b", "a=b"),
    ],
)
def test_a_value_is_json_or_a_number_or_text(text: str, value: object) -> None:
    name, parsed = assignment(text)
    assert name == text.partition("=")[0]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", ["eta", "=1", ""])
def test_what_is_no_assignment_says_its_form(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be NAME=VALUE"):
        assignment(text)
