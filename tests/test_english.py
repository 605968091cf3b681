"""The README, the docs and the texts of the packages are plain English; the README is short."""

import re
from pathlib import Path

import pytest

from .english import (
    BANNED,
    Passage,
    check,
    markdown,
    packages,
    pages,
    passages,
    python,
    sentences,
    words,
)
from .root import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DIALECT = (
    "The network is told the time.",
    "The outputs are held against PyTorch's.",
    "They are equal to the bit.",
    "The order is drawn anew.",
    "The same command goes on to the same weights.",
    "Whatever ended it, it resumes.",
    "What has no equal here is refused by name.",
    "The sides are 1e-4 apart.",
    "It costs 64 ms a picture.",
    "It stands beside its reason.",
    "Where that is too far, nothing is written.",
    "Tell the person.",
    "Precision int8 cannot be had on openvino.",
    "It has a scale an output channel.",
)
HONEST = (
    "Where does a change go?",
    "Labels are chosen by name or number.",
    "All but the last row differ, apart from rounding.",
    "The answer of the service is JSON.",
    "A file is written to a temporary sibling.",
    "It takes 64 ms per image.",
    "There is no file of this name.",
    "See Ho et al. 2020, eq. 7.",
    "The sample has a label and a guidance scale.",
)


def test_the_docs_have_no_word_of_the_dialect_and_few_long_sentences() -> None:
    report = check(passage for page in pages() for passage in markdown(page))
    assert report.banned == []
    assert report.sentences > 1000
    assert report.long_percent < 5, "\n".join(report.long)


@pytest.mark.parametrize("package", packages(), ids=lambda package: package.name)
def test_comments_docstrings_help_and_messages_have_no_word_of_the_dialect_and_few_long_sentences(
    package: Path,
) -> None:
    report = check(passages(package))
    assert report.banned == []
    assert report.sentences > 0
    assert report.long_percent < 5, "\n".join(report.long)


def test_an_argument_name_is_not_a_message_and_an_option_is_not_a_word(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text('raise refused("picture", "a path", x)\n')
    assert [passage.text for passage in python(file)] == ["a path"]
    assert check([Passage("here:1", "Pass --pictures N.")]).banned == []


def test_the_readme_has_the_length_of_a_first_screen() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    text = re.sub(r"<!--.*?-->", "", README)
    assert 900 <= len(words(text)) <= 1100
    assert next(i for i, line in enumerate(lines, 1) if "pip install" in line) < 25
    assert lines.index("```python") + 1 < 35
    assert {"make demo", "make test"} <= set(lines[:35])


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_lines_have_at_most_100_columns_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    # A table, a command, a formula, or a block that a script writes is one line, however long.
    exempt = r"```.*?```|\$\$.*?\$\$|<!-- (\S+) -->.*?<!-- /\1 -->"
    prose = re.sub(exempt, "", text, flags=re.DOTALL)
    long = [line for line in prose.splitlines() if len(line) > 100]
    assert [line for line in long if not line.startswith(("|", "!["))] == []
    for target in re.findall(r"\]\(([^)#\s]+)", prose):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", prose):
        linked = (page.parent / target) if target else page
        assert anchor in _anchors(linked), f"{target}#{anchor}"


@pytest.mark.parametrize("sentence", DIALECT)
def test_the_dialect_is_found(sentence: str) -> None:
    assert check([Passage("here:1", sentence)]).banned


@pytest.mark.parametrize("sentence", HONEST)
def test_honest_english_passes(sentence: str) -> None:
    assert check([Passage("here:1", sentence)]).banned == []


def test_sentences_end_at_full_stops_and_not_at_abbreviations() -> None:
    assert sentences("See Ho et al. 2020, eq. 7. It holds.") == [
        "See Ho et al. 2020, eq. 7.",
        "It holds.",
    ]
    assert len(words("Numbers 1.5 count, and – does not")) == 6


def test_comments_docstrings_help_and_messages_of_python_are_passages(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(
        '"""The module."""\n'
        "def f(x):\n"
        '    """Do it.\n\n    Args:\n        x: A number.\n    """\n'
        '    parser.add_argument("--n", help="how " "many")\n'
        '    raise ValueError(f"`x` must be 1, got {x}." + " Pass 1.")\n'
        "    # The reason\n    # goes on.\n"
        "    return x  # Another.\n    # noqa: this is for a tool\n"
    )
    assert {passage.text for passage in python(file)} == {
        "The module.",
        "Do it.",
        "A number.",
        "how many",
        "`x` must be 1, got `code`. Pass 1.",
        "The reason goes on.",
        "Another.",
    }


def test_every_pattern_says_what_to_write() -> None:
    assert all(instead for instead in BANNED.values())


def test_troubleshooting_quotes_messages_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    assert len(quoted) > 30
    code = "".join(
        path.read_text(encoding="utf-8")
        for package in ("runtime", "trainer", "export")
        for path in sorted((ROOT / package).rglob("*.py"))
    )
    # A message may be split over adjacent literals.
    joined = re.sub(r'"\s*\n\s*f?"', "", code)
    assert [words for words in quoted if words not in joined] == []


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
