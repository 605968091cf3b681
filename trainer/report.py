"""One page about a run: python -m trainer.report RUN writes RUN/report.html."""

from __future__ import annotations

import argparse
import base64
import html
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from runtime.files import write_text
from runtime.terminal.output import say
from runtime.terminal.verbs import program, run_verb

from .runs import log
from .runs.folder import read_run, read_starts
from .runs.log import BUCKET_COLUMNS, QUALITY_COLUMNS

WIDTH = 460
HEIGHT = 220
EDGE = 44
COLOURS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
    "#17becf",
)
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:62em;padding:0 1em;color:#222}
h1,h2{font-weight:600}
figure{display:inline-block;margin:0 1em 1em 0;vertical-align:top}
figcaption{color:#555}
table{border-collapse:collapse}
td,th{padding:.15em .8em .15em 0;text-align:left;vertical-align:top}
img{max-width:100%;image-rendering:pixelated}
svg text{font-size:11px;fill:#555}
details{margin:.5em 0}
"""
Points = list[tuple[float, float]]


def points(rows: Iterable[dict[str, str]], column: str) -> Points:
    """Return (step, value) of the rows that have a value."""
    found = [(float(row["step"]), float(row[column])) for row in rows if row.get(column)]
    return [(x, y) for x, y in found if math.isfinite(y)]


def chart(title: str, curves: dict[str, Points], logarithmic: bool = False) -> str:
    """Return curves over steps as an SVG figure, "" if there are no points."""
    # A logarithm has no place for 0.
    curves = {
        name: [(x, y) for x, y in found if y > 0 or not logarithmic]
        for name, found in curves.items()
    }
    curves = {name: found for name, found in curves.items() if found}
    if not curves:
        return ""

    def height(y: float) -> float:
        return math.log10(y) if logarithmic else y

    every = [point for found in curves.values() for point in found]
    x_low = min(x for x, _ in every)
    x_high = max(x for x, _ in every)
    y_low = min(height(y) for _, y in every)
    y_high = max(height(y) for _, y in every)

    # `or 1`: a curve of one point, or of equal values, has no extent.
    def place(x: float, y: float) -> str:
        across = (x - x_low) / (x_high - x_low or 1) * (WIDTH - EDGE - 8)
        up = (height(y) - y_low) / (y_high - y_low or 1) * (HEIGHT - 38)
        return f"{EDGE + across:.1f},{HEIGHT - 22 - up:.1f}"

    drawn = []
    for i, (name, found) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(place(x, y) for x, y in found)
        drawn.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{path}"/>'
        )
        if len(curves) > 1:
            drawn.append(
                f'<text x="{EDGE + 6 + i * 40}" y="12" '
                f'style="fill:{colour}">{html.escape(name)}</text>'
            )
    ends = [(y_low, HEIGHT - 22), (y_high, 20)]
    drawn += [f'<text x="2" y="{y}">{10**v if logarithmic else v:.3g}</text>' for v, y in ends]
    drawn += [f'<text x="{EDGE}" y="{HEIGHT - 4}">step {x_low:.0f}</text>']
    drawn += [f'<text x="{WIDTH - 8}" y="{HEIGHT - 4}" text-anchor="end">{x_high:.0f}</text>']
    frame = (
        f'<rect x="{EDGE}" y="16" width="{WIDTH - EDGE - 8}" height="{HEIGHT - 38}" '
        'fill="none" stroke="#ddd"/>'
    )
    return (
        f'<figure><svg width="{WIDTH}" height="{HEIGHT}" role="img">{frame}{"".join(drawn)}</svg>'
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
    )


def table(pairs: Iterable[tuple[str, object]]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in pairs
    )
    return f"<table>{rows}</table>"


def picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="">'
        f"<figcaption>{html.escape(path.stem)}</figcaption></figure>"
    )


def chosen(paths: Sequence[Path], most: int = 6) -> list[Path]:
    """Return at most so many paths, evenly spaced, with the first and the last."""
    if len(paths) <= most:
        return list(paths)
    return [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]


def curves_of(run: Path) -> str:
    rows = log.read(run / "log.csv")
    quality = log.read(run / "quality.csv")

    def one(title: str, column: str, logarithmic: bool = False) -> str:
        return chart(title, {column: points(rows, column)}, logarithmic)

    tenths = {str(i): points(rows, column) for i, column in enumerate(BUCKET_COLUMNS)}
    return "".join(
        [
            one("loss", "loss", logarithmic=True),
            chart(
                "loss in each tenth of the schedule, 0 the least noisy", tenths, logarithmic=True
            ),
            one("norm of the gradient before clipping", "grad_norm", logarithmic=True),
            one("learning rate", "learning_rate"),
            one("pictures a second", "pictures_per_s"),
            one("share of the time spent waiting for pictures", "waiting"),
            one("share of the machine's measured peak", "of_peak"),
            *(chart(name, {name: points(quality, name)}) for name in QUALITY_COLUMNS[1:]),
        ]
    )


def summary(run: Path) -> list[tuple[str, object]]:
    """Return the first lines of the page: the data, the length of training, the images left out."""
    config, rest = read_run(run)
    rows = log.read(run / "log.csv")
    record = rest["data_record"]
    found: list[tuple[str, object]] = [
        (
            "data",
            f"{record['name']}: {record['pictures']} pictures of {rest['sample_shape']}, "
            f"{record['note']}",
        ),
        ("fingerprint", record["fingerprint"]),
        ("classes", len(rest["classes"])),
    ]
    if rows:
        last = rows[-1]
        found += [
            (
                "trained",
                f"{last['step']} of {config.steps} steps, {last.get('pictures') or '?'} pictures, "
                f"{float(last.get('seconds') or 0):.0f} s",
            ),
            ("last loss", last.get("loss") or "not finite"),
            ("pictures that could not be read", last.get("bad") or 0),
        ]
    if best := sorted((run / "best").glob("step-*")):
        found.append(("best checkpoint", best[-1].name))
    return found


def report(run: Path) -> str:
    """Return the page, which needs no other file: images are part of it.

    Raises:
        CheckpointError: `run` is not a run, or its logs are damaged.
    """
    config, _ = read_run(run)
    starts = read_starts(run)
    grids = [picture(path) for path in chosen(sorted(run.glob("samples/step-*.png")))]
    parts = [
        f"<h1>{html.escape(run.name)}</h1>",
        table(summary(run)),
        "<h2>Curves</h2>",
        curves_of(run) or "<p>The log has no rows yet.</p>",
        "<h2>Samples</h2>",
        "".join(grids) or "<p>None were made.</p>",
        "<h2>Config</h2>",
        f"<details><summary>every option</summary>{table(config.to_json().items())}</details>",
        "<h2>Starts</h2>",
    ]
    for start in starts:
        title = html.escape(
            f"{start['time']}, from step {start['step']}, commit {start.get('commit')}"
        )
        rest = {
            **start.get("environment", {}),
            **start.get("versions", {}),
            **{k: start[k] for k in ("parameters", "flops", "peak_flops") if k in start},
        }
        parts.append(f"<details><summary>{title}</summary>{table(rest.items())}</details>")
    name = html.escape(run.name)
    head = f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{STYLE}</style>"
    return head + "\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog=program("trainer.report"), description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    return run_verb(parser, _act, arguments)


def _act(given: argparse.Namespace) -> None:
    page = given.run / "report.html"
    write_text(page, report(given.run))
    say(page)


if __name__ == "__main__":
    sys.exit(main())
