"""Any module: what fits is exported whatever its shape, what does not is named before anything is converted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from export import ExportError, build_bundle, graph
from export.check import Plan, torch_network
from export.from_module import from_module, make_labels
from runtime import Sampler, make_schedule, run
from runtime.errors import RequestError
from runtime.files import from_json
from runtime.noise import Stream, noise
from runtime.sample import main as sample_command

QUICK = Plan(batches=(1, 3), times=3, pictures=2, steps=5, samples=4, judged=2, ways=(("dpmpp_2m", 5),))
EPSILON: dict[str, Any] = {"prediction": "epsilon", "schedule": "linear_raw"}


class Signal(nn.Module):
    """A network of 1-D signals in two channels, with labels where it is told how many."""

    def __init__(self, labels: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(2, 8, 5, padding=2), nn.SiLU(), nn.Conv1d(8, 2, 5, padding=2))
        self.time = nn.Linear(1, 2)
        self.label = nn.Embedding(labels, 2) if labels else None

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        shift = self.time(torch.sin(time / 300)[:, None])
        if self.label is not None:
            shift = shift + self.label(label)
        return self.layers(x) + shift[..., None]


def signal(labels: int = 0) -> Signal:
    torch.manual_seed(0)
    return Signal(labels).eval()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("signal") / "signal"
    build_bundle(signal(), out, sample_shape=(2, 64), plan=QUICK, name="waves", prediction="epsilon", schedule="cosine")
    return out


def test_signals_are_sampled_as_pytorch_does(bundle: Path) -> None:
    sampler = Sampler.load(bundle)
    model = from_module(signal(), sample_shape=(2, 64), prediction="epsilon", schedule="cosine")

    def draw(stream: Stream, k: int) -> np.ndarray:
        return np.stack([noise(seed, stream, k, (2, 64)) for seed in (5, 6, 7)])

    program = sampler.bundle.program("ddpm", 12)
    expected = run(program, torch_network(model), draw(Stream.INITIAL, 0), lambda k: draw(Stream.STEP, k))
    found = sampler.sample(3, 5, solver="ddpm", steps=12)
    assert found.shape == (3, 2, 64)
    # Nothing is clipped, so values reach sigma/alpha = 20000.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_bounds_leave_room_for_what_the_schedule_makes_of_rounding(bundle: Path) -> None:
    """sigma/alpha multiplies F, and so its rounding: that share is allowed for, and no more. Samples without a clip have their own size."""
    report = from_json((bundle / "report.json").read_bytes())
    entry = report["precisions"]["fp32"]["onnxruntime"]
    step = entry["steps"]["step"]
    assert step["by_time"][-1]["next_state"] > report["bounds"]["next_state"], "or this tests nothing"
    assert step["by_time"][0]["next_state"] < 1e-6
    assert step["next_state"]["error"] <= step["next_state"]["bound"] < 1
    assert step["answer"]["error"] < step["answer"]["bound"] == 1e-4, "the network's own answer gets no such leave"
    for trajectory in entry["trajectories"]:
        assert trajectory["bound"] > report["bounds"]["trajectory"]
        assert trajectory["error"] < 1e-2 * trajectory["bound"]
    assert report["plan"]["batches"] == [1, 3]


def test_what_cannot_be_shown_as_a_picture_has_a_report_and_a_card_all_the_same(bundle: Path) -> None:
    with Image.open(bundle / "report.png") as report:
        assert report.size[0] > 800
    assert not (bundle / "samples.png").exists()
    card = (bundle / "README.md").read_text()
    assert "samples = sampler.sample(8, seed=0)" in card
    assert "a PyTorch module, Signal" in card
    for absent in ("samples.png", "None", "?"):
        assert absent not in card


def test_the_sample_command_writes_signals_as_numbers(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert sample_command([str(bundle), "--n", "2", "--steps", "3", "--out", str(tmp_path / "x.png")]) == 2
    assert "the samples of waves are 2×64" in (said := capsys.readouterr().err)
    assert "--out samples.npy" in said
    assert sample_command([str(bundle), "--n", "2", "--steps", "3", "--out", str(tmp_path / "x.npy")]) == 0
    assert np.load(tmp_path / "x.npy").shape == (2, 2, 64)


def test_labels_and_guidance_of_any_module(tmp_path: Path) -> None:
    described = {"sample_shape": (2, 16), "num_classes": 3, "null_label": 1, "label_names": ["a", "b", "c"]}
    found = build_bundle(signal(4), tmp_path / "out", plan=QUICK, clip=1.0, guidance=1.5, **described, **EPSILON)
    assert (found.labels.names, found.defaults.guidance) == (("a", "b", "c"), 1.5)
    sampler, network, start = Sampler(found), signal(4), [float(found.schedule.time[-1])]
    x = torch.from_numpy(np.stack([noise(seed, Stream.INITIAL, 0, (2, 16)) for seed in (0, 1)]))
    alpha, sigma = found.schedule.alpha[-1], found.schedule.sigma[-1]
    for label, number in (("a", 0), ("b", 2), ("c", 3), (None, 1)):
        with torch.inference_mode():
            F = network(x, torch.full((2,), start[0]), torch.full((2,), number)).numpy()
        expected = np.clip((x.numpy() - sigma * F) / alpha, -1, 1)
        one_step = sampler.sample(2, 0, label=label, guidance=1.0, solver="ddim", grid=start)
        np.testing.assert_allclose(one_step, expected, rtol=0, atol=1e-3)


def test_a_bundles_defaults_are_the_callers(tmp_path: Path) -> None:
    data = {"name": "sines", "note": "made up", "licence": "CC0"}
    model = from_module(
        signal(),
        sample_shape=(2, 16),
        prediction="v",
        schedule=make_schedule("cosine", T=200).zero_terminal_snr(),
        solver="ddpm",
        options={"variance": "fixed_large"},
        grid="leading",
        sample_range=(-2, 2),
        clip=2.0,
        provenance={"data": data},
    )
    assert (model.name, model.clip, model.sample_range) == ("signal", 2.0, (-2.0, 2.0))
    assert (model.defaults.solver, model.defaults.steps, model.defaults.guidance) == ("ddpm", 50, 1.0)
    assert model.provenance["data"] == data


class Fixed(Signal):
    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(x.reshape(2, 2, 16), time)


class Branching(Signal):
    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(x if x.mean() > 0 else 2 * x, time)


@pytest.mark.parametrize(
    ("module", "message"),
    [(Fixed, "the module works at one size of the batch|cannot trace"), (Branching, "cannot trace")],
)
def test_a_module_that_cannot_be_traced_is_explained(module: type[Signal], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        build_bundle(module().eval(), tmp_path / "out", sample_shape=(2, 16), plan=QUICK, **EPSILON)
    assert list(tmp_path.iterdir()) == []


class Littered(Signal):
    """Asks for its shapes at run time, as much published code does."""

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        time = time * torch.ones(x.shape[0], dtype=time.dtype)
        tokens = x.transpose(1, 2)[:, None]
        mixed = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return super().forward(x + mixed.transpose(2, 3).reshape(x.shape[0], -1, x.shape[2]), time)


def test_shapes_that_a_module_asks_for_are_constants_in_the_graph() -> None:
    model = from_module(Littered().eval(), sample_shape=(2, 16), **EPSILON)
    kinds = {node.op_type for node in graph.trace(model, False).graph.node}
    assert "Softmax" in kinds
    assert not kinds & {"Shape", "Expand"}


class Answer(nn.Module):
    """Answers with whatever a function makes of x."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, time: Tensor) -> Any:
        return self.answer(x)


