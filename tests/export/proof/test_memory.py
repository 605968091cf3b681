"""A proof holds one backend, and buffers of one size, at a time: each may hold the weights."""

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from export.proof import check, trajectories
from export.proof.plan import LEAST
from export.sources.run import from_run
from runtime import BackendError, Bundle
from runtime.backends import memory
from runtime.backends.host import HostBuffers
from runtime.backends.onnxruntime import OnnxRuntime
from runtime.backends.registry import BACKENDS, Kind
from runtime.terminal.progress import Progress


class Living:
    """The objects of a class that exist, as seen whenever another one is made.

    Attributes:
        most: The most different marks that existed at once.
    """

    def __init__(self, mark: Callable[..., object]) -> None:
        self.mark = mark
        self.most = 0
        self.made = 0
        self._living: dict[int, tuple[weakref.ref[object], object]] = {}

    def watch(self, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
        make = kind.__init__

        def watched(one: object, *given: object, **named: object) -> None:
            self.made += 1
            self._living[self.made] = weakref.ref(one), self.mark(*given)
            self.most = max(self.most, len({*self.marks()}))
            make(one, *given, **named)

        monkeypatch.setattr(kind, "__init__", watched)

    def marks(self) -> list[object]:
        return [mark for ref, mark in self._living.values() if ref() is not None]


@pytest.mark.slow
def test_one_backend_and_one_size_at_a_time(
    tiny_run: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "HEAVY_BYTES", 0)
    kinds = [OnnxRuntime]
    monkeypatch.setattr(check, "BACKENDS", BACKENDS)
    try:
        from runtime.backends.openvino import OpenVino

        kinds.append(OpenVino)
    except ImportError:
        pass
    backends = Living(lambda bundle, precision, *_: precision)
    for kind in kinds:
        backends.watch(kind, monkeypatch)
    sizes = Living(lambda bundle, guard, batch, *_: batch)
    sizes.watch(HostBuffers, monkeypatch)
    looped: list[list[object]] = []
    run = trajectories.run_loop_graph

    def run_alone(*given: object) -> object:
        looped.append([*backends.marks(), *sizes.marks()])
        return run(*given)

    monkeypatch.setattr(trajectories, "run_loop_graph", run_alone)
    # Backends of one precision count as one, so each one's end is looked at as well.
    monkeypatch.setattr(check, "_free", _ended(check._free, backends))

    bundle = Bundle.load(tiny_bundle)
    proof = check.check(from_run(tiny_run, 2.0), bundle, plan=LEAST)
    assert len(proof.report.checks) == backends.made - _refused(bundle, proof)
    assert (backends.most, sizes.most) == (1, 1)
    assert sizes.made > 10
    # The loop graph has the weights too, and runs when everything else is freed.
    assert looped
    assert not any(looped)
    assert all(run.loop_graph is not None for run in proof.report.checks[0].trajectories)


def _ended(free: Callable[[Bundle], None], backends: Living) -> Callable[[Bundle], None]:
    def freed(bundle: Bundle) -> None:
        free(bundle)
        assert not backends.marks()

    return freed


def _refused(bundle: Bundle, proof: check.Proof) -> int:
    """Return how many pairs a machine does not offer, such as bf16."""
    return len(check._pairs(bundle)) - len(proof.report.checks)


def test_the_bar_counts_what_can_be_opened(
    tiny_run: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise BackendError("not here.")

    fake = Kind({"fp32": "fp32", "bf16": "fp32"}, refuse, "nothing", "nothing")
    monkeypatch.setattr(check, "BACKENDS", {"absent": fake})
    bars: list[Progress] = []

    class Seen(Progress):
        def __init__(self, *given: object) -> None:
            super().__init__(*given)
            bars.append(self)

    monkeypatch.setattr(check, "Progress", Seen)
    proof = check.check(from_run(tiny_run, 2.0), Bundle.load(tiny_bundle), plan=LEAST)
    assert len(proof.report.checks) == 1
    (bar,) = bars
    assert bar.done == bar.total > 0
