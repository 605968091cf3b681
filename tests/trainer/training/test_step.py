"""The seams of a step: an objective is any object with three methods; properties compute
nothing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from trainer.config import Config
from trainer.data.builtin import digits
from trainer.objectives.denoising import Denoising
from trainer.objectives.objective import Draws, Networks
from trainer.parallel.processes import Processes
from trainer.training.step import Trainer

CONFIG = Config(
    data="digits", channels=(8, 16), attention=(), batch=8, steps=4, T=50, device="cpu"
)  # fmt: skip


class Distillation:
    """Matches a teacher, as an objective of the future could: it draws all images at one level."""

    def __init__(self, batch: int, teacher: nn.Module) -> None:
        self.batch = batch
        self.teacher = teacher

    def draw_times(self, generator: torch.Generator) -> Tensor:
        return torch.randint(50, (1,), generator=generator).expand(self.batch).clone()

    def losses(self, networks: Networks, draws: Draws) -> Tensor:
        time = draws.t.float()
        with torch.no_grad():
            wanted = self.teacher(draws.eps, time, draws.label)
        made = networks.student(draws.eps, time, draws.label)
        return (made - wanted).square().flatten(1).mean(1)

    def weights(self, t: Tensor) -> Tensor:
        return torch.ones(len(t))


def test_another_objective_trains_without_a_change_to_the_step() -> None:
    teacher = Trainer(replace(CONFIG, seed=1), digits())
    with torch.no_grad():
        teacher.state.weights["last.bias"].fill_(0.5)  # a network starts as 0
    trainer = Trainer(replace(CONFIG, warmup=0, learning_rate=1e-2, steps=40), digits())
    trainer.objective = Distillation(CONFIG.batch, teacher.state.network.eval())
    losses = [trainer.train_step()["loss"] for _ in range(40)]
    assert losses[-1] < 0.2 * losses[0]


def test_the_denoising_loss_is_the_squared_error_of_the_students_prediction() -> None:
    """By hand, for an epsilon network that predicts a constant: mean (c - eps)²."""
    config = replace(CONFIG, prediction="epsilon", schedule="linear")
    objective = Denoising(config, config.make_schedule(), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(8, 1, 8, 8, generator=generator) for _ in range(2))
    t = objective.draw_times(generator)
    draws = Draws(x0, torch.zeros(8, dtype=torch.int64), t, eps)
    seen: list[Tensor] = []

    def student(x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        seen.append(x)
        return torch.full_like(x, 0.25)

    losses = objective.losses(Networks(student), draws)
    torch.testing.assert_close(losses, (0.25 - eps).square().mean((1, 2, 3)))
    process = objective.process
    torch.testing.assert_close(seen[0], process.network_input(process.jump(x0, t, eps), t))
    assert objective.weights(t).tolist() == [1.0] * 8


def test_the_network_is_prepared_once_and_not_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    wrapped = Processes.wrapped
    monkeypatch.setattr(
        Processes, "wrapped", lambda self, network: calls.append(1) or wrapped(self, network)
    )
    trainer = Trainer(CONFIG, digits())
    for name in dir(trainer):  # no property computes anything
        getattr(trainer, name)
    assert calls == []
    for _ in range(2):
        trainer.train_step()
    assert calls == [1]
    assert trainer.prepare() is trainer.prepare()


def test_a_step_has_no_gradients_left_and_counts_itself() -> None:
    trainer = Trainer(CONFIG, digits())
    trainer.train_step()
    assert trainer.state.step == 1
    assert all(w.grad is None for w in trainer.state.weights.values())


@pytest.mark.parametrize("clip", [1e-3, 100.0])
def test_the_gradient_of_a_step_is_no_longer_than_asked_for(
    clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(replace(CONFIG, gradient_clip=clip), digits())
    state = trainer.state
    taken: list[float] = []
    take = state.optimizer.step

    def step(*given: object) -> object:
        gradients = [w.grad.norm() for w in state.weights.values() if w.grad is not None]
        taken.append(torch.stack(gradients).norm().item())
        return take(*given)

    monkeypatch.setattr(state.optimizer, "step", step)
    norm = trainer.train_step()["grad_norm"]
    assert 1e-3 < norm < 100.0
    assert taken == [pytest.approx(min(clip, norm), rel=1e-3)]


def test_a_resumed_state_takes_the_steps_of_an_unbroken_one() -> None:
    """With dropout, whose draws depend on the step alone; and nothing that is counted is lost."""
    config = replace(CONFIG, dropout=0.5)
    whole = Trainer(config, digits())
    expected = [whole.train_step() for _ in range(4)]
    first = Trainer(config, digits())
    assert [first.train_step() for _ in range(2)] == expected[:2]
    first.state.seconds = 7.5
    first.state.bad = {3, 1}
    second = Trainer(config, digits())
    second.state.resume(first.state.to_checkpoint())
    torch.rand(5)  # draws elsewhere do not matter
    assert (second.state.seconds, second.state.bad) == (7.5, {1, 3})
    assert [second.train_step() for _ in range(2)] == expected[2:]
    assert torch.equal(second.state.bucket_losses, whole.state.bucket_losses)
