"""Averages have the width in their name, and any other width can be computed afterwards from stored
ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.average import main, post_hoc
from trainer.config import Config
from trainer.errors import CheckpointError
from trainer.evaluate import Changes, of_run
from trainer.fit import fit
from trainer.quality import features
from trainer.runs import checkpoint as checkpoints
from trainer.runs.folder import EXAMPLES
from trainer.training.averages import (
    Averages,
    combination,
    exponent,
    inner_products,
    misfit,
    power_decay,
)
from trainer.training.step import Trainer

CONFIG = Config(
    data="digits", channels=(8, 8), attention=(), batch=8, steps=120, warmup=5, T=100, checkpoint_every=60,
    sample_every=0, log_every=60, decay="constant", ema_power=(0.05, 0.1), snapshot_every=20, ema_half_life=(100, 400), device="cpu",
)  # fmt: skip


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25])
def test_the_profile_has_the_width_that_was_asked_for(width: float) -> None:
    """Relative standard deviation of tau under the density tau^gamma on 0 … 1, in closed form."""
    gamma = exponent(width)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert np.sqrt(square - mean**2) == pytest.approx(width, rel=1e-9)


def test_a_power_average_weighs_step_t_like_t_to_the_gamma() -> None:
    """The share of each step's weights in the final average, from the decays."""
    T, gamma = 2000, exponent(0.1)
    decays = np.array([power_decay(0.1, step) for step in range(T)])
    share = (1 - decays) * np.append(np.cumprod(decays[:0:-1])[::-1], 1)
    assert share.sum() == pytest.approx(1)
    expected = (gamma + 1) / T * (np.arange(1, T + 1) / T) ** gamma
    np.testing.assert_allclose(share[T // 2 :], expected[T // 2 :], rtol=5e-3)


def test_inner_products_are_the_integrals() -> None:
    profiles = [(1.0, 4.0), (0.6, 8.0), (1.0, 0.5)]
    tau = (np.arange(200_000) + 0.5) / 200_000
    values = [np.where(tau <= t, (g + 1) / t * (tau / t) ** g, 0) for t, g in profiles]
    expected = [[(a * b).mean() for b in values] for a in values]
    np.testing.assert_allclose(inner_products(profiles, profiles), expected, rtol=1e-3)


def test_a_profile_that_was_kept_is_found_again() -> None:
    kept = [(50.0, 4.0), (100.0, 4.0), (50.0, 9.0), (100.0, 9.0)]
    np.testing.assert_allclose(combination(kept, 100.0, 9.0), [0, 0, 0, 1], atol=1e-6)
    assert combination(kept, 100.0, 6.0).sum() == pytest.approx(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("averages")
    assert fit(CONFIG, runs)
    return runs / "digits"


def test_a_width_that_was_not_kept_is_that_of_an_average_that_was(
    run: Path, tmp_path: Path
) -> None:
    """Compared with a run that stored it: closer than a twentieth of the distance between the
    average and the last weights."""
    assert fit(replace(CONFIG, ema_power=(0.07,)), tmp_path)
    direct = checkpoints.newest(tmp_path / "digits" / "checkpoints")
    assert direct is not None
    expected, found = direct.more["power-0.07"], post_hoc(run, 0.07, 120)

    def apart(a: dict, b: dict) -> float:
        return float(sum(((a[k] - b[k]) ** 2).sum() for k in a)) ** 0.5

    assert apart(found, expected) < 0.05 * apart(direct.weights, expected)


def test_the_command_makes_a_run_of_it(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "STEPS", 20)  # any classifier will do
    # A run with conditions has some of the data's here, under which it is exported.
    (run / EXAMPLES).write_bytes(b"conditions")
    monkeypatch.chdir(run)
    assert main([".", "--width", "0.07"]) == 0
    out = run.with_name("digits-ema-0.070")
    assert (out / EXAMPLES).read_bytes() == b"conditions"
    (run / EXAMPLES).unlink()
    assert str(out) in capsys.readouterr().out
    made = checkpoints.newest(out / "checkpoints")
    assert made is not None
    assert all(torch.equal(made.ema[k], v) for k, v in post_hoc(run, 0.07, 120).items())
    found = of_run(out, False, "cpu", Changes(quality_samples=20, sample_steps=2))
    assert (found.step, found.samples) == (120, 20)
    many = of_run(out, False, "cpu", Changes(quality_samples=2000, sample_steps=1))
    assert many.samples == 1797  # the data has no more images
    assert found.distances["frechet"] > 0


def test_a_run_without_snapshots_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"train with --ema-power 0\.05,0\.1"):
        post_hoc(tmp_path, 0.07, 100)


def test_several_half_lives_are_kept_side_by_side() -> None:
    weights = {"a": torch.zeros(1)}
    averages = Averages(replace(CONFIG, ema_half_life=(80, 800), ema_power=()), weights)
    weights = {"a": torch.ones(1)}
    for step in range(100_000, 100_010):  # beyond the ramp-up: 80 images
        averages.update(weights, step)
    assert averages.of["ema"]["a"].item() == pytest.approx(0.5)
    assert averages.of["ema-800"]["a"].item() == pytest.approx(1 - 0.5**0.1)


def test_all_of_them_are_in_the_checkpoint_and_come_back(run: Path) -> None:
    from trainer.data import sources as data

    checkpoint = checkpoints.newest(run / "checkpoints")
    assert checkpoint is not None
    assert set(checkpoint.more) == {"ema-400", "power-0.05", "power-0.1"}
    trainer = Trainer(CONFIG, data.digits())
    trainer.state.resume(checkpoint)
    for name, tensors in checkpoint.more.items():
        assert all(torch.equal(trainer.state.averages.of[name][k], v) for k, v in tensors.items())
    trainer = Trainer(replace(CONFIG, ema_half_life=(100, 500)), data.digits())
    with pytest.raises(CheckpointError, match="not those of this config"):
        trainer.state.resume(checkpoint)


def test_a_width_that_the_snapshots_do_not_give_is_warned_of(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = [(50.0, 4.0), (100.0, 4.0), (50.0, 9.0), (100.0, 9.0)]
    # The profile itself, none at all, and another one, whose distance is an integral.
    exact = combination(kept, 100.0, 9.0)
    assert misfit(kept, exact, 100.0, 9.0) == pytest.approx(0, abs=1e-5)
    assert misfit(kept, np.zeros(4), 100.0, 9.0) == pytest.approx(1)
    tau = (np.arange(200_000) + 0.5) / 200_000
    narrow, wide = 10 * tau**9, 5 * tau**4
    expected = np.sqrt(((narrow - wide) ** 2).mean() / (narrow**2).mean())
    assert misfit([(100.0, 4.0)], np.ones(1), 100.0, 9.0) == pytest.approx(expected, rel=1e-3)

    post_hoc(run, 0.07, 120)
    assert caplog.text == ""
    post_hoc(run, 0.07, 20)  # after one snapshot of each width
    assert caplog.text == ""
    post_hoc(run, 0.25, 20)
    assert "the average of width 0.25 after step 20 is" in caplog.text
