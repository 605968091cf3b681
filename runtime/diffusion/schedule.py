"""The variance schedule of the forward process, x_t = alpha_t · x_0 + sigma_t · eps, in float64.

The named schedules are in `formulas`, their levels between knots in `curves`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike

from ..errors import RequestError
from ..errors.arguments import MAX_LENGTH, array_of, choice, flag, instance, numbers
from ..errors.keywords import bind
from ..errors.messages import reason, refused, shown
from .arrays import Float64, Parameters
from .curves import CURVES, Curve, interpolated, log_snr_of
from .formulas import FORMULAS, Knots, from_beta


@dataclass(frozen=True, eq=False)
class Schedule:
    """T noise levels, the knots: index 0 is the least noisy one, after one forward step.

    The clean end (1, 0) is not a knot. log-SNR strictly falls; only the last one may be -inf.

    Attributes:
        alpha: [T], the signal scale (√ᾱ_t of Ho et al. 2020), which never rises.
        sigma: [T], the noise scale, above 0, which never falls.
        time: [T], what the network is conditioned on at each knot, strictly rising.

    Raises:
        RequestError: The arrays break one of these rules.
    """

    name: str
    alpha: Float64
    sigma: Float64
    time: Float64
    parameters: Parameters = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise refused("name", "a schedule's name", self.name)
        if not isinstance(self.parameters, Mapping):
            raise self._refused(f"parameters must be a dict, got {shown(self.parameters)}")
        # The dataclass is frozen; its mapping and its arrays are made so too.
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
        """A copy of a field as float64, of its own shape."""
        try:
            return np.array(numbers(name, getattr(self, name), "finite real numbers"))
        except RequestError as error:
            raise self._refused(f"{name} must be finite real numbers: {error}") from None

    def __reduce__(self) -> tuple[type[Schedule], tuple[object, ...]]:
        """Pickle the fields: the frozen mapping cannot be pickled."""
        arrays = (self.alpha, self.sigma, self.time)
        return type(self), (self.name, *arrays, dict(self.parameters))

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
        """[T]: the variance that one forward step adds, β_t of Ho et al. 2020.

        β_t = sigma_t² - (alpha_t / alpha_{t-1})² · sigma_{t-1}².
        """
        # The step before knot 0 starts at the clean end (1, 0).
        ratio = self.alpha / np.r_[1.0, self.alpha[:-1]]
        previous = np.r_[0.0, self.sigma[:-1]]
        return self.sigma**2 - (ratio * previous) ** 2

    def level(self, time: ArrayLike) -> tuple[Float64, Float64]:
        """Compute (alpha, sigma) at a time, each of the shape of `time`, which may be any.

        Between knots a continuous schedule uses its formula. Any other interpolates log-SNR
        linearly in time.

        Raises:
            RequestError: A time lies outside [time[0], time[-1]].
        """
        time = _floats("time", time)
        # Written so that NaN, which no comparison holds for, is refused too.
        inside = (time >= self.time[0]) & (time <= self.time[-1])
        if not inside.all():
            raise RequestError(
                f"time {shown(time[~inside][0])} is outside the schedule {self.name!r}, "
                f"which runs from {self.time[0]} to {self.time[-1]}."
            )
        return self._curve.level(time)

    def time_at(self, log_snr: ArrayLike) -> Float64:
        """Compute the time at which the schedule has this log-SNR, of its shape, which may be any.

        Raises:
            RequestError: A log-SNR lies outside the schedule's range.
        """
        log_snr = _floats("log_snr", log_snr)
        knots = self.log_snr
        # Levels computed from knots may leave the range by a rounding; np.clip takes it back.
        slack = 1e-9
        inside = (log_snr >= knots[-1] - slack) & (log_snr <= knots[0] + slack)
        if not inside.all():
            raise RequestError(
                f"log-SNR {shown(log_snr[~inside][0])} is outside the schedule {self.name!r}, "
                f"which runs from {knots[0]:.4g} down to {knots[-1]:.4g}."
            )
        return np.clip(self._curve.time(log_snr), self.time[0], self.time[-1])

    @property
    def _curve(self) -> Curve:
        # Rescaled to zero terminal SNR, a schedule no longer follows its formula.
        if self.name in CURVES and not self.parameters.get("zero_terminal_snr"):
            try:
                return CURVES[self.name](**self.parameters)
            except TypeError as error:  # one that was made by hand
                raise self._refused(
                    f"its parameters are not those of its formula ({reason(error)}); make it with "
                    f"make_schedule"
                ) from None
        return interpolated(self.time, self.log_snr)

    def zero_terminal_snr(self) -> Schedule:
        """Shift and scale alpha so that the last knot is pure noise (Lin et al. 2024, Algorithm 1).

        Raises:
            RequestError: The schedule does not preserve variance, or has one knot.
        """
        if not self.variance_preserving:
            raise self._refused(
                "zero_terminal_snr() is defined for variance-preserving schedules only"
            )
        if len(self) < 2:
            raise self._refused("zero_terminal_snr() needs two knots: it keeps the first")
        # The map that takes the last alpha to 0 and keeps the first.
        first = self.alpha[0]
        last = self.alpha[-1]
        alpha = (self.alpha - last) * (first / (first - last))
        # √(1 - alpha²) as a product, which keeps the digits of small sigmas. The first one is
        # known exactly.
        sigma = np.sqrt((1.0 - alpha) * (1.0 + alpha))
        sigma[0] = self.sigma[0]
        return Schedule(
            self.name, alpha, sigma, self.time, {**self.parameters, "zero_terminal_snr": True}
        )

    def to_json(self) -> dict[str, object]:
        """Return a JSON value from which `from_json` makes the bit-exact same schedule."""
        arrays = {name: getattr(self, name).tolist() for name in ("alpha", "sigma", "time")}
        return {
            "name": self.name,
            "parameters": {k: _plain(v) for k, v in self.parameters.items()},
            **arrays,
        }

    @classmethod
    def from_json(cls, value: object) -> Schedule:
        """Return the schedule that `to_json` wrote.

        Raises:
            RequestError: The numbers are not a schedule, or differ from those of the formula that
                the name and the parameters give.
        """
        fields = ("name", "alpha", "sigma", "time", "parameters")
        if not isinstance(value, Mapping) or not all(name in value for name in fields):
            raise RequestError(
                f"a schedule must be an object with {', '.join(fields)}, got {shown(value)}."
            )
        parameters = dict(instance("parameters", value["parameters"], Mapping))
        zero = flag("zero_terminal_snr", parameters.pop("zero_terminal_snr", False))
        named = _named(value["name"], parameters)
        named = named.zero_terminal_snr() if zero else named
        # The formula knows the parameters that are not stored, because they are its defaults.
        arrays = (value["alpha"], value["sigma"], value["time"])
        found = cls(value["name"], *arrays, named.parameters)
        # A stored schedule is both its name and its numbers: the two must agree.
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


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _floats(name: str, value: object) -> Float64:
    """`value` as a float64 array that may hold NaN and infinities.

    Raises RequestError for anything but an array of numbers.
    """
    try:
        return np.asarray(array_of(value, MAX_LENGTH), np.float64)
    except Exception:
        raise refused(name, "a number or an array of numbers", value) from None


def _schedule(formula: Callable[..., Knots]) -> Callable[..., Schedule]:
    """The function from a formula's parameters to a `Schedule`."""

    @functools.wraps(formula)
    def make(*positional: object, **named: object) -> Schedule:
        # Parameters that give infinities or NaN are refused below, without numpy's warnings.
        with np.errstate(all="ignore"):
            return Schedule(*formula(*positional, **named))

    return make


