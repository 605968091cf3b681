"""Draw the figures of the book.

    python docs/learn/figures.py [--only NAME] [--out FOLDER]

Run it in the project's folder. The same versions of the libraries give the same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from drawing import (
    COLOURS,
    Array,
    category,
    denoiser,
    digits,
    emoji,
    gallery,
    gaussian_error,
    jump,
    plots,
)
from matplotlib.figure import Figure

from runtime import Sampler, Stream, make_schedule, noise
from runtime.diffusion.program import precondition

BUNDLE = "bundles/emoji32"
SCHEDULES = ("linear", "scaled_linear", "cosine", "sigmoid", "flow", "edm")
PREDICTIONS = ("epsilon", "v", "x0", "flow")
FACE = 0  # a held-out emoji, "grinning"


def forward() -> Figure:
    """A digit and an emoji on the way to noise."""
    schedule = make_schedule("linear")
    times = (0, 10, 50, 100, 200, 400, 700, 1000)
    rows = []
    for x in (digits()[0], emoji(FACE)):
        kept = [x]
        for t in range(1, 1001):
            beta = schedule.beta[t - 1]
            x = np.sqrt(1 - beta) * x + np.sqrt(beta) * noise(0, Stream.ENCODE, t, x.shape)
            kept.append(x)
        rows.append([kept[t] for t in times])
    return gallery(rows, [f"t = {t}" for t in times], ["digit", "emoji"])


def variance() -> Figure:
    """What three choices of the mean do to the variance of a pixel."""
    beta = make_schedule("linear").beta
    figure, (axes,) = plots(1)
    choices = (
        (r"mean $x_{t-1}$", np.ones_like(beta)),
        (r"mean $\sqrt{1-\beta_t}\,x_{t-1}$", np.sqrt(1 - beta)),
        (r"mean $(1-\beta_t)\,x_{t-1}$", 1 - beta),
    )
    for label, factor in choices:
        v = [1.0]
        for a, b in zip(factor, beta, strict=True):
            v.append(a**2 * v[-1] + b)
        axes.plot(v, label=label)
    axes.set(xlabel="t", ylabel="variance of a pixel", yscale="log", yticks=[0.5, 1, 2, 5, 10])
    axes.set_yticklabels(["0.5", "1", "2", "5", "10"])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return figure


def jumps() -> Figure:
    """One pixel of many chains, and the density of the jump."""
    schedule = make_schedule("linear")
    x = np.full(40_000, 0.8)
    rng = np.random.default_rng(0)
    figure, (axes,) = plots(1)
    wanted = {50: COLOURS[0], 200: COLOURS[1], 600: COLOURS[2]}
    at = np.linspace(-3.5, 3.5, 400)
    for t in range(1, 601):
        beta = schedule.beta[t - 1]
        x = np.sqrt(1 - beta) * x + np.sqrt(beta) * rng.standard_normal(x.size)
        if t in wanted:
            axes.hist(x, 120, range=(-3.5, 3.5), density=True, color=wanted[t], alpha=0.35)
            m, s = schedule.alpha[t - 1] * 0.8, schedule.sigma[t - 1]
            density = np.exp(-((at - m) ** 2) / (2 * s**2)) / (s * np.sqrt(2 * np.pi))
            axes.plot(at, density, color=wanted[t], label=f"t = {t}")
    axes.axvline(0.8, color="black", linewidth=1, linestyle=":")
    axes.text(0.7, 2.55, "$x_0$", ha="right")
    axes.set(
        xlabel="value of one pixel of $x_t$", ylabel="density", xlim=(-3.5, 3.5), ylim=(0, 2.8)
    )
    axes.legend(frameon=False, title="bars: chain, line: jump")
    return figure


def schedules() -> Figure:
    """An emoji under each schedule, at equal parts of the way, at unit scale."""
    shares = (0.05, 0.15, 0.3, 0.5, 0.7, 0.85, 1.0)
    rows = []
    for name in SCHEDULES:
        schedule = make_schedule(name)
        scale = np.hypot(schedule.alpha, schedule.sigma)
        indices = [round(share * 1000) for share in shares]
        rows.append([jump(emoji(FACE), schedule, t) / scale[t - 1] for t in indices])
    return gallery(rows, [f"t/T = {share:g}" for share in shares], SCHEDULES)


def snr() -> Figure:
    """log-SNR along each schedule."""
    figure, (axes,) = plots(1)
    for name in SCHEDULES:
        schedule = make_schedule(name)
        axes.plot(np.arange(1, 1001) / 1000, schedule.log_snr, label=name)
    axes.axhline(0, color="black", linewidth=1, linestyle=":")
    axes.text(0.01, -1.8, "SNR = 1", fontsize=8)
    axes.set(xlabel="t/T", ylabel=r"log SNR = $\log(\alpha_t^2/\sigma_t^2)$", ylim=(-20, 15))
    axes.legend(frameon=False, ncols=2)
    return figure


def subtract() -> Figure:
    """What subtracting noise gives, and what the best guess is."""
    schedule, data = make_schedule("linear"), digits()
    times = (50, 200, 400, 600, 1000)
    names = ("x_0", "x_t", "minus fresh noise", "minus the true noise", "best guess")
    rows: list[list[Array]] = [[] for _ in names]
    for t in times:
        alpha, sigma = schedule.alpha[t - 1], schedule.sigma[t - 1]
        x_t = jump(data[0], schedule, t)
        true, fresh = (noise(seed, Stream.ENCODE, 0, x_t.shape) for seed in (0, 1))
        guess = denoiser(x_t[None], alpha, sigma, data)[0]
        column = (data[0], x_t, (x_t - sigma * fresh) / alpha, (x_t - sigma * true) / alpha, guess)
        for row, image in zip(rows, column, strict=True):
            row.append(image)
    labels = [name.replace("x_0", "$x_0$").replace("x_t", "$x_t$") for name in names]
    return gallery(rows, [f"t = {t}" for t in times], labels)


def posterior() -> Figure:
    """Two Gaussians and their product, for one pixel."""
    schedule = make_schedule("linear", T=50)
    t, x_0, x_t = 12, 0.8, -0.9
    beta, alpha, sigma = schedule.beta[t - 1], schedule.alpha[t - 2], schedule.sigma[t - 2]
    at = np.linspace(-2.2, 2.2, 800)
    step = np.exp(-((x_t - np.sqrt(1 - beta) * at) ** 2) / (2 * beta))
    prior = np.exp(-((at - alpha * x_0) ** 2) / (2 * sigma**2))
    figure, (axes,) = plots(1)
    for values, label in (
        (prior, r"$q(x_{t-1}\mid x_0)$: near $\alpha_{t-1}x_0$"),
        (step, r"$q(x_t\mid x_{t-1})$: $x_{t-1}$ that lead to $x_t$"),
        (prior * step, r"product: $q(x_{t-1}\mid x_t, x_0)$"),
    ):
        axes.plot(at, values / (values.sum() * (at[1] - at[0])), label=label)
    axes.set(xlabel="$x_{t-1}$", ylabel="density", ylim=(0, 1.9))
    for value, name in ((x_0, "$x_0$"), (x_t, "$x_t$")):
        axes.plot([value], [0], "k^", clip_on=False)
        axes.text(value, 0.07, name, ha="center")
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def predictions() -> Figure:
    """What a network must output for each prediction, and how far its error is amplified."""
    schedule, x_0 = make_schedule("cosine"), emoji(FACE)
    eps = noise(0, Stream.ENCODE, 0, x_0.shape)
    shares = (0.02, 0.25, 0.5, 0.75, 0.98)
    levels = [(schedule.alpha[i], schedule.sigma[i]) for i in (int(1000 * s) - 1 for s in shares)]
    rows = [[a * x_0 + s * eps for a, s in levels]]
    for name in PREDICTIONS:
        _, mixture = precondition(name, *np.array(levels).T)
        rows.append([clean * x_0 + noisy * eps for clean, noisy in mixture])
    return gallery(rows, [f"t/T = {s:g}" for s in shares], ["$x_t$", *PREDICTIONS])


def amplified() -> Figure:
    """How an error of the network's output shows in D and in the noise estimate."""
    schedule = make_schedule("cosine")
    inner = slice(5, 995)
    alpha, sigma = schedule.alpha[inner], schedule.sigma[inner]
    figure, panels = plots(2)
    for name in PREDICTIONS:
        c, _ = precondition(name, alpha, sigma)
        in_D = np.abs(c[:, 2])
        for axes, error in zip(panels, (in_D, in_D * alpha / sigma), strict=True):
            axes.plot(np.arange(1000)[inner] / 1000, error, label=name)
    for axes, what in zip(panels, ("D, the image estimate", "the noise estimate"), strict=True):
        axes.set(xlabel="t/T", yscale="log", ylim=(5e-3, 2e2))
        axes.set_title(f"error of {what}, per unit of error of F", fontsize=9)
    panels[0].legend(frameon=False)
    return figure


