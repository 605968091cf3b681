"""Any module: a valid one is exported in any shape; an invalid one raises an error before anything
is converted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from export import ExportError, build_bundle
from export.graph.calibrate import Calibration
from export.proof.plan import Bounds, Plan
from export.sources.loading import load_module, load_weights
from export.sources.model import make_labels
from export.sources.module import from_module
from runtime import Sampler, make_schedule, run
from runtime.diffusion.noise import Stream, noise
from runtime.diffusion.schedule import Schedule
from runtime.errors import RequestError
from runtime.files import from_json
from runtime.sample import main as sample_command

from ...traces import traced_step

QUICK = Plan(
    batches=(1, 3),
    sizes=(2,),
    times=3,
    pictures=2,
    steps=5,
    samples=4,
    judged=2,
    ways=(("dpmpp_2m", 5),),
)
EPSILON: dict[str, Any] = {"prediction": "epsilon", "schedule": "linear_raw"}


class Signal(nn.Module):
    """A network of 1-D signals in two channels, with labels if their number is given."""

    def __init__(self, labels: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(2, 8, 5, padding=2), nn.SiLU(), nn.Conv1d(8, 2, 5, padding=2)
        )
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
    build_bundle(
        signal(),
        out,
        sample_shape=(2, 64),
        plan=QUICK,
        name="waves",
        prediction="epsilon",
        schedule="cosine",
    )
    return out


def test_signals_are_sampled_as_pytorch_does(bundle: Path) -> None:
    sampler = Sampler.load(bundle)
    model = from_module(signal(), sample_shape=(2, 64), prediction="epsilon", schedule="cosine")

    def draw(stream: Stream, k: int) -> np.ndarray:
        return np.stack([noise(seed, stream, k, (2, 64)) for seed in (5, 6, 7)])

    program = sampler.bundle.program("ddpm", 12)
    expected = run(
        program, model.reference(), draw(Stream.INITIAL, 0), lambda k: draw(Stream.STEP, k)
    )
    found = sampler.sample(3, 5, solver="ddpm", steps=12)
    assert found.shape == (3, 2, 64)
    # Nothing is clipped, so values reach sigma/alpha = 20000.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_bounds_leave_room_for_what_the_schedule_makes_of_rounding(bundle: Path) -> None:
    """sigma/alpha multiplies F, and so its rounding: the tolerance allows for that share only.
    Samples without a clip have their own size."""
    report = from_json((bundle / "report.json").read_bytes())
    entry = report["precisions"]["fp32"]["onnxruntime"]
    step = entry["steps"]["step"]
    assert step["by_time"][-1]["next_state"] > report["bounds"]["next_state"], (
        "or this tests nothing"
    )
    assert step["by_time"][0]["next_state"] < 1e-6
    assert step["next_state"]["error"] <= step["next_state"]["bound"] < 1
    assert step["answer"]["error"] < step["answer"]["bound"] == 1e-4, (
        "the network's own answer gets no such leave"
    )
    for trajectory in entry["trajectories"]:
        assert trajectory["bound"] > report["bounds"]["trajectory"]
        assert trajectory["error"] < 1e-2 * trajectory["bound"]
    assert report["plan"]["batches"] == [1, 3]


def test_what_cannot_be_shown_as_a_picture_has_a_report_and_a_card_all_the_same(
    bundle: Path,
) -> None:
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
    assert (
        sample_command([str(bundle), "--n", "2", "--steps", "3", "--out", str(tmp_path / "x.png")])
        == 2
    )
    assert "the samples of waves are 2×64" in (said := capsys.readouterr().err)
    assert "--out samples.npy" in said
    assert (
        sample_command([str(bundle), "--n", "2", "--steps", "3", "--out", str(tmp_path / "x.npy")])
        == 0
    )
    assert np.load(tmp_path / "x.npy").shape == (2, 2, 64)


def test_labels_and_guidance_of_any_module(tmp_path: Path) -> None:
    described = {
        "sample_shape": (2, 16),
        "num_classes": 3,
        "null_label": 1,
        "label_names": ["a", "b", "c"],
    }
    found = build_bundle(
        signal(4), tmp_path / "out", plan=QUICK, clip=1.0, guidance=1.5, **described, **EPSILON
    )
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
    assert (model.defaults.solver, model.defaults.steps, model.defaults.guidance) == (
        "ddpm",
        50,
        1.0,
    )
    assert model.provenance["data"] == data


class Fixed(Signal):
    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(x.reshape(2, 2, 16), time)


class Branching(Signal):
    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(x if x.mean() > 0 else 2 * x, time)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Fixed, "fails on a batch of 4 samples.*any size"),
        (Branching, "depends on other samples"),
    ],
)
def test_a_module_that_cannot_be_traced_is_explained(
    module: type[Signal], message: str, tmp_path: Path
) -> None:
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
    kinds = {node.op_type for node in traced_step(model, False).graph.node}
    assert "Softmax" in kinds
    assert not kinds & {"Shape", "Expand"}


class Answer(nn.Module):
    """Returns a function of x."""

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
        (
            Answer(lambda x: torch.cat([x, x], 1)).eval(),
            r"returns \[2, 4, 16\].*twice the channels",
        ),
        (Answer(lambda x: (x,)).eval(), "returns tuple, a tensor expected"),
        (Answer(lambda x: x.double()).eval(), "returns float64, float32 expected"),
        (Answer(lambda x: x / 0).eval(), "returns NaN or infinity"),
        (Answer(lambda x: torch.rand_like(x)).eval(), "returns another F the second time"),
        (
            Answer(broken).eval(),
            r"module\(x \[2, 2, 16\], time \[2\]\) fails with ValueError: no such thing",
        ),
        (nn.Identity().eval(), "fails with TypeError.*Does it take as many inputs"),
        (Signal(), "Signal is in training mode.*Call module.eval"),
        (in_training(), r"layers\.1 is in training mode"),
        (signal().double(), "layers.0.weight is float64, float32 expected. Call module.float"),
        (signal().to("meta"), "layers.0.weight is on meta; the export runs on the CPU"),
        (lambda x, time: x, "module must be a torch.nn.Module, got function"),
    ],
)
def test_a_module_that_does_not_fit_is_explained(module: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        from_module(module, sample_shape=(2, 16), name="it", **EPSILON)


def test_labels_out_of_the_modules_range_are_found_before_the_export() -> None:
    with pytest.raises(
        ExportError, match="with label 4, its labels being 0 to 4, fails with IndexError"
    ):
        from_module(signal(4), sample_shape=(2, 16), num_classes=4, null_label=4, **EPSILON)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction": "epsilom"}, "Did you mean 'epsilon'"),
        ({"schedule": "linear_row"}, "Did you mean 'linear_raw'"),
        (
            {"schedule": make_schedule("cosine").zero_terminal_snr()},
            "says nothing at zero terminal SNR",
        ),
        ({"solver": "dddim"}, "unknown solver"),
        ({"grid": "leadin"}, "Did you mean 'leading'"),
        ({"steps": 0}, "steps.* must be"),
        ({"options": {"eat": 1}}, "Did you mean 'eta'"),
        ({"clip": 0}, "clip.* must be"),
        ({"sample_shape": ()}, "1 to 4 integers"),
        ({"sample_shape": (2, 0)}, "sample_shape.* must be .*1 to 65536"),
        ({"sample_shape": (65536, 65536)}, "at most 67108864 values"),
        ({"sample_shape": "2,16"}, "1 to 4 integers"),
        ({"sample_range": (1, 1)}, "two rising numbers"),
        ({"name": "a/b"}, "name must be at most 200 letters"),
        ({"num_classes": -1}, "num_classes.* must be .*0"),
        ({"label_names": ["a"]}, "need classes"),
        ({"null_label": 0}, "need classes"),
        ({"num_classes": 2, "label_names": ["a", "a"]}, "2 different names"),
        ({"num_classes": 2, "null_label": 3}, "null_label.* must be .*0 to 2"),
        ({"guidance": "2"}, "guidance.* must be a number"),
        ({"num_classes": 3, "label_names": "abc"}, "`label_names` must be a list of names"),
        ({"grid": [999.0, 0.0]}, "`grid` must be a string"),
        ({"options": {"clip": 1.0}}, "Pass clip as an argument"),
        ({"options": {"guidance": 3.0}}, "Pass guidance as an argument"),
        ({"provenance": {"data": float("nan")}}, "`provenance` must be JSON"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_explained(changes: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        from_module(signal(), **{"sample_shape": (2, 16), **EPSILON, **changes})


class Strange:
    """A value of an unknown class, whose repr raises."""

    def __repr__(self) -> str:
        raise ValueError("no")


ANYTHING: tuple[Any, ...] = (
    *(5, 2.5, True, "x", "", b"x", [1], (), {}, {1: 2}, {"a": object()}, object, float("nan")),
    *(10**400, 1j, np.zeros(3), np.zeros(()), np.array("x"), torch.zeros(2), Strange(), "\udcff"),
    range(3),
)
ARGUMENTS = {
    "sample_shape": (None, *ANYTHING),
    "sample_range": (None, (1,), (1, 2, 3), ("a", "b"), (2, 1), *ANYTHING),
    "prediction": (None, *ANYTHING),
    "schedule": (None, *ANYTHING),
    "options": (*ANYTHING,),
    "provenance": (*ANYTHING,),
    "label_names": (["a", None], ["a", ["b"]], ["a", "b", "c"], *ANYTHING),
    "num_classes": (None, *ANYTHING),
    "null_label": (*ANYTHING,),
    "steps": (*ANYTHING,),
    "grid": (None, *ANYTHING),
    "solver": (None, *ANYTHING),
    "clip": (*ANYTHING,),
    "guidance": (None, *ANYTHING),
    "name": (*ANYTHING,),
}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_arguments_of_any_type_end_in_an_error_of_ours(argument: str) -> None:
    """Or in a model, if the value happens to be a valid one."""
    module = signal(3)
    for value in ARGUMENTS[argument]:
        given = {"sample_shape": (2, 16), "num_classes": 2, "null_label": 2, **EPSILON}
        try:
            model = from_module(module, **{**given, argument: value})
        except (RequestError, ExportError):
            continue
        defaults = vars(model.defaults)
        json.dumps([defaults | {"options": dict(defaults["options"])}, dict(model.provenance)])
        json.dumps([model.clip, model.sample_range, model.sample_shape, model.name])


@pytest.mark.parametrize("module", [*ANYTHING, None, nn.Module], ids=lambda v: type(v).__name__)
def test_what_is_no_module_is_refused(module: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"module must be a torch.nn.Module"):
        from_module(module, sample_shape=(2, 16), **EPSILON)
    with pytest.raises(ExportError, match=r"module must be a torch.nn.Module"):
        load_weights(module, tmp_path / "w.safetensors")


def test_scalars_of_numpy_are_numbers() -> None:
    model = from_module(
        signal(3),
        sample_shape=np.array([2, 16]),
        num_classes=np.array(2),
        null_label=np.int64(2),
        steps=np.array(5),
        clip=np.float32(2),
        guidance=np.array(3.0),
        sample_range=np.array([-2.0, 2.0]),
        options={"eta": np.float32(0.5)},
        **EPSILON,
    )
    assert (model.sample_shape, model.num_classes, model.clip) == ((2, 16), 2, 2.0)
    assert (model.defaults.steps, model.defaults.guidance) == (5, 3.0)
    assert model.defaults.options == {"eta": 0.5}
    assert json.dumps([vars(model.defaults), model.sample_range, model.clip])


def test_a_schedule_that_a_bundle_cannot_hold_is_refused() -> None:
    linear = make_schedule("linear_raw")
    own = Schedule("mine", linear.alpha, linear.sigma, linear.time)
    parameters = Schedule("linear_raw", linear.alpha, linear.sigma, linear.time, {"T": object()})
    other = Schedule("cosine", linear.alpha, linear.sigma, linear.time, {"T": 1000})
    for schedule in (own, parameters, other):
        with pytest.raises(RequestError, match=r"make_schedule or from_betas|unknown schedule"):
            from_module(signal(), sample_shape=(2, 16), prediction="v", schedule=schedule)


@pytest.mark.parametrize(
    "value", [None, 5, b"mynet:net", ["mynet:net"], Strange()], ids=lambda v: type(v).__name__
)
def test_loaders_take_strings_and_paths(value: Any) -> None:
    with pytest.raises(RequestError, match="`spec` must be a string"):
        load_module(value)
    with pytest.raises(RequestError, match="`path` must be a path"):
        load_weights(signal(), value)
    with pytest.raises(RequestError, match="NUL"):
        load_weights(signal(), "a\0.safetensors")


def test_a_lazy_module_is_refused_until_it_has_run(tmp_path: Path) -> None:
    module = nn.LazyConv1d(2, 3).eval()
    with pytest.raises(ExportError, match="weight has no shape yet"):
        from_module(module, sample_shape=(2, 16), **EPSILON)
    save_file({"weight": torch.zeros(2, 2, 3), "bias": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ExportError, match="of the module has no shape yet"):
        load_weights(module, tmp_path / "w.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.int64])
def test_weights_that_are_no_real_numbers_are_not_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    path = tmp_path / "w.safetensors"
    save_file({"weight": torch.ones(2, 2, dtype=dtype), "bias": torch.zeros(2)}, path)
    with pytest.raises(ExportError, match=r"'weight' is .*, float32 expected|cannot be read"):
        load_weights(layer, path)
    save_file({"weight": torch.ones(2, 2).half(), "bias": torch.zeros(2).double()}, path)
    load_weights(layer, path)
    assert torch.equal(layer.weight, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("count", "null", "names"),
    [(3, None, ("0", "1", "2")), (3, 2, ("0", "1")), (3, 0, ("class1", "class2")), (0, None, None)],
)
def test_names_of_labels_without_names_never_name_another_number(
    count: int, null: int | None, names: tuple[str, ...] | None
) -> None:
    labels = make_labels(count, null, None)
    assert (labels and labels.names) == names


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (Plan, {"times": 0}),
        (Plan, {"times": 2.5}),
        (Plan, {"batches": ()}),
        (Plan, {"batches": (0, 1)}),
        (Plan, {"sizes": 3}),
        (Plan, {"ways": ()}),
        (Plan, {"ways": ("ddim", 4)}),
        (Plan, {"ways": [("ddim", 0)]}),
        (Bounds, {"answer": -1.0}),
        (Bounds, {"trajectory": "0.1"}),
        (Bounds, {"psnr": {"int8_trt": 30.0}}),
        (Bounds, {"psnr": {"int8": float("nan")}}),
        (Bounds, {"psnr": 30.0}),
        (Calibration, {"pictures": 0}),
        (Calibration, {"ways": [["ddim"]]}),
    ],
    ids=str,
)
def test_what_is_compared_is_checked_before_anything_is_done(kind: Any, changes: dict) -> None:
    (name,) = changes
    with pytest.raises(RequestError, match=name):
        kind(**changes)


def test_sizes_of_a_plan_may_be_a_list() -> None:
    assert Plan(batches=[1, 3], ways=[["ddim", 4]]) == Plan(batches=(1, 3), ways=(("ddim", 4),))
