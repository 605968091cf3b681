"""The files of a package import each other in one direction: no circles, not even through imports
inside functions or for type checkers only. So do its rooms, which are few."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGES = ("runtime", "trainer", "export", "serve")

LIMITS = {"runtime": (14, 58), "export": (11, 21), "trainer": (15, 43)}
"""Of a package: rooms, and arrows between them."""

Imports = Mapping[str, set[str]]
"""Module → the modules that its file imports anywhere."""


def modules_of(package: Path) -> dict[str, Path]:
    """The modules of a package by their dotted names."""
    modules = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imports_of(modules: Mapping[str, Path]) -> Imports:
    """What each module imports of the others.

    `from .a import b` is an import of a.b if that is a module, otherwise of a. The packages that
    Python loads on the way to a module do not count.
    """
    return {
        name: {target for target in _imported(name, path, modules) if target in modules} - {name}
        for name, path in modules.items()
    }


@cache
def imports_in(package: Path) -> Imports:
    """What each module of a package imports of the others."""
    return imports_of(modules_of(package))


def _imported(name: str, path: Path, modules: Mapping[str, Path]) -> set[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, package)
            submodules = {f"{module}.{alias.name}" for alias in node.names}
            imported |= submodules & modules.keys()
            # Names that are not modules are defined in the module itself.
            if submodules - modules.keys():
                imported.add(module)
    return imported


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    base = parts[: len(parts) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def rooms_of(imports: Imports) -> Imports:
    """What each room of a package imports of the others: a room is a folder or a file at the top.

    `__init__` and `__main__` at the top are none.
    """
    rooms: dict[str, set[str]] = {}
    for module, targets in imports.items():
        if (room := _room(module)) in ("", "__main__"):
            continue
        rooms.setdefault(room, set()).update({_room(target) for target in targets} - {"", room})
    return rooms


def _room(module: str) -> str:
    """The room of a module, "" for the package itself."""
    return ".".join(module.split(".")[1:2])


def circle_in(imports: Imports) -> list[str]:
    """One circle of modules that import each other, [] if there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        # graphlib names each module before the one that imports it.
        return error.args[1][::-1]
    return []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_files_import_each_other_in_a_circle(root: Path, package: str) -> None:
    circle = circle_in(imports_in(root / package))
    assert not circle, " imports ".join(circle)


@pytest.mark.parametrize(("package", "limits"), LIMITS.items())
def test_rooms_and_arrows_are_few(root: Path, package: str, limits: tuple[int, int]) -> None:
    rooms = rooms_of(imports_in(root / package))
    assert len(rooms) <= limits[0]
    assert sum(map(len, rooms.values())) <= limits[1]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_rooms_import_each_other_in_a_circle(root: Path, package: str) -> None:
    circle = circle_in(rooms_of(imports_in(root / package)))
    assert not circle, " imports ".join(circle)


def test_circles_are_found_through_functions_type_checking_and_packages(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "room").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("def use():\n    from .room import b\n")
    (package / "room" / "__init__.py").write_text("")
    (package / "room" / "b.py").write_text("import package.room.c\n")
    (package / "room" / "c.py").write_text("if TYPE_CHECKING:\n    from ..a import use\n")
    circle = circle_in(imports_of(modules_of(package)))
    assert circle[0] == circle[-1]
    start = circle.index("package.a")
    around = [*circle[start:-1], *circle[: start + 1]]
    assert around == ["package.a", "package.room.b", "package.room.c", "package.a"]
    (package / "room" / "c.py").write_text("from package import room\n")
    assert not circle_in(imports_of(modules_of(package)))


def test_circles_of_rooms_are_found_where_no_files_make_one(tmp_path: Path) -> None:
    package = tmp_path / "package"
    for room in ("low", "high"):
        (package / room).mkdir(parents=True)
        (package / room / "__init__.py").write_text("")
    (package / "__init__.py").write_text("from .verb import main\n")
    (package / "verb.py").write_text("from .high.step import take\nfrom . import verb\n")
    (package / "high" / "step.py").write_text("from ..low.files import write\n")
    (package / "low" / "files.py").write_text("from ..high.names import NAME\n")
    (package / "high" / "names.py").write_text("NAME = 1\n")
    imports = imports_in(package)
    assert not circle_in(imports)
    assert rooms_of(imports) == {"verb": {"high"}, "high": {"low"}, "low": {"high"}}
    assert set(circle_in(rooms_of(imports))) == {"high", "low"}
