"""The formulas of the named schedules, each with its source: names collide between codebases."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import NamedTuple, ParamSpec

import numpy as np

from ..errors import RequestError
from ..errors.arguments import MAX_LENGTH, integer, number
from ..errors.keywords import option_names
from ..errors.messages import reason, shown
from . import curves
from .arrays import Float64, Parameters


class Knots(NamedTuple):
    """The fields of a `Schedule`: alpha, sigma and time, each [T]."""

    name: str
    alpha: Float64
    sigma: Float64
    time: Float64
    parameters: Parameters


P = ParamSpec("P")


def _formula(function: Callable[P, Knots]) -> Callable[P, Knots]:
    """A formula that checks its parameters, and whose failures are RequestErrors."""
    names = option_names(function, 0)

    @functools.wraps(function)
    def checked(*positional: P.args, **named: P.kwargs) -> Knots:
        given = [_parameter(*pair) for pair in zip(names, positional, strict=False)]
        options = {name: _parameter(name, value) for name, value in named.items()}
        # Arguments beyond the parameters are passed on, for Python's own error.
        beyond = positional[len(given) :]
        try:
            return function(*given, *beyond, **options)  # type: ignore[arg-type]
        except (ArithmeticError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            values = {**dict(zip(names, given, strict=False)), **options}
            raise RequestError(
                f"schedule {function.__name__!r} cannot use {shown(values)}: {reason(error)}."
            ) from error

    return checked


def _parameter(name: str, value: object) -> int | float:
    """A parameter as a plain number: T as an int, others finite.

    Raises RequestError for anything else.
    """
    if name == "T":
        return integer("T", value, 1, MAX_LENGTH)
    plain = number(name, value, -sys.float_info.max, sys.float_info.max)
    # A whole number stays an int, so that bundle.json shows it as it was given.
    return value if type(value) is int and abs(value) < 2**53 else plain


@_formula
def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Knots:
    """β linear from beta_start to beta_end, both multiplied by 1000/T.

    Any T therefore ends near the same noise. Raises RequestError if β reaches 1, which happens for
    T ≤ 20 with the defaults. Ho et al. 2020; rescaling: the code of Nichol & Dhariwal 2021.
    """
    beta = np.linspace(beta_start, beta_end, T) * (1000.0 / T)
    if (beta >= 1).any():
        raise RequestError(
            f"schedule 'linear': T={T} rescales beta to {beta.max():.3g}, which must stay below "
            f"1; use a larger T or 'linear_raw'."
        )
    return from_beta("linear", beta, {"T": T, "beta_start": beta_start, "beta_end": beta_end})


@_formula
def linear_raw(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Knots:
    """β linear from beta_start to beta_end, not rescaled: Ho et al. 2020, as in most libraries."""
    beta = np.linspace(beta_start, beta_end, T)
    return from_beta("linear_raw", beta, {"T": T, "beta_start": beta_start, "beta_end": beta_end})


@_formula
def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Knots:
    """√β linear: latent diffusion, Rombach et al. 2022."""
    beta = np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2
    parameters = {"T": T, "beta_start": beta_start, "beta_end": beta_end}
    return from_beta("scaled_linear", beta, parameters)


@_formula
def cosine(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Knots:
    """ᾱ(t) = f(t)/f(0), f(t) = cos²((t + s)/(1 + s) · π/2): Nichol & Dhariwal 2021, eq. 17.

    β_t = min(1 - ᾱ(t+1)/ᾱ(t), max_beta).
    """
    f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * (np.pi / 2)) ** 2
    # f(0) cancels in the ratio. max_beta keeps the last β, whose ᾱ is 0, below 1.
    beta = np.minimum(1.0 - f[1:] / f[:-1], max_beta)
    return from_beta("cosine", beta, {"T": T, "s": s, "max_beta": max_beta})


@_formula
def sigmoid(
    T: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0, clip_min: float = 1e-9
) -> Knots:
    """ᾱ(t) = (S(end) - S(start + t·(end - start))) / (S(end) - S(start)), at least clip_min.

    S(v) = sigmoid(v/tau), t = (i+1)/T. Jabri et al. 2022, Algorithm 1 of the sigmoid schedule;
    Chen 2023, Code 1.
    """
    time = np.arange(T, dtype=np.float64)
    parameters = {"T": T, "start": start, "end": end, "tau": tau, "clip_min": clip_min}
    alpha, sigma = curves.sigmoid(**parameters).level(time)
    return Knots("sigmoid", alpha, sigma, time, parameters)


@_formula
def flow(T: int = 1000, time_scale: float = 1000.0) -> Knots:
    """alpha = 1 - t, sigma = t, t = (i+1)/T; the network is conditioned on time_scale·t.

    Rectified flow: Liu et al. 2023; Lipman et al. 2023.
    """
    t = np.arange(1, T + 1) / T
    return Knots("flow", 1.0 - t, t, time_scale * t, {"T": T, "time_scale": time_scale})


@_formula
def edm(
    T: int = 1000,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    sigma_data: float = 0.5,
) -> Knots:
    """alpha = 1, sigma^(1/rho) linear from sigma_min to sigma_max.

    The network is conditioned on ln(sigma)/4. Karras et al. 2022, eq. 5 and table 1.
    """
    # With none, a network of the prediction edm would have no say in D.
    number("sigma_data", sigma_data, 1e-6, 1e6)
    ramp = np.linspace(0.0, 1.0, T)
    low = sigma_min ** (1 / rho)
    high = sigma_max ** (1 / rho)
    sigma = (low + ramp * (high - low)) ** rho
    parameters = {
        "T": T,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
        "rho": rho,
        "sigma_data": sigma_data,
    }
    return Knots("edm", np.ones(T), sigma, np.log(sigma) / 4, parameters)


def from_beta(name: str, beta: Float64, parameters: Parameters) -> Knots:
    """Compute the knots of a discrete schedule from β [T]: ᾱ_t = Π (1 - β_s), time 0 … T-1.

    Raises:
        RequestError: A β lies outside (0, 1), or one before the last is 1.
    """
    if (
        np.iscomplexobj(beta)
        or beta.ndim != 1
        or beta.size == 0
        or not ((beta > 0) & (beta <= 1)).all()
        or (beta[:-1] == 1).any()
    ):
        raise RequestError(
            f"schedule {name!r}: every beta must lie in (0, 1), and only the last may be 1."
        )
    # Sums of log1p instead of products: 1 - ᾱ of the first knots keeps its digits.
    with np.errstate(divide="ignore"):
        log_alpha_bar = np.cumsum(np.log1p(-beta))
    sigma = np.sqrt(-np.expm1(log_alpha_bar))
    time = np.arange(beta.size, dtype=np.float64)
    return Knots(name, np.exp(0.5 * log_alpha_bar), sigma, time, parameters)


FORMULAS = (linear, linear_raw, scaled_linear, cosine, sigmoid, flow, edm)
"""The named schedules that are functions of numbers."""