def sampling() -> Figure:
    """x_t and the denoised estimate, along twelve steps."""
    sampler = Sampler.load(BUNDLE, threads=1)
    estimates: list[Array] = []
    states: list[Array] = []

    def keep(preview) -> None:
        estimates.append(preview.denoised[0].astype(np.float64))
        states.append(preview.x[0].astype(np.float64))

    sampler.sample(1, seed=104, label="noto/people-body", steps=12, on_step=keep)
    shown = (0, 1, 2, 3, 5, 7, 9, 11)
    rows = [[np.clip(group[k], -1, 1) for k in shown] for group in (estimates, states)]
    return gallery(rows, [f"call {k + 1}" for k in shown], ["estimate D", "x after it"])


def few_steps() -> Figure:
    """The same noise, with more and more calls."""
    sampler = Sampler.load(BUNDLE, threads=1)
    counts = (2, 4, 6, 10, 20, 50)
    rows = []
    for solver in ("ddpm", "ddim", "unipc"):
        how = {"solver": solver, "grid": "log_snr(7)", "guidance": 1.0, "label": "noto/flags"}
        rows.append([sampler.sample(1, seed=102, steps=n, **how)[0] for n in counts])
    return gallery(rows, [f"{n} calls" for n in counts], ["ddpm", "ddim", "unipc"])


