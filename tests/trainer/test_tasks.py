"""A run with conditions from its first step to samples of its bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.build import build
from export.proof.plan import LEAST
from export.sources.bundle import from_bundle
from export.sources.run import from_run
from runtime import Bundle, Sampler
from runtime.errors import RequestError
from runtime.sample import main
from trainer.config import Config
from trainer.evaluate import Changes, of_bundle, of_run
from trainer.fit import fit
from trainer.runs import checkpoint as checkpoints
from trainer.training.run import EXAMPLES

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


def test_a_bundle_is_measured_as_its_run_is(run: Path, bundle: Bundle) -> None:
    """Under the same conditions and labels: other ones give other samples."""
    changes = Changes(quality_samples=24)
    expected = of_run(run, best=False, device="cpu", changes=changes).distances
    found = of_bundle(bundle.path, None, "cpu", changes).distances
    assert found == pytest.approx(expected, rel=1e-3)


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
