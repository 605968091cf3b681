"""What runtime.bench samples, and how long it measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..bundle.bundle import Bundle
from ..bundle.sampling import ResolvedOptions
from ..engine.expand import expand
from ..engine.job import Table
from ..engine.keywords import GuidedKeywords, LabelKeywords
from ..engine.request import Request, resolve
from ..errors.arguments import enough_memory
from ..terminal.options import in_turn


@dataclass(frozen=True)
class Effort:
    """How long and how often to measure.

    Attributes:
        seconds: Of each pair and batch size.
        cold: Fresh processes of each pair.
        pictures: Samples that are compared with the reference's.
        threads: Of the inference library; None for one a core.
        streams: Parts of a batch that run at once; None for what is fastest.
    """

    seconds: float
    cold: int
    pictures: int
    threads: int | None
    streams: int | None = None


@dataclass(frozen=True, eq=False)
class Workload:
    """The arguments of `Sampler.sample`, and what they resolve to for the bundle.

    Attributes:
        labels: The samples' labels, used in turn; empty for a model without labels.
        request: Of the first sample.
        table: The program of every sample.
    """

    seed: int
    keywords: GuidedKeywords
    labels: Sequence[int | str]
    request: Request
    options: ResolvedOptions
    table: Table
    bundle: Bundle

    @classmethod
    def of(
        cls, bundle: Bundle, seed: int, keywords: GuidedKeywords, labels: Sequence[int | str]
    ) -> Workload:
        """Resolve the arguments.

        Raises:
            RequestError: One of them cannot be used.
        """
        # Samples differ in their labels and seeds only, so the first one's program is everyone's.
        (request,) = expand(bundle, 1, seed, _completed(bundle, keywords, labels, 1))
        options = resolve(bundle, request).options
        with enough_memory("the program", "Take fewer steps."):
            table = Table.of(bundle.program_of(options))
        return cls(seed, keywords, labels, request, options, table, bundle)

    def arguments(self, n: int) -> LabelKeywords:
        """Return the keyword arguments of `Sampler.sample` for n samples, without the seed."""
        return _completed(self.bundle, self.keywords, self.labels, n)


def _completed(
    bundle: Bundle, keywords: GuidedKeywords, labels: Sequence[int | str], n: int
) -> LabelKeywords:
    """The keywords, with random conditions, and one label for all samples or the given in turn."""
    label = in_turn(labels, n)
    found: LabelKeywords = {**keywords}
    if bundle.conditions:
        found["conditions"] = {**bundle.draw_conditions(n), **(keywords.get("conditions") or {})}
    if label is not None:
        found["label"] = label
    return found
