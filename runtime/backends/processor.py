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
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return min(cores, quota() or cores)


def quota(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return how many cores' time a container is given, rounded down, at least 1; None for all.

    Args:
        root: Of Linux's control groups.
    """
    try:
        if (root / "cpu.max").exists():
            limit, period = (root / "cpu.max").read_text().split()
        else:
            limit = (root / "cpu" / "cpu.cfs_quota_us").read_text()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text()
        given = int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max", or no Linux
        return None
    return max(1, int(given)) if given > 0 else None
