"""Order of convergence on Gaussian data, between two finite levels and on two grids, which the
check of a program cannot see."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import RequestError, make_schedule
from runtime.diffusion.program import D, Update, Z, assemble
from runtime.diffusion.solvers import SOLVERS
from runtime.diffusion.solvers.multistep import _ago
from runtime.diffusion.solvers.quadrature import growing
from runtime.diffusion.solvers.steps import multistep, orders

from .gaussian import MU, S, exact, finite_grid, mean_and_variance, seeded, walk

SCHEDULES = {"linear": make_schedule("linear"), "flow": make_schedule("flow")}
GRIDS = [("linear", "karras"), ("linear", "even"), ("flow", "karras")]
ODE = [
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("heun", {}, 2),
    ("edm", {}, 2),
    ("kdpm2", {}, 2),
    ("dpmpp_2s", {}, 2),
    ("dpmpp_2s", {"r": 0.7}, 2),
    ("dpmpp_3s", {}, 3),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_3m", {}, 3),
    *[("unipc", {"order": p, "variant": v}, p + 1) for p in (2, 3) for v in ("bh1", "bh2")],
    *[
        ("unipc", {"order": p, "variant": v, "corrector": False}, p)
        for p in (2, 3)
        for v in ("bh1", "bh2")
    ],
    *[("deis", {"order": p}, p) for p in (1, 2, 3)],
    *[("lms", {"order": p}, p) for p in (1, 2, 3, 4)],
    ("plms", {}, 2),
]
SDE = [
    ("ddpm", {}, 1),
    ("ddpm", {"variance": "fixed_large"}, 1),
    ("ddim", {"eta": 0.5}, 1),
    ("euler_ancestral", {}, 1),
    ("repaint", {"jump": 3, "resample": 2}, 1),
    ("edm", {"churn": 20.0}, 2),
    ("dpmpp_2s_sde", {}, 2),
    ("dpmpp_2m_sde", {}, 2),
]
NO_MEMORY = ("heun", "edm", "kdpm2", "dpmpp_2s", "dpmpp_3s")


def slope(errors: list[float]) -> float:
    """Order between n = 96 and n = 384."""
    return float(np.log(errors[0] / errors[1]) / np.log(4))


def error(solver: str, options: dict, grid: tuple[str, str], n: int, seed_history: bool) -> float:
    on = finite_grid(SCHEDULES[grid[0]], n, grid[1])
    update = SOLVERS[solver](on, **options)
    levels = update.moments[:, 0]
    x = 1.7 * np.hypot(levels[0, 0] * S, levels[0, 1])
    memory = 0 if solver in NO_MEMORY else int(update.moments[-2, 1:].any(axis=1).sum())
    row = memory + 2 if memory and seed_history else 0
    state = seeded(update, row, x)
    if row and solver == "unipc" and options.get("corrector", True):
        # Its x comes from the predictor, so the predictor runs from the exact state one row before.
        predictor = SOLVERS[solver](on, **{**options, "corrector": False})
        state[0] = walk(predictor, seeded(predictor, row - 1, x), row - 1, row)[0]
    return abs(walk(update, state, row)[0] - exact(x, levels[0], levels[-1]))


@pytest.mark.parametrize("grid", GRIDS, ids="-".join)
@pytest.mark.parametrize(("solver", "options", "order"), ODE, ids=str)
def test_order_of_convergence_to_the_exact_trajectory(
    solver, options, order, grid, record_property
) -> None:
    found = {
        seed: slope([error(solver, options, grid, n, seed) for n in (96, 384)])
        for seed in (True, False)
    }
    record_property("slope with the shipped start", round(found[False], 2))
    assert found[True] >= order - 0.2, f"slope {found}"
    # The first steps of lower order are taken where lambda changes nothing yet: no solver loses its
    # order to them here.
    assert found[False] >= order - 0.2, f"slope {found}"
    if (
        grid[1] == "karras"
    ):  # the even grid cancels the leading error of three-point formulas: 3.8 for 3
        assert found[True] <= order + 0.2, f"slope {found}"


@pytest.mark.parametrize("grid", GRIDS, ids="-".join)
@pytest.mark.parametrize(("solver", "options", "order"), SDE, ids=str)
def test_mean_and_variance_converge_to_the_datas(solver, options, order, grid) -> None:
    errors = []
    for n in (96, 384):
        update = SOLVERS[solver](finite_grid(SCHEDULES[grid[0]], n, grid[1]), **options)
        mean, variance = mean_and_variance(update)
        alpha, sigma = update.moments[-1, 0]
        assert abs(mean - alpha * MU) < 1e-12, "the mean is exact: D of the mean is the mean"
        errors.append(abs(variance - (alpha * S) ** 2 - sigma**2))
    assert slope(errors) >= order - 0.2
    assert errors[1] < 0.02


@pytest.mark.parametrize(
    "solver",
    [
        "ddpm",
        "dpmpp_2s_sde",
        "dpmpp_2m_sde",
        "edm",
        "lcm",
        "repaint",
        "heun",
        "unipc",
        "deis",
        "lms",
        "plms",
        "dpmpp_3s",
    ],
)
def test_for_one_picture_every_level_is_kept_and_what_leaves_it_is_declared(solver: str) -> None:
    """Data that is one point: D is x_0, so mean and variance follow from M alone. They must be as
    declared at every row."""
    update = SOLVERS[solver](
        finite_grid(SCHEDULES["linear"], 40, "karras"),
        **({"churn": 10.0} if solver == "edm" else {}),
    )
    mean, n = (
        update.moments[0, :, 0] * MU,
        update.moments[0, :, 1:],
    )  # n: noise, one column for each independent draw
    for k, M in enumerate(update.M):
        mean = M[:, :4] @ mean + M[:, D] * MU
        n = np.hstack([M[:, :4] @ n, M[:, Z:]])
        if solver == "lcm":  # f keeps a little of x, so what it adds on purpose adds up
            assert (
                abs(mean[0] - update.moments[k + 1, 0, 0] * MU)
                <= abs(MU * update.bias).sum() + 1e-12
            )
        else:
            np.testing.assert_allclose(mean, update.moments[k + 1, :, 0] * MU, atol=1e-12)
            np.testing.assert_allclose(
                (n[0] ** 2).sum(), update.moments[k + 1, 0, 1] ** 2, rtol=1e-10
            )


def third_order_as_commonly_coded(grid) -> Update:
    """3M with half of the weight on its second difference, and no other change."""
    h, ago = _ago(grid, 2)
    points, m = orders(grid, 3), growing(h, 2)
    w = np.zeros((len(grid), 2))
    r1, r2 = ago[:, 0], ago[:, 1]
    w[points == 2, 0] = (-0.5 * np.expm1(-h) / r1)[points == 2]
    three = points == 3
    a, b = r1[three], r2[three]
    # D = D_0 + u·D' + ½u²·D'': D' from both nodes exactly, D''/2 from the second difference, its
    # integral halved.
    first, second = (
        np.stack([-b / (a * (a - b)), a / (b * (a - b))], -1),
        np.stack([1 / (a * (a - b)), -1 / (b * (a - b))], -1),
    )
    w[three] = m[three, :1] * first + 0.5 * m[three, 1:] * second
    return multistep(grid, w)


def flipped_2m(grid) -> Update:
    update = SOLVERS["dpmpp_2m"](grid)
    update.M[:, 0, D] += 2 * update.M[:, 0, 1]
    update.M[:, 0, 1] *= -1
    return update


@pytest.mark.parametrize(
    ("wrong", "order", "low", "high"),
    [(third_order_as_commonly_coded, 3, 1.8, 2.2), (flipped_2m, 2, 0.8, 1.2)],
)
def test_wrong_history_passes_the_proof_and_is_found_here(
    wrong, order: int, low: float, high: float
) -> None:
    errors = []
    for n in (96, 384):
        update = wrong(finite_grid(SCHEDULES["linear"], n, "karras"))
        assemble("wrong", update, SCHEDULES["linear"], "v")  # raises nothing
        levels = update.moments[:, 0]
        x = 1.7 * np.hypot(levels[0, 0] * S, levels[0, 1])
        errors.append(
            abs(walk(update, seeded(update, 4, x), 4)[0] - exact(x, levels[0], levels[-1]))
        )
    assert low < slope(errors) < high < order


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun", "deis"])
def test_a_grid_that_climbs_inverts(solver: str) -> None:
    """Up from the least noisy level and down again ends within the error of both."""
    schedule = SCHEDULES["linear"]
    down = finite_grid(schedule, 200, "karras")
    up = type(down)("up", *(v[::-1] for v in (down.time, down.alpha, down.sigma)), schedule)
    there, back = SOLVERS[solver](up), SOLVERS[solver](down)
    x = 0.9
    noise = walk(there, seeded(there, 0, x))[0]
    assert abs(noise - exact(x, there.moments[0, 0], there.moments[-1, 0])) < (
        0.2 if solver == "ddim" else 0.01
    )
    state = seeded(back, 0, noise)
    assert abs(walk(back, state)[0] - x) < (0.05 if solver == "ddim" else 0.005)


def test_a_grid_that_climbs_takes_no_fresh_noise() -> None:
    down = finite_grid(SCHEDULES["linear"], 5, "even")
    up = type(down)(
        "up", *(v[::-1] for v in (down.time, down.alpha, down.sigma)), SCHEDULES["linear"]
    )
    for solver in ("ddpm", "euler_ancestral", "repaint", "dpmpp_2m_sde", "dpmpp_2s_sde"):
        with pytest.raises(RequestError, match="climbs"):
            SOLVERS[solver](up)


def test_the_worked_example_of_the_docs(root: Path) -> None:
    """The code in docs/adding-a-solver.md is a solver of order 2. With its sign flipped, the
    program's check still passes and this test fails."""
    code = (
        (root / "docs" / "adding-a-solver.md").read_text().split("```python\n")[1].split("```")[0]
    )
    found: dict[str, Any] = {}
    for name, text in (("right", code), ("flipped", code.replace("[(1 +", "[-(1 +"))):
        exec(text, names := {})
        errors = []
        for n in (96, 384):
            update = names["dpmpp_2s_exact"](finite_grid(SCHEDULES["linear"], n, "karras"))
            assemble(name, update, SCHEDULES["linear"], "v")
            levels = update.moments[:, 0]
            x = 1.7 * np.hypot(levels[0, 0] * S, levels[0, 1])
            errors.append(
                abs(walk(update, seeded(update, 0, x))[0] - exact(x, levels[0], levels[-1]))
            )
        found[name] = slope(errors)
    assert found["right"] > 1.8
    assert found["flipped"] < 1.2
