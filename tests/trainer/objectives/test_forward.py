"""The forward process: noising an image step by step equals noising it in one jump; sampling
inverts the targets."""

import numpy as np
import pytest
import torch

from runtime import Schedule, make_schedule
from runtime.diffusion.program import PREDICTIONS, precondition
from trainer.objectives.forward import ForwardProcess

SCHEDULES = {
    **{
        name: make_schedule(name)
        for name in ("linear", "linear_raw", "scaled_linear", "cosine", "sigmoid")
    },
    "from_betas": make_schedule("from_betas", betas=[0.1, 0.2, 0.9]),
    "zero": make_schedule("scaled_linear").zero_terminal_snr(),
    "flow": make_schedule("flow"),
    "edm": make_schedule("edm"),
}


def exact(schedule: Schedule, prediction: str = "x0") -> ForwardProcess:
    return ForwardProcess(schedule, prediction, dtype=torch.float64)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Images x_0 and noise eps, [4, 3, 2, 5]."""
    random = torch.Generator().manual_seed(3)
    shape = (4, 3, 2, 5)
    x0 = torch.rand(shape, generator=random, dtype=torch.float64) * 2 - 1
    return x0, torch.randn(shape, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_unrolled_steps_have_the_mean_and_variance_of_the_jump(name: str) -> None:
    """step() is linear in x and eps: its effect on 1 and 0 gives the change of mean and standard
    deviation."""
    schedule = SCHEDULES[name]
    process = exact(schedule)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    mean, variance, travelled = one, zero, []
    for t in torch.arange(len(schedule)).split(1):
        mean = process.step(mean, t, zero)
        variance = process.step(variance.sqrt(), t, zero) ** 2 + process.step(zero, t, one) ** 2
        travelled.append((mean.item(), variance.item()))
    means, variances = np.array(travelled).T
    # A thousand products, each rounded to 1e-16; alpha may end at 0 but for rounding.
    np.testing.assert_allclose(means, schedule.alpha, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(variances, schedule.sigma**2, rtol=1e-12)


@pytest.mark.parametrize("name", ["cosine", "flow", "edm"])
def test_the_unrolled_steps_have_the_distribution_of_the_jump(name: str) -> None:
    """Two samples of the same image, one noised in 12 steps with fresh noise each, one in a single
    jump."""
    n, schedule = 100_000, make_schedule(name, T=12)
    process, random = exact(schedule), torch.Generator().manual_seed(11)
    draw = lambda: torch.randn(n, 1, generator=random, dtype=torch.float64)  # noqa: E731
    x0 = torch.full((n, 1), 0.7, dtype=torch.float64)
    x = x0
    for knot in range(len(schedule)):
        t = torch.full((n,), knot)
        x = process.step(x, t, draw())
        unrolled, jumped = (
            np.sort(x.numpy().ravel()),
            np.sort(process.jump(x0, t, draw()).numpy().ravel()),
        )
        both = np.concatenate([unrolled, jumped])
        distance = (
            np.abs(
                np.searchsorted(unrolled, both, "right") - np.searchsorted(jumped, both, "right")
            ).max()
            / n
        )
        # Kolmogorov-Smirnov of two samples, by chance once in 1e5: √(ln(2e5)/n). A deviation of the
        # noise off by a tenth fails.
        assert distance < (np.log(2e5) / n) ** 0.5, f"knot {knot}"


def test_every_sample_of_a_batch_is_noised_to_its_own_knot(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    x0, eps = batch
    schedule, knots = SCHEDULES["cosine"], [0, 999, 31, 500]
    found = exact(schedule).jump(x0, torch.tensor(knots), eps)
    for i, t in enumerate(knots):
        expected = schedule.alpha[t] * x0[i].numpy() + schedule.sigma[t] * eps[i].numpy()
        np.testing.assert_allclose(found[i].numpy(), expected, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_read_as_sampling_reads_it_is_the_picture(
    prediction: str, name: str, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x0, eps = batch
    schedule = SCHEDULES[name]
    if prediction == "epsilon" and schedule.alpha[-1] == 0:  # there epsilon says nothing
        schedule = Schedule(name, schedule.alpha[:-1], schedule.sigma[:-1], schedule.time[:-1])
    process, T = exact(schedule, prediction), len(schedule)
    t = torch.tensor([0, 1, T // 2, T - 1])
    x = process.jump(x0, t, eps)
    c, _ = precondition(prediction, schedule.alpha[t.numpy()], schedule.sigma[t.numpy()])
    c_in, c_skip, c_out = (torch.from_numpy(v).reshape(-1, 1, 1, 1) for v in c.T.copy())
    denoised = c_skip * x + c_out * process.target(x0, t, eps)
    # c_out reaches sigma/alpha ~ 3e4 at the noisy end (80 for edm) and multiplies rounding by as
    # much.
    torch.testing.assert_close(denoised, x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(process.network_input(x, t), c_in * x, rtol=1e-15, atol=0)


def test_the_targets_are_the_papers(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    x0, eps = batch
    schedule, t = SCHEDULES["cosine"], torch.tensor([0, 300, 600, 950])
    alpha, sigma = (
        torch.from_numpy(v[t.numpy()]).reshape(-1, 1, 1, 1)
        for v in (schedule.alpha, schedule.sigma)
    )
    # Karras et al. 2022, eq. 8, for the image x_t / alpha at noise r = sigma / alpha.
    r, data = sigma / alpha, 0.5
    edm = (x0 - data**2 / (r**2 + data**2) * (x0 + r * eps)) / (
        r * data / torch.sqrt(r**2 + data**2)
    )
    papers = {"epsilon": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0, "edm": edm}
    for prediction in PREDICTIONS:
        found = exact(schedule, prediction).target(x0, t, eps)
        # eq. 8 divides a difference by its noise, r ~ 0.01 at the first knot.
        torch.testing.assert_close(found, papers[prediction], rtol=0, atol=1e-13, msg=prediction)


def test_training_runs_in_float32_and_is_told_the_schedules_time(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    x0, eps = (v.float() for v in batch)
    schedule, t = SCHEDULES["flow"], torch.tensor([0, 1, 2, 3])
    process = ForwardProcess(schedule, "flow")
    for made in (process.jump(x0, t, eps), process.step(x0, t, eps), process.target(x0, t, eps)):
        assert made.dtype == torch.float32
    np.testing.assert_array_equal(process.time.numpy(), schedule.time.astype(np.float32))
