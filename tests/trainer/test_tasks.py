"""A run with conditions from its first step to samples of its bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from export.build import build
from export.proof.plan import LEAST
from export.sources.bundle import from_bundle
from export.sources.run import from_run
from runtime import Bundle, Sampler
from runtime.diffusion.noise import noises
from runtime.diffusion.program import run as run_program
from runtime.errors import RequestError
from runtime.sample import main
from trainer.config import Config
from trainer.config.distillation import wanted_knots
from trainer.data.sources import load
from trainer.data.tasks import task_of
from trainer.distill import student_of
from trainer.evaluate import Changes, of_bundle, of_run
from trainer.fit import fit
from trainer.objectives.forward import ForwardProcess
from trainer.parallel.processes import Processes
from trainer.quality import features
from trainer.randomness import FIRST_TRAJECTORY_SEED, TRAJECTORY_START
from trainer.runs import checkpoint as checkpoints
from trainer.training.run import EXAMPLES
from trainer.training.start import teach
from trainer.training.step import Trainer
from trainer.training.teacher import Teacher
from trainer.training.trajectories import Trajectories

from ..quick import quick_proof

OPTIONS = {
    "data": "digits",
    "task": "superres",
    "channels": (8, 16),
    "attention": (),
    "batch": 8,
    "warmup": 1,
    "sample_steps": 2,
    "quality_batch": 8,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert fit(Config(**{**OPTIONS, "name": "up", "steps": 4}), runs)
    return runs / "up"


@pytest.fixture(scope="module")
def bundle(run: Path) -> Bundle:
    model = from_run(run, 1.0)
    assert model.examples["low_res"].shape == (EXAMPLES, 1, 4, 4)
    with quick_proof():
        return build(model, run.parent / "bundle", plan=LEAST, winograd=False)


def test_the_bundle_declares_what_the_run_learned_from(bundle: Bundle) -> None:
    (condition,) = bundle.conditions
    assert (condition.name, condition.shape, condition.range) == ("low_res", (1, 4, 4), (-1, 1))
    assert bundle.can_guide
    assert bundle.report["fp32"]["onnxruntime"]["missed"] == 0


def test_its_samples_follow_an_image(bundle: Bundle, tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 200, np.uint8)).save(tmp_path / "small.png")
    words = [str(bundle.path), "--n", "2", "--steps", "2", "--out", str(tmp_path / "out.png")]
    assert main([*words, "--condition", f"low_res={tmp_path / 'small.png'}"]) == 0
    with Image.open(tmp_path / "out.png") as image:
        assert image.size[0] > 0
    sampler = Sampler(bundle)
    with pytest.raises(RequestError, match="low_res"):
        sampler.sample(1)


def test_the_bundle_is_exported_again(bundle: Bundle) -> None:
    model = from_bundle(bundle.path)
    assert model.conditions == bundle.conditions
    x = np.ones((2, 1, 8, 8), np.float32)
    time = np.array([3, 500], np.float32)
    given = model.draw_conditions(2)
    label = np.array([0, 1])
    found = model.reference()(x, time, label, **given)
    assert found.shape == x.shape


def test_a_bundle_is_measured_as_its_run_is(
    run: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the same conditions and labels: other ones give other samples."""
    monkeypatch.setattr(features, "STEPS", 5)  # any features show whether samples are the same
    changes = Changes(quality_samples=24)
    expected = of_run(run, best=False, device="cpu", changes=changes).distances
    found = of_bundle(bundle.path, None, "cpu", changes).distances
    assert found == pytest.approx(expected, rel=1e-3)


def test_guidance_contrasts_with_images_that_have_neither_label_nor_conditions() -> None:
    """Dropped on their own, both would be missing together for one image in a hundred."""
    config = Config(**{**OPTIONS, "batch": 64, "label_dropout": 0.3, "condition_dropout": 0.3})
    trainer = Trainer(config, load(config))
    dropped = []
    for step in range(4):
        draws = trainer.draw(step)
        without = (draws.given["low_res"] == 0).flatten(1).all(1)
        assert torch.equal(without, draws.label == trainer.num_classes)
        dropped.append(without)
    assert 0.2 < torch.cat(dropped).float().mean() < 0.4


