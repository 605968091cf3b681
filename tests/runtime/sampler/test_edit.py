"""Image editing: each verb's definition, bit for bit where possible, and the promise of the same
bytes."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime import Request, RequestError, Sampler, Stream, noise
from runtime.backends.onnxruntime import OnnxRuntimeBuffers
from runtime.diffusion.slerp import slerp
from runtime.diffusion.tuned import Tuned
from runtime.edit import VERBS, main
from runtime.sampler.edits import PAINTING
from runtime.sampler.inversion import INVERTING
from runtime.terminal.editing import DEFAULTS

LABELS = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """Five real digits, uint8 [5, 8, 8, 1]."""
    from trainer.data.builtin import digits

    return digits().images[[3, 1, 4, 11, 5]]


@pytest.fixture(scope="module")
def x0(digits: np.ndarray) -> np.ndarray:
    return digits.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255) * 2 - 1


MASK = np.zeros((8, 8), bool)
MASK[:5] = True
VERB_CALLS: dict[str, Callable[[Sampler, Any, Any, int], np.ndarray]] = {
    "stylize": lambda s, x, label, seed: s.stylize(x, 0.6, seed, label=label, steps=6),
    "stylize, ddpm": lambda s, x, label, seed: s.stylize(
        x, 0.6, seed, label=label, steps=6, solver="ddpm"
    ),
    "invert": lambda s, x, label, seed: s.invert(x, label=label, steps=6).noise,
    "translate": lambda s, x, label, seed: s.translate(
        x, label, 7, steps=6, guidance=2.0, strength=0.8
    ),
    "inpaint": lambda s, x, label, seed: s.inpaint(
        x, MASK, seed, label=label, steps=6, jump=3, resample=2
    ),
}


@pytest.mark.parametrize("verb", VERB_CALLS)
def test_a_verb_gives_a_picture_the_same_bytes_in_any_batch(
    verb: str, sampler: Sampler, tiny_bundle: Path, digits: np.ndarray
) -> None:
    call = VERB_CALLS[verb]
    together = call(sampler, digits, LABELS, 20)
    for i in (0, 3, 4):
        assert call(sampler, digits[i], [LABELS[i]], 20 + i).tobytes() == together[i].tobytes()
    chunked = call(Sampler.load(tiny_bundle, max_batch=2), digits, LABELS, 20)
    assert chunked.tobytes() == together.tobytes()


def test_what_lies_between_and_variations_keep_their_bytes_in_any_batch(
    sampler: Sampler, tiny_bundle: Path, digits: np.ndarray
) -> None:
    small, how = Sampler.load(tiny_bundle, max_batch=2), {"label": 3, "steps": 6, "guidance": 2.0}
    three, five = (
        sampler.interpolate(digits[0], 77, 3, **how),
        small.interpolate(digits[0], 77, 5, **how),
    )
    assert five[[0, 2, 4]].tobytes() == three.tobytes()
    together = sampler.variations(digits[0], 5, 0.4, 40, **how)
    assert small.variations(digits[0], 5, 0.4, 40, **how).tobytes() == together.tobytes()
    assert small.variations(digits[0], 1, 0.4, 43, **how)[0].tobytes() == together[3].tobytes()


def test_paths_pillow_images_and_arrays_are_the_same_pictures(
    sampler: Sampler, digits: np.ndarray, x0: np.ndarray, files: Path
) -> None:
    kinds = [
        files / "0.png",
        str(files / "0.png"),
        Image.fromarray(digits[0, ..., 0]),
        digits[0],
        x0[0],
    ]
    calls: list[Callable[[Any], np.ndarray]] = [
        lambda p: sampler.stylize(p, steps=3, label=3),
        lambda p: sampler.invert(p, steps=3, label=3).noise,
        lambda p: sampler.translate(p, 3, 7, steps=6),
        lambda p: sampler.inpaint(p, MASK, steps=3),
        lambda p: sampler.interpolate(p, 5, 3, steps=3),
        lambda p: sampler.variations(p, 2, steps=3),
        lambda p: sampler.animate(pictures=p, steps=3),
    ]
    for call in calls:
        assert len({call(kind).tobytes() for kind in kinds}) == 1
        assert len({call([kind]).tobytes() for kind in kinds}) == 1


def test_requests_of_different_verbs_share_a_batch_and_keep_their_bytes(
    sampler: Sampler, x0: np.ndarray
) -> None:
    mask = np.broadcast_to(MASK, (1, 8, 8)).astype(np.float32)
    requests = [
        Request(5, label=3, picture=x0[0], strength=0.5, steps=8),
        Request(6, label=1, guidance=2.0, steps=5),
        Request(7, start=x0[1], up=True, solver="dpmpp_2m", grid="log_snr", steps=7),
        Request(8, label=4, known=x0[2], mask=mask, solver="repaint", steps=4),
        Request(9, label=4, guidance=3.0, guidance_interval=(0.2, 4.0), solver="ddpm", steps=6),
    ]
    together = sampler.sample_requests(requests)
    for request, sample in zip(requests, together, strict=True):
        assert sampler.sample_requests([request])[0].tobytes() == sample.tobytes()


def test_stylize_starts_from_q_of_x_t_given_x_0(
    sampler: Sampler, digits: np.ndarray, x0: np.ndarray
) -> None:
    found = sampler.stylize(list(digits), 0.6, 20, label=3, steps=10)
    level = sampler.bundle.program(steps=10, strength=0.6).level[0].astype(np.float32)
    assert level[1] == np.float32(sampler.bundle.schedule.sigma[599])
    eps = np.stack([noise(20 + i, Stream.ENCODE, 0, (1, 8, 8)) for i in range(5)])
    start = level[0] * x0 + level[1] * eps
    by_hand = sampler.sample(5, 20, label=3, steps=10, start=start, strength=0.6)
    assert found.tobytes() == by_hand.tobytes()


def test_the_less_strength_the_nearer_the_picture(
    sampler: Sampler, digits: np.ndarray, x0: np.ndarray
) -> None:
    apart = [np.abs(sampler.stylize(digits, s, steps=20) - x0).mean() for s in (0.05, 0.4, 1.0)]
    assert apart[0] < 0.5 * apart[1]
    assert apart[1] < 0.8 * apart[2]


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_what_was_inverted_comes_back_and_more_nearly_by_a_higher_order(
    strength: float, sampler: Sampler, digits: np.ndarray, x0: np.ndarray
) -> None:
    errors = {}
    for solver in ("ddim", "dpmpp_2m", "unipc"):
        found = sampler.invert(digits, label=LABELS, solver=solver, steps=30, strength=strength)
        how = {"solver": solver, "grid": "log_snr", "guidance": 1.0, "label": LABELS}
        back = sampler.sample(5, start=found.noise, steps=30, strength=strength, **how)
        assert back.tobytes() == found.back.tobytes()
        np.testing.assert_allclose(
            found.error, np.sqrt(((back - x0) ** 2).mean(axis=(1, 2, 3))), rtol=1e-5
        )
        errors[solver] = found.error.mean()
    assert errors["dpmpp_2m"] < 0.05
    assert errors["dpmpp_2m"] < 0.5 * errors["ddim"]
    assert errors["unipc"] < 0.5 * errors["ddim"]


def test_inversion_climbs_unclipped_from_the_least_noisy_knot(sampler: Sampler) -> None:
    program = sampler.bundle.program("ddim", 10, "linspace", up=True)
    schedule = sampler.bundle.schedule
    assert np.isinf(program.call[:, 4]).all()
    np.testing.assert_allclose(program.level[0], (schedule.alpha[0], schedule.sigma[0]), rtol=1e-12)
    np.testing.assert_allclose(
        program.moments[-1, 0], (schedule.alpha[-1], schedule.sigma[-1]), rtol=1e-12
    )
    assert (np.diff(program.level[:, 1]) > 0).all()


def test_translate_is_inverting_under_one_label_and_coming_back_under_another(
    sampler: Sampler, digits: np.ndarray
) -> None:
    for strength in (1.0, 0.5):
        found = sampler.translate(
            digits, LABELS, [7, 7, 7, 8, 8], steps=8, strength=strength, guidance=2.0
        )
        noises = sampler.invert(digits, label=LABELS, steps=8, strength=strength).noise
        how = {
            "solver": "dpmpp_2m",
            "grid": "log_snr",
            "steps": 8,
            "strength": strength,
            "guidance": 2.0,
        }
        assert (
            sampler.sample(5, label=[7, 7, 7, 8, 8], start=noises, **how).tobytes()
            == found.tobytes()
        )
        same = sampler.translate(digits, LABELS, LABELS, steps=8, strength=strength, guidance=1.0)
        assert (
            same.tobytes()
            == sampler.invert(digits, label=LABELS, steps=8, strength=strength).back.tobytes()
        )


def test_translate_walks_part_of_the_way_and_is_guided_where_the_bundle_can_be(
    sampler: Sampler, digits: np.ndarray, edited: Callable[[Callable[[dict], object]], Path]
) -> None:
    found = sampler.translate(digits, LABELS, 7, steps=8)
    assert (
        sampler.translate(digits, LABELS, 7, steps=8, strength=0.4, guidance=3.0).tobytes()
        == found.tobytes()
    )
    never_null = Sampler.load(edited(lambda value: value["labels"].update(null_trained=False)))
    plain = sampler.translate(digits, LABELS, 7, steps=8, guidance=1.0)
    assert never_null.translate(digits, LABELS, 7, steps=8).tobytes() == plain.tobytes()


@pytest.mark.parametrize(
    "how", [{}, {"solver": "ddim"}, {"solver": "dpmpp_3m"}, {"solver": "heun"}], ids=str
)
def test_inpainting_keeps_what_is_known_to_the_bit_and_paints_the_rest(
    how: dict, sampler: Sampler, digits: np.ndarray, x0: np.ndarray
) -> None:
    found = sampler.inpaint(digits, MASK, 3, label=LABELS, steps=8, **how)
    known = np.broadcast_to(MASK, x0.shape)
    assert found[known].tobytes() == x0[known].tobytes()
    assert not np.array_equal(found[~known], x0[~known])
    other = sampler.inpaint(digits, MASK, 99, label=LABELS, steps=8, **how)
    assert not np.array_equal(found[~known], other[~known])


def test_inpainting_walks_the_known_part_along_its_own_noise(
    sampler: Sampler, digits: np.ndarray, x0: np.ndarray
) -> None:
    """D is the known image there, so DDIM's x is alpha·x_0 + sigma·eps at every level, with the
    seed's eps (up to the last knot's alpha, 5e-5)."""
    program, seen = sampler.bundle.program("ddim", 8), []
    sampler.inpaint(
        digits[:1], MASK, 3, label=2, guidance=1.0, steps=8, solver="ddim", on_step=seen.append
    )
    eps = noise(3, Stream.INITIAL, 0, (1, 8, 8))
    for k, preview in enumerate(seen):
        alpha, sigma = program.moments[k + 1, 0]
        expected = alpha * x0[0] + sigma * eps
        np.testing.assert_allclose(preview.x[0, :, :5], expected[:, :5], atol=1e-4)
        np.testing.assert_allclose(preview.denoised[0, :, :5], x0[0, :, :5], atol=1e-6)
        assert np.abs(preview.x[0, :, 5:] - expected[:, 5:]).max() > 1e-3


def test_masks_of_nothing_and_of_every_kind(
    sampler: Sampler, digits: np.ndarray, x0: np.ndarray
) -> None:
    plain = sampler.sample(2, 3, label=2, steps=5, solver="repaint")
    nothing = sampler.inpaint(digits[:2], np.zeros((8, 8)), 3, label=2, steps=5)
    np.testing.assert_allclose(nothing, plain, atol=1e-6)
    all_known = sampler.inpaint(digits[:2], np.ones((8, 8), np.uint8), 3, label=2, steps=5)
    assert all_known.tobytes() == x0[:2].tobytes()
    expected = sampler.inpaint(digits[:2], MASK, 3, steps=5).tobytes()
    white = MASK.astype(np.uint8) * 255
    image = Image.fromarray(white)
    kinds = [
        white,
        MASK.astype(np.float64),
        image,
        image.convert("1"),
        np.broadcast_to(MASK, (2, 1, 8, 8)),
    ]
    for kind in kinds:
        assert sampler.inpaint(digits[:2], kind, 3, steps=5).tobytes() == expected
    half = sampler.inpaint(digits[:2], np.full((8, 8), 0.5), 3, steps=5, solver="ddim", label=2)
    assert np.abs(half - x0[:2]).mean() < 0.7 * np.abs(plain - x0[:2]).mean()


def test_interpolation_has_both_ends_and_stays_on_the_sphere(
    sampler: Sampler, digits: np.ndarray
) -> None:
    how = {"solver": "ddim", "grid": "trailing", "steps": 6, "label": 3}
    found = sampler.interpolate(5, 900, 5, **how)
    ends = sampler.sample(2, [5, 900], guidance=1.0, **how)
    assert found[[0, -1]].tobytes() == ends.tobytes()
    pictures = sampler.interpolate(digits[0], digits[1], 3, label=3, steps=6)
    backs = sampler.invert(digits[:2], label=3, steps=6).back
    assert pictures[[0, -1]].tobytes() == backs.tobytes()
    mixed = sampler.interpolate(digits[0], 900, 3, label=3, steps=6)
    assert mixed[0].tobytes() == backs[0].tobytes()


def test_interpolation_draws_the_same_noise_for_all_samples(sampler: Sampler) -> None:
    """Only the starts differ, so neighbours are alike and the first end is its seed's sample."""
    how = {"solver": "ddpm", "grid": "trailing", "steps": 6, "label": 3, "guidance": 1.0}
    found = sampler.interpolate(5, 900, 5, **how)
    assert found[0].tobytes() == sampler.sample(1, 5, **how).tobytes()
    last = noise(900, Stream.INITIAL, 0, (1, 8, 8))
    assert found[-1].tobytes() == sampler.sample(1, 5, start=last[None], **how).tobytes()


