"""Formulas and diagrams of the site, drawn while it is built: MathML and SVG, and no JavaScript.

MkDocs calls the functions `on_…` (mkdocs.yml).
"""

from __future__ import annotations

import html
import logging
import re
import unicodedata
from pathlib import Path
from typing import Any

import ziamath
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mmdr import Diagram

log = logging.getLogger("mkdocs.hooks")
FONT = "theme/STIXTwoMath.ttf"
"""The font for mathematics (SIL Open Font Licence), as theme/site.css names it."""
DIAGRAM = re.compile(r"^```mermaid\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
SPELLED = {
    r"\lVert": "‖",
    r"\rVert": "‖",
    r"\lvert": "|",
    r"\rvert": "|",
    r"{aligned}": "{align*}",
    r"{gathered}": "{gather*}",
}
"""LaTeX that latex2mathml does not know, and what means the same."""
FUNCTION = re.compile(r"<mi>(log|ln|exp|sin|cos|min|max)</mi>(?!<mo|</)")
"""Functions before an argument without a bracket: a thin space goes between."""
VARIANT = re.compile(r'<mi mathvariant="(?P<variant>script|double-struck)">(?P<letter>\w)</mi>')
"""Letters that browsers draw by their own code points, and not by the attribute."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Ship the font for mathematics with the site."""
    font = Path(ziamath.__file__).parent / "fonts" / "STIXTwoMath-Regular.ttf"
    files.append(File.generated(config, FONT, content=font.read_bytes()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Draw Mermaid's diagrams, which the theme would fetch a script from another host for."""
    return DIAGRAM.sub(lambda match: _svg(match["text"]), markdown)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Turn formulas into MathML, which browsers draw by themselves."""
    return FORMULA.sub(lambda match: _mathml(match["latex"], match["tag"], page), html)


def _svg(text: str) -> str:
    svg = re.sub(r"\s*\n\s*", " ", Diagram(text).svg())
    return f'<div class="diagram">{svg}</div>\n'


def _mathml(latex: str, tag: str, page: Page) -> str:
    text = html.unescape(latex).strip()
    for command, same in SPELLED.items():
        text = text.replace(command, same)
    formula = convert(text, display="inline" if tag == "span" else "block")
    # What the converter does not know stays as it is written, without an error.
    if "\\" in html.unescape(formula) or "<mi>&</mi>" in formula:
        log.warning(f"{page.file.src_uri}: a formula has a command that is unknown: {latex}")
    formula = FUNCTION.sub(r'<mi>\1</mi><mspace width="0.17em"/>', formula)
    return VARIANT.sub(lambda match: f"<mi>{_letter(**match.groupdict())}</mi>", formula)


def _letter(variant: str, letter: str) -> str:
    """A script or double-struck letter's own code point."""
    name = f"{variant.upper()} CAPITAL {letter.upper()}"
    # Unicode had some letters, such as ℝ, before it had the alphabets.
    for place in (name, f"MATHEMATICAL {name}"):
        try:
            return unicodedata.lookup(place)
        except KeyError:
            continue
    return letter
