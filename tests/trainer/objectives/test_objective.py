"""Objectives follow the papers: weightings in closed form, noise levels by their distribution, and
every objective lowers its loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from runtime.diffusion.program import precondition
from runtime.diffusion.schedule import make_schedule
from trainer.config import Config
from trainer.data import sources as data
from trainer.objectives.denoising import draw_knots, loss_weights
from trainer.runs.log import BUCKETS
from trainer.training.state import buckets
from trainer.training.step import Trainer

from ...lazily import Lazy

stats = Lazy("scipy.stats")

CONFIG = Config(data="digits", channels=(8, 16), attention=(), batch=16, steps=200, device="cpu")


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("epsilon", lambda snr: np.minimum(snr, 5) / snr),
        ("x0", lambda snr: np.minimum(snr, 5)),
        ("v", lambda snr: np.minimum(snr, 5) / (snr + 1)),
    ],
)
def test_min_snr_weighs_as_the_paper_says(prediction: str, expected) -> None:
    """Hang et al. 2023, section 3.4, for each prediction."""
    config = replace(CONFIG, prediction=prediction, weighting="min_snr")
    schedule = config.make_schedule()
    snr = (schedule.alpha / schedule.sigma) ** 2
    np.testing.assert_allclose(loss_weights(config, schedule), expected(snr), rtol=1e-9)


def test_edm_weighs_edm_answers_alike_and_others_by_what_their_error_does_to_the_picture() -> None:
    schedule = make_schedule("edm")
    edm = replace(CONFIG, prediction="edm", schedule="edm", weighting="edm")
    np.testing.assert_allclose(loss_weights(edm, schedule), 1.0, rtol=1e-9)
    x0 = replace(edm, prediction="x0")
    expected = (schedule.sigma**2 + 0.25) / (
        schedule.sigma * 0.5
    ) ** 2  # Karras et al. 2022, table 1
    np.testing.assert_allclose(loss_weights(x0, schedule), expected, rtol=1e-9)


@pytest.mark.parametrize("weighting", ["uniform", "min_snr", "edm"])
@pytest.mark.parametrize("prediction", ["v", "x0", "edm"])
def test_weights_are_finite_at_zero_terminal_snr(weighting: str, prediction: str) -> None:
    config = replace(CONFIG, prediction=prediction, weighting=weighting, zero_terminal_snr=True)
    assert np.isfinite(loss_weights(config, config.make_schedule())).all()


def test_the_same_error_of_the_picture_costs_the_same_whatever_the_network_answers() -> None:
    """F's error times c_out is the error of D: with min_snr its weight does not depend on the
    prediction."""
    schedule = CONFIG.make_schedule()
    on_picture = []
    for prediction in ("epsilon", "v", "x0", "edm"):
        c, _ = precondition(prediction, schedule.alpha, schedule.sigma)
        weights = loss_weights(
            replace(CONFIG, prediction=prediction, weighting="min_snr"), schedule
        )
        on_picture.append(weights / c[:, 2] ** 2)
    for other in on_picture[1:]:
        np.testing.assert_allclose(other, on_picture[0], rtol=1e-9)


def drawn(config: Config, count: int = 20_000) -> np.ndarray:
    wide = replace(config, batch=count, accumulate=1)
    return draw_knots(wide, wide.make_schedule(), torch.Generator().manual_seed(5)).numpy()


@pytest.mark.parametrize("times", ["uniform", "stratified"])
def test_knots_are_drawn_evenly(times: str) -> None:
    found = drawn(replace(CONFIG, times=times))
    assert (found.min(), found.max()) == (0, 999)
    # By chance once in 1e5 for independent draws.
    assert stats.kstest((found + 0.5) / 1000, "uniform").pvalue > 1e-5


@pytest.mark.parametrize(
    ("schedule", "prediction"), [("edm", "edm"), ("flow", "flow"), ("cosine", "v")]
)
def test_log_normal_draws_the_noise_level_from_its_distribution(
    schedule: str, prediction: str
) -> None:
    config = replace(
        CONFIG,
        schedule=schedule,
        prediction=prediction,
        times="log_normal",
        time_mean=-0.5,
        time_std=0.8,
    )
    found = config.make_schedule()
    with np.errstate(divide="ignore"):
        log_ratio = np.minimum(-0.5 * found.log_snr, 50)[drawn(config)]
    middle = np.quantile(log_ratio, [0.1, 0.5, 0.9])
    # Knots are within 0.05 of each other there.
    np.testing.assert_allclose(middle, stats.norm(-0.5, 0.8).ppf([0.1, 0.5, 0.9]), atol=0.05)


def test_buckets_hold_the_losses_of_their_stretch() -> None:
    found = buckets(torch.tensor([0, 99, 100, 999]), torch.tensor([1.0, 2.0, 5.0, 7.0]), 1000)
    assert found[0].tolist() == [3, 5, *[0] * (BUCKETS - 3), 7]
    assert found[1].tolist() == [2, 1, *[0] * (BUCKETS - 3), 1]


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction": "epsilon", "schedule": "linear"},
        {"prediction": "x0", "weighting": "min_snr"},
        {"prediction": "v", "zero_terminal_snr": True, "times": "uniform"},
        {
            "prediction": "flow",
            "schedule": "flow",
            "times": "log_normal",
            "time_mean": 0.0,
            "time_std": 1.0,
        },
        {"prediction": "edm", "schedule": "edm", "weighting": "edm", "times": "log_normal"},
    ],
    ids=str,
)
def test_every_objective_learns_and_is_sampled_by_the_runtimes_solvers(changes: dict) -> None:
    """Overfitting ten images: the loss falls, and samples are closer to the images than those of an
    untrained network."""
    digits = data.digits()
    few = replace(digits, images=digits.images[:10], labels=digits.labels[:10])
    config = replace(
        CONFIG,
        **changes,
        learning_rate=1e-2,
        steps=60,
        warmup=5,
        ema_half_life=(50,),
        batch=20,
        channels=(16,),
    )
    trainer = Trainer(config, few)
    losses = [trainer.train_step()["loss"] for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:5])

    def apart(sampled: Trainer) -> float:
        made = sampled.sample(10, steps=10, label=few.labels)
        return float(np.abs(made.astype(float) - few.images).mean())

    assert apart(trainer) < 0.9 * apart(Trainer(config, few))
