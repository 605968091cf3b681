"""Find words and sentences that break the style of our English: python tests/english.py [PATH …]

A path is a Markdown file, a Python file, or a folder of both. Without one, the README, the docs and
the packages are read, and a line of figures is printed for each.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("runtime", "export", "trainer", "serve", "benchmarks", "tests")
NOT_OURS_TO_CHANGE = "fixtures"
"""A folder of tests: files that an earlier release wrote."""
LONGEST_SENTENCE = 25
"""Words."""
PER = "image picture call step sample core second channel row batch label class epoch value number"
BANNED = {
    # The dialect's verbs.
    r"\btold\b|\btells? (the|a|its) network\b": "conditioned on, given, passed",
    r"\bh[eo]lds? against\b|\bheld against\b": "compare with",
    r"\b(go|goes|going|gone|went) on\b": "resume, continue",
    r"\b(be|is|are) had\b": "exists, is available",
    r"\bstands? (in|beside|once|at|there|ready)\b": "is",
    r"\b(it|which|that|this) is said\b": "is reported",
    r"\b(network|net|graph|module)('s)? answers?\b": "prediction, output",
    r"(?<!there )\b(is|are) no (path|number|folder|bundle|integer|list|solver|text|image|picture|"
    r"multiple|member|file|program|name|JSON|one)\b": "is not a",
    # The dialect's adverbs and turns.
    r"\bto the bit\b": "bit for bit, bit-exact",
    r"\banew\b": "again, from scratch",
    r"\bapart\b(?! from)": "differ by",
    r"\bbeside\b": "alongside, next to",
    r"\brefused? by name\b|\bnamed by name\b": "raises an error that names it",
    r"\bno equal\b": "unsupported",
    r"\bas it comes\b": "by default, unchanged",
    r"\bin silence\b": "silently",
    r"\bin good order\b": "cleanly",
    rf"\b(ms|MB|MiB|GFLOP|seconds|milliseconds) an? ({'|'.join(PER.split())})\b": "per",
    rf"\ba (worker|column|row|class|scale|panel|curve|session|profile|marker|thread) "
    rf"an? ({'|'.join(PER.split())}|category|subfolder|size|family|system|output)\b": "one per",
    # Clauses without a subject.
    r"\bwhatever\b|\bwhoever\b|\bwhence\b|\blest\b|\bwherein\b|\bthereof\b": "if, unless, when",
    r"\bwhat (is|are|was|has) (not|no)\b": "name the thing",
    r"^Where (?!does|do|is|are|to|next)[^?]*$": "if, unless, when",
    # One word for one thing.
    r"\bpictures?\b": "image",
    r"\b(a|the) person\b": "the user",
}
"""Patterns of the dialect, each with what to write instead."""
_PATTERNS = [(re.compile(p, re.IGNORECASE), instead) for p, instead in BANNED.items()]
_FENCE = re.compile(r"^ *(`{3,}|~{3,}).*?^ *\1 *$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_DIRECTIVE = re.compile(r"#\s*(type|noqa|fmt|pyright|pragma)\b|#!|#\s*-{3}|#%%")
"""Comments for tools, and rules between sections."""
_STRING_OR_COMMENT = re.compile(
    r"""(?P<quotes>\"{3}|'{3})(?:\\.|(?!(?P=quotes)).)*(?P=quotes)"""
    r"""|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|(?P<comment>#[^\n]*)""",
    re.DOTALL,
)
"""Strings too, because a # in one begins no comment."""
_ABBREVIATION = re.compile(r"\b(al|eq|eqs|e\.g|i\.e|vs|no|cf|sec|fig|approx|etc)\.$", re.IGNORECASE)


@dataclass(frozen=True)
class Passage:
    """A paragraph, a cell or a message.

    Attributes:
        where: path:line.
        prose: Whether its sentences are measured. Headings and cells of tables are not.
    """

    where: str
    text: str
    prose: bool = True


@dataclass
class Report:
    """What was found. Entries name places as path:line."""

    passages: int = 0
    sentences: int = 0
    long: list[str] = field(default_factory=list)
    banned: list[str] = field(default_factory=list)

    @property
    def long_percent(self) -> float:
        """Sentences with more than LONGEST_SENTENCE words, of all."""
        return 100 * len(self.long) / max(1, self.sentences)


def check(passages: Iterable[Passage]) -> Report:
    """Measure sentences and look for banned words."""
    report = Report()
    for passage in passages:
        report.passages += 1
        text = plain(passage.text)
        for sentence in sentences(text):
            for pattern, instead in _PATTERNS:
                if found := pattern.search(sentence):
                    report.banned.append(f"{passage.where}: {found[0][:40]!r}: write {instead}")
            if passage.prose:
                report.sentences += 1
                if (count := len(words(sentence))) > LONGEST_SENTENCE:
                    report.long.append(f"{passage.where}: {count} words: {sentence[:70]} …")
    return report


