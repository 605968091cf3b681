"""Which samples step next: start-time fair queueing of flows, in network rows. Pure policy, without
a clock and without threads.

A flow has a tag, in network rows: a plain row costs 1, a guided row 2. The flow with the least tag
is served first, and its tag grows by the rows that it was served (Goyal, Vin and Cheng 1996). The
virtual time is the tag that was served last. A flow that comes, or comes back, starts there, or at
its own tag if that is larger. So while n flows have work, each gets 1/n of the rows, and a flow
that was idle saves nothing up.

Inside a flow the group (one submission) with the least work left goes first, and inside a group the
sample with the least work left.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from .cost import CostCurve

IDLE_FLOWS = 256
"""Tags of idle flows that are kept before those behind the virtual time are dropped."""


@dataclass(eq=False, slots=True)
class Work:
    """One sample, as the policy sees it.

    Attributes:
        key: The caller's name for it.
        flow: Whose rows they are.
        group: The submission that it belongs to.
        guided: A byte for each row of its program, 1 if the row is guided.
        row: Rows that are done.
        started: Whether it holds a slot: it has been picked before.
        left: Network rows that are left.
    """

    key: int
    flow: str
    group: int
    guided: bytes
    row: int = 0
    started: bool = False
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = network_rows(self.guided)

    def copy(self) -> Work:
        """Another one in the same state."""
        other = Work(self.key, self.flow, self.group, self.guided, self.row, self.started)
        other.left = self.left
        return other


def network_rows(guided: bytes) -> int:
    """Network rows of a program: 2 for each guided row, 1 for each other."""
    return len(guided) + guided.count(1)


class Tick(NamedTuple):
    """One network call: the graph, and the samples that take their next row."""

    guided: bool
    works: tuple[Work, ...]

    @property
    def rows(self) -> int:
        """Network rows of the call."""
        return len(self.works) * (1 + self.guided)


@dataclass(eq=False, slots=True)
class _Group:
    """One submission: its samples, and the network rows that they have left."""

    key: int
    works: list[Work] = field(default_factory=list)
    left: int = 0


@dataclass(eq=False, slots=True)
class _Flow:
    """A flow with work, and its tag."""

    name: str
    order: int
    tag: int
    groups: dict[int, _Group] = field(default_factory=dict)

    def ranked(self) -> Iterator[Work]:
        """Its samples, those to be served first in front."""
        for group in sorted(self.groups.values(), key=attrgetter("left", "key")):
            yield from sorted(group.works, key=attrgetter("left", "key"))


class FairQueue:
    """The samples under way and waiting, and the choice of those that step next.

    queue.add([Work(key, flow, group, guided)])
    tick = queue.pick()             # charges the flows
    finished = queue.advance(tick.works)
    """

    def __init__(self, curve: CostCurve, live: int) -> None:
        """Make an empty queue.

        Args:
            curve: Gives the most samples of a call, and the choice to merge.
            live: Most samples that are started and not finished. It is raised to a full call of
                each graph: otherwise samples of one could keep the calls of the other small.
        """
        self.curve = curve
        self._caps = (curve.cap(False), curve.cap(True))
        self.live = max(live, sum(self._caps))
        self.rows = 0
        self._started: dict[int, Work] = {}
        self._flows: dict[str, _Flow] = {}
        self._works: dict[int, Work] = {}
        self._idle: dict[str, int] = {}
        self._virtual = 0
        self._order = 0

    def __len__(self) -> int:
        return len(self._works)

    @property
    def started(self) -> int:
        """Samples that hold a slot."""
        return len(self._started)

    @property
    def flows(self) -> int:
        """Flows that have work."""
        return len(self._flows)

    def works(self) -> Iterable[Work]:
        """All samples, in the order of arrival."""
        return self._works.values()

    def copy(self) -> FairQueue:
        """Another queue in the same state, to try things out."""
        other = FairQueue(self.curve, self.live)
        other._virtual = self._virtual
        other._order = self._order
        other._idle = dict(self._idle)
        for name, flow in self._flows.items():
            other._flows[name] = _Flow(name, flow.order, flow.tag)
        other.add(work.copy() for work in self._works.values())
        other._started = {key: other._works[key] for key in self._started}
        return other

    def tag(self, flow: str) -> int:
        """The tag of a flow, or the one that it would come with."""
        known = self._flows.get(flow)
        return known.tag if known else max(self._virtual, self._idle.get(flow, 0))

    def add(self, works: Iterable[Work]) -> None:
        """Take in samples that have rows left."""
        for work in works:
            flow = self._flows.get(work.flow) or self._arrive(work.flow)
            group = flow.groups.setdefault(work.group, _Group(work.group))
            group.works.append(work)
            group.left += work.left
            self._works[work.key] = work
            self.rows += work.left

    def remove(self, work: Work) -> None:
        """Take a sample out, finished or not. A second call does nothing."""
        if self._works.pop(work.key, None) is None:
            return
        flow = self._flows[work.flow]
        group = flow.groups[work.group]
        group.works.remove(work)
        group.left -= work.left
        self.rows -= work.left
        self._started.pop(work.key, None)
        if not group.works:
            del flow.groups[work.group]
        if not flow.groups:
            self._leave(flow)

    def pick(self) -> Tick | None:
        """Choose the next call and charge the flows; None if there is no work."""
        if not self._works:
            return None
        tick = self._merged() or self._fair()
        for work in tick.works:
            work.started = True
            self._started[work.key] = work
        return tick

    def advance(self, works: Iterable[Work]) -> list[Work]:
        """Note that these samples took their next row. Returns, and takes out, the finished."""
        finished = []
        for work in works:
            cost = 1 + work.guided[work.row]
            work.row += 1
            work.left -= cost
            self.rows -= cost
            self._flows[work.flow].groups[work.group].left -= cost
            if work.row == len(work.guided):
                finished.append(work)
        for work in finished:
            self.remove(work)
        return finished

    def _merged(self) -> Tick | None:
        """All samples in one call of the guided graph, if they fit and the curve advises it."""
        if len(self._works) > self._caps[True] or not self.curve.mergeable:
            return None
        guided = sum(work.guided[work.row] for work in self._works.values())
        if not self.curve.merges(len(self._works) - guided, guided):
            return None
        least = min(flow.tag for flow in self._flows.values())
        self._virtual = max(self._virtual, least)
        for work in self._works.values():
            self._flows[work.flow].tag += 1 + work.guided[work.row]
        return Tick(True, tuple(self._works.values()))

    def _fair(self) -> Tick:
        """The flow with the least tag decides which graph runs; the call is filled in the order
        of tags."""
        order = [(flow.tag, flow.order, flow) for flow in self._flows.values()]
        heapq.heapify(order)
        free = self._free()
        ranked: dict[str, Iterator[Work]] = {}
        chosen: list[Work] = []
        graph: int | None = None
        while order and (graph is None or len(chosen) < self._caps[graph]):
            flow = order[0][2]
            works = ranked.setdefault(flow.name, flow.ranked())
            work = next((work for work in works if _eligible(work, graph, free)), None)
            if work is None:
                heapq.heappop(order)
                continue
            if graph is None:
                graph = work.guided[work.row]
                self._virtual = max(self._virtual, flow.tag)
            if not work.started:
                free[graph] -= 1
            chosen.append(work)
            flow.tag += 1 + graph
            heapq.heapreplace(order, (flow.tag, flow.order, flow))
        # If no slot is free, the samples that hold them are eligible, so one is always found.
        assert graph is not None
        return Tick(bool(graph), tuple(chosen))

    def _free(self) -> list[int]:
        """Samples of each graph that may start: a full call of the other graph keeps its slots."""
        held = [0, 0]
        for work in self._started.values():
            held[work.guided[work.row]] += 1
        free = self.live - sum(held)
        return [min(free, self.live - self._caps[1 - graph] - held[graph]) for graph in (0, 1)]

    def _arrive(self, name: str) -> _Flow:
        tag = self.tag(name)
        self._idle.pop(name, None)
        self._order += 1
        flow = self._flows[name] = _Flow(name, self._order, tag)
        return flow

    def _leave(self, flow: _Flow) -> None:
        """Forget a flow without work, but for what it was served beyond its share."""
        del self._flows[flow.name]
        if not self._flows:
            self._idle.clear()
            self._virtual = 0
            return
        self._idle[flow.name] = flow.tag
        if len(self._idle) > IDLE_FLOWS:
            ahead = {name: tag for name, tag in self._idle.items() if tag > self._virtual}
            self._idle = ahead


def _eligible(work: Work, graph: int | None, free: list[int]) -> bool:
    """Whether a sample can join a call of a graph, None for either, with so many slots free."""
    own = work.guided[work.row]
    return graph in (None, own) and (work.started or free[own] > 0)
