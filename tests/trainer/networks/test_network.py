"""The network's output has the shape of its input, samples are independent, and every parameter
gets a gradient."""

import pytest
import torch
from torch import Tensor

from runtime import RequestError
from trainer.networks.unet import Attention, UNet


def network(shape=(1, 8, 8), channels=(8, 16), blocks=1, attention=(4,), num_classes=10) -> UNet:
    torch.manual_seed(0)
    return UNet(shape, channels, blocks, attention, num_classes)


def awake(**options) -> UNet:
    """A network whose zeroed layers are no longer zero, as after some training."""
    made = network(**options)
    with torch.no_grad():
        for parameter in made.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return made


def inputs(shape=(1, 8, 8), batch: int = 3, num_classes: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *shape, generator=generator)
    return x, torch.linspace(0, 999, batch), torch.arange(batch) % (num_classes + 1)


@pytest.mark.parametrize(
    ("shape", "channels", "blocks", "attention"),
    [
        ((1, 8, 8), (8, 16), 1, ()),
        ((1, 8, 8), (8,), 2, (8,)),
        ((3, 32, 32), (8, 16, 24), 1, (8, 16)),
        ((3, 8, 16), (16, 8), 2, (8, 4)),
        ((1, 12, 4), (8, 8, 8), 1, (3,)),
        ((1, 8, 8), (136, 200), 1, ()),
    ],
)
def test_the_answer_has_the_shape_of_the_question(shape, channels, blocks, attention) -> None:
    made = network(shape, channels, blocks, attention)
    assert made(*inputs(shape)).shape == (3, *shape)


def test_a_new_network_answers_zero() -> None:
    assert not network()(*inputs()).any()


@pytest.mark.parametrize("of", ["x", "time", "label"])
def test_the_answer_depends_on_every_input(of: str) -> None:
    made, (x, time, label) = awake(), inputs()
    other = {"x": (-x, time, label), "time": (x, time + 1, label), "label": (x, time, label + 1)}[
        of
    ]
    change = (made(*other) - made(x, time, label)).abs().amax(dim=(1, 2, 3))
    assert (change > 1e-4).all()  # of every sample, and far above rounding


def test_the_null_label_is_a_label_of_its_own() -> None:
    made, (x, time, _) = awake(num_classes=2), inputs()
    answers = [made(x, time, torch.full((3,), label)) for label in (0, 1, 2)]
    assert not torch.allclose(answers[2], answers[0])
    assert not torch.allclose(answers[2], answers[1])


def test_without_classes_no_label_is_needed() -> None:
    x, time, _ = inputs()
    assert awake(num_classes=0)(x, time).shape == x.shape


@pytest.mark.parametrize("shape", [(1, 6, 8), (1, 8, 6)])
def test_sides_that_cannot_be_halved_are_refused_with_the_remedy(shape) -> None:
    with pytest.raises(
        RequestError, match=r"cannot be halved 2 times: use sides that 4 divides, or fewer channels"
    ):
        network(shape, channels=(8, 8, 8))


def test_a_sample_does_not_see_its_neighbours() -> None:
    made, batch = awake(), inputs(batch=4)
    alone = torch.cat([made(*(v[i : i + 1] for v in batch)) for i in range(4)])
    torch.testing.assert_close(
        made(*batch), alone, atol=1e-5, rtol=1e-5
    )  # float32, sums of another order


def test_every_parameter_gets_a_gradient() -> None:
    made = awake(shape=(3, 16, 16), channels=(8, 16, 16), blocks=2, attention=(8, 4))
    x, time, label = inputs((3, 16, 16), batch=11)  # a batch with every label
    made(x, time, label).square().sum().backward()
    asleep = [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    assert asleep == []


def test_attention_stands_at_the_heights_that_were_asked_for_and_in_the_middle() -> None:
    made = network(shape=(1, 16, 16), channels=(8, 8, 8), attention=(8,))
    pixels = {part.shape[-1] for part in made.modules() if isinstance(part, Attention)}
    assert pixels == {8 * 8, 4 * 4}
