"""What each extra installs: packages and MB on this disk, with all that they require.

    python benchmarks/installed.py [--write]

The packages of all extras must be installed (the extra dev). Their own files are counted, as pip
records them. --write refreshes docs/install.md. Takes seconds.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from figures import fill, machine, markdown
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

USES = {
    "cpu": ("ONNX Runtime", "sampling on CPUs"),
    "openvino": ("OpenVINO", "sampling on x86 CPUs, int8 fast"),
    "serve": ("Starlette, uvicorn, prometheus-client", "`unnoise serve`, next to `cpu`"),
    "plot": ("matplotlib", "`runtime.bench --plot`, next to `cpu`"),
    "train": ("PyTorch", "`trainer`"),
    "export": ("`train`, `cpu`, ONNX's tools, matplotlib", "`export`"),
    "diffusers": ("`export`, diffusers", "exporting its folders"),
    "data": ("`train`, datasets, webdataset", "training on tables and tar files"),
}
"""What an extra adds, and for what."""
OWN = "unnoise"


def required(requirements: Iterable[str], extras: Iterable[str] = ()) -> Iterator[Requirement]:
    """Yield the requirements that apply to this Python and system."""
    environments = [{"extra": extra} for extra in ("", *extras)]
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is None or any(marker.evaluate(environment) for environment in environments):
            yield requirement


def packages(waiting: list[Requirement]) -> set[str]:
    """Return the names of the installed packages that requirements need, directly or not."""
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key not in seen:
            seen.add(key)
            needed = metadata.distribution(key[0]).requires or []
            waiting += required(needed, requirement.extras)
    return {name for name, _ in seen} - {OWN}


def megabytes(package: str) -> float:
    """Return the size of a package's files."""
    paths = [Path(str(f.locate())) for f in metadata.distribution(package).files or []]
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6


def table() -> str:
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = []
    for extra, (adds, use) in USES.items():
        needed = [*project["dependencies"], *project["optional-dependencies"][extra]]
        # An extra may name other extras of this project, whose own metadata lists them.
        names = packages(list(required(needed)))
        size = sum(map(megabytes, names))
        rows.append([f"`{extra}`", adds, use, str(len(names)), f"{size:,.0f}"])
    return markdown(["extra", "adds", "for", "packages", "MB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="refresh docs/install.md")
    given = parser.parse_args()
    torch = metadata.version("torch")
    source = (
        f"Counted by `benchmarks/installed.py` with torch {torch}, on {machine()}. unnoise itself is "
        "not counted."
    )
    text = f"{table()}\n\n{source}"
    print(text)
    if given.write:
        fill(Path("docs/install.md"), "extras", text)


if __name__ == "__main__":
    main()
