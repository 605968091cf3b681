"""Write README.md's speed table from the tables of docs/benchmarks.md; measure nothing.

    python benchmarks/readme.py

benchmarks/same_work.py --write does the same after it has measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from figures import fill, markdown

EAGER = "diffusers, eager"
COLUMNS: Mapping[str, Callable[[str], bool]] = {
    EAGER: lambda name: name == EAGER,
    "diffusers, fastest of eager, channels_last, compiled": lambda name: (
        name.startswith("diffusers") and "bf16" not in name
    ),
    "unnoise fp32, faster backend": lambda name: name.startswith("unnoise") and "fp32" in name,
    "unnoise int8, OpenVINO": lambda name: name.startswith("unnoise, openvino int8"),
}
"""The README's columns, and the rows of docs/benchmarks.md of which each takes the fastest."""
NETWORKS = {
    "emoji32": "emoji32 (2.9 M parameters)",
    "CIFAR-shaped": "DDPM's CIFAR-10 size (35.7 M, random weights)",
    "64×64": "64×64 pixels (15.3 M, random weights)",
}
"""The README's words for the networks of docs/benchmarks.md."""
CONDITIONS = """\
Milliseconds per image at batch 1 / batch 16; in brackets, eager's time divided by this one. DDIM
without guidance, the same weights in a row, one thread per core. fp32 images agree to an RMS of
{fp32}, int8's differ by {int8} over all images (a median of 35 dB is 0.036).
On {machine}. [More](docs/benchmarks.md): quartiles, bf16, AMX."""


def speed(page: str) -> str:
    """Return the README's table, a row per network, from the text of docs/benchmarks.md."""
    block = page.split("<!-- same-work -->")[1].split("<!-- /same-work -->")[0]
    tables = re.findall(r"(.+), DDIM, (\d+) steps:\n\n((?:\|.+\n)+)", block)
    rows = [_row(f"{NETWORKS[name]}, {steps} steps", table) for name, steps, table in tables]
    machine = re.search(r"same_work.py` on ([^;]+);", block)
    conditions = CONDITIONS.format(
        fp32=f"{max(_differences(block, 'fp32')):.0e}",
        int8=" to ".join(f"{bound(_differences(block, 'int8')):g}" for bound in (min, max)),
        machine=machine[1] if machine else "an unknown machine",
    )
    return f"{markdown(['', *COLUMNS], rows)}\n\n{conditions}"


def _differences(block: str, precision: str) -> list[float]:
    """Return the RMS from our fp32 images of our rows in a precision."""
    rows = re.findall(rf"^\| unnoise, \S+ {precision} \|.*\| (\S+) \|$", block, re.MULTILINE)
    return [float(rms) for rms in rows if rms != "–"]


def _row(name: str, table: str) -> list[str]:
    times = _times(table)
    cells = [name]
    for wanted in COLUMNS.values():
        chosen = [row for system, row in times.items() if wanted(system)]
        if not chosen:
            cells.append("–")
            continue
        # The fastest system may be another at another batch size.
        best = [min(batch) for batch in zip(*chosen, strict=True)]
        text = " / ".join(f"{ms:.0f}" for ms in best)
        ratios = [eager / ms for eager, ms in zip(times[EAGER], best, strict=True)]
        gain = "" if wanted(EAGER) and len(chosen) == 1 else _ratios(ratios)
        cells.append(text + gain)
    return cells


def _ratios(ratios: list[float]) -> str:
    return f" ({' / '.join(f'{ratio:.1f} ×' for ratio in ratios)})"


def _times(table: str) -> dict[str, tuple[float, float]]:
    """Return ms per image at the smallest and the largest batch, by system."""
    times = {}
    for line in table.splitlines()[2:]:
        system, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        ms = [float(cell.split()[0]) for cell in cells[:-1]]
        times[system] = (ms[0], ms[-1])
    return times


def write() -> None:
    """Fill README.md."""
    fill(Path("README.md"), "speed", speed(Path("docs/benchmarks.md").read_text(encoding="utf-8")))


if __name__ == "__main__":
    write()