@pytest.mark.parametrize(
    ("method", "guidance"), [("endpoint", 2.0), ("consistency", 2.0), ("data", 1.0)]
)
def test_it_is_distilled(run: Path, tmp_path: Path, method: str, guidance: float) -> None:
    student = student_of(
        str(run),
        {"method": method, "trajectories": 20, "solver_steps": 8, "guidance": guidance},
        {"steps": 2, "batch": 8, "sample_every": 2, "device": "cpu", "name": "fast"},
    )
    assert fit(student, tmp_path)
    assert (tmp_path / "fast" / "samples" / "step-00000002.png").is_file()
    model = from_run(tmp_path / "fast", 1.0)
    assert not model.can_guide, "the guidance is built in"
    assert [condition.null for condition in model.conditions] == [None]
    before = from_run(run, 1.0).module.state_dict()
    assert any(not w.equal(before[name]) for name, w in model.module.state_dict().items())


def test_data_learns_the_images_of_the_conditions(run: Path, tmp_path: Path) -> None:
    """Flipped if the teacher's were, called where a sample is, and without paths of the teacher."""
    student = student_of(str(run), {"method": "data", "calls": (1, 2)}, {"batch": 64, "name": "d"})
    assert student.flips == OPTIONS.get("flips", False)
    trainer = Trainer(student, load(student))
    teach(trainer, tmp_path)
    draws = trainer.draw(0)
    assert torch.equal(draws.given["low_res"], avg_pool2d(draws.x0, 2))
    T = student.T
    assert sorted(set(draws.t.tolist()), reverse=True) == list(wanted_knots((1, 2), T))
    assert not any(tmp_path.iterdir())
    process = ForwardProcess(student.make_schedule(), student.prediction, torch.device("cpu"))

    F = process.target(draws.x0, draws.t, draws.eps)
    networks = replace(trainer.prepare(), student=lambda *_, **__: F)
    assert trainer.objective.losses(networks, draws).max() < 1e-3
    wrong = replace(networks, student=lambda *_, **__: F + 1)
    assert trainer.objective.losses(wrong, draws).min() > 0.1


def test_a_teacher_s_paths_have_the_conditions_of_their_images(run: Path, tmp_path: Path) -> None:
    """And end where the runtime's own loop ends, guided away from no label and no conditions."""
    student = student_of(
        str(run), {"trajectories": 6, "solver_steps": 8, "guidance": 2.0}, {"name": "fast"}
    )
    dataset = load(student)
    task = task_of(student, dataset)
    device = torch.device("cpu")
    shape, classes = dataset.sample_shape, dataset.classes
    teacher = Teacher(student, shape, classes, device, task.conditions)
    paths = Trajectories(student, dataset, teacher, tmp_path, task)
    assert paths.make(Processes(0, 1, device), lambda: False)
    places = np.arange(6)
    given = paths.conditions(places)
    image = torch.from_numpy(dataset.gather(paths.images)[0]).permute(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(given["low_res"], avg_pool2d(image, 2), atol=1e-6)

    def network(*inputs: np.ndarray, **named: np.ndarray) -> np.ndarray:
        tensors = {name: torch.tensor(value) for name, value in named.items()}
        with torch.no_grad():
            return teacher.module(*map(torch.from_numpy, inputs), **tensors).numpy()

    expected = run_program(
        teacher.program,
        network,
        noises((FIRST_TRAJECTORY_SEED + places).tolist(), TRAJECTORY_START, 0, shape),
        label=paths.labels,
        null_label=len(classes),
        conditions=given,
        null_conditions={"low_res": np.zeros((1, 4, 4), np.float32)},
    )
    ends, _ = paths.take(places, np.zeros(6, np.int64))
    np.testing.assert_allclose(ends, expected, atol=2e-3)
    # A file of conditions that is deleted is made again.
    (paths.folder / "00000.low_res.npy").unlink()
    again = Trajectories(student, dataset, teacher, tmp_path, task)
    assert again.make(Processes(0, 1, device), lambda: False)
    np.testing.assert_array_equal(again.conditions(places)["low_res"], given["low_res"])


def test_a_run_resumes_to_the_same_weights(run: Path, tmp_path: Path) -> None:
    """The conditions that are dropped are a function of the step, too."""
    options = {**OPTIONS, "name": "up", "checkpoint_every": 2}

    class Stop(Exception):
        pass

    from trainer.training.run import Run

    whole = checkpoints.newest(run / "checkpoints")
    original = Run.save_checkpoint

    def once(self: Run) -> None:
        original(self)
        if self.trainer.state.step == 2:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save_checkpoint", once)
        with pytest.raises(Stop):
            fit(Config(**{**options, "steps": 4}), tmp_path)
    assert fit(Config(**{**options, "steps": 4}), tmp_path)
    resumed = checkpoints.newest(tmp_path / "up" / "checkpoints")
    assert whole is not None
    assert resumed is not None
    for name, weight in whole.weights.items():
        assert weight.equal(resumed.weights[name]), name
