"""The pages of the site that are not in docs/: the packages' reference, the README and others.

MkDocs calls the functions `on_…` while it builds the site (mkdocs.yml). Links between the pages and
the rest of the repository lead to where their targets are in the site.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[2]
PACKAGES = ("runtime", "export", "trainer", "serve")
API = "reference/api"
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "bundles/README.md": "bundles.md",
    "bundles/emoji32/README.md": "emoji32.md",
    "examples/README.md": "examples/index.md",
    "docs/README.md": "pages.md",
}
"""Pages from outside docs/: where they lie in the repository, and in the site.

MkDocs would make docs/README.md the site's first page, which is the project's README instead.
"""
EXAMPLES = {".py": "python", ".cpp": "cpp"}
"""The programs of examples/ that get a page, and their languages."""
LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s]+)(?P<after>\))")
ATTRIBUTE = re.compile(r'(?P<before>\b(?:href|src)=")(?P<target>[^"]+)(?P<after>")')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for source, target in ELSEWHERE.items():
        if (ROOT / source).is_file():
            text = (ROOT / source).read_text(encoding="utf-8")
            if target == "index.md":
                text = f"---\nhide: [navigation]\n---\n{text}"
            files.append(File.generated(config, target, content=text))
    for program in _programs():
        text = _program_page(program)
        files.append(File.generated(config, _program_place(program.name), content=text))
    for room in _rooms():
        text = _room_page(room)
        files.append(File.generated(config, f"{API}/{room}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to where their targets are in the site."""
    folder = posixpath.dirname(_repository_path(page.file.src_uri))

    def in_markdown(match: re.Match[str]) -> str:
        target = _site_path(match["target"], folder, config, files)
        if target is None:
            return match[0]
        path, mark, fragment = target.partition("#")
        start = posixpath.dirname(page.file.src_uri) or "."
        return f"{match['before']}{posixpath.relpath(path, start)}{mark}{fragment}{match['after']}"

    def in_html(match: re.Match[str]) -> str:
        target = _site_path(match["target"], folder, config, files)
        path, mark, fragment = (target or "").partition("#")
        file = files.get_file_from_path(path)
        if file is None:
            return match[0]
        url = get_relative_url(file.url, page.file.url)
        return f"{match['before']}{url}{mark}{fragment}{match['after']}"

    return ATTRIBUTE.sub(in_html, LINK.sub(in_markdown, markdown))


def _programs() -> list[Path]:
    return [p for p in sorted((ROOT / "examples").glob("*")) if p.suffix in EXAMPLES]


def _program_place(name: str) -> str:
    """The page of a program; its ending stays, as two programs may differ in it alone."""
    return f"examples/{name.replace('.', '-')}.md"


def _program_page(program: Path) -> str:
    text = program.read_text(encoding="utf-8")
    return f"# {program.name}\n\n```{EXAMPLES[program.suffix]}\n{text}```\n"


def _rooms() -> Iterator[str]:
    """The packages and the packages in them, by dotted name."""
    for package in PACKAGES:
        for marker in sorted((ROOT / package).rglob("__init__.py")):
            yield ".".join(marker.parent.relative_to(ROOT).parts)


def _room_page(room: str) -> str:
    """One page with the documentation of every module of a room."""
    folder = ROOT / room.replace(".", "/")
    own = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    sections = [f"# {room}"]
    # A package that says something of itself comes first; most only hold modules.
    if own.body:
        sections.append(f"::: {room}")
    shown = {
        alias.name for node in own.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    for module in sorted(folder.glob("*.py")):
        if not module.stem.startswith("_") and not _is_shown(module, shown):
            sections.append(f"::: {room}.{module.stem}")
    return "\n\n".join(sections) + "\n"


def _is_shown(module: Path, names: set[str]) -> bool:
    """Whether a package exports all that one of its modules defines."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    kinds = (ast.ClassDef, ast.FunctionDef)
    defined = {n.name for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")}
    return bool(defined) and defined <= names


def _repository_path(site: str) -> str:
    """Return the place of a page of the site in the repository."""
    for source, target in ELSEWHERE.items():
        if target == site:
            return source
    return site if site.startswith("examples/") else f"docs/{site}"


def _site_path(target: str, folder: str, config: MkDocsConfig, files: Files) -> str | None:
    """Return the place of a link's target in the site, with its fragment.

    None for other hosts, for places in the page itself, and for what the repository does not have.

    Args:
        target: As it is written.
        folder: Of the page that has the link, in the repository.
    """
    parts = urlsplit(target)
    if parts.scheme or parts.netloc or not parts.path:
        return None
    path = posixpath.normpath(posixpath.join(folder, parts.path))
    mark = f"#{parts.fragment}" if parts.fragment else ""
    if path in ELSEWHERE:
        return ELSEWHERE[path] + mark
    if path.startswith("docs/"):
        return path.removeprefix("docs/") + mark
    return _code(path) or _copied(path, config, files)


def _code(path: str) -> str | None:
    """The page of a module, of a room, or of an example."""
    name = path.removesuffix(".py").replace("/", ".")
    rooms = [*_rooms()]
    if name in rooms:
        return f"{API}/{name}.md"
    room = name.rpartition(".")[0]
    if path.endswith(".py") and room in rooms:
        return f"{API}/{room}.md#{name}"
    if ROOT / path in _programs():
        return _program_place(posixpath.basename(path))
    return "examples/index.md" if path == "examples" else None


def _copied(path: str, config: MkDocsConfig, files: Files) -> str | None:
    """Another file of the repository, which the site gets a copy of."""
    if not (ROOT / path).is_file():
        return None
    place = f"files/{path}.txt" if "." not in posixpath.basename(path) else f"files/{path}"
    if files.get_file_from_path(place) is None:
        files.append(File.generated(config, place, content=(ROOT / path).read_bytes()))
    return place