def from_betas(betas: Iterable[float]) -> Schedule:
    """The schedule with exactly these β_t, each in (0, 1); the last may be 1. At most 1,000,000."""
    if not hasattr(betas, "__len__"):
        # An iterator may be endless: read one more than is allowed, and let `numbers` refuse it.
        try:
            betas = list(itertools.islice(betas, MAX_LENGTH + 1))
        except Exception as error:
            raise RequestError(f"`betas` cannot be read: {reason(error)}.") from error
    rule = f"a list of 1 to {MAX_LENGTH} numbers"
    array = numbers("betas", betas, rule)
    if array.ndim != 1:
        raise refused("betas", rule, betas)
    betas = tuple(array.tolist())
    return Schedule(*from_beta("from_betas", np.array(betas), {"betas": betas}))


SCHEDULES: Mapping[str, Callable[..., Schedule]] = {
    **{formula.__name__: _schedule(formula) for formula in FORMULAS},
    "from_betas": from_betas,
}
"""The named schedules, as functions of their parameters."""


def make_schedule(name: str, **parameters: object) -> Schedule:
    """Make the schedule called `name` with these parameters.

    Raises:
        RequestError: The name or a parameter is unknown, or a value cannot be used.
    """
    return _named(name, parameters)


def _named(name: str, parameters: Mapping[str, object]) -> Schedule:
    known = choice("name", name, SCHEDULES, "schedule")
    return bind(f"schedule {known!r}", SCHEDULES[known], (), parameters)
