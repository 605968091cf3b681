"""The style figures of the packages stay within limits; `python tests/style.py` lists every
place."""

from pathlib import Path

import pytest

from .style import LONGEST_FILE, PACKAGES, Figures, files, measure


@pytest.fixture(scope="module", params=PACKAGES)
def figures(request: pytest.FixtureRequest) -> Figures:
    return measure(files(request.param))


def test_values_are_typed(figures: Figures) -> None:
    assert figures.any_per_1000 <= 8


def test_a_statement_binds_one_thing(figures: Figures) -> None:
    assert figures.packed_percent < 3


def test_lines_and_functions_are_short(figures: Figures) -> None:
    assert figures.long_lines == []
    assert figures.long_functions == []


def test_comments_say_why(figures: Figures) -> None:
    assert 3 <= figures.comment_percent <= 6


def test_public_functions_state_the_shapes_of_their_arrays(figures: Figures) -> None:
    assert figures.shapeless == []


def test_files_are_short() -> None:
    """At most three files over 300 lines in all packages together."""
    long = [place for package in PACKAGES for place in measure(files(package)).long_files]
    assert len(long) <= 3, long


def test_the_script_finds_what_it_looks_for(tmp_path: Path) -> None:
    source = tmp_path / "bad.py"
    body = "\n".join(f"    x{i} = {i}" for i in range(60))
    source.write_text(
        f"from typing import Any\n\n\ndef area(x: NDArray, **how: Any):\n"
        f'    """Do things."""\n    # A reason.\n    y = 1  # noqa: F841\n'
        f"    a, b = x, how()\n    c, d = 1, 2\n{body}\n# {'long ' * 30}\n" + "\n" * LONGEST_FILE
    )
    found = measure([source])
    assert found.any_uses == 1
    assert found.comments == 2
    assert found.packed == ["bad.py:8"]
    assert len(found.long_lines) == 1
    assert [place.split()[1] for place in found.long_functions] == ["area"]
    assert len(found.long_files) == 1
    assert found.shapeless == ["bad.py:4 area"]
