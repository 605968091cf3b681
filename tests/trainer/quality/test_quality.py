"""Distances equal those of other implementations and closed forms; a run keeps its best checkpoint;
runs and bundles get the same scores."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime import Sampler
from runtime.errors import RequestError
from runtime.files import from_json
from trainer.config import Config
from trainer.data import sources as data
from trainer.data.memory import Pictures
from trainer.errors import DataError
from trainer.evaluate import Changes, evaluate, main
from trainer.fit import fit
from trainer.quality import distances as quality
from trainer.quality import features
from trainer.quality.distances import compare, frechet, kernel, precision_recall
from trainer.quality.features import features_of, rotations_of, train_classifier
from trainer.quality.judge import Judge
from trainer.runs import checkpoint as checkpoints
from trainer.runs.log import read

CONFIG = Config(
    data="digits", channels=(8, 16), attention=(), batch=16, steps=20, warmup=5, T=100, checkpoint_every=10, sample_every=0,
    quality_every=150, quality_samples=60, sample_steps=4, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def classifiers() -> dict[str, features.Classifier]:
    """Classifiers that a test here has trained, by what was trained on."""
    return {}


@pytest.fixture(autouse=True)
def trained_once(
    classifiers: dict[str, features.Classifier],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Have runs and bundles of the same images share a classifier.

    Tests of the training itself call `train_classifier`, which this leaves as it is.
    """
    train = features.train_classifier

    def train_once(pictures: Pictures, device: torch.device) -> features.Classifier:
        key = f"{pictures.fingerprint()} {pictures.classes} {device}"
        if key not in classifiers:
            classifiers[key] = train(pictures, device)
        return classifiers[key]

    monkeypatch.setattr(features, "train_classifier", train_once)


def normal(n: int, mean, cov, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).multivariate_normal(mean, cov, n)


def test_the_frechet_distance_of_normal_clouds_is_the_closed_form() -> None:
    a, b = (
        normal(200_000, [0, 0], np.diag([1.0, 4.0]), 0),
        normal(200_000, [1, 0], np.diag([4.0, 4.0]), 1),
    )
    assert frechet(a, b) == pytest.approx(1 + (2 - 1) ** 2, rel=0.02)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


class Identity(torch.nn.Module):
    """Features as torchmetrics takes them: the pixels themselves."""

    num_features = 12

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double().flatten(1)


@pytest.fixture(scope="module")
def clouds() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(80, 3, 2, 2, generator=generator), torch.rand(
        80, 3, 2, 2, generator=generator
    ) ** 2


@pytest.mark.filterwarnings("ignore")
def test_the_distances_are_those_of_torchmetrics(clouds) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    real, made = clouds
    fid = FrechetInceptionDistance(Identity(), normalize=True, input_img_size=(3, 2, 2)).set_dtype(
        torch.float64
    )
    kid = KernelInceptionDistance(Identity(), subsets=1, subset_size=80, normalize=True)
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(made, real=False)
    a, b = (x.double().flatten(1).numpy() for x in (real, made))
    assert frechet(a, b) == pytest.approx(float(fid.compute()), rel=1e-4)
    assert kernel(a, b) == pytest.approx(float(kid.compute()[0]), rel=1e-4)


