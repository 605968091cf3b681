"""The book in docs/learn: its snippets and commands run, and print what it states."""

import contextlib
import doctest
import importlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from runtime.terminal import verbs

from .root import ROOT

LEARN = ROOT / "docs" / "learn"
CHAPTERS = sorted(LEARN.glob("[0-9]-*.md"))
PAGES = [LEARN / "README.md", *CHAPTERS]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
WORDS = range(600, 1101)
"""How long a chapter is, code and displayed formulas left out."""
MOST_BYTES = 2_500_000
"""Of all figures."""
HANGING_S = 600
"""After this time a command counts as hanging. It is not a bound on speed."""


class Block(NamedTuple):
    """A fenced block, and the output that the page states below it: none if there is none."""

    language: str
    code: str
    output: str


def _blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = list(FENCE.finditer(text))
    blocks = []
    for i, match in enumerate(found):
        after = found[i + 1] if i + 1 < len(found) else None
        follows = after and after[1] == "text" and not text[match.end() : after.start()].strip()
        blocks.append(Block(match[1], match[2], after[2] if after and follows else ""))
    return blocks


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that has what a clone has, so that the book leaves nothing in this one."""
    for name in ("runtime", "trainer", "export", "docs", "bundles"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _same(expected: str, printed: str) -> bool:
    return doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_print_what_the_page_states(page: Path, folder: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for block in _blocks(page):
        if block.language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(block.code, page.name, "exec"), names)
            assert _same(block.output, printed.getvalue()), printed.getvalue()


def _commands(page: Path) -> list[tuple[str, Block]]:
    """The commands of a page, each with its block."""
    shell = [block for block in _blocks(page) if block.language == "sh"]
    return [(command, block) for block in shell for command in block.code.splitlines()]


def _trains(page: Path) -> bool:
    return any("trainer." in command for command, _ in _commands(page))


@pytest.mark.parametrize("page", [p for p in PAGES if _trains(p)], ids=lambda page: page.stem)
def test_commands_that_train_are_parsed(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "status", lambda _: 0)  # parses and does nothing
    for command, _ in _commands(page):
        _, _, module, *words = shlex.split(command)
        assert importlib.import_module(module).main(words) == 0


def _printed(words: list[str], folder: Path) -> str:
    """Run a command and return what it prints.

    A verb of the runtime runs in this process: test_readme.py starts each of them in its own.
    """
    if words[1] == "-m" and words[2].startswith("runtime."):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert importlib.import_module(words[2]).main(words[3:]) == 0
        return printed.getvalue()
    program = [sys.executable if word == "python" else word for word in words]
    run = subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=HANGING_S)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] if _trains(p) else []) for p in PAGES],
    ids=lambda page: page.stem,
)
def test_commands_run(page: Path, folder: Path) -> None:
    for command, block in _commands(page):
        words = shlex.split(command)
        printed = _printed(words, folder)
        assert not block.output or _same(block.output, printed), printed
        if "--out" in words:
            assert Path(words[words.index("--out") + 1]).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", FENCE.sub("", page.read_text()))
    missing = [
        t for t in targets if not t.startswith("https://") and not (page.parent / t).exists()
    ]
    assert not missing


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
def test_a_chapter_is_short_and_has_code_a_command_a_figure_and_a_solution(page: Path) -> None:
    text = page.read_text()
    languages = {block.language for block in _blocks(page)}
    assert languages >= {"python", "sh"}
    assert "](figures/" in text
    assert "## Exercise" in text
    assert "<summary>Solution</summary>" in text
    prose = re.sub(r"\$\$[^$]*\$\$", "", FENCE.sub("", text))
    prose = re.sub(r"\$[^$]*\$", "x", prose)
    assert len(prose.split()) in WORDS


def test_every_figure_is_drawn_by_the_script_and_stands_in_a_chapter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(LEARN))
    spec = importlib.util.spec_from_file_location("figures", LEARN / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    linked = [
        name
        for page in CHAPTERS
        for name in re.findall(r"\]\(figures/([\w-]+)\.png\)", page.read_text())
    ]
    files = sorted((LEARN / "figures").iterdir())
    assert sorted(linked) == sorted(script.FIGURES) == [file.stem for file in files]
    assert sum(file.stat().st_size for file in files) < MOST_BYTES


MEASURED = re.compile(r"<!-- from (\S+) -->\n(.*?)<!-- /from -->", re.DOTALL)


def _cells(row: str) -> tuple[str, ...]:
    """The cells of a table's row without its first, which is only a name."""
    return tuple(cell.strip() for cell in row.strip("|").split("|")[1:])


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
def test_measured_tables_are_those_of_the_page_that_they_come_from(page: Path) -> None:
    for source, table in MEASURED.findall(page.read_text()):
        measured = {_cells(row) for row in (page.parent / source).read_text().splitlines()}
        rows = [row for row in table.splitlines() if row.startswith("|")][2:]
        assert rows
        assert {_cells(row) for row in rows} <= measured
