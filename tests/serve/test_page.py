"""The page's files. What it does in a browser: test_browser.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from serve.health import PAGE

MOST_BYTES = 60_000
NAMESPACE = "http://www.w3.org/2000/svg"
Files = dict[str, str]


@pytest.fixture
def files(root: Path) -> Files:
    """The page's files by name."""
    return {file.name: file.read_text("utf-8") for file in (root / "serve" / "page").iterdir()}


def test_the_page_is_small(files: Files) -> None:
    assert sum(len(text.encode()) for text in files.values()) <= MOST_BYTES


def test_the_service_has_every_file_of_the_page(files: Files) -> None:
    assert {name for name, _ in PAGE.values()} == files.keys()


def test_the_page_names_files_that_exist_and_no_other_host(files: Files) -> None:
    for text in files.values():
        assert not re.search(r"//(?! )", text.replace(NAMESPACE, ""))
        assert not re.search(r"https?:", text.replace(NAMESPACE, ""))
    named = re.findall(r'(?:src|href)="([^"#]+)"', files["index.html"])
    imported = [name for text in files.values() for name in re.findall(r'from "\./(.+)"', text)]
    assert {name for name in named if not name.startswith("data:")} | set(imported) <= files.keys()


def test_nothing_is_inline_that_the_content_security_policy_forbids(files: Files) -> None:
    page = files["index.html"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<script[^>]*>[^<]", page)


def test_labels_and_descriptions_point_at_elements(files: Files) -> None:
    page = files["index.html"]
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    pointing = r'\s(?:for|aria-labelledby|aria-describedby|aria-controls)="([^"]+)"'
    assert {name for names in re.findall(pointing, page) for name in names.split()} <= set(ids)
