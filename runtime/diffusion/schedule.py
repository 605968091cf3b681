"""The variance schedule of the forward process, x_t = alpha_t · x_0 + sigma_t · eps, in float64.

Every named schedule states its formula and source, because names collide between codebases.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, ParamSpec

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import RequestError
from ..errors.arguments import MAX_LENGTH, array_of, choice, integer, number, numbers, refused
from ..errors.keywords import bind, option_names
from ..errors.messages import reason, shown

Float64 = NDArray[np.float64]


def log_snr_of(alpha: ArrayLike, sigma: ArrayLike) -> Float64:
    """log(alpha² / sigma²), elementwise: +inf at the clean end (1, 0), -inf where alpha is 0."""
    with np.errstate(divide="ignore"):
        return np.asarray(2.0 * (np.log(alpha) - np.log(sigma)))


def _variance_preserving(log_snr: ArrayLike) -> tuple[Float64, Float64]:
    """(alpha, sigma) on the unit circle with the given log-SNR; exact to rounding at both ends."""
    half = 0.5 * np.asarray(log_snr, np.float64)
    return np.exp(-0.5 * np.logaddexp(0.0, -2.0 * half)), np.exp(
        -0.5 * np.logaddexp(0.0, 2.0 * half)
    )


class Curve(NamedTuple):
    """A schedule between its knots: time → (alpha, sigma), and log-SNR → time."""

    level: Callable[[Float64], tuple[Float64, Float64]]
    time: Callable[[Float64], Float64]


@dataclass(frozen=True, eq=False)
class Schedule:
    """T noise levels, index 0 the least noisy (after one forward step); the clean end (1, 0) is no
    knot.

    alpha [T]: signal scale (√ᾱ_t of Ho et al. 2020), never rises. sigma [T]: noise scale, never
    falls, above 0.
    time [T]: what the network is told at each knot, strictly rising. log-SNR strictly falls; -inf
    is allowed at the last knot only. Raises RequestError where any of this does not hold.
    """

    name: str
    alpha: Float64
    sigma: Float64
    time: Float64
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise refused("name", "a schedule's name", self.name)
        if not isinstance(self.parameters, Mapping):
            raise self._refused(f"parameters must be a dict, got {shown(self.parameters)}")
        object.__setattr__(self, "parameters", MappingProxyType(dict(self.parameters)))
        for name in ("alpha", "sigma", "time"):
            array = self._numbers(name)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        alpha = self.alpha
        sigma = self.sigma
        time = self.time
        if alpha.ndim != 1 or alpha.size == 0 or not alpha.shape == sigma.shape == time.shape:
            raise self._refused(
                "alpha, sigma and time must be three vectors of one length, "
                f"got {alpha.shape}, {sigma.shape}, {time.shape}"
            )
        if (alpha < 0).any() or (alpha[:-1] == 0).any() or (sigma <= 0).any():
            raise self._refused("alpha must be above 0 (0 at the last knot only) and sigma above 0")
        if (np.diff(alpha) > 0).any() or (np.diff(sigma) < 0).any():
            raise self._refused("alpha must never rise and sigma must never fall")
        if (np.diff(log_snr_of(alpha, sigma)) >= 0).any() or (np.diff(time) <= 0).any():
            raise self._refused("log-SNR must strictly fall and time must strictly rise")
        if self.variance_preserving and not np.allclose(
            alpha**2 + sigma**2, 1.0, rtol=0, atol=1e-12
        ):
            raise self._refused(
                "alpha² + sigma² must be 1 (to 1e-12) in a variance-preserving schedule"
            )

    def _refused(self, why: str) -> RequestError:
        return RequestError(f"schedule {shown(self.name)}: {why}.")

    def _numbers(self, name: str) -> Float64:
        """A copy of a field as float64."""
        try:
            return np.array(numbers(name, getattr(self, name), "finite real numbers"))
        except RequestError as error:
            raise self._refused(f"{name} must be finite real numbers: {error}") from None

    def __len__(self) -> int:
        return self.alpha.size

    @property
    def variance_preserving(self) -> bool:
        """Whether alpha² + sigma² = 1 at every knot: all schedules but `flow` and `edm`."""
        return self.name not in ("flow", "edm")

    @property
    def log_snr(self) -> Float64:
        """[T]: log(alpha² / sigma²)."""
        return log_snr_of(self.alpha, self.sigma)

    @property
    def beta(self) -> Float64:
        """[T]: the variance that one forward step adds, sigma_t² - (alpha_t / alpha_{t-1})² ·
        sigma_{t-1}²; β_t of Ho et al. 2020."""
        ratio = self.alpha / np.r_[1.0, self.alpha[:-1]]
        previous = np.r_[0.0, self.sigma[:-1]]
        return self.sigma**2 - (ratio * previous) ** 2

    def level(self, time: ArrayLike) -> tuple[Float64, Float64]:
        """(alpha, sigma) at `time` (any shape), which may lie between knots.

        Between knots a continuous schedule uses its formula, any other makes log-SNR linear in
        time. Raises RequestError outside [time[0], time[-1]].
        """
        time = _floats("time", time)
        if not ((time >= self.time[0]) & (time <= self.time[-1])).all():
            raise RequestError(
                f"time {shown(time)} is outside the schedule {self.name!r}, "
                f"which runs from {self.time[0]} to {self.time[-1]}."
            )
        return self._curve.level(time)

    def time_at(self, log_snr: ArrayLike) -> Float64:
        """The time (any shape) at which the schedule has this log-SNR. Raises RequestError outside
        its range."""
        log_snr = _floats("log_snr", log_snr)
        knots = self.log_snr
        slack = 1e-9
        if not ((log_snr >= knots[-1] - slack) & (log_snr <= knots[0] + slack)).all():
            raise RequestError(
                f"log-SNR {shown(log_snr)} is outside the schedule {self.name!r}, "
                f"which runs from {knots[0]:.4g} down to {knots[-1]:.4g}."
            )
        return np.clip(self._curve.time(log_snr), self.time[0], self.time[-1])

    @property
    def _curve(self) -> Curve:
        if self.name in CURVES and not self.parameters.get("zero_terminal_snr"):
            return CURVES[self.name](**self.parameters)
        return _interpolated(self.time, self.log_snr)

    def zero_terminal_snr(self) -> Schedule:
        """The same schedule with alpha shifted and scaled so that the last knot is pure noise (Lin
        et al. 2024, Algorithm 1).

        Raises RequestError for a schedule that does not preserve variance.
        """
        if not self.variance_preserving:
            raise self._refused(
                "zero_terminal_snr() is defined for variance-preserving schedules only"
            )
        first = self.alpha[0]
        last = self.alpha[-1]
        alpha = (self.alpha - last) * (first / (first - last))
        sigma = np.sqrt((1.0 - alpha) * (1.0 + alpha))
        sigma[0] = self.sigma[0]
        return Schedule(
            self.name, alpha, sigma, self.time, {**self.parameters, "zero_terminal_snr": True}
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `from_json` makes the same schedule, to the bit."""
        arrays = {name: getattr(self, name).tolist() for name in ("alpha", "sigma", "time")}
        return {
            "name": self.name,
            "parameters": {k: _plain(v) for k, v in self.parameters.items()},
            **arrays,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Schedule:
        """The schedule that `to_json` wrote. Raises RequestError where the numbers are no schedule
        or are not what the name says."""
        fields = ("name", "alpha", "sigma", "time", "parameters")
        if not isinstance(value, Mapping) or not all(name in value for name in fields):
            raise RequestError(
                f"a schedule must be an object with {', '.join(fields)}, got {shown(value)}."
            )
        found = cls(*(value[name] for name in fields))
        parameters = dict(found.parameters)
        zero = parameters.pop("zero_terminal_snr", False)
        named = _named(found.name, parameters)
        named = named.zero_terminal_snr() if zero else named
        for name in ("alpha", "sigma", "time"):
            stored = getattr(found, name)
            formula = getattr(named, name)
            if stored.shape != formula.shape or not np.allclose(
                stored, formula, rtol=1e-9, atol=1e-12
            ):
                raise RequestError(
                    f"schedule {found.name!r}: the stored {name} is not what its name and "
                    f"parameters give."
                )
        return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _floats(name: str, value: Any) -> Float64:
    """`value` as a float64 array that may hold NaN and infinities. Raises RequestError for
    others."""
    try:
        return np.asarray(array_of(value, MAX_LENGTH), np.float64)
    except Exception:
        raise refused(name, "a number or an array of numbers", value) from None


def _interpolated(time: Float64, log_snr: Float64) -> Curve:
    """Log-SNR linear in time; in a last interval that ends at -inf, alpha/sigma linear in time
    instead."""
    if np.isfinite(log_snr[-1]):

        def at(t: Float64) -> Float64:
            return np.interp(t, time, log_snr)

        def back(lam: Float64) -> Float64:
            return np.interp(-lam, -log_snr, time)
    else:
        inner = time[:-1]
        finite = log_snr[:-1]
        ratio = math.exp(0.5 * log_snr[-2])
        start = time[-2]
        width = time[-1] - time[-2]

        def at(t: Float64) -> Float64:
            with np.errstate(divide="ignore"):
                tail = 2.0 * np.log(ratio * np.clip((time[-1] - t) / width, 0.0, 1.0))
            return np.where(t <= start, np.interp(t, inner, finite), tail)

        def back(lam: Float64) -> Float64:
            tail = time[-1] - width * np.exp(0.5 * np.minimum(lam, finite[-1])) / ratio
            return np.where(lam >= finite[-1], np.interp(-lam, -finite, inner), tail)

    return Curve(lambda t: _variance_preserving(at(t)), back)


def _from_beta(name: str, beta: Float64, parameters: Mapping[str, Any]) -> Schedule:
    """ᾱ_t = Π (1 - β_s), by sums of log1p so that the first sigmas keep their digits."""
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
    with np.errstate(divide="ignore"):
        log_alpha_bar = np.cumsum(np.log1p(-beta))
    sigma = np.sqrt(-np.expm1(log_alpha_bar))
    return Schedule(
        name, np.exp(0.5 * log_alpha_bar), sigma, np.arange(beta.size, dtype=np.float64), parameters
    )


P = ParamSpec("P")


def _formula(function: Callable[P, Schedule]) -> Callable[P, Schedule]:
    """A schedule's function whose parameters are checked to be numbers, and whose failures are
    RequestErrors."""

    names = option_names(function, 0)
    what = f"schedule {function.__name__!r}"

    @functools.wraps(function)
    def checked(*positional: P.args, **named: P.kwargs) -> Schedule:
        given = [_parameter(*pair) for pair in zip(names, positional, strict=False)]
        options = {name: _parameter(name, value) for name, value in named.items()}
        try:
            with np.errstate(all="ignore"):  # Schedule refuses numbers that come to nothing
                return function(*given, *positional[len(given) :], **options)  # type: ignore[arg-type]
        except (ArithmeticError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            values = {**dict(zip(names, given, strict=False)), **options}
            raise RequestError(f"{what} cannot use {shown(values)}: {reason(error)}.") from error

    return checked


def _parameter(name: str, value: Any) -> int | float:
    """A parameter as a plain number: T as an int, others finite. Raises RequestError for anything
    else."""
    if name == "T":
        return integer("T", value, 1, MAX_LENGTH)
    found = number(name, value, -sys.float_info.max, sys.float_info.max)
    # A whole number stays as it was given, so that bundle.json shows it so.
    return value if type(value) is int and abs(value) < 2**53 else found


@_formula
def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """β linear from beta_start to beta_end, both rescaled by 1000/T so that any T ends near the
    same noise (Ho et al. 2020; rescaling: Nichol & Dhariwal 2021's code). Refused where β ≥ 1,
    which is T ≤ 20 with the defaults."""
    beta = np.linspace(beta_start, beta_end, T) * (1000.0 / T)
    if (beta >= 1).any():
        raise RequestError(
            f"schedule 'linear': T={T} rescales beta to {beta.max():.3g}, which must stay below "
            f"1; use a larger T or 'linear_raw'."
        )
    return _from_beta("linear", beta, {"T": T, "beta_start": beta_start, "beta_end": beta_end})


@_formula
def linear_raw(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """β linear from beta_start to beta_end, not rescaled (Ho et al. 2020, as most libraries have
    it)."""
    beta = np.linspace(beta_start, beta_end, T)
    return _from_beta("linear_raw", beta, {"T": T, "beta_start": beta_start, "beta_end": beta_end})


@_formula
def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
    """√β linear (Rombach et al. 2022, latent diffusion)."""
    beta = np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2
    return _from_beta(
        "scaled_linear", beta, {"T": T, "beta_start": beta_start, "beta_end": beta_end}
    )


@_formula
def cosine(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """ᾱ(t) = f(t)/f(0), f(t) = cos²((t + s)/(1 + s) · π/2), β_t = min(1 - ᾱ(t+1)/ᾱ(t), max_beta)
    (Nichol & Dhariwal 2021, eq. 17)."""
    f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * (np.pi / 2)) ** 2
    return _from_beta(
        "cosine", np.minimum(1.0 - f[1:] / f[:-1], max_beta), {"T": T, "s": s, "max_beta": max_beta}
    )


def from_betas(betas: Iterable[float]) -> Schedule:
    """The schedule with exactly these β_t, each in (0, 1); the last may be 1. At most 1,000,000."""
    if not hasattr(betas, "__len__"):
        try:
            betas = list(itertools.islice(betas, MAX_LENGTH + 1))
        except Exception as error:
            raise RequestError(f"`betas` cannot be read: {reason(error)}.") from error
    rule = f"a list of 1 to {MAX_LENGTH} numbers"
    array = numbers("betas", betas, rule)
    if array.ndim != 1:
        raise refused("betas", rule, betas)
    betas = tuple(array.tolist())
    return _from_beta("from_betas", np.array(betas), {"betas": betas})


@_formula
def sigmoid(
    T: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0, clip_min: float = 1e-9
) -> Schedule:
    """ᾱ(t) = (S(end) - S(start + t·(end - start))) / (S(end) - S(start)), S(v) = sigmoid(v/tau), t
    = (i+1)/T, at least clip_min (Jabri et al. 2022, Algorithm 1 of the sigmoid schedule; Chen 2023,
    Code 1)."""
    time = np.arange(T, dtype=np.float64)
    parameters = {"T": T, "start": start, "end": end, "tau": tau, "clip_min": clip_min}
    return Schedule("sigmoid", *_sigmoid_curve(**parameters).level(time), time, parameters)


def _sigmoid_curve(T: int, start: float, end: float, tau: float, clip_min: float) -> Curve:
    def S(v: Any) -> Any:
        return 1.0 / (1.0 + np.exp(-np.asarray(v) / tau))

    low = S(start)
    high = S(end)

    def level(time: Float64) -> tuple[Float64, Float64]:
        alpha_bar = np.maximum(
            (high - S(start + (time + 1) / T * (end - start))) / (high - low), clip_min
        )
        return np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)

    def back(log_snr: Float64) -> Float64:
        v = high - _variance_preserving(log_snr)[0] ** 2 * (high - low)
        return (tau * np.log(v / (1.0 - v)) - start) / (end - start) * T - 1

    return Curve(level, back)


@_formula
def flow(T: int = 1000, time_scale: float = 1000.0) -> Schedule:
    """alpha = 1 - t, sigma = t, t = (i+1)/T; the network is told time_scale·t (rectified flow: Liu
    et al. 2023; Lipman et al. 2023)."""
    t = np.arange(1, T + 1) / T
    return Schedule("flow", 1.0 - t, t, time_scale * t, {"T": T, "time_scale": time_scale})


def _flow_curve(T: int, time_scale: float) -> Curve:
    return Curve(
        lambda time: (1.0 - time / time_scale, time / time_scale),
        lambda log_snr: time_scale / (1.0 + np.exp(0.5 * log_snr)),
    )


@_formula
def edm(
    T: int = 1000,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    sigma_data: float = 0.5,
) -> Schedule:
    """alpha = 1, sigma^(1/rho) linear from sigma_min to sigma_max; the network is told ln(sigma)/4
    (Karras et al. 2022, eq. 5 and table 1)."""
    ramp = np.linspace(0.0, 1.0, T)
    sigma = (
        sigma_min ** (1 / rho) + ramp * (sigma_max ** (1 / rho) - sigma_min ** (1 / rho))
    ) ** rho
    parameters = {
        "T": T,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
        "rho": rho,
        "sigma_data": sigma_data,
    }
    return Schedule("edm", np.ones(T), sigma, np.log(sigma) / 4, parameters)


def _edm_curve(**_: float) -> Curve:
    return Curve(
        lambda time: (np.ones_like(time), np.exp(4.0 * time)), lambda log_snr: -log_snr / 8.0
    )


SCHEDULES: Mapping[str, Callable[..., Schedule]] = {
    s.__name__: s
    for s in (linear, linear_raw, scaled_linear, cosine, sigmoid, flow, edm, from_betas)
}
CURVES: Mapping[str, Callable[..., Curve]] = {
    "sigmoid": _sigmoid_curve,
    "flow": _flow_curve,
    "edm": _edm_curve,
}


def make_schedule(name: str, **parameters: Any) -> Schedule:
    """The schedule called `name` with these parameters. Raises RequestError for an unknown name,
    parameter or value."""
    return _named(name, parameters)


def _named(name: str, parameters: Mapping[str, Any]) -> Schedule:
    found = choice("name", name, SCHEDULES, "schedule")
    return bind(f"schedule {found!r}", SCHEDULES[found], (), parameters)
