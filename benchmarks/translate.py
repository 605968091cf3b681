"""How well `translate` moves an emoji to the other style, compared with its drawn counterpart.

    python benchmarks/translate.py [BUNDLE] [--minutes M] [--write]

Every held-out emoji of trainer/data/assets/emoji32.npz (index % 10 == 0) is translated both ways:
its category stays and its style changes. Emoji are left out if an image of theirs, in either style,
is byte-identical to a training image. The scores are those of the saved images, of 0 … 255:

- RMS: distance to the counterpart, over pixels and channels in -1 … 1, mean over emoji.
- style: share that a classifier assigns to the target style.
- top 1: share whose counterpart is the nearest of all these emoji in the target style, for a
  network that places images by content.
- top 5: share whose counterpart is among the nearest five.
- hit: in the target style and in the top 5 at once. Settings are chosen by this score.

The judges are trained here, on training emoji alone (judges.py). A sweep's best setting is chosen
on every second emoji and reported on the others, and the other way round. So no reported image
influenced the choice. Seeds of SDEdit are 0, 1, ….

Results are stored in out/translate, so the same command resumes; --minutes stops it cleanly. Takes
an hour on two cores. --write refreshes docs/translation.md and its sheet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from figures import fill, machine
from judges import OUT, Emoji, Judges, Made, Scores, emoji
from numpy.typing import NDArray

from runtime import Sampler
from runtime.files import replacing
from runtime.images import from_uint8, save, tile, to_uint8
from runtime.terminal.progress import track
from trainer.data.builtin import STYLES

GUIDANCES = (1.0, 2.0, 3.0, 5.0, 8.0, 12.0)
STRENGTHS = {
    "translate": {0.3: 12, 0.35: 12, 0.4: 12, 0.5: 8, 0.6: 5, 1.0: 3},
    "stylize": {0.4: 5, 0.6: 5, 0.7: 3, 1.0: 2},
}
"""And the most guidance that each is tried with: more is worse, the more is walked."""
INTERVALS = ((0.0, 2.0),)
STEPS = 25
WALKS = (
    ("ddim", "log_snr(7)", 50),
    ("dpmpp_2m", "log_snr", 50),
)
PICTURE_EVERY = 11


class Setting(NamedTuple):
    """A method of `Sampler`, and its arguments besides the images and labels. "again": translated
    into its own style."""

    verb: str
    how: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        """ "guidance 3, strength 0.6, 25 steps"."""
        told = [
            f"`{v}`" if isinstance(v, str) else f"{k.replace('_', ' ')} {v}"
            for k, v in self.how
            if k != "steps"
        ]
        return ", ".join([*told, *(f"{v} steps" for k, v in self.how if k == "steps")])


def setting(verb: str, **how: Any) -> Setting:
    return Setting(verb, tuple(sorted(how.items())))


PLAIN, AGAIN = (
    setting(verb, solver="dpmpp_2m", grid="log_snr", steps=50, guidance=1.0)
    for verb in ("translate", "again")
)
DEFAULT = setting("translate", strength=0.4, guidance=3.0, steps=50)
ANEW = setting("stylize", strength=1.0, guidance=2.0, steps=STEPS)


def plan() -> dict[str, list[Setting]]:
    """The runs of the network, by their table."""
    sweeps = {
        verb: [
            setting(verb, strength=s, guidance=g, steps=STEPS)
            for s, most in tried.items()
            for g in GUIDANCES
            if g <= most
        ]
        for verb, tried in STRENGTHS.items()
    }
    within = product(INTERVALS, (3.0, 5.0))
    sweeps["within"] = [
        setting("translate", guidance_interval=i, guidance=g, steps=STEPS) for i, g in within
    ]
    walks = [
        setting(verb, solver=solver, grid=grid, steps=steps, guidance=1.0)
        for (solver, grid, steps), verb in product(WALKS, ("translate", "again"))
    ]
    return {**sweeps, "walks": walks, "rest": [DEFAULT]}


class Maker:
    """Makes what settings say, and keeps it in out/translate."""

    def __init__(self, sampler: Sampler, held: Emoji) -> None:
        self.sampler, self.held = sampler, held
        files = sampler.bundle.files
        same = [
            files[name].sha256
            for name in ("fp32/step.onnx", "fp32/step_guided.onnx", "fp32/weights.bin")
        ]
        self.key = json.dumps([same, hashlib.sha256(held.images.tobytes()).hexdigest()])

    def path(self, setting: Setting) -> Path:
        return OUT / f"{hashlib.sha256(f'{self.key} {setting!r}'.encode()).hexdigest()[:20]}.npz"

    def __call__(self, setting: Setting) -> Made:
        path = self.path(setting)
        if not path.exists():
            made = np.stack([to_uint8(self._one(setting, style)) for style in (0, 1)])
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, made=made)
        return np.load(path)["made"]

    def _one(self, setting: Setting, style: int) -> Any:
        count = len(self.held.categories)
        source, target = (list(self.held.category + count * s) for s in (style, 1 - style))
        x = list(self.held.images[:, style])
        if setting.verb == "stylize":
            return self.sampler.stylize(x, label=target, **dict(setting.how))
        return self.sampler.translate(
            x, source, source if setting.verb == "again" else target, **dict(setting.how)
        )


def untouched(held: Emoji) -> Made:
    """The unchanged images."""
    return held.images.swapaxes(0, 1)


def recoloured(held: Emoji, train: Emoji) -> Made:
    """Each channel's mean and deviation brought from those of the category's training images in one
    style to those in the other.
    """
    made = np.empty_like(untouched(held))
    for style, category in product((0, 1), range(len(held.categories))):
        here, there = (
            train.images[train.category == category, s].reshape(-1, 3).astype(float)
            for s in (style, 1 - style)
        )
        mine = held.category == category
        z = (held.images[mine, style] - here.mean(0)) / here.std(0)
        made[style, mine] = np.clip(np.round(z * there.std(0) + there.mean(0)), 0, 255)
    return made


def looked_up(held: Emoji, train: Emoji) -> Made:
    """The training emoji of the category whose image is nearest in pixels, as it is drawn in the
    other style."""
    made = np.empty_like(untouched(held))
    for style, (i, category) in product((0, 1), enumerate(held.category)):
        mine = np.flatnonzero(train.category == category)
        apart = train.images[mine, style].astype(float) - held.images[i, style]
        made[style, i] = train.images[mine[(apart**2).sum((1, 2, 3)).argmin()], 1 - style]
    return made


def chosen(
    settings: Sequence[Setting], scores: Mapping[Setting, Scores]
) -> tuple[Setting, Setting]:
    """For the even emoji the setting with most hits on the odd ones, and the other way round."""

    def best(half: int) -> Setting:
        return max(settings, key=lambda s: scores[s].hit[:, 1 - half :: 2].mean())

    return best(0), best(1)


def mixed(even: Any, odd: Any) -> Any:
    """[2, n, ...]: every second emoji from the one, and from the other."""
    found = even.copy()
    found[:, 1::2] = odd[:, 1::2]
    return found


def percent(values: Any) -> str:
    return f"{100 * np.mean(values):.0f}"


def both(values: NDArray[Any], show: Callable[[Any], str] = percent) -> str:
    """ "78 / 82": by direction."""
    return " / ".join(show(v) for v in values)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def methods(rows: Mapping[str, Scores]) -> str:
    """The table of methods, noto → twemoji / twemoji → noto."""
    head = ("noto → twemoji / twemoji → noto", "RMS", "style, %", "top 1, %", "top 5, %", "hit, %")
    return table(
        head,
        [
            (name, both(s.rms, lambda v: f"{v.mean():.2f}"), *(both(v) for v in s[1:]))
            for name, s in rows.items()
        ],
    )


def sweep(settings: Sequence[Setting], scores: Mapping[Setting, Scores], by: str) -> str:
    """Hits, and in brackets style and top 5, all in percent: one row per value of `by`, one column
    per guidance.
    """
    cells: dict[Any, dict[float, str]] = {}
    for s in settings:
        how, found = dict(s.how), scores[s]
        cell = f"{percent(found.hit)} ({percent(found.style)}, {percent(found.five)}) {found.rms.mean():.2f}"
        cells.setdefault(how[by], {})[how["guidance"]] = cell
    guidances = sorted({g for row in cells.values() for g in row})
    rows = [(f"{value}", *(row.get(g, "") for g in guidances)) for value, row in cells.items()]
    return table((f"{by.replace('_', ' ')} \\ guidance", *(f"{g:g}" for g in guidances)), rows)


def walks(
    settings: Sequence[Setting], scores: Mapping[Setting, Scores], held: Emoji, made: Maker
) -> str:
    """How nearly an image comes back under its own label, and how translation then scores, by
    solver, grid and steps."""
    rows = []
    for there, again in zip(settings[::2], settings[1::2], strict=True):
        how, found = dict(there.how), scores[there]
        apart = from_uint8(made(again).reshape(-1, 32, 32, 3)) - from_uint8(
            untouched(held).reshape(-1, 32, 32, 3)
        )
        error = np.sqrt((apart**2).mean((1, 2, 3))).mean()
        numbers = (percent(v) for v in (found.style, found.first, found.five, found.hit))
        rows.append(
            (f"`{how['solver']}` on `{how['grid']}`", str(how["steps"]), f"{error:.3f}", *numbers)
        )
    return table(
        ("", "steps", "round trip, RMS", "style, %", "top 1, %", "top 5, %", "hit, %"), rows
    )


def by_category(rows: Mapping[str, Scores], held: Emoji) -> str:
    """Hits, and in brackets style and top 5, of both directions together."""
    lines = []
    for number, name in enumerate(held.categories):
        mine = held.category == number
        cells = [
            f"{percent(s.hit[:, mine])} ({percent(s.style[:, mine])}, {percent(s.five[:, mine])})"
            for s in rows.values()
        ]
        lines.append((name, str(mine.sum()), *cells))
    return table(("category", "emoji", *rows), lines)


def against(a: Scores, b: Scores, measure: str) -> str:
    """ "+3.2 ± 2.1": by how many points more of a's than of b's, with the standard error over
    emoji."""
    change = 100 * (getattr(a, measure).astype(float) - getattr(b, measure)).mean(0)
    return f"{change.mean():+.1f} ± {change.std(ddof=1) / np.sqrt(len(change)):.1f}"


def picture(path: Path, rows: Mapping[str, Made], held: Emoji, every: int) -> None:
    """Save a sheet of every `every`-th emoji: one row per method, Noto's into Twemoji's above, the
    other way below.
    """
    from PIL import Image, ImageDraw, ImageFont

    some, margin, scale = slice(every // 2, None, every), 150, 2
    sheets = []
    for style in (0, 1):
        stack = {
            f"{STYLES[style]}": untouched(held)[style],
            **{n: m[style] for n, m in rows.items()},
        }
        stack[f"{STYLES[1 - style]}, true"] = held.images[:, 1 - style]
        pictures = np.concatenate([images[some] for images in stack.values()])
        sheet = tile(pictures, len(pictures) // len(stack)).repeat(scale, 0).repeat(scale, 1)
        canvas = Image.new("RGB", (margin + sheet.shape[1], sheet.shape[0] + 20), "white")
        canvas.paste(Image.fromarray(sheet), (margin, 0))
        for i, name in enumerate(stack):
            place = (8, scale * (34 * i + 12))
            ImageDraw.Draw(canvas).text(place, name, "black", ImageFont.load_default(17))
        sheets.append(np.asarray(canvas))
    save(path, np.concatenate(sheets))


def report(
    judges: Judges,
    made: Maker,
    train: Emoji,
    held: Emoji,
    todo: Mapping[str, list[Setting]],
    write: bool,
) -> None:
    """Judge all that was made; print the tables, or write them where they belong."""
    scores = {s: judges(made(s)) for group in todo.values() for s in group}
    ours, theirs = (
        chosen(group, scores) for group in ([*todo["translate"], *todo["within"]], todo["stylize"])
    )
    best = {
        name: mixed(*(made(s) for s in pair))
        for name, pair in (("translate", ours), ("SDEdit", theirs))
    }
    own = {name: judges(pictures) for name, pictures in best.items()}
    rows = {
        "left alone": judges(untouched(held)),
        "colours moved to the other style's": judges(recoloured(held, train)),
        "nearest training image's counterpart": judges(looked_up(held, train)),
        "a new sample of the label": scores[ANEW],
        "there and back under its own label": scores[AGAIN],
        "`translate`, the whole way, unguided": scores[PLAIN],
        "`translate`, defaults": scores[DEFAULT],
        "`translate`, chosen": own["translate"],
        "SDEdit, chosen": own["SDEdit"],
        "the counterpart itself": judges(untouched(held)[::-1]),
    }
    sentence = (
        f"{len(held.images)} emoji. Chosen for `translate`: {ours[0]} (even emoji) and {ours[1]} "
        f"(odd); for SDEdit: {theirs[0]} and {theirs[1]}. "
        f"The difference between translate and SDEdit, in points: hit "
        f"{against(own['translate'], own['SDEdit'], 'hit')}, "
        f"top 1 {against(own['translate'], own['SDEdit'], 'first')}, style "
        f"{against(own['translate'], own['SDEdit'], 'style')}."
    )
    source = f"Measured by `benchmarks/translate.py` on `{made.sampler.bundle.name}`, on {machine()}, torch {torch.__version__}."
    texts = {
        "methods": f"{methods(rows)}\n\n{sentence}\n\n{source}",
        "sweep": sweep([*todo["translate"]], scores, "strength"),
        "interval": sweep(todo["within"], scores, "guidance_interval"),
        "sdedit": sweep(todo["stylize"], scores, "strength"),
        "walks": walks(todo["walks"], scores, held, made),
        "categories": by_category({"left alone": rows["left alone"], **own}, held),
    }
    docs = Path("docs") if write else OUT
    picture(docs / "translation.png", best, held, PICTURE_EVERY)
    for name, text in texts.items():
        print(text, end="\n\n")
        if write:
            fill(docs / "translation.md", name, text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, default=Path("bundles/emoji32"))
    parser.add_argument(
        "--minutes",
        type=float,
        default=1e9,
        help="start nothing new after this many minutes, and report what is left",
    )
    parser.add_argument(
        "--backend",
        default="auto",
        help="of the sampler [onnxruntime]; stored results of any backend are used",
    )
    parser.add_argument("--precision", default="auto", help="of the sampler [fp32]")
    parser.add_argument(
        "--write", action="store_true", help="refresh docs/translation.md and docs/translation.png"
    )
    given = parser.parse_args()
    stop = time.monotonic() + 60 * given.minutes
    train, held = emoji()
    made, todo = Maker(Sampler.load(given.bundle, given.backend, given.precision), held), plan()
    every = [s for group in todo.values() for s in group]
    left = [s for s in every if not made.path(s).exists()]
    for done, s in enumerate(track(left, "translating")):
        if time.monotonic() > stop:
            raise SystemExit(
                f"{len(left) - done} of {len(every)} settings are left: re-run the same command to resume."
            )
        made(s)
    report(Judges(train, held), made, train, held, todo, given.write)


if __name__ == "__main__":
    main()
