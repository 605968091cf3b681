"""The commands and programs of the README and the docs, and where they run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from runtime.bundle.shipped import NAMES

from .root import ROOT

SERVING = ROOT / "docs" / "serving.md"
"""Its commands need a running service: tests/serve/test_docs.py runs them."""
DOCS = sorted({*(ROOT / "docs").glob("*.md")} - {SERVING})
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS)
SET_UP = {
    "pip install '.[cpu]'",
    "pip install '.[export]'",
    "python3 -m venv .venv && . .venv/bin/activate",
}
IN_TURN = (
    "python -m trainer.fit --data digits",
    "python -m export.build runs/digits",
    "python -m runtime.sample bundles/digits --n 20 --label 3 --label 8 --out digits.png",
)
"""The README's own run, from data to images. Each command needs the one before."""
HANGING_S = 3600
"""After this time a command counts as hanging. It is not a bound on speed."""


def blocks(language: str) -> list[str]:
    """Return the blocks of one language on all pages."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands() -> list[str]:
    """Return the commands on all pages, each once."""
    lines = (line for block in blocks("sh") for line in block.splitlines())
    return [line for line in dict.fromkeys(lines) if line and line not in SET_UP]


def run(command: str, folder: Path) -> str:
    """Run a command in a folder and return what it prints."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=HANGING_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def clone(path: Path) -> Path:
    """Give a folder what a clone has, so that the commands leave nothing in this one."""
    for name in ("runtime", "trainer", "export", "docs", "examples"):
        (path / name).symlink_to(ROOT / name)
    (path / "bundles").mkdir()
    for name in NAMES:
        (path / "bundles" / name).symlink_to(ROOT / "bundles" / name)
    return path
