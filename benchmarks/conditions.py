"""What conditioned networks reach on emoji that they never saw.

    python benchmarks/conditions.py [--restyle BUNDLE] [--regression BUNDLE] [--superres BUNDLE]
                                    [--write]

Restyling, by the judges of docs/translation.md: each held-out emoji in one style is given, and the
other is wanted. Compared are a network that was trained on pairs; one of the same size that was
trained on pairs to predict the image at once (`--prediction x0`, pure noise alone); and `translate`
and SDEdit with `emoji32`, which saw no pairs. The guidance of the first, or its steps if it is
distilled, are chosen on every second emoji and reported on the others, as in translate.py, whose
choices the last two have.

Super-resolution from 16 to 32 pixels, of the same emoji in both styles: the Fréchet distance of the
results to the originals; their RMS distance; and how well they agree with the input after
averaging, as a PSNR over all pixels.

--write refreshes docs/translation.md, docs/conditions.md and their sheets. Takes fifteen minutes on
two cores, of them eight for the judges' training.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import fill, machine, markdown
from judges import Emoji, Judges, Made, Scores, emoji
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F
from translate import Maker, Setting, chosen, methods, mixed, picture, setting, untouched

from runtime import Sampler
from runtime.images import from_uint8, save, tile, to_uint8
from trainer.config import Config
from trainer.data.builtin import emoji as training_emoji
from trainer.quality.distances import frechet
from trainer.quality.judge import Judge

GUIDANCES = (1.0, 1.5, 2.0, 3.0, 5.0)
STEPS = 25
TRANSLATE = setting("translate", strength=0.4, guidance=5.0, steps=STEPS)
SDEDIT = setting("stylize", strength=0.6, guidance=5.0, steps=STEPS)
"""What translate.py chose."""
PICTURE_EVERY = 11
CALLS = (4, 10, 25)
"""Steps of super-resolution."""
UInt8 = NDArray[np.uint8]


def restyled(sampler: Sampler, held: Emoji, guidance: float, steps: int) -> Made:
    """Every emoji in the other style, given the one; seeds 0, 1, …"""
    count = len(held.categories)
    made = []
    for style in (0, 1):
        label = [int(c) + count * (1 - style) for c in held.category]
        made.append(
            sampler.pictures(
                len(label),
                label=label,
                guidance=guidance,
                steps=steps,
                conditions={"source": list(held.images[:, style])},
            )
        )
    return np.stack(made)


def tried(sampler: Sampler) -> dict[Setting, tuple[float, int]]:
    """Guidance and steps by their setting."""
    if sampler.bundle.distilled:
        return {
            setting("sample", steps=n): (1.0, n) for n in sorted(sampler.bundle.distilled.levels)
        }
    return {setting("sample", guidance=g, steps=STEPS): (g, STEPS) for g in GUIDANCES}


def restyle(given: argparse.Namespace) -> None:
    train, held = emoji()
    judges = Judges(train, held)
    sampler = Sampler.load(given.restyle)
    unpaired = Maker(Sampler.load("emoji32"), held)
    swept = {s: restyled(sampler, held, *how) for s, how in tried(sampler).items()}
    scores = {s: judges(images) for s, images in swept.items()}
    pair = chosen(list(swept), scores)
    made: dict[str, Made] = {
        "SDEdit": unpaired(SDEDIT),
        "translate": unpaired(TRANSLATE),
    }
    if given.regression:
        made["regression"] = restyled(Sampler.load(given.regression), held, 1.0, 1)
    made["pairs"] = mixed(*(swept[s] for s in pair))
    names = {
        "SDEdit": "SDEdit, chosen",
        "translate": "`translate`, chosen",
        "regression": "trained on pairs, regression",
    }
    rows: dict[str, Scores] = {"left alone": judges(untouched(held))}
    rows |= {names[name]: judges(images) for name, images in made.items() if name != "pairs"}
    rows |= {f"trained on pairs, {s}": scores[s] for s in swept} if len(swept) > 1 else {}
    rows["trained on pairs, chosen"] = judges(made["pairs"])
    rows["the counterpart itself"] = judges(untouched(held)[::-1])
    hits = {name: 100 * score.hit.mean() for name, score in rows.items()}
    apart = {name: score.rms.mean() for name, score in rows.items()}
    best = "trained on pairs, chosen"
    text = (
        f"{methods(rows)}\n\n{len(held.images)} emoji, both ways. Trained on pairs, chosen: "
        f"{pair[0]} (even emoji) and {pair[1]} (odd); hits {hits[best]:.1f} %, RMS "
        f"{apart[best]:.3f}. Measured by `benchmarks/conditions.py` on `{sampler.bundle.name}` and "
        f"`emoji32`, on {machine()}, torch {torch.__version__}."
    )
    folder = Path("docs") if given.write else Path("out")
    picture(folder / "restyling.png", made, held, PICTURE_EVERY)
    finish(given, "translation.md", "pairs", text)


def halved(x: NDArray[Any]) -> NDArray[np.float32]:
    """The mean of each 2x2 pixels of [n, C, H, W]."""
    return F.avg_pool2d(torch.from_numpy(x), 2).numpy()


def bicubic(small: UInt8) -> UInt8:
    size = (2 * small.shape[2], 2 * small.shape[1])
    return np.stack([np.asarray(Image.fromarray(s).resize(size, Image.BICUBIC)) for s in small])


def superres(given: argparse.Namespace) -> None:
    _, held = emoji()
    original = held.images.reshape(-1, *held.images.shape[2:])  # [2n, 32, 32, 3]
    low_res = halved(from_uint8(original))
    sampler = Sampler.load(given.superres)
    config = Config.from_json(sampler.bundle.provenance["config"])
    judge = Judge(config, training_emoji(config.split), None, torch.device("cpu"))
    real = judge.features(original)
    made: dict[str, UInt8] = {
        "each pixel four times": to_uint8(low_res).repeat(2, 1).repeat(2, 2),
        "bicubic": bicubic(to_uint8(low_res)),
    }
    for steps in CALLS:
        made[f"`{sampler.bundle.name}`, {steps} steps"] = sampler.pictures(
            len(original), steps=steps, conditions={"low_res": low_res}
        )
    rows = []
    for name, images in made.items():
        x = from_uint8(images)
        agrees = np.square(halved(x) - low_res, dtype=np.float64).mean()
        rms = np.sqrt(np.square(x - from_uint8(original), dtype=np.float64).mean((1, 2, 3))).mean()
        psnr = 10 * np.log10(4 / agrees)
        distance = frechet(real, judge.features(images))
        rows.append([name, f"{distance:.2f}", f"{rms:.3f}", f"{psnr:.1f}"])
    text = (
        f"{markdown(['', 'Fréchet', 'RMS', 'PSNR to the input, dB'], rows)}\n\n"
        f"{len(original)} images that no network saw; smaller is better, but for the last column. "
        f"Distances are to the originals. Measured by `benchmarks/conditions.py` on {machine()}."
    )
    some = slice(PICTURE_EVERY // 2, None, 2 * PICTURE_EVERY)
    shown = [*(images[some] for images in made.values()), original[some]]
    sheet = tile(np.concatenate(shown), len(shown[0])).repeat(2, 0).repeat(2, 1)
    save(Path("docs" if given.write else "out") / "superres.png", sheet)
    finish(given, "conditions.md", "superres", text)


def finish(given: argparse.Namespace, page: str, name: str, text: str) -> None:
    print(text, end="\n\n", flush=True)
    if given.write:
        fill(Path("docs") / page, name, text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--restyle", type=Path, metavar="BUNDLE")
    parser.add_argument("--regression", type=Path, metavar="BUNDLE")
    parser.add_argument("--superres", type=Path, metavar="BUNDLE")
    parser.add_argument("--write", action="store_true", help="refresh the documents")
    given = parser.parse_args()
    if given.restyle:
        restyle(given)
    if given.superres:
        superres(given)


if __name__ == "__main__":
    main()
