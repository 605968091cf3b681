"""The version is the same wherever it is written."""

import re
import tomllib

from .root import ROOT


def test_the_changelog_and_the_citation_name_the_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^## \[([\d.]+)\]", changelog, re.MULTILINE)[0] == project["version"]
    assert f"\nversion: {project['version']}\n" in citation
