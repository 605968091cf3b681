"""runtime.terminal.options: what the commands' options mean."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

import runtime.terminal.options
from runtime import Sampler
from runtime.engine.loop import Preview
from runtime.terminal.options import assignment, condition, progress
from runtime.terminal.progress import Progress


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("corrector=false", False),
        ("corrector=False", False),
        ("corrector=True", True),
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


@pytest.mark.parametrize(
    ("passes", "bars"),
    [
        # Batches of one step.
        ([1, 1, 1], [(1, 1)] * 3),
        # An inversion of one row up and two back.
        ([1, 2], [(1, 1), (2, 2)]),
        ([3, 2], [(3, 3), (2, 2)]),
    ],
)
def test_each_pass_has_a_bar_of_its_own(
    monkeypatch: pytest.MonkeyPatch, passes: list[int], bars: list[tuple[int, int]]
) -> None:
    made: list[Progress] = []

    def bar(title: str, total: int) -> Progress:
        made.append(Progress(title, total))
        return made[-1]

    monkeypatch.setattr(runtime.terminal.options, "Progress", bar)
    sampler = cast(Sampler, SimpleNamespace(whole=False))
    nothing = np.zeros((1, 1))
    with progress("sampling", sampler) as on_step:
        assert on_step is not None
        for steps in passes:
            for step in range(1, steps + 1):
                on_step(Preview(np.arange(1), step, steps, nothing, nothing))
    assert [(b.done, b.total) for b in made] == bars


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': (",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000000000000,)}",
    ],
)
def test_a_damaged_array_of_a_condition_is_named(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    text = header.ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    with pytest.raises(argparse.ArgumentTypeError, match=r"a\.npy cannot be read"):
        condition(f"low_res={path}")


def test_an_archive_of_arrays_is_no_array(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.savez(file, a=np.zeros(3))
    with pytest.raises(argparse.ArgumentTypeError, match="it is an archive of arrays"):
        condition(f"low_res={tmp_path / 'a.npy'}")


def test_brackets_without_an_end_are_a_path() -> None:
    assert condition("low_res=" + "[" * 100_000) == ("low_res", "[" * 100_000)
