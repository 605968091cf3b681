"""Text that config.json can hold, and a terminal can print."""

from __future__ import annotations

import unicodedata


def text_fault(text: str) -> str:
    """Say why `text` cannot be stored and printed as UTF-8 text, or "" if it can."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid UTF-8 text"
    if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in text):
        return "contains a control character"
    return ""


def printable(name: str) -> str:
    """Return the name, or its escaped form if it cannot be printed as one line of UTF-8."""
    return ascii(name) if text_fault(name) else name
