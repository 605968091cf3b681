"""Write README.md's speed table from the tables of docs/benchmarks.md; measure nothing.

    python benchmarks/readme.py

benchmarks/same_work.py --write does the same after it has measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from figures import fill, markdown

EAGER = "diffusers, eager"
COLUMNS: Mapping[str, Callable[[str], bool]] = {
    EAGER: lambda name: name == EAGER,
    "diffusers, fastest in fp32": lambda name: name.startswith("diffusers") and "bf16" not in name,
    "ONNX Runtime alone": lambda name: name.startswith("raw ONNX Runtime, fp32"),
    "unnoise, the default": lambda name: name == "unnoise, onnxruntime fp32",
    "unnoise, int8 on OpenVINO": lambda name: name == "unnoise, openvino int8",
}
"""The README's columns, and the rows of docs/benchmarks.md of which each takes the fastest."""
NETWORKS = {
    "emoji32": "emoji32 (2.9 M parameters)",
    "CIFAR-shaped": "CIFAR-10 size of DDPM (35.7 M, random weights)",
    "64×64": "64×64 pixels (15.3 M, random weights)",
}
"""The README's words for the networks of docs/benchmarks.md."""
CONDITIONS = """\
Milliseconds per image at batch 1 / at batch 16, on {machine}.
In brackets: how many times faster than eager, PyTorch's default mode. Medians over {rounds} rounds;
ratios are taken within a round, and their quartiles lie up to {spread:.0f} % away. DDIM without guidance,
one thread per core, equal weights in a row (–: not exported in int8). fp32 images agree to an RMS
of {fp32}. [All figures](docs/benchmarks.md#all-figures)"""


@dataclass(frozen=True)
class Cell:
    """One time of docs/benchmarks.md: `64.3 (2.16 ×, 1.77 … 2.33)`.

    Attributes:
        ms: Per image.
        ratio: Eager's time over this one, the median over rounds, and its quartiles.
    """

    ms: float
    ratio: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """How far the further quartile lies from the median, as a share of it."""
        return max(self.high - self.ratio, self.ratio - self.low) / self.ratio


def speed(page: str) -> str:
    """Return the README's table, a row per network, from the text of docs/benchmarks.md."""
    block = page.split("<!-- same-work -->")[1].split("<!-- /same-work -->")[0]
    tables = re.findall(r"(.+), DDIM, (\d+) steps:\n\n((?:\|.+\n)+)", block)
    chosen = {f"{NETWORKS[name]}, {steps} steps": _chosen(table) for name, steps, table in tables}
    cells = [cell for row in chosen.values() for column in row for cell in column]
    machine = re.search(r"same_work.py` on ([^;]+);", block)
    rounds = re.search(r"Medians of (.+?) alternating rounds", block)
    conditions = CONDITIONS.format(
        fp32=f"{max(_differences(block)):.0e}",
        machine=machine[1] if machine else "an unknown machine",
        rounds=rounds[1] if rounds else "several",
        spread=100 * max(cell.spread for cell in cells),
    )
    rows = [[name, *map(_text, row)] for name, row in chosen.items()]
    return f"{markdown(['', *COLUMNS], rows)}\n\n{conditions}"


def _differences(block: str) -> list[float]:
    """Return the RMS of our fp32 images on other backends from those of the default."""
    rows = re.findall(r"^\| unnoise, \S+ fp32 \|.*\| (\S+) \|$", block, re.MULTILINE)
    return [float(rms) for rms in rows if rms != "–"]


def _chosen(table: str) -> list[list[Cell]]:
    """Return the fastest cell of each column at the smallest and the largest batch."""
    cells = _cells(table)
    row = []
    for wanted in COLUMNS.values():
        systems = [cells[system] for system in cells if wanted(system)]
        # The fastest system may be another at another batch size.
        row.append([min(batch, key=lambda c: c.ms) for batch in zip(*systems, strict=True)])
    return row


def _text(column: list[Cell]) -> str:
    if not column:
        return "–"
    times = " / ".join(f"{cell.ms:.0f}" for cell in column)
    if all(cell.ratio == cell.low == cell.high == 1 for cell in column):
        return times
    return f"{times} ({' / '.join(f'{cell.ratio:.2f} ×' for cell in column)})"


def _cells(table: str) -> dict[str, tuple[Cell, Cell]]:
    """Return the cells of a table at the smallest and the largest batch, by system."""
    found = {}
    for line in table.splitlines()[2:]:
        system, *texts = [text.strip() for text in line.strip("|").split("|")]
        cells = [Cell(*map(float, re.findall(r"\d+(?:\.\d+)?", text))) for text in texts[:-1]]
        found[system] = (cells[0], cells[-1])
    return found


def write() -> None:
    """Fill README.md."""
    fill(Path("README.md"), "speed", speed(Path("docs/benchmarks.md").read_text(encoding="utf-8")))


if __name__ == "__main__":
    write()
