"""How a network's prediction F is read: D = clip(c_skip·x + c_out·F(c_in·x, time))."""

from __future__ import annotations

import numpy as np

from ..errors import RequestError
from ..errors.arguments import choice
from .arrays import Float64

PREDICTIONS = ("epsilon", "v", "x0", "flow", "edm")
"""What networks predict, see `precondition`."""


def precondition(
    prediction: str, alpha: Float64, sigma: Float64, sigma_data: float = 0.5
) -> tuple[Float64, Float64]:
    """Compute how to read a network's prediction F at levels (alpha, sigma).

    epsilon: F = eps (Ho et al. 2020). v: F = alpha·eps - sigma·x_0 (Salimans & Ho 2022).
    x0: F = x_0. flow: F = eps - x_0 (Liu et al. 2023). edm: Karras et al. 2022, table 1, applied to
    x/alpha at noise sigma/alpha.

    Args:
        prediction: One of `PREDICTIONS`.
        alpha: [K].
        sigma: [K].
        sigma_data: The standard deviation of the data, for edm.

    Returns:
        c [K, 3], the c_in, c_skip and c_out of D = c_skip·x + c_out·F(c_in·x); and answer [K, 2].
        The latter is the prediction of a perfect network, in units of (x_0, eps).

    Raises:
        RequestError: The prediction is unknown, or it is epsilon and alpha is 0, where eps is x
            and says nothing about x_0.
    """
    zero = np.zeros_like(alpha)
    one = np.ones_like(alpha)
    # Each case solves x = alpha·x_0 + sigma·eps and the definition of F for x_0.
    if prediction == "epsilon":
        if (alpha == 0).any():
            raise RequestError(
                "an epsilon network says nothing at zero terminal SNR (alpha = 0): "
                "use a grid that starts lower, or a v, x0 or flow network."
            )
        c = (one, 1 / alpha, -sigma / alpha)
        answer = (zero, one)
    elif prediction == "v":
        # alpha² + sigma² is 1 only in variance-preserving schedules.
        square = alpha**2 + sigma**2
        c = (one, alpha / square, -sigma / square)
        answer = (-sigma, alpha)
    elif prediction == "x0":
        c = (one, zero, one)
        answer = (one, zero)
    elif prediction == "flow":
        c = (one, 1 / (alpha + sigma), -sigma / (alpha + sigma))
        answer = (-one, one)
    elif prediction == "edm":
        # Multiplied through by alpha, so that alpha = 0 needs no special case.
        norm = np.hypot(sigma, alpha * sigma_data)
        c = (1 / norm, alpha * sigma_data**2 / norm**2, sigma * sigma_data / norm)
        answer = (sigma / (sigma_data * norm), -alpha * sigma_data / norm)
    else:
        choice("prediction", prediction, PREDICTIONS)
        raise AssertionError(prediction)
    return np.stack(c, -1), np.stack(answer, -1)