def plain(text: str) -> str:
    """Return Markdown without its marks: code is one word, a link is its text."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"(`+)(.+?)\1", "code", text, flags=re.DOTALL)
    text = re.sub(r"<[^>\s][^>]*>", " ", text)
    # The name of an option is an identifier.
    text = re.sub(r"--[a-z][a-z-]*", "option", text)
    return " ".join(text.replace("**", "").split())


def sentences(text: str) -> list[str]:
    """Split plain text at the ends of sentences."""
    found: list[str] = []
    for part in re.split(r"(?<=[.!?]) +|(?<=[.!?][)\"'*]) +", text):
        if found and _ABBREVIATION.search(found[-1]):
            found[-1] += " " + part
        else:
            found.append(part)
    return [sentence for sentence in found if sentence]


def words(text: str) -> list[str]:
    """Words and numbers; signs alone are none."""
    return [word for word in text.split() if re.search(r"\w", word)]


def markdown(path: Path) -> Iterator[Passage]:
    """The passages of a Markdown file, without code blocks and comments."""

    def blank(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n")

    text = _COMMENT.sub(blank, _FENCE.sub(blank, path.read_text(encoding="utf-8")))
    paragraph: list[str] = []
    began = 1
    for number, line in enumerate([*text.splitlines(), ""], 1):
        mark = re.match(r"\s*([-*+]|\d+\.)\s+|\s*>\s?|#+\s+", line)
        alone = line.startswith(("|", "#"))
        if paragraph and (not line.strip() or mark or alone):
            yield Passage(f"{_name(path)}:{began}", " ".join(paragraph))
            paragraph = []
        if alone:
            for cell in line.strip("|# ").split("|"):
                yield Passage(f"{_name(path)}:{number}", cell.strip(), prose=False)
        elif line.strip():
            began = began if paragraph else number
            paragraph.append(line[mark.end() :].strip() if mark else line.strip())


def python(path: Path) -> Iterator[Passage]:
    """The comments, docstrings, help texts and error messages of a Python file."""
    yield from comments(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        # A docstring, of a module, class or function, or of the name assigned above it.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            for text in _paragraphs(inspect.cleandoc(literal(node.value))):
                yield Passage(f"{_name(path)}:{node.lineno}", text)
        elif isinstance(node, ast.keyword) and node.arg in ("help", "description", "epilog"):
            if text := literal(node.value):
                yield Passage(f"{_name(path)}:{node.value.lineno}", text)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            for argument in node.exc.args:
                # A single word is the name of an argument, not a message.
                if " " in (text := literal(argument)):
                    yield Passage(f"{_name(path)}:{node.lineno}", text)


def comments(path: Path) -> Iterator[Passage]:
    """The comments of a Python file; those on lines that follow each other are one passage."""
    block: list[str] = []
    began = last = 0
    for number, line, column, comment in _comments(path.read_text(encoding="utf-8")):
        alone = not line[:column].strip()
        if _DIRECTIVE.match(comment):
            continue
        # A comment after code begins a passage; a line of its own may continue it.
        if block and not (alone and number == last + 1):
            yield Passage(f"{_name(path)}:{began}", " ".join(block))
            block = []
        began = began if block else number
        block.append(comment.lstrip("#").strip())
        last = number
    if block:
        yield Passage(f"{_name(path)}:{began}", " ".join(block))


def _comments(text: str) -> Iterator[tuple[int, str, int, str]]:
    """The comments of Python source: number of the line, the line, column, and comment.

    They are those that `tokenize` finds, ten times as fast.
    """
    number = 1
    seen = 0
    for match in _STRING_OR_COMMENT.finditer(text):
        if match["comment"]:
            number += text.count("\n", seen, match.start())
            seen = match.start()
            began = text.rfind("\n", 0, seen) + 1
            yield number, text[began : match.end()], seen - began, match["comment"]


def literal(node: ast.expr) -> str:
    """The text of a string literal; a value that an f-string inserts is `code`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) or "`code`" for part in node.values)
    if isinstance(node, ast.BinOp):
        return literal(node.left) + literal(node.right)
    return ""


def passages(path: Path) -> Iterator[Passage]:
    """The passages of a file, or of all Markdown and Python files of a folder."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            ours = not any(p.startswith(".") or p == NOT_OURS_TO_CHANGE for p in file.parts)
            if file.suffix in (".md", ".py") and ours:
                yield from passages(file)
    else:
        yield from (markdown(path) if path.suffix == ".md" else python(path))


def pages() -> list[Path]:
    """The README and the pages for users."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
    guides = [ROOT / "bundles" / "README.md", ROOT / "examples" / "README.md"]
    docs = ROOT / "docs"
    return [*top, *guides, *sorted(docs.glob("*.md")), *sorted((docs / "learn").glob("*.md"))]


def packages() -> list[Path]:
    """The folders of PACKAGES that exist."""
    return [ROOT / name for name in PACKAGES if (ROOT / name).is_dir()]


def _paragraphs(docstring: str) -> list[str]:
    """The paragraphs of a docstring; each entry of its Args, Raises and so on is one."""
    blocks = re.split(r"\n\s*\n|\n(?=\s*[\w*, ]+: )", docstring)
    blocks = [re.sub(r"^\s*(Args|Returns|Raises|Attributes|Yields):\s*", "", b) for b in blocks]
    return [re.sub(r"^\s*[\w*]+: ", "", block) for block in blocks if block.strip()]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def main(names: list[str]) -> None:
    """Print the figures of each path, and each finding."""
    given = [Path(name) for name in names]
    groups = {name: [path.resolve()] for name, path in zip(names, given, strict=True)}
    for name, paths in (groups or {"docs": pages(), **{p.name: [p] for p in packages()}}).items():
        report = check(passage for path in paths for passage in passages(path))
        for finding in (*report.banned, *report.long):
            print(finding)
        print(
            f"{name}: {report.passages} passages, {report.sentences} sentences, "
            f"{len(report.long)} too long ({report.long_percent:.1f} %), "
            f"{len(report.banned)} banned"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
