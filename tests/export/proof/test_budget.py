"""The time of a proof: a slow network is compared on less, and never on nothing."""

from pathlib import Path

import pytest
from torch import Tensor, nn

from export import build_bundle
from export.proof import steps
from export.proof.budget import PAIR, Work, fitting, largest, passes
from export.proof.card import sheet_steps
from export.proof.examples import Examples
from export.proof.independence import BATCH
from export.proof.plan import LADDER, LEAST, Bounds, Plan
from export.sources.module import from_module
from export.sources.run import from_run
from runtime import Bundle
from runtime.backends.onnxruntime import OnnxRuntime
from runtime.backends.streams import fixed
from runtime.errors import RequestError
from runtime.files import from_json
from runtime.terminal.progress import Progress

PLAIN = Work(graphs=1, trajectories=2, backends=3, steps=50)
GUIDED = Work(graphs=2, trajectories=4, backends=7, steps=50)
DESCRIBED = {"sample_shape": (4, 4, 4), "prediction": "v", "schedule": "cosine", "clip": 1.0}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.last(x) + 0.001 * time[:, None, None, None]


@pytest.mark.parametrize("work", [PLAIN, GUIDED])
def test_each_plan_of_the_ladder_is_less_work(work: Work) -> None:
    found = [passes(plan, work) for plan in LADDER]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 1300
    assert found[0] > 20 * found[-1]


def test_calls_that_are_never_cut_are_not_compared_in_streams(
    tiny_run: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.load(tiny_bundle)
    examples = Examples(from_run(tiny_run, 2.0), bundle, LEAST)
    cut: list[int] = []
    monkeypatch.setattr(steps, "fixed", lambda streams: cut.append(streams) or fixed(streams))
    for heavy_s, most in ((1e3, 2), (0.0, 0)):
        cut.clear()
        monkeypatch.setattr(steps, "HEAVY_S", heavy_s)
        backend = OnnxRuntime(bundle, "fp32", threads=2)
        found = steps.check_steps(examples, backend, False, Bounds(), Progress("checking", 9))
        assert found.batch_invariant
        assert max(cut, default=0) == most
    assert passes(LEAST, PLAIN, heavy=True) < passes(LEAST, PLAIN)


def test_the_cards_image_of_a_slow_network_has_few_steps() -> None:
    assert sheet_steps(50, 0.02) == 50
    assert sheet_steps(1000, 0.02) == 50
    assert sheet_steps(50, 2.0) == 30
    assert sheet_steps(50, 60.0) == 10
    assert sheet_steps(4, 60.0) == 4


def test_the_largest_plan_that_fits() -> None:
    assert largest(1e-3, GUIDED, 5) == Plan()
    assert largest(1e6, GUIDED, 5) == LEAST
    for plan in LADDER:
        assert largest(1.0, PLAIN, passes(plan, PLAIN) / 60) == plan


def test_every_promise_is_in_the_least_plan() -> None:
    # A sample alone, and in batches of two sizes; both ends of the schedule; int8 as well.
    assert 1 in LEAST.batches
    assert len({*LEAST.batches, *LEAST.sizes}) >= 3
    assert len({*LEAST.batches, *LEAST.quantized_sizes}) >= 3
    assert LEAST.times == 2
    assert LEAST.ways


def test_a_slow_module_is_checked_in_pairs() -> None:
    model = from_module(Small().eval(), name="small", **DESCRIBED)
    now = iter(range(0, 1000, 100))
    slow = fitting(model, (), 5, lambda: float(next(now)))
    assert (slow.plan, slow.independent) == (LEAST, PAIR)
    fast = fitting(model, (), 5, lambda: 0.0)
    assert (fast.plan, fast.independent) == (Plan(), BATCH)
    with pytest.raises(RequestError, match="proof_minutes"):
        fitting(model, (), -1)


def test_the_report_states_what_was_compared(tmp_path: Path) -> None:
    bundle = build_bundle(Small().eval(), tmp_path / "small", proof_minutes=0, **DESCRIBED)
    report = from_json((bundle.path / "report.json").read_text())
    assert report["plan"] == {
        name: [list(v) if isinstance(v, tuple) else v for v in value]
        if isinstance(value, tuple)
        else value
        for name, value in LEAST.to_json().items()
    }
    assert bundle.same_bytes