def test_a_tuned_solver_interpolates_seeds_on_its_own_levels(sampler: Sampler) -> None:
    spec = sampler.bundle
    tuned = Tuned(spec.schedule.time[[999, 400]], np.zeros((2, 3)), {})
    with_tuned = Sampler(replace(spec, tuned={2: tuned}), sampler.backend)
    found = with_tuned.interpolate(1, 2, 2, solver="tuned", label=3)
    expected = with_tuned.sample(2, 1, solver="tuned", label=3, guidance=1.0)
    assert found.tobytes() == expected.tobytes()
    with pytest.raises(RequestError, match="takes no options, got a way up"):
        with_tuned.invert(ZEROS, solver="tuned")


def test_slerp_turns_at_an_even_rate() -> None:
    a, b = noise(1, Stream.INITIAL, 0, (3, 40, 40)), noise(2, Stream.INITIAL, 0, (3, 40, 40))

    def angle(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.arccos((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())))

    for t in (0.25, 0.5, 0.8):
        middle = slerp(a, b, t)
        assert middle.std() == pytest.approx(1, abs=0.05)  # a straight line has 0.71 in the middle
        assert angle(a, middle) == pytest.approx(t * angle(a, b), abs=0.02)
    assert slerp(a, b, 0.0).tobytes() == a.tobytes()
    assert slerp(a, b, 1.0).tobytes() == b.tobytes()
    assert {slerp(a.astype(np.float64), b, t).dtype for t in (0, 0.5)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(slerp(a, a, 0.5), a, rtol=1e-6)


def test_variations_run_from_the_picture_to_the_seeds_samples(
    sampler: Sampler, digits: np.ndarray
) -> None:
    how = {"label": 3, "steps": 6}
    none = sampler.variations(digits[0], 3, 0.0, 40, **how)
    back = sampler.invert(digits[0], **how).back
    assert [v.tobytes() for v in none] == [back[0].tobytes()] * 3
    whole = sampler.variations(digits[0], 3, 1.0, 40, **how)
    fresh = sampler.sample(3, 40, solver="dpmpp_2m", grid="log_snr", guidance=1.0, **how)
    assert whole.tobytes() == fresh.tobytes()
    some = sampler.variations(digits[0], 3, 0.3, 40, **how)
    assert np.abs(some - back).mean() < np.abs(whole - back).mean()
    assert sampler.variations(digits[0], 1, 0.3, 42, **how)[0].tobytes() == some[2].tobytes()


def test_an_animation_ends_with_the_sample(sampler: Sampler, tiny_bundle: Path) -> None:
    frames = sampler.animate(3, 8, label=2, steps=5, solver="ddpm")
    assert frames.shape == (6, 3, 1, 8, 8)
    assert frames[0, 1].tobytes() == noise(9, Stream.INITIAL, 0, (1, 8, 8)).tobytes()
    assert frames[-1].tobytes() == sampler.sample(3, 8, label=2, steps=5, solver="ddpm").tobytes()
    chunked = Sampler.load(tiny_bundle, max_batch=2).animate(3, 8, label=2, steps=5, solver="ddpm")
    assert chunked.tobytes() == frames.tobytes()


def test_the_forward_animation_is_the_forward_process(sampler: Sampler, x0: np.ndarray) -> None:
    many = np.repeat(x0, 200, axis=0)
    frames = sampler.animate(pictures=many, seed=50, steps=10)
    program = sampler.bundle.program("ddim", 10)
    assert frames[0].tobytes() == many.tobytes()
    levels = [(1.0, 0.0), *program.level[::-1]]
    for (alpha, sigma), frame, before, after in zip(
        levels[1:], frames[1:], frames, levels[:-1], strict=False
    ):
        left = frame - np.float32(alpha) * many
        assert left.mean() == pytest.approx(0, abs=0.02)
        assert left.std() == pytest.approx(sigma, rel=0.02)
        # Each step adds noise of its own: what is new is unrelated to what was there.
        new = frame - np.float32(alpha / after[0]) * before
        assert abs(np.corrcoef(new.ravel(), before.ravel())[0, 1]) < 0.02
    four = np.repeat(x0[:1], 4, axis=0)
    alone = sampler.animate(pictures=x0[:1], seed=53, steps=4)[-1, 0].tobytes()
    assert alone == sampler.animate(pictures=four, seed=50, steps=4)[-1, 3].tobytes()
    assert alone == sampler.animate(4, [9, 53, 8, 7], pictures=four, steps=4)[-1, 1].tobytes()


@pytest.fixture
def guided_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """(guided, batch) of every network call."""
    calls = []
    run = OnnxRuntimeBuffers.run

    def counted(self: OnnxRuntimeBuffers, guided: bool, first: int, count: int) -> None:
        calls.append((guided, count))
        run(self, guided, first, count)

    monkeypatch.setattr(OnnxRuntimeBuffers, "run", counted)
    return calls


def test_outside_the_guidance_interval_nobody_pays_for_guidance(
    sampler: Sampler, guided_calls: list[tuple[bool, int]]
) -> None:
    program = sampler.bundle.program("ddim", 10)
    rho = program.level[:, 1] / program.level[:, 0]
    interval = (float(rho[6]), float(rho[2]))  # above row 6's level, up to row 2's: rows 2 to 5
    guided = [False, False, True, True, True, True, False, False, False, False]
    sampler.sample(2, label=3, guidance=3.0, guidance_interval=interval, steps=10)
    assert guided_calls == [(g, 2) for g in guided]
    guided_calls.clear()
    sampler.sample(3, label=3, guidance=[3.0, 1.0, 1.0], guidance_interval=interval, steps=10)
    assert [(True, 1) in guided_calls[i : i + 2] for i in (2, 4, 6, 8)] == [True] * 4
    assert sum(batch for g, batch in guided_calls if g) == 4
    assert sum(batch for g, batch in guided_calls if not g) == 26


def test_a_guidance_interval_of_everything_or_nothing(sampler: Sampler) -> None:
    how = {"label": 3, "steps": 6}
    full = sampler.sample(2, guidance=3.0, **how).tobytes()
    none = sampler.sample(2, guidance=1.0, **how).tobytes()
    assert full != none
    assert sampler.sample(2, guidance=3.0, guidance_interval=(0, np.inf), **how).tobytes() == full
    assert sampler.sample(2, guidance=3.0, guidance_interval=(0, 1e-9), **how).tobytes() == none
    part = sampler.sample(2, guidance=3.0, guidance_interval=(0.2, 3), **how).tobytes()
    assert part not in (full, none)


ZEROS = np.zeros((8, 8), np.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.sample(1, strength=0.5), "need an image to start from"),
        (lambda s: s.sample(2, start=np.zeros((3, 1, 8, 8), np.float32)), "`start` must be one "
        "value or 2 of them, got 3"),
        (lambda s: s.sample(1, start=np.zeros((1, 8, 8, 1), np.float32)), r"`start` must be "
        r"finite floats of shape \(1, 8, 8\)"),
        (lambda s: s.sample(1, start=np.full((1, 1, 8, 8), np.nan, np.float32)), "`start` must be "
        "finite"),
        (lambda s: s.sample_requests([Request(0, start=ZEROS[None] * 1.0, picture=ZEROS[None] * 1.0)]), "got both"),
        (lambda s: s.sample_requests([Request(0, known=ZEROS[None] * 1.0)]), "go together"),
        (lambda s: s.stylize(ZEROS, 1.5), "`strength` must be a number from 0 to 1"),
        (lambda s: s.stylize(ZEROS, labl=3), "option of solver 'ddim': 'labl'"),
        (lambda s: s.stylize([]), "no picture was given"),
        (lambda s: s.invert(ZEROS, solver="ddpm"), "use a deterministic solver"),
        (lambda s: s.translate(ZEROS, 3, "twemoi"), "unknown label 'twemoi'"),
        (lambda s: s.translate([ZEROS] * 3, [1, 2], 3), "`label` must be one value or 3 of them, "
        "got 2"),
        (lambda s: s.inpaint(ZEROS, np.zeros((4, 4))), r"mask has shape \(4, 4\)"),
        (lambda s: s.inpaint(ZEROS, np.full((8, 8), 2.0)), "`mask` must lie in 0 … 1"),
        (lambda s: s.inpaint(ZEROS, Image.new("L", (9, 8))), "9×8 L, 8×8 L expected"),
        (lambda s: s.interpolate(1, 2, 1), "`n` must be 2 to 1000000, got 1"),
        (lambda s: s.interpolate([ZEROS] * 2, 3), "one image is needed here, got 2"),
        (lambda s: s.variations(ZEROS, amount=-0.1), "`amount` must be a number from 0 to 1"),
        (lambda s: s.animate(pictures=ZEROS, label=3), "option of animate with pictures: 'label'"),
        (lambda s: s.animate(3, pictures=ZEROS), "`n` must be the number of images, 1, if these "
        "are given, got 3"),
        (lambda s: s.animate(pictures=ZEROS, seed=-1), "`seed` must be 0 to"),
        (lambda s: s.translate(ZEROS, 3, 7, label=3), "`label` is set by this method"),
        (lambda s: s.invert(ZEROS, up=True), "`up` is set by this method"),
        (lambda s: s.stylize(ZEROS, picture=ZEROS), "`picture` is set by this method"),
        (lambda s: s.interpolate(1, 2, strength=0.5), "`strength` is for images"),
        (lambda s: s.variations(ZEROS, strength=0.5), "`strength` is for images"),
        (lambda s: s.interpolate(True, 2), "`seed` must be an integer, .* got True"),
        (lambda s: s.interpolate(ZEROS, 2, 3, label=[1, 2, 3]), "`label` must be one value, got 3"),
        (lambda s: s.sample(1, conditions=np.zeros(3)), "`conditions` must be a dict by name, got an "
        "array"),
        (lambda s: s.inpaint(ZEROS, None), "the mask must be a path"),
        (lambda s: s.inpaint(ZEROS, np.full((8, 8), "x")), "`mask` must be an array of bool or "
        "numbers"),
        (lambda s: s.sample(1, label=3, guidance=2.0, guidance_interval=(3, 1)), "must rise"),
        (lambda s: s.sample(1, label=3, guidance=1.0, guidance_interval=(3, 1)), "must rise"),
        (lambda s: s.sample(1, label=3, guidance=2.0, guidance_interval=3), "two noise levels"),
        (lambda s: s.sample(1, label=3, guidance=2.0, guidance_interval=(-1, 3)), "from 0 to inf"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(
    call: Callable[[Sampler], Any], message: str, sampler: Sampler
) -> None:
    with pytest.raises(RequestError, match=message):
        call(sampler)


@pytest.fixture
def files(digits: np.ndarray, tmp_path: Path) -> Path:
    for i in range(2):
        Image.fromarray(digits[i, ..., 0]).save(tmp_path / f"{i}.png")
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    Image.new("RGBA", (30, 20), "red").save(tmp_path / "big.png")
    return tmp_path


@pytest.mark.parametrize(
    ("verb", "words", "size"),
    [
        ("stylize", "0.png 1.png --strength 0.4 --label 3 --label 1", (20 + 2, 20 + 2)),
        ("invert", "0.png 1.png --label 3 --label 1", (22, 22)),
        ("translate", "0.png 1.png --from 3 --from 1 --to 7", (22, 22)),
        ("inpaint", "0.png 1.png --mask mask.png --option resample=2", (22, 22)),
        ("interpolate", "0.png 77 --label 3 --n 4", (42, 12)),
        ("interpolate", "5 6 --label 3 --n 3", (32, 12)),
        ("variations", "0.png --label 3 --n 3", (22, 22)),
        ("stylize", "big.png --convert", (12, 22)),
    ],
)
def test_each_verb_writes_a_sheet(
    verb: str,
    words: str,
    size: tuple[int, int],
    files: Path,
    tiny_bundle: Path,
    monkeypatch,
    capsys,
) -> None:
    monkeypatch.chdir(files)
    assert main([verb, str(tiny_bundle), *words.split(), "--steps", "4", "--width", "1"]) == 0
    with Image.open(files / "edited.png") as image:
        assert image.size == size
    assert "edited.png" in capsys.readouterr().out


def test_the_sheet_shows_before_above_after_and_arrays_are_whole(
    files: Path, tiny_bundle: Path, sampler: Sampler, x0: np.ndarray, monkeypatch
) -> None:
    monkeypatch.chdir(files)
    given = [
        "translate",
        str(tiny_bundle),
        "0.png",
        "1.png",
        "--from",
        "3",
        "--to",
        "7",
        "--steps",
        "4",
    ]
    assert main([*given, "--out", "after.npy"]) == 0
    found = np.load(files / "after.npy")
    assert found.tobytes() == sampler.translate(x0[:2], 3, 7, steps=4).tobytes()
    assert main([*given, "--width", "1"]) == 0
    with Image.open(files / "edited.png") as image:
        sheet = np.asarray(image)
    np.testing.assert_array_equal(sheet[2:10, 12:20], sampler.to_uint8(x0)[1, ..., 0])
    np.testing.assert_array_equal(sheet[12:20, 2:10], sampler.to_uint8(found)[0, ..., 0])
    assert main(["invert", str(tiny_bundle), "0.png", "--steps", "4", "--out", "noise.npy"]) == 0
    assert np.load(files / "noise.npy").tobytes() == sampler.invert(x0[0], steps=4).noise.tobytes()


@pytest.mark.parametrize(
    ("name", "kind", "words", "frames"),
    [
        ("a.gif", "GIF", "--n 2 --label 3", 6),
        ("a.png", "PNG", "0.png", 6),
        ("a.webp", "WEBP", "--n 1", 6),
    ],
)
def test_animations(
    name: str,
    kind: str,
    words: str,
    frames: int,
    files: Path,
    tiny_bundle: Path,
    monkeypatch,
    capsys,
) -> None:
    monkeypatch.chdir(files)
    assert main(["animate", str(tiny_bundle), *words.split(), "--steps", "5", "--out", name]) == 0
    with Image.open(files / name) as image:
        assert (image.format, image.n_frames, image.info["loop"]) == (kind, frames, 0)
        assert image.width >= 512
    assert "6 frames" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("stylize {} big.png", "big.png is 30×20 RGBA, 8×8 L expected"),
        ("stylize {} none.png", "there is no image none.png"),
        ("stylize {} mask.txt", "mask.txt cannot be read as an image"),
        ("translate {} 0.png --from 3 --to three", "unknown label 'three'"),
        ("animate {} 0.png --n 3", "`n` must be the number of images, 1"),
        ("animate {} 0.png --label 3", "unknown option of animate with pictures: 'label'"),
        ("stylize {} 0.png --columns -2", "`columns` must be at least 1"),
        ("stylize {} 0.png --out a.xyz", "cannot write images as .xyz"),
        ("stylize {} 0.png --guidance-interval 1,x", "--guidance-interval must be two numbers"),
        ("stylize nowhere 0.png", "nowhere is not a folder"),
    ],
)
def test_wrong_words_end_in_a_line_that_says_why(
    words: str, message: str, files: Path, tiny_bundle: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(files)
    (files / "mask.txt").write_text("no picture")
    assert main(words.format(tiny_bundle).split()) == 2
    assert message in capsys.readouterr().err
    assert not (files / "edited.png").exists()


@pytest.mark.parametrize(
    "words",
    [
        "animate {} --out a.bmp",
        "stylize {} 0.png --out a.xyz",
        "animate {} --columns 0",
        "animate {} --width 100000",
        "translate {} 0.png --from 1 --to 2 --width 100000",
        "interpolate {} 1 2 --n 30000000",
        "variations {} 0.png --n 3 --width 100000",
        "interpolate {} 1 2 --n 3 --label 1 --label 2",
        "stylize {} 0.png --out .",
        "stylize {} 0.png --out 0.png/a.png",
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_sampled(
    words: str, files: Path, tiny_bundle: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setattr(OnnxRuntimeBuffers, "run", lambda *_: pytest.fail("sampled"))
    assert main(words.format(tiny_bundle).split()) == 2
    message = "cannot write|`columns` must be|bytes is too large|takes one label, got 2|is "
    message += "a folder. Name a file|0.png is not a folder"
    assert re.search(message, capsys.readouterr().err)


def test_the_help_of_a_verb_has_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, own in DEFAULTS.items():
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        told = " ".join(capsys.readouterr().out.split())
        assert all(f"[{default}]" in told for default in own.values())
    assert {k: str(v) for k, v in DEFAULTS["invert"].items()} == {
        name: f"{value:g}" if isinstance(value, float) else value
        for name, value in INVERTING.items()
    }
    assert DEFAULTS["inpaint"] == PAINTING


def test_every_verb_of_the_command_is_a_method(sampler: Sampler) -> None:
    assert all(callable(getattr(sampler, verb)) for verb in VERBS)


@pytest.mark.parametrize(
    "words",
    [
        "translate {} 0.png --from 1 --to 2 --option source=1",
        "variations {} 0.png --option amount=1",
        "interpolate {} 1 2 --option first=1",
        "stylize {} 0.png --option pictures=1",
        "animate {} --option self=1",
    ],
)
def test_an_argument_of_a_method_is_no_option_of_a_solver(
    words: str, files: Path, tiny_bundle: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(files)
    assert main(words.format(tiny_bundle).split()) == 2
    assert "unknown option of a solver: " in capsys.readouterr().err
