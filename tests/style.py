"""Measure the style of the packages: python tests/style.py [PACKAGE …].

The figures are those of `LIMITS`; tests/test_style.py holds them.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("runtime", "export", "trainer", "serve")
LONGEST_LINE = 100
LONGEST_FUNCTION = 60
LONGEST_FILE = 300
ARRAYS = re.compile(r"\b(NDArray|ArrayLike|ndarray|Float32|Float64|UInt8|Tensor)\b")
"""Annotations of arrays."""
SHAPE = re.compile(r"\[[^\]]*\]|\bshape\b|\bscalar\b|\b0-d\b")
"""How a docstring states a shape: x [B, *S]; of the shape of x; a scalar."""
PRAGMA = re.compile(r"#\s*(type:|noqa|fmt:|pyright:|pragma)")


@dataclass
class Figures:
    """The style of some files. Lists name places as path:line."""

    lines: int = 0
    code_lines: int = 0
    comments: int = 0
    any_uses: int = 0
    assignments: int = 0
    packed: list[str] = field(default_factory=list)
    long_lines: list[str] = field(default_factory=list)
    long_functions: list[str] = field(default_factory=list)
    long_files: list[str] = field(default_factory=list)
    shapeless: list[str] = field(default_factory=list)

    @property
    def any_per_1000(self) -> float:
        """Uses of `Any` in annotations per 1,000 lines."""
        return 1000 * self.any_uses / self.lines

    @property
    def comment_percent(self) -> float:
        """Lines with a comment, of those that are not blank."""
        return 100 * self.comments / self.code_lines

    @property
    def packed_percent(self) -> float:
        """Assignments that bind unlike things at once, of all assignments."""
        return 100 * len(self.packed) / self.assignments


def measure(paths: list[Path]) -> Figures:
    """Measure Python files."""
    figures = Figures()
    for path in paths:
        _measure_file(path, figures)
    return figures


def files(package: str) -> list[Path]:
    """The Python files of a package."""
    return sorted((ROOT / package).rglob("*.py"))


def _measure_file(path: Path, figures: Figures) -> None:
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    lines = text.splitlines()
    figures.lines += len(lines)
    figures.code_lines += sum(bool(line.strip()) for line in lines)
    figures.comments += _comments(text)
    figures.long_lines += [
        f"{name}:{i}" for i, line in enumerate(lines, 1) if len(line) > LONGEST_LINE
    ]
    if len(lines) > LONGEST_FILE:
        figures.long_files.append(f"{name} ({len(lines)})")
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "Any":
            figures.any_uses += 1
        elif isinstance(node, ast.Assign):
            figures.assignments += 1
            if _packs_unlike_things(node):
                figures.packed.append(f"{name}:{node.lineno}")
        elif isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LONGEST_FUNCTION:
                figures.long_functions.append(f"{name}:{node.lineno} {node.name} ({length})")
    figures.shapeless += [
        f"{name}:{function.lineno} {function.name}"
        for function, owner in _public_functions(tree)
        if _has_arrays(function) and not SHAPE.search(_documented(function, owner))
    ]


def _comments(text: str) -> int:
    """Count the lines with a comment that is not an instruction to a tool."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(
        token.type == tokenize.COMMENT and not PRAGMA.match(token.string) for token in tokens
    )


def _packs_unlike_things(node: ast.Assign) -> bool:
    """a, b = x, y(): one statement that binds the values of unlike expressions."""
    if not isinstance(node.targets[0], ast.Tuple) or not isinstance(node.value, ast.Tuple):
        return False
    return len({type(element) for element in node.value.elts}) > 1


def _public_functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, ast.ClassDef | None]]:
    """The public functions of a module and the public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node, None
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    yield method, node


def _has_arrays(function: ast.FunctionDef) -> bool:
    given = function.args
    parts = [a.annotation for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return any(
        part is not None and ARRAYS.search(ast.unparse(part)) for part in (*parts, function.returns)
    )


def _documented(function: ast.FunctionDef, owner: ast.ClassDef | None) -> str:
    """What is documented on a function: its docstring, and its class's."""
    own = ast.get_docstring(function) or ""
    return own + ((ast.get_docstring(owner) or "") if owner else "")


def main(packages: list[str]) -> None:
    """Print the figures of packages, and the places that are not as they should be."""
    for package in packages or PACKAGES:
        found = measure(files(package))
        print(
            f"{package}: {found.lines} lines; Any {found.any_per_1000:.1f} per 1,000 lines; "
            f"comments {found.comment_percent:.1f} %; packed {found.packed_percent:.1f} %"
        )
        for title in ("long_lines", "long_functions", "long_files", "shapeless"):
            places = getattr(found, title)
            print(f"  {title.replace('_', ' ')}: {len(places)}")
            for place in places:
                print(f"    {place}")


if __name__ == "__main__":
    main(sys.argv[1:])