def broken(x: Tensor) -> Tensor:
    raise ValueError("no such thing")


def in_training() -> nn.Module:
    module = signal()
    module.layers[1].train()
    return module


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Answer(lambda x: x[:, :1]).eval(), r"returns \[2, 1, 16\], \[2, 2, 16\] expected"),
        (Answer(lambda x: torch.cat([x, x], 1)).eval(), r"returns \[2, 4, 16\].*twice the channels"),
        (Answer(lambda x: (x,)).eval(), "returns tuple, a tensor expected"),
        (Answer(lambda x: x.double()).eval(), "returns float64, float32 expected"),
        (Answer(lambda x: x / 0).eval(), "returns NaN or infinity"),
        (Answer(lambda x: torch.rand_like(x)).eval(), "answers otherwise the second time"),
        (Answer(broken).eval(), r"module\(x \[2, 2, 16\], time \[2\]\) fails with ValueError: no such thing"),
        (nn.Identity().eval(), "fails with TypeError.*Does it take as many inputs"),
        (Signal(), "Signal is in training mode.*Call module.eval"),
        (in_training(), r"layers\.1 is in training mode"),
        (signal().double(), "layers.0.weight is float64, float32 expected. Call module.float"),
        (signal().to("meta"), "layers.0.weight is on meta; the export runs on the CPU"),
        (lambda x, time: x, "torch.nn.Module expected, found function"),
    ],
)
def test_a_module_that_does_not_fit_is_explained(module: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        from_module(module, sample_shape=(2, 16), name="it", **EPSILON)


def test_labels_out_of_the_modules_range_are_found_before_the_export() -> None:
    with pytest.raises(ExportError, match="with label 4, its labels being 0 to 4, fails with IndexError"):
        from_module(signal(4), sample_shape=(2, 16), num_classes=4, null_label=4, **EPSILON)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction": "epsilom"}, "Did you mean 'epsilon'"),
        ({"schedule": "linear_row"}, "Did you mean 'linear_raw'"),
        ({"schedule": make_schedule("cosine").zero_terminal_snr()}, "says nothing at zero terminal SNR"),
        ({"solver": "dddim"}, "unknown solver"),
        ({"grid": "leadin"}, "Did you mean 'leading'"),
        ({"steps": 0}, "steps must be"),
        ({"options": {"eat": 1}}, "Did you mean 'eta'"),
        ({"clip": 0}, "clip must be"),
        ({"sample_shape": ()}, "1 to 4 integers"),
        ({"sample_shape": (2, 0)}, "sample_shape must be from 1"),
        ({"sample_shape": "2,16"}, "1 to 4 integers"),
        ({"sample_range": (1, 1)}, "two rising numbers"),
        ({"name": "a/b"}, "a bundle's name is"),
        ({"num_classes": -1}, "num_classes must be at least 0"),
        ({"label_names": ["a"]}, "need classes"),
        ({"null_label": 0}, "need classes"),
        ({"num_classes": 2, "label_names": ["a", "a"]}, "2 different names"),
        ({"num_classes": 2, "null_label": 3}, "null_label must be from 0 to 2"),
        ({"guidance": "2"}, "guidance must be a number"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_explained(changes: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        from_module(signal(), **{"sample_shape": (2, 16), **EPSILON, **changes})


@pytest.mark.parametrize(
    ("count", "null", "names"),
    [(3, None, ("0", "1", "2")), (3, 2, ("0", "1")), (3, 0, ("class1", "class2")), (0, None, None)],
)
def test_names_of_labels_without_names_never_name_another_number(
    count: int, null: int | None, names: tuple[str, ...] | None
) -> None:
    labels = make_labels(count, null, None)
    assert (labels and labels.names) == names


@pytest.mark.parametrize("changes", [{"times": 0}, {"batches": ()}, {"batches": (0, 1)}])
def test_a_plan_compares_something(changes: dict) -> None:
    with pytest.raises(ExportError, match="a plan needs"):
        Plan(**changes)
