"""Whether an engine accepts more work: limits on the backlog, and deadlines. Pure policy, without a
clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import RequestError
from ..errors.arguments import integer, number
from .fair import Work
from .forecast import Forecast

Why = Literal["samples", "rows", "seconds", "flow", "deadline"]


@dataclass(frozen=True)
class Limits:
    """How much work an engine accepts before it raises `Overloaded`.

    Attributes:
        live: Samples that hold memory in the batch; the others wait without. It is raised to a
            full call of each graph.
        samples: Samples that are not finished, of all flows.
        rows: Network rows that are left, of all flows; a guided row counts 2.
        seconds: Seconds that those rows take by the cost curve. A busy machine takes longer, which
            changes predictions and not this bound. A submission is accepted by an engine that has
            nothing to do, however long it takes.
        flow_share: The share of samples, rows and seconds that one flow may hold, more than 0, at
            most 1. A submission is accepted if its flow has nothing to do, as far as the limits of
            all flows allow.
    """

    live: int = 64
    samples: int = 512
    rows: int = 100_000
    seconds: float = 60.0
    flow_share: float = 0.5

    def checked(self) -> Limits:
        """Return these limits. Raises RequestError if one of them cannot be used."""
        return Limits(
            live=integer("live", self.live, 1, 1_000_000),
            samples=integer("samples", self.samples, 1, 1_000_000),
            rows=integer("rows", self.rows, 1),
            seconds=number("seconds", self.seconds, 1e-3, 1e9),
            flow_share=number("flow_share", self.flow_share, 1e-6, 1.0),
        )

    def check_samples(self, samples: int) -> None:
        """Raise RequestError if one submission has more samples than are ever accepted."""
        if samples > self.samples:
            raise RequestError(
                f"at most {self.samples} samples can be submitted together, got {samples}. "
                "Submit fewer at a time."
            )

    def check_rows(self, rows: int) -> None:
        """Raise RequestError if one submission has more network rows than are ever accepted."""
        if rows > self.rows:
            raise RequestError(
                f"at most {self.rows} rows of the network can be submitted together, got {rows}. "
                "Take fewer steps or fewer samples."
            )


@dataclass(frozen=True)
class Refusal:
    """Why work is not accepted, and when it would be.

    Attributes:
        why: The limit that it meets, or "deadline".
        seconds: Predicted seconds until it would be accepted; for a deadline, until it would be
            done.
        sentence: For the user.
    """

    why: Why
    seconds: float
    sentence: str


def refusal(
    now: Forecast, works: Sequence[Work], limits: Limits, running: float = 0.0
) -> Refusal | None:
    """Why a submission is not accepted now, or None if it is.

    Args:
        now: Of what is under way and waiting.
        works: The samples of one submission, of one flow, not among those.
        limits: The bounds.
        running: Seconds that the present network call has taken.
    """
    if not works or not now.rows:
        return None
    flow = works[0].flow
    # By the curve alone: a bound that moved with the machine's pace would not be predictable.
    rate = now.seconds / now.pace / now.rows
    new_rows = sum(work.left for work in works)
    found: list[tuple[float, Why, str]] = []

    def check(why: Why, sentence: str, over: float, wait: float) -> None:
        if over > 0:
            found.append((now.end_of_call(wait, running), why, sentence))

    over = now.samples + len(works) - limits.samples
    check("samples", _full("samples", limits.samples), over, now.seconds_until_done(over))
    over = now.rows + new_rows - limits.rows
    check("rows", _full("rows of the network", limits.rows), over, now.seconds_of(over))
    over = (now.rows + new_rows) * rate - limits.seconds
    wait = min(over * now.pace, now.seconds)
    check("seconds", _full("seconds of work", limits.seconds), over, wait)
    if held := now.flow_rows(flow):
        share = limits.flow_share
        own = now.flow_samples(flow)
        over = own + len(works) - share * limits.samples
        wait = now.seconds_until_done(min(_ceil(over), own), flow)
        check("flow", _share("samples", share), over, wait)
        over = held + new_rows - share * limits.rows
        wait = now.seconds_until_flow_served(flow, min(over, held))
        check("flow", _share("rows of the network", share), over, wait)
        # The flow's seconds are those of its rows at the rate of all.
        over = (held + new_rows) * rate - share * limits.seconds
        wait = now.seconds_until_flow_served(flow, min(over / rate, held))
        check("flow", _share("seconds of work", share), over, wait)
    if not found:
        return None
    seconds, why, sentence = max(found)
    return Refusal(why, seconds, f"{sentence} Try again in {seconds:.1f} s.")


def deadline_refusal(seconds: float, deadline: float) -> Refusal | None:
    """Why a submission cannot be done `deadline` seconds from now, or None if it can.

    Args:
        seconds: Predicted until it is done.
        deadline: Seconds.
    """
    if seconds <= deadline:
        return None
    return Refusal(
        "deadline",
        seconds,
        f"the deadline is {deadline:g} s from now, and the request would take {seconds:.2f} s. "
        "Allow more time, or take fewer steps.",
    )


def _full(what: str, limit: float) -> str:
    return f"the engine is overloaded: at most {limit:g} {what} may be under way and waiting."


def _share(what: str, share: float) -> str:
    return (
        f"this user has too much under way: one user may hold {share:.0%} of the {what} that the "
        "engine accepts."
    )


def _ceil(value: float) -> int:
    return int(-(-value // 1))