def orders() -> Figure:
    """The error of solvers of order 1, 2 and 3 against the number of steps."""
    figure, (axes,) = plots(1)
    counts = np.array([10, 20, 40, 80, 160, 320])
    for solver, order in (("ddim", 1), ("dpmpp_2m", 2), ("dpmpp_3m", 3)):
        errors = [gaussian_error(solver, n) for n in counts]
        axes.loglog(counts, errors, "o-", label=f"{solver}, order {order}")
    axes.set(xlabel="steps n", ylabel="error", xticks=counts)
    axes.set_xticklabels([str(n) for n in counts])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return figure


def guidance() -> Figure:
    """The same seeds under more and more guidance."""
    sampler = Sampler.load(BUNDLE, threads=1)
    scales = (1.0, 2.0, 4.0, 8.0)
    how = {"label": "noto/smileys-emotion", "solver": "unipc", "steps": 12, "grid": "log_snr(7)"}
    rows = [list(sampler.sample(8, seed=40, guidance=g, **how)) for g in scales]
    return gallery(rows, [f"seed {40 + i}" for i in range(8)], [f"g = {g:g}" for g in scales])


def style() -> Figure:
    """Three ways from Noto to Twemoji, and the artist's own."""
    sampler = Sampler.load(BUNDLE, threads=1)
    rows = []
    for index in (0, 240, 560, 1000):
        x = emoji(index).astype(np.float32)[None]
        source = category(index)
        rows.append([x[0], *_styled(sampler, x, source), emoji(index, 1)])
    titles = ["source", "s = 0.3", "s = 0.6", "s = 0.9", "translate", "artist's"]
    return gallery(rows, titles, ["", "", "", ""])


def _styled(sampler: Sampler, x: Array, source: int) -> Iterator[Array]:
    for strength in (0.3, 0.6, 0.9):
        yield sampler.stylize(x, strength, 0, label=source + 9, guidance=5.0, steps=25)[0]
    yield sampler.translate(x, source, source + 9, guidance=5.0, steps=25)[0]


def precision() -> Figure:
    """The same samples in float32 and int8, and their difference."""
    how = {"label": [0, 1, 2, 3, 4, 7, 8], "solver": "unipc", "steps": 12, "grid": "log_snr(7)"}
    full, small = (
        Sampler.load(BUNDLE, "onnxruntime", name, threads=1).sample(7, seed=30, **how)
        for name in ("fp32", "int8")
    )
    apart = np.clip(8 * (small - full), -1, 1)
    names = ["faces", "people", "animals", "food", "travel", "symbols", "flags"]
    return gallery(
        [list(full), list(small), list(apart)], names, ["fp32", "int8", "8 × difference"]
    )


FIGURES: dict[str, Callable[[], Figure]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        *(forward, variance, jumps, schedules, snr, subtract, posterior, predictions, amplified),
        *(sampling, few_steps, orders, guidance, style, precision),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=FIGURES, help="one figure [all]")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
    given = parser.parse_args()
    for name in [given.only] if given.only else FIGURES:
        path = given.out / f"{name}.png"
        FIGURES[name]().savefig(path, dpi=120, metadata={"Software": None})
        print(path)


if __name__ == "__main__":
    main()