def test_blocks_of_rows_change_nothing(clouds, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (x.double().flatten(1).numpy() for x in clouds)
    whole = compare(a, b)
    monkeypatch.setattr(quality, "BLOCK", 37)
    assert compare(a, b) == pytest.approx(whole, rel=1e-9)


def test_the_kernel_distance_is_unbiased() -> None:
    """For two samples of one distribution it is 0 on average, with both signs."""
    found = [kernel(*np.random.default_rng(s).normal(size=(2, 40, 4))) for s in range(200)]
    assert min(found) < 0 < max(found)
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(200)


def test_precision_and_recall_tell_what_is_wrong_from_what_is_missing() -> None:
    random = np.random.default_rng(0)
    real = np.concatenate([random.normal(0, 1, (200, 2)), random.normal(50, 1, (200, 2))])
    half = random.normal(0, 1, (400, 2))  # every sample good, half of the data missing
    precision, recall = precision_recall(real, half)
    assert precision > 0.9
    assert 0.3 < recall < 0.6
    wrong = np.concatenate(
        [real, random.normal(-90, 1, (400, 2))]
    )  # half of the samples are unrelated to the data
    precision, recall = precision_recall(real, wrong)
    assert 0.4 < precision < 0.6
    assert recall > 0.9


def test_the_classifier_learns_the_classes() -> None:
    digits = data.digits()
    network = features.train_classifier(digits, torch.device("cpu"))  # which other tests share
    x = torch.from_numpy(digits.images.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1
    with torch.no_grad():
        right = network(x).argmax(1).numpy() == digits.labels
    assert right.mean() > 0.9


def test_the_classifier_is_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "STEPS", 40)
    one, two = (train_classifier(data.digits(), torch.device("cpu")).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_features_tell_spoiled_pictures_from_good_ones() -> None:
    digits = data.digits()
    features = features_of(CONFIG, digits, None, torch.device("cpu"))
    first, second = digits.images[:400], digits.images[400:800]
    noise = np.random.default_rng(0).integers(0, 256, second.shape, np.uint8)
    good, bad = (
        compare(features(first), features(x)) for x in (second, (second // 2 + noise // 2))
    )
    assert bad["frechet"] > 3 * good["frechet"]
    assert bad["precision"] < good["precision"]


def test_without_classes_the_classifier_learns_which_way_is_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(features, "STEPS", 3)  # the shape is all that is looked at
    extract = features_of(CONFIG, replace(data.digits(), classes=()), None, torch.device("cpu"))
    assert extract(data.digits().images[:5]).shape == (5, 64)


def tall_digits() -> Pictures:
    """Digits without classes, cut to 8×6."""
    digits = data.digits()
    return replace(digits, images=digits.images[:, :, 1:7], classes=())


def test_images_that_are_not_square_are_turned_by_halves_and_have_two_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A quarter turn would change their shape; with a single class there would be nothing to
    learn."""
    labels: list[torch.Tensor] = []
    cross_entropy = features.F.cross_entropy

    def noted(x: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        labels.append(of)
        return cross_entropy(x, of)

    monkeypatch.setattr(features.F, "cross_entropy", noted)
    monkeypatch.setattr(features, "STEPS", 3)
    network = train_classifier(tall_digits(), torch.device("cpu"))
    assert network.out.out_features == 2
    for batch in labels:
        assert 0.2 < batch.double().mean() < 0.8  # 64 fair draws: beyond this once in 1e6
        assert set(batch.tolist()) == {0, 1}


def test_the_classifier_tells_upright_images_from_turned_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(features, "STEPS", 200)
    tall = tall_digits()
    network = train_classifier(tall, torch.device("cpu"))
    x = torch.from_numpy(tall.images.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1
    with torch.no_grad():
        upright, turned = (network(v).argmax(1).double().mean() for v in (x, x.rot90(2, (2, 3))))
    # 0, 1 and 8 look much the same upside down: not all can be distinguished.
    assert upright < 0.3
    assert turned > 0.7


@pytest.mark.parametrize(
    ("shape", "quarters"), [((8, 8), (0, 1, 2, 3)), ((8, 6), (0, 2)), ((1, 1), (0, 1, 2, 3))]
)
def test_rotations_keep_the_shape_and_are_those_that_the_labels_say(
    shape: tuple[int, int], quarters: tuple[int, ...]
) -> None:
    rotations = rotations_of(*shape)
    assert rotations.quarters == quarters
    x = torch.arange(40 * shape[0] * shape[1]).reshape(40, 1, *shape)
    turned, labels = rotations(x, np.random.default_rng(0))
    assert turned.shape == x.shape
    assert set(labels.tolist()) == set(range(len(quarters)))
    for before, after, label in zip(x, turned, labels, strict=True):
        assert torch.equal(after, before.rot90(quarters[label], (1, 2)))


class Inception(torch.nn.Module):
    """Like StyleGAN's file except for the weights: bytes of three channels in, features out."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return x.float().mean((2, 3)) if return_features else x.float()


@pytest.mark.filterwarnings("ignore")
def test_inception_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "inception.pt"
    torch.jit.script(Inception()).save(str(file))
    features = features_of(
        replace(CONFIG, features=str(file)), data.digits(), None, torch.device("cpu")
    )
    digits = data.digits().images[:5]
    np.testing.assert_allclose(
        features(digits), np.repeat(digits.mean((1, 2)), 3, axis=1), rtol=1e-5
    )


# --- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("judged")
    assert fit(CONFIG, runs)
    return runs / "digits"


def test_a_run_keeps_its_best_checkpoint(run: Path) -> None:
    rows = read(run / "quality.csv")
    assert [row["step"] for row in rows] == [
        "10",
        "19",
        "20",
    ]  # the first to reach 150 and 300 images; and the last
    best = min(rows, key=lambda row: float(row["frechet"]))
    assert [p.name for p in (run / "best").iterdir()] == [f"step-{int(best['step']):08d}"]
    assert checkpoints.newest(run / "best") is not None


def test_a_measurement_has_its_grid(run: Path) -> None:
    grids = sorted(path.stem for path in (run / "samples").iterdir())
    assert grids == [f"step-{int(row['step']):08d}" for row in read(run / "quality.csv")]


def test_the_command_says_what_the_run_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == from_json((run / "evaluation.json").read_bytes())
    for name, value in read(run / "quality.csv")[-1].items():
        assert told[name] == pytest.approx(float(value), rel=1e-4)


def test_the_bundle_of_a_run_is_judged_as_the_run_is(
    tiny_run: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--n", "40", "--steps", "5"]
    assert main([str(tiny_run), *how]) == 0
    assert main([str(tiny_bundle), *how]) == 0
    of_run, of_bundle = (json.loads("{" + text) for text in capsys.readouterr().out.split("{")[1:])
    for name in ("frechet", "kernel"):  # the same images but for rounding
        assert of_bundle[name] == pytest.approx(of_run[name], rel=0.02)


@pytest.mark.parametrize(("given", "guidance"), [(None, 1.0), (0.0, 0.0), (2.0, 2.0)])
def test_a_bundle_is_sampled_at_the_scale_that_is_given(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, given: float | None, guidance: float
) -> None:
    def pictures(*_: object, **how: object) -> None:
        assert how["guidance"] == guidance
        raise RequestError("seen")

    monkeypatch.setattr(Sampler, "pictures", pictures)
    monkeypatch.setattr(features, "STEPS", 2)
    with pytest.raises(RequestError, match="seen"):
        evaluate(tiny_bundle, False, given, "cpu", Changes())


def test_data_that_changed_since_training_is_named(
    run: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    digits = data.digits()
    monkeypatch.setattr(features, "STEPS", 2)
    few = Changes(quality_samples=8, sample_steps=1)
    evaluate(run, False, None, "cpu", few)
    assert "has changed" not in caplog.text
    monkeypatch.setattr(data, "digits", lambda: replace(digits, images=255 - digits.images))
    for what in (run, tiny_bundle):
        caplog.clear()
        evaluate(what, False, None, "cpu", few)
        assert f"the data of {what} has changed since training" in caplog.text
    names = (*digits.classes[:9], "ten")
    monkeypatch.setattr(data, "digits", lambda: replace(digits, classes=names))
    for what in (run, tiny_bundle):
        with pytest.raises(DataError, match="was trained with the classes 0, 1, 2, 3, 4 and 5"):
            evaluate(what, False, None, "cpu", few)


def test_a_bundle_has_no_best_checkpoint(tiny_bundle: Path) -> None:
    with pytest.raises(RequestError, match="--best is for runs"):
        evaluate(tiny_bundle, True, None, "cpu", Changes())


@pytest.mark.parametrize(("what", "message"), [("nowhere", "is not a run"), ("", "is not a run")])
def test_what_cannot_be_judged_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, message: str
) -> None:
    assert main([str(tmp_path / what)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_measured_is_refused_before_training(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"  # a common download, which has no program
    torch.save({"weight": torch.zeros(2)}, file)
    for options, message in (
        ({"quality_samples": 3}, "3 images are too few"),
        ({"features": "no.pt"}, "no such file"),
        ({"features": str(file)}, "cannot be loaded as a TorchScript file"),
    ):
        with pytest.raises(RequestError, match=message):
            fit(replace(CONFIG, **options), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="3 images are too few"):
        Judge(replace(CONFIG, quality_samples=3), data.digits(), None, torch.device("cpu"))
