"""The processor of this machine, and how much of it this process may use."""

from __future__ import annotations

import os
import re
from pathlib import Path


def cpuinfo() -> str:
    """Return what Linux says of the processor, "" on other systems."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def processor_name() -> str:
    """Name this machine's processor."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo(), re.MULTILINE)
    if found:
        return found[1].strip()
    import platform  # costly, and not needed on Linux

    return platform.processor() or platform.machine()


def flags() -> frozenset[str]:
    """Return this processor's instruction sets by Linux's names; nothing on other systems."""
    found = re.search(r"^(?:flags|Features)\s*:(.+)$", cpuinfo(), re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def usable_cores() -> int:
    """Count the cores that this process may use: containers and taskset allow it fewer."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
