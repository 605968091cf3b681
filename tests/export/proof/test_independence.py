"""A network that mixes the samples of a batch raises an error that names it; any other is
exported."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import ModelProto, helper
from torch import Tensor, nn
from torch.nn import functional

from export.build import build_bundle, main
from export.errors import ExportError
from export.graph import convert
from export.proof.examples import Examples
from export.proof.plan import Plan
from runtime import Bundle, Sampler
from runtime.files import from_json

SMALL = Plan(
    batches=(1, 3),
    sizes=(2,),
    quantized_sizes=(2,),
    times=3,
    pictures=1,
    steps=3,
    samples=1,
    judged=1,
    ways=(("dpmpp_2m", 3),),
)
DESCRIBED = {
    "sample_shape": (3, 8, 8),
    "prediction": "epsilon",
    "schedule": "linear_raw",
    "clip": 1.0,
}


class Net(nn.Module):
    """A convolution whose input or output `change` alters: change(x, time, label, conv) → F."""

    def __init__(self, change: Callable[..., Tensor], labels: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.table = nn.Embedding(max(1, labels), 3)
        self.change = change

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        return self.change(x, time, label, self.conv, self.table)


def column(v: Tensor) -> Tensor:
    return v[:, None, None, None]


def attention(x: Tensor) -> Tensor:
    """Attention between samples, by mistake for attention between pixels."""
    flat = x.flatten(1)
    return (torch.softmax(flat @ flat.T / 50, -1) @ flat).view_as(x)


MIXING = {
    "first mean": ("neighbours", lambda x, t, _, c, e: c(x) + 0.5 * x[:1].mean()),
    "tiny mean": ("neighbours", lambda x, t, _, c, e: c(x) + 1e-6 * x[-1:].mean()),
    "mean of axis 0": ("neighbours", lambda x, t, _, c, e: c(x - x.mean(0))),
    "mean of all": ("neighbours", lambda x, t, _, c, e: c(x / x.std())),
    "rolled": ("neighbours", lambda x, t, _, c, e: c(x) + 0.1 * x.roll(1, 0)),
    "batch norm": (
        "neighbours",
        lambda x, t, _, c, e: functional.batch_norm(c(x), None, None, training=True),
    ),
    "attention": ("neighbours", lambda x, t, _, c, e: c(attention(x))),
    "first time": ("times of other", lambda x, t, _, c, e: c(x) + torch.sin(t[0])),
    "mean time": ("times of other", lambda x, t, _, c, e: c(x) + t.mean() / 1000),
    "time.item()": ("times of other", lambda x, t, _, c, e: c(x) * (1 + t[0].item() / 1000)),
    "all times": ("times of other", lambda x, t, _, c, e: c(x) if (t > 500).all() else c(x / 2)),
    "position": (
        "position in the batch",
        lambda x, t, _, c, e: c(x) + column(torch.arange(len(x)) / 10),
    ),
    "size": ("size of the batch", lambda x, t, _, c, e: c(x) / len(x)),
}


@pytest.mark.parametrize("kind", MIXING)
def test_a_network_that_mixes_samples_is_refused_and_told_why(kind: str, tmp_path: Path) -> None:
    dependency, change = MIXING[kind]
    with pytest.raises(ExportError, match=rf"{dependency}.*Likely cause") as caught:
        build_bundle(Net(change).eval(), tmp_path / "out", plan=SMALL, **DESCRIBED)
    assert "is not exported" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_one_label_for_the_whole_batch_is_refused(tmp_path: Path) -> None:
    net = Net(lambda x, t, label, c, e: c(x) + column(e(label)[:1, 0]), labels=4)
    with pytest.raises(ExportError, match=r"labels of other samples.*label\[0\]"):
        build_bundle(
            net.eval(), tmp_path / "out", plan=SMALL, num_classes=3, null_label=3, **DESCRIBED
        )


def test_a_network_that_fails_on_a_lone_sample_is_refused(tmp_path: Path) -> None:
    net = Net(lambda x, t, _, c, e: c(x) + (x.mean((1, 2, 3)).squeeze() * 1.0)[:, None, None, None])
    with pytest.raises(ExportError, match=r"fails on a batch of one sample.*squeeze\(\)"):
        build_bundle(net.eval(), tmp_path / "out", plan=SMALL, **DESCRIBED)


class Sequence(nn.Module):
    """A network along one axis: convolutions, functions and a norm that do not mix samples."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv1d(2, channels, 5, padding=2)
        self.middle = nn.Conv1d(channels, channels, 5, padding=2)
        self.last = nn.Conv1d(channels, 2, 5, padding=2)
        self.norm = nn.GroupNorm(1, channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = functional.softplus(self.first(x + torch.cos(time)[:, None, None]))
        return self.last(functional.mish(self.norm(self.middle(h))))


HONEST = {
    "sin of time": lambda x, t, _, c, e: c(x + column(torch.sin(t))),
    "other functions of time": lambda x, t, _, c, e: c(
        x * column((t / 1000) ** 3) + column(torch.cos(t) + torch.log1p(t) / 7)
    ),
    "mean of a sample, elu": lambda x, t, _, c, e: functional.elu(
        c(x - x.mean((1, 2, 3), keepdim=True))
    ),
}


@pytest.mark.parametrize("kind", HONEST)
def test_an_honest_network_exports(kind: str, tmp_path: Path) -> None:
    bundle = build_bundle(Net(HONEST[kind]).eval(), tmp_path / "out", plan=SMALL, **DESCRIBED)
    assert bundle.same_bytes
    sampler = Sampler(bundle)
    batch = sampler.sample(5, seed=3, steps=4)
    for i in range(5):
        assert sampler.sample(1, seed=3 + i, steps=4).tobytes() == batch[i].tobytes()


@pytest.mark.parametrize(("channels", "length"), [(16, 32), (17, 33)])
def test_an_honest_network_along_one_axis_exports(
    channels: int, length: int, tmp_path: Path
) -> None:
    described = DESCRIBED | {"sample_shape": (2, length)}
    assert build_bundle(
        Sequence(channels).eval(), tmp_path / "out", plan=SMALL, **described
    ).same_bytes


def test_a_conversion_that_mixes_samples_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module does not mix samples, but the graph adds a little of the first sample's state to
    D."""

    def mixed(proto: ModelProto) -> ModelProto:
        graph = proto.graph
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = ["D" if name == "denoised" else name for name in names]
        graph.initializer.extend(
            [
                helper.make_tensor("first", 7, [1], [0]),
                helper.make_tensor("last", 7, [1], [1]),
                helper.make_tensor("little", 1, [], [1e-5]),
            ]
        )
        graph.node.extend(
            [
                helper.make_node("Slice", ["state", "first", "last", "first"], ["neighbour"]),
                helper.make_node("ReduceMean", ["neighbour"], ["mean"], keepdims=0),
                helper.make_node("Mul", ["mean", "little"], ["leak"]),
                helper.make_node("Add", ["D", "leak"], ["denoised"]),
            ]
        )
        return proto

    monkeypatch.setattr(convert, "same_in_any_batch", mixed)
    net = Net(lambda x, t, _, c, e: c(x)).eval()
    with pytest.raises(ExportError, match=r"bytes depend on the batch.*neighbours") as caught:
        build_bundle(net, tmp_path / "out", plan=SMALL, same_bytes=False, **DESCRIBED)
    assert "--no-same-bytes" not in str(caught.value)


def unrewritten(proto: ModelProto) -> ModelProto:
    return proto


def test_the_node_that_rounds_otherwise_is_named_and_a_flag_lets_it_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(convert, "same_in_any_batch", unrewritten)
    net = Net(HONEST["sin of time"]).eval()
    plan = Plan(**{**vars(SMALL), "batches": (1, 16), "times": 13})
    with pytest.raises(ExportError, match=r"cannot keep the same bytes") as caught:
        build_bundle(net, tmp_path / "out", plan=plan, **DESCRIBED)
    message = str(caught.value)
    assert "rounds otherwise there is Sin network" in message
    assert "--no-same-bytes" in message
    assert not (tmp_path / "out").exists()

    bundle = build_bundle(net, tmp_path / "out", plan=plan, same_bytes=False, **DESCRIBED)
    assert not bundle.same_bytes
    assert not Bundle.load(tmp_path / "out").same_bytes
    assert from_json((tmp_path / "out" / "bundle.json").read_bytes())["same_bytes"] is False
    assert from_json((tmp_path / "out" / "report.json").read_bytes())["same_bytes"] is False
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "in another batch" in card


def test_a_flag_that_is_not_needed_changes_nothing(tmp_path: Path) -> None:
    net = Net(lambda x, t, _, c, e: c(x)).eval()
    assert build_bundle(net, tmp_path / "out", plan=SMALL, same_bytes=False, **DESCRIBED).same_bytes


def test_the_flag_does_not_let_a_mixing_network_pass(tmp_path: Path) -> None:
    net = Net(MIXING["first mean"][1]).eval()
    with pytest.raises(ExportError, match="neighbours"):
        build_bundle(net, tmp_path / "out", plan=SMALL, same_bytes=False, **DESCRIBED)


def test_a_bundle_of_before_has_the_same_bytes_in_any_batch(edited: Callable) -> None:
    assert Bundle.load(edited(lambda value: value.pop("same_bytes"))).same_bytes


def test_every_sample_is_compared_at_every_level_beside_other_levels(
    tiny_bundle: Path, tiny_run: Path
) -> None:
    from export.sources.run import from_run

    examples = Examples(from_run(tiny_run, 2.0), Bundle.load(tiny_bundle), Plan())
    found = [examples.at(turn, guided=True) for turn in range(len(examples))]
    for i in range(examples.count):
        assert {int(example.knots[i]) for example in found} == set(examples.knots.tolist())
    for example in found:
        assert len(set(example.knots.tolist())) == len(examples)
        assert len(set(example.label.tolist())) > 10
        assert len(np.unique(example.call[:, 5])) >= 4


def test_a_forward_in_another_precision_is_refused_by_name(tmp_path: Path) -> None:
    def half(x: Tensor, t: Tensor, _: None, c: nn.Module, e: nn.Module) -> Tensor:
        weight = c.weight.bfloat16()
        return functional.conv2d(x.bfloat16(), weight, padding=1).float()

    with pytest.raises(ExportError, match=r"converts to bfloat16, .*--int8 make other precisions"):
        build_bundle(Net(half).eval(), tmp_path / "out", plan=SMALL, **DESCRIBED)


def test_a_branch_on_values_is_one_error_that_shows_the_line(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    def branch(x: Tensor, t: Tensor, _: None, c: nn.Module, e: nn.Module) -> Tensor:
        if torch.isnan(x).any():
            return x
        return c(x)

    with pytest.raises(
        ExportError, match=r"test_independence\.py, line \d+, `if torch\.isnan\(x\)"
    ):
        build_bundle(Net(branch).eval(), tmp_path / "out", plan=SMALL, **DESCRIBED)
    printed = capfd.readouterr()
    assert printed.out + printed.err == "converting\n"


def test_the_command_takes_the_flag(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--no-same-bytes" in capsys.readouterr().out
