"""The site: built strictly, from this machine alone, with links that lead somewhere."""

import os
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from .root import ROOT

LOADED = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "link": ("href",),
    "iframe": ("src",),
    "video": ("src", "poster"),
    "audio": ("src",),
    "source": ("src", "srcset"),
    "object": ("data",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
}
"""What a browser fetches by itself, by element and attribute."""
HANGING_S = 1800

pytestmark = pytest.mark.slow


class Links(HTMLParser):
    """The targets of a page's links, what it loads, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        # A canonical link names a page and loads nothing.
        if given.get("rel") != "canonical":
            self.loaded += [given[name] for name in LOADED.get(tag, ()) if name in given]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="pip install 'unnoise[docs]'")
    folder = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        # A proxy that does not exist, so that any request to another host fails.
        env={
            **os.environ,
            "NO_MKDOCS_2_WARNING": "1",
            "http_proxy": "http://127.0.0.1:9",
            "https_proxy": "http://127.0.0.1:9",
        },
        capture_output=True,
        text=True,
        timeout=HANGING_S,
    )
    assert build.returncode == 0, build.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    return {page: Links(page.read_text(encoding="utf-8")) for page in site.rglob("*.html")}


def _internal(pages: dict[Path, Links]) -> Iterator[tuple[Path, str]]:
    for page, found in pages.items():
        if page.name != "404.html":  # which a server shows at any address
            for target in {*found.links, *found.loaded}:
                parts = urlsplit(target)
                if not parts.scheme and not parts.netloc:
                    yield page, target


def test_no_page_loads_anything_from_another_host(site: Path, pages: dict[Path, Links]) -> None:
    for page, found in pages.items():
        for target in found.loaded:
            parts = urlsplit(target)
            assert parts.scheme in ("", "data"), f"{page} loads {target}"
            assert not parts.netloc, f"{page} loads {target}"
        # The theme fetches a script from another host if it finds one of these.
        assert 'class="mermaid"' not in page.read_text(encoding="utf-8"), page
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8").replace("http://www.w3.org/", "")
        assert "url(http" not in text, sheet
        assert "url(//" not in text, sheet
        assert "@import" not in text, sheet


def test_every_link_leads_to_a_page_and_a_place_in_it(site: Path, pages: dict[Path, Links]) -> None:
    missing = []
    for page, target in _internal(pages):
        parts = urlsplit(target)
        place = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if place.is_dir():  # the logo, which a server answers with the page in the folder
            place = place / "index.html"
        anchor = unquote(parts.fragment)
        if not place.is_file() or not place.is_relative_to(site):
            missing.append(f"{page.relative_to(site)}: {target}")
        elif place.suffix == ".html" and anchor and anchor not in pages[place].anchors:
            missing.append(f"{page.relative_to(site)}: {target}, which has no such place")
    assert not missing, "\n".join(missing)


def test_every_page_is_in_the_site_with_its_formulas_drawn(
    site: Path, pages: dict[Path, Links]
) -> None:
    for source in (ROOT / "docs").rglob("*.md"):
        target = source.relative_to(ROOT / "docs").with_suffix(".html")
        if target.name == "README.html":
            target = target.with_name("index.html")
        assert site / target in pages, source
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "arithmatex" not in text, page
        assert "```" not in text.split("<main")[1].split("</main>")[0], page


def test_the_reference_has_the_public_names_of_all_packages(pages: dict[Path, Links]) -> None:
    anchors = set().union(*(found.anchors for found in pages.values()))
    import export
    import runtime

    assert {f"runtime.{name}" for name in runtime.__all__} <= anchors
    assert {f"export.{name}" for name in export.__all__} <= anchors
    assert {"trainer.fit.fit", "trainer.config.Config", "runtime.diffusion.grid.Grid"} <= anchors
