"""The transformer has the same interface as the U-Net; flags change time and memory but not the
result; costs are counted correctly."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime.bundle.conditions import Condition
from runtime.errors import RequestError
from trainer.config import Config
from trainer.config.presets import PRESETS
from trainer.data import sources as data
from trainer.errors import CheckpointError
from trainer.networks.cost import cost, make_network, peak_flops
from trainer.networks.dit import DiT, positions
from trainer.runs.weights import Other, fitting, widened
from trainer.training.step import Trainer

SHAPE = (3, 8, 12)
UNET = Config(data="digits", channels=(8, 16), attention=(4,), batch=8, device="cpu")
DIT = replace(UNET, network="dit", patch=2, width=32, depth=2, heads=4)


def dit(num_classes: int = 10) -> DiT:
    """With its zeroed layers filled, as after some training."""
    torch.manual_seed(0)
    made = DiT(SHAPE, 2, 32, 2, 4, num_classes)
    with torch.no_grad():
        for parameter in made.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return made


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(0, 999, batch), torch.arange(batch)


def test_a_new_transformer_answers_zero_in_the_shape_of_the_question() -> None:
    answer = DiT(SHAPE, 4, 32, 2, 4, 10)(*inputs())
    assert answer.shape == (3, *SHAPE)
    assert not answer.any()


@pytest.mark.parametrize("of", ["x", "time", "label"])
def test_the_answer_depends_on_every_input(of: str) -> None:
    made, (x, time, label) = dit(), inputs()
    other = {"x": (-x, time, label), "time": (x, time + 1, label), "label": (x, time, label + 1)}[
        of
    ]
    assert ((made(*other) - made(x, time, label)).abs().amax((1, 2, 3)) > 1e-4).all()


def test_every_patch_sees_every_other_and_knows_its_place() -> None:
    made, (x, time, label) = dit(), inputs(1)
    changed = x.clone()
    changed[0, 0, 0, 0] += 1
    assert ((made(changed, time, label) - made(x, time, label)).abs().amax((0, 1)) > 1e-7).all()
    same = torch.ones_like(x)  # the same patch everywhere
    answer = made(same, time, label)
    assert not torch.allclose(answer[..., :2, :2], answer[..., 4:6, 6:8])
    rows = positions(4, 6, 32)
    assert len(torch.unique(rows, dim=0)) == 24


def test_patches_are_put_back_where_they_were() -> None:
    made = DiT(SHAPE, 2, 32, 0, 4, 0)
    with torch.no_grad():
        made.first.weight.copy_(torch.eye(32, 12))
        made.position.zero_()
        made.last.weight.copy_(torch.eye(12, 32))
    x = torch.randn(1, 3, 8, 12)
    h = torch.nn.functional.layer_norm(
        made.first(x.reshape(1, 3, 4, 2, 6, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, 12)),
        (32,),
        eps=1e-6,
    )
    answer = made(x, torch.zeros(1))
    patch = h.reshape(4, 6, 32)[1, 2, :12].reshape(3, 2, 2)  # the output of row 1, column 2
    torch.testing.assert_close(answer[0, :, 2:4, 4:6], patch)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_a_network_begins_as_one_without_its_conditions(kind: str) -> None:
    """Its answers do not depend on them yet, and it can learn to use them."""
    small = {"channels": (8, 16), "attention": (), "width": 32, "depth": 2, "heads": 2}
    config = Config(network=kind, **small)
    conditions = [Condition("low_res", (3, 4, 4)), Condition("pose", (5,))]
    torch.manual_seed(0)
    plain = make_network(config, (3, 8, 8), 4)
    network = make_network(config, (3, 8, 8), 4, conditions)
    with torch.no_grad():
        for weight in plain.parameters():  # a new transformer predicts 0 for all inputs
            weight.normal_(0, 0.1)
    wanted = dict(network.named_parameters())
    other = Other(dict(plain.named_parameters()), (), ())
    taken = fitting(widened(other, wanted, 3, conditions), wanted, Path("there"))
    network.load_state_dict(taken, strict=False)
    x, time, label = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 4])
    given = {"low_res": torch.randn(2, 3, 4, 4), "pose": torch.randn(2, 5)}
    answer = network(x, time, label, **given)
    assert torch.allclose(answer, plain(x, time, label), atol=1e-5)
    answer.square().mean().backward()
    for name in ("first.weight", "vectors.pose.2.weight"):
        gradient = wanted[name].grad
        assert gradient is not None
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_a_condition_keeps_its_weights_wherever_it_stands(kind: str) -> None:
    small = {"channels": (8, 16), "attention": (), "width": 32, "depth": 2, "heads": 2}
    config = Config(network=kind, **small)
    low_res = Condition("low_res", (3, 4, 4))
    grey = Condition("grey", (1, 8, 8))
    before = make_network(config, (3, 8, 8), 4, [low_res])
    after = make_network(config, (3, 8, 8), 4, [grey, low_res])
    with torch.no_grad():
        for weight in before.parameters():
            weight.normal_(0, 0.1)
    wanted = dict(after.named_parameters())
    other = Other(dict(before.named_parameters()), (), (low_res,))
    taken = fitting(widened(other, wanted, 3, [grey, low_res]), wanted, Path("there"))
    after.load_state_dict(taken, strict=False)
    x, time, label = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 4])
    image = torch.randn(2, 3, 4, 4)
    answer = after(x, time, label, low_res=image, grey=torch.randn(2, 1, 8, 8))
    assert torch.allclose(answer, before(x, time, label, low_res=image), atol=1e-5)
    with pytest.raises(CheckpointError, match="conditioned on low_res, and this run is not"):
        widened(other, wanted, 3, [grey])


def test_a_patch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(RequestError, match="not made of patches of 5"):
        DiT(SHAPE, 5, 32, 1, 4)


def test_every_parameter_gets_a_gradient() -> None:
    made = dit(2)
    made(*inputs()).square().sum().backward()
    assert [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()] == []


# --- flags


@pytest.mark.parametrize("config", [UNET, DIT], ids=["unet", "dit"])
@pytest.mark.parametrize("flag", [{"checkpointing": True}, {"channels_last": False}], ids=str)
def test_a_flag_does_not_change_what_is_learned(config: Config, flag: dict) -> None:
    plain, flagged = (Trainer(c, data.digits()) for c in (config, replace(config, **flag)))
    for _ in range(3):
        a, b = plain.train_step(), flagged.train_step()
        # Sums of another order, at most.
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_dropout_drops_while_training_and_not_while_sampling() -> None:
    torch.manual_seed(0)
    made = make_network(replace(UNET, dropout=0.5), SHAPE, 10)
    with torch.no_grad():
        for parameter in made.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    assert not torch.equal(made(*inputs()), made(*inputs()))
    made.eval()
    assert torch.equal(made(*inputs()), made(*inputs()))


# --- costs


def test_a_convolutions_cost_is_what_the_book_says() -> None:
    """The operations of one more block, by hand: two 3×3 convolutions and a linear layer."""
    a, b = (
        cost(replace(UNET, channels=(8,), attention=(), blocks=n), (1, 8, 8), 0) for n in (1, 2)
    )
    down = 2 * 2 * 9 * 8 * 8 * 64 + 2 * 32 * 16
    up = (
        2 * 9 * (16 * 8 + 8 * 8) * 64 + 2 * 32 * 16 + 2 * 16 * 8 * 64
    )  # 16 come in, and a 1×1 for the skip
    assert b.flops - a.flops == down + up


@pytest.mark.parametrize(
    ("preset", "shape", "millions"),
    [
        ("cifar", (3, 32, 32), 35.7),
        ("dit-s", (4, 32, 32), 33),
        ("dit-b", (4, 32, 32), 130),
        ("256", (3, 256, 256), 114),
    ],
)
def test_presets_are_as_large_as_the_papers_networks(
    preset: str, shape: tuple[int, int, int], millions: float
) -> None:
    """Ho et al. 2020, appendix B; Peebles & Xie 2023, table 1. Ours modulates by twice the width:
    within 15 %."""
    found = cost(Config(**{**PRESETS[preset], "data": "digits"}), shape, 0)
    assert found.parameters / 1e6 == pytest.approx(millions, rel=0.15)


def test_the_transformers_operations_are_the_papers() -> None:
    """Peebles & Xie 2023, table 1: DiT-S/2 and DiT-B/2 take 6.06 and 23.01 billion multiplications
    with addition at 32×32×4."""
    for preset, billions in (("dit-s", 6.06), ("dit-b", 23.01)):
        found = cost(Config(**{**PRESETS[preset], "data": "digits"}), (4, 32, 32), 1000)
        assert found.flops / 2e9 == pytest.approx(billions, rel=0.01)


def test_the_machines_own_speed_is_measured() -> None:
    assert peak_flops(torch.device("cpu"), torch.float32, 64) > 1e6
