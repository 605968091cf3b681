"""Distillation: the teacher's paths, both objectives, a run that is stopped and resumed, and the
model that is exported."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.build import build
from export.proof.plan import Plan
from export.sources.run import from_run
from runtime import Sampler
from runtime.diffusion.grid import make_grid
from runtime.diffusion.noise import Stream, noises
from runtime.diffusion.program import run
from runtime.diffusion.schedule import make_schedule
from runtime.diffusion.solvers import make_program
from runtime.errors import RequestError, UnnoiseError
from runtime.terminal.progress import Progress
from trainer import fit as fitting
from trainer.config import Config
from trainer.config.distillation import Distillation
from trainer.data.sources import load
from trainer.data.tasks import task_of
from trainer.distill import main, student_of
from trainer.errors import CheckpointError, TrainingError
from trainer.fit import fit
from trainer.networks.cost import make_network
from trainer.objectives.distillation import (
    Consistency,
    Endpoint,
    contrast,
    distance,
    perceptual_distance,
)
from trainer.objectives.forward import ForwardProcess
from trainer.objectives.objective import Draws, Networks
from trainer.parallel.processes import Processes, join
from trainer.runs import checkpoint as checkpoints
from trainer.runs.starts import read_starts
from trainer.runs.weights import SHA256
from trainer.training import trajectories
from trainer.training.start import start
from trainer.training.step import Trainer, require_shares
from trainer.training.teacher import Teacher, levels_of
from trainer.training.trajectories import Trajectories

FEW = {"trajectories": 40, "solver_steps": 8, "guidance": 2.0}
SHORT = {"steps": 6, "batch": 16, "checkpoint_every": 2, "sample_every": 0, "device": "cpu"}

QUICK = Plan(
    batches=(1, 3), sizes=(2,), quantized_sizes=(2, 5), times=3, pictures=2, samples=4, judged=4
)

LEARNING = {
    "steps": 70,
    "batch": 32,
    "learning_rate": 3e-3,
    "warmup": 5,
    "ema_half_life": (300, 30),
    "checkpoint_every": 1000,
}


@pytest.fixture(scope="module", autouse=True)
def small_files() -> Iterator[None]:
    """Few paths in a file, so that few paths make several files."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trajectories, "CHUNK", 16)
        yield


@pytest.fixture(scope="module")
def student(tiny_run: Path) -> Config:
    return student_of(str(tiny_run), FEW, {**SHORT, "name": "fast"})


@pytest.fixture(scope="module")
def finished(student: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that was trained without a stop."""
    runs = tmp_path_factory.mktemp("finished")
    assert fit(student, runs)
    return runs / "fast"


def teacher_of(config: Config) -> Teacher:
    dataset = load(config)
    conditions = task_of(config, dataset).conditions
    return Teacher(config, dataset.sample_shape, dataset.classes, torch.device("cpu"), conditions)


def alone(index: int = 0, count: int = 1) -> Processes:
    return Processes(index, count, torch.device("cpu"))


class OneOfTwo(Processes):
    """A process whose twin needs no waiting for: the test runs them one after the other."""

    def wait(self) -> None:
        pass

    def any(self, value: bool) -> bool:
        return value


# --- The teacher's paths.


def test_paths_end_where_the_runtime_s_own_loop_ends(student: Config) -> None:
    teacher = teacher_of(student)
    seeds = [5, 6, 7]
    label = np.array([1, 2, 3])
    x = noises(seeds, Stream.INITIAL, 0, (1, 8, 8))

    def network(*inputs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return teacher.module(*map(torch.from_numpy, inputs)).numpy()

    expected = run(teacher.program, network, x, label=label, null_label=10)
    found = teacher.paths(seeds, label)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found[:, 0], expected, atol=2e-3)
    # Pure noise is the first point of every path.
    np.testing.assert_allclose(found[:, 1], x, atol=5e-3)


def test_the_stored_noise_makes_each_point_of_the_path(student: Config) -> None:
    """x_t = alpha · end + sigma · eps is on the path: from there the same solver ends there too."""
    teacher = teacher_of(student)
    label = np.array([4, 5])
    found = teacher.paths([8, 9], label).astype(np.float64)
    seen: dict[int, np.ndarray] = {}

    def network(x: np.ndarray, time: np.ndarray, label: np.ndarray) -> np.ndarray:
        seen.setdefault(round(float(time[0])), x)
        with torch.no_grad():
            return teacher.module(*map(torch.from_numpy, (x, time, label))).numpy()

    run(teacher.program, network, noises([8, 9], 0, 0, (1, 8, 8)), label=label, null_label=10)
    rows = teacher.program.call[:, 0].round().astype(int).tolist()
    assert student.distillation is not None
    for k, knot in enumerate(student.distillation.levels):
        row = min(range(len(rows)), key=lambda i, near=knot: abs(rows[i] - near))
        alpha, sigma = teacher.program.level[row]
        point = alpha * found[:, 0] + sigma * found[:, 1 + k]
        np.testing.assert_allclose(point, seen[rows[row]], atol=6e-3)


def test_levels_are_the_teacher_s_rows_nearest_to_trailing(student: Config) -> None:
    assert student.distillation is not None
    # The default for a run: 16 calls on `trailing`, here 8, which has all of these knots.
    assert student.distillation.levels == (999, 749, 499, 249)
    assert student.distillation.knots(2, 1000) == (999, 749)
    assert student.distillation.knots(1, 1000) == (999,)


def test_labels_have_the_data_s_proportions(student: Config, tmp_path: Path) -> None:
    dataset = load(student)
    assert student.distillation is not None
    all_of_them = replace(
        student, distillation=replace(student.distillation, trajectories=len(dataset))
    )
    paths = Trajectories(all_of_them, dataset, teacher_of(student), tmp_path)
    assert sorted(paths.labels) == sorted(dataset.labels)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*.npy")}


def test_paths_are_the_same_after_a_stop_and_by_two_processes(
    student: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Progress] = []

    def bar(*given: Any) -> Progress:
        bars.append(Progress(*given))
        return bars[-1]

    monkeypatch.setattr(trajectories, "Progress", bar)
    dataset = load(student)
    teacher = teacher_of(student)

    def paths(name: str) -> Trajectories:
        return Trajectories(student, dataset, teacher, tmp_path / name)

    assert paths("whole").make(alone(), lambda: False)
    stops = iter([False, True])
    assert not paths("stopped").make(alone(), lambda: next(stops))
    assert len(files(tmp_path / "stopped")) == 1
    assert paths("stopped").make(alone(), lambda: False)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    # The first one cannot read what the second has not made yet.
    with pytest.raises(TrainingError, match="cannot be read"):
        paths("two").make(OneOfTwo(0, 2, torch.device("cpu")), lambda: False)
    assert sorted(files(tmp_path / "two")) == ["00000.npy", "00002.npy"]
    missing = paths("two")
    assert missing.make(OneOfTwo(0, 2, torch.device("cpu")), lambda: False)
    assert files(tmp_path / "two") == files(tmp_path / "whole")
    written = sorted((tmp_path / "whole").rglob("*.npy"))
    assert [len(np.load(path)) for path in written] == [16, 16, 8]
    # Whole, stopped, resumed, the first of two, and what the second left.
    assert [(b._start, b.done, b.total) for b in bars] == [
        (0, 40, 40),
        (0, 16, 40),
        (16, 40, 40),
        (0, 40, 40),
        (24, 40, 40),
    ]


def test_another_teacher_has_other_paths(student: Config, tmp_path: Path) -> None:
    dataset = load(student)
    one = teacher_of(student)
    two = teacher_of(student)
    two.sha256 = "0" * 64  # as of other weights
    folders = {Trajectories(student, dataset, t, tmp_path).folder for t in (one, two)}
    assert len(folders) == 2


def test_a_damaged_file_of_paths_is_named(student: Config, tmp_path: Path) -> None:
    paths = Trajectories(student, load(student), teacher_of(student), tmp_path)
    assert paths.make(alone(), lambda: False)
    damaged = paths.folder / "00001.npy"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UnnoiseError, match=r"00001\.npy.*Delete it"):
        paths.make(alone(), lambda: False)


# --- What is learned.


def test_distance_is_zero_for_the_image_itself_and_its_slope_is_finite() -> None:
    x = torch.rand(3, 1, 8, 8, requires_grad=True)
    found = distance(x, x.detach())
    found.sum().backward()
    assert found.tolist() == pytest.approx([5e-5] * 3, abs=1e-6)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_distance_prefers_detail_elsewhere_to_a_blur() -> None:
    """Noise of the wanted image's own contrast is nearer than its mean, by contrast alone."""
    generator = torch.Generator().manual_seed(0)
    wanted, other = torch.randn(2, 64, 1, 16, 16, generator=generator).mul(0.5)
    blurred = torch.zeros_like(wanted)

    def in_contrast(found: torch.Tensor) -> float:
        return float((contrast(found) - contrast(wanted)).square().mean())

    assert in_contrast(other) < 0.2 * in_contrast(blurred)


def test_perceptual_distance_is_that_of_the_teacher_s_features_without_noise(
    student: Config,
) -> None:
    teacher = teacher_of(student)
    process = ForwardProcess(student.make_schedule(), student.prediction)
    generator = torch.Generator().manual_seed(6)
    found, wanted = torch.rand(2, 3, 1, 8, 8, generator=generator).mul(2).sub(1)
    label = torch.tensor([1, 2, 3])

    def features(image: torch.Tensor) -> list[torch.Tensor]:
        # At the lowest level an image is its own x_t, but for alpha, which is nearly 1.
        return teacher.module.features(image, torch.zeros(3), label)

    draws = Draws(wanted, label, torch.full((3,), 500), torch.zeros(3, 1, 8, 8))
    distances = perceptual_distance(process, teacher.module.features, found, wanted, draws)
    pairs = list(zip(features(found), features(wanted), strict=True))
    expected = [
        np.mean([float((f[i] - g[i]).norm() / g[i].norm()) for f, g in pairs]) for i in range(3)
    ]
    np.testing.assert_allclose(distances, expected, rtol=2e-2)
    nothing = perceptual_distance(process, teacher.module.features, wanted, wanted, draws)
    assert float(nothing.max()) < 1e-3


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_features_are_what_the_network_computes_on_its_way(student: Config, network: str) -> None:
    """Each is an output of one of its parts, in a shape that has the batch first."""
    config = replace(student, network=network, width=32, depth=4, heads=2)
    module = make_network(config, (1, 8, 8), 10)
    torch.nn.init.normal_(module.last.weight, std=0.1)
    for name, weight in module.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(weight, std=0.1)
    x = torch.rand(2, 1, 8, 8)
    time = torch.tensor([10.0, 20.0])
    label = torch.tensor([1, 2])
    heard: list[torch.Tensor] = []
    for part in module.modules():
        part.register_forward_hook(lambda _m, _i, out: heard.append(out))
    module(x, time, label)
    whole = [*heard]
    found = module.features(x, time, label)
    assert len(found) >= 3
    for feature in found:
        assert len(feature) == 2
        shape = feature.shape[1:]
        near = [out for out in whole if out.numel() == feature.numel()]
        start = module.position if network == "dit" and feature is found[0] else 0
        assert any(torch.equal(out.reshape(2, *shape) + start, feature) for out in near)


def pixels(x: torch.Tensor, _time: torch.Tensor, _label: torch.Tensor) -> list[torch.Tensor]:
    return [x]


def test_endpoint_draws_each_level_by_its_share(student: Config) -> None:
    wide = replace(student, batch=1000)
    objective = Endpoint(wide, wide.make_schedule(), torch.device("cpu"))
    t = objective.draw_times(torch.Generator().manual_seed(1))
    assert {knot: int((t == knot).sum()) for knot in (999, 749, 499, 249)} == {
        999: 400,
        749: 200,
        499: 200,
        249: 200,
    }


def test_endpoint_is_zero_for_a_network_that_knows_the_ends(student: Config) -> None:
    objective = Endpoint(student, student.make_schedule(), torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    x0 = torch.rand(16, 1, 8, 8, generator=generator) * 2 - 1
    eps = torch.randn(16, 1, 8, 8, generator=generator)
    t = objective.draw_times(generator)
    draws = Draws(x0, torch.zeros(16, dtype=torch.int64), t, eps)
    knows = objective.process.target(x0, t, eps)
    assert float(objective.losses(Networks(lambda *_: knows, features=pixels), draws).max()) < 1e-3
    off = objective.losses(Networks(lambda *_: torch.zeros_like(x0), features=pixels), draws)
    assert float(off.min()) > 0.1


def test_consistency_compares_with_one_ddim_step_of_the_guided_teacher(tiny_run: Path) -> None:
    """The target is the average's estimate at the point that our own DDIM row gives."""
    config = student_of(
        str(tiny_run), {"method": "consistency", "guidance": 3.0}, {**SHORT, "name": "c"}
    )
    assert config.ema_half_life == (5000, 900)
    schedule = config.make_schedule()
    objective = Consistency(config, schedule, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    x0 = torch.rand(4, 1, 8, 8, generator=generator) * 2 - 1
    eps = torch.randn(4, 1, 8, 8, generator=generator)
    t, s = 499, 468  # neighbours on the grid of 32 intervals
    assert int(objective.below[t]) == s

    def teacher(x: torch.Tensor, time: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * x) * (1 + label.reshape(-1, 1, 1, 1) / 10)

    asked: list[torch.Tensor] = []

    def average(x: torch.Tensor, time: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        asked.extend([x, time])
        return 0.3 * x

    label = torch.tensor([1, 2, 3, 4])
    draws = Draws(x0, label, torch.full((4,), t), eps)
    guided = teacher_of(config).guided(teacher)
    networks = Networks(lambda *_: torch.zeros_like(x0), {"ema-900": average}, guided, pixels)
    losses = objective.losses(networks, draws)

    grid = make_grid(schedule, [float(schedule.time[t]), float(schedule.time[s])])
    program = make_program(schedule, "v", "ddim", grid=grid, clip=1.0, guidance=3.0)
    first = replace(
        program,
        call=program.call[:1].copy(),
        update=program.update[:1].copy(),
        moments=program.moments[:2].copy(),
        excess=program.excess[:1].copy(),
        bias=program.bias[:1].copy(),
        answer=program.answer[:1].copy(),
    )

    def network(*inputs: np.ndarray) -> np.ndarray:
        return teacher(*map(torch.from_numpy, inputs)).numpy()

    x_t = objective.process.jump(x0, draws.t, eps)
    x_s = run(first, network, x_t.numpy(), label=label.numpy(), null_label=10)
    np.testing.assert_allclose(asked[0], x_s, atol=1e-5)
    assert asked[1].tolist() == [float(schedule.time[s])] * 4
    target = schedule.alpha[s] * x_s - schedule.sigma[s] * 0.3 * x_s
    D = schedule.alpha[t] * x_t
    wanted = torch.from_numpy(target.clip(-1, 1)).float()
    seen = (D.float() - wanted).square().flatten(1).mean(1) / wanted.square().flatten(1).mean(1)
    np.testing.assert_allclose(losses, distance(D.float(), wanted) + seen.sqrt(), rtol=1e-4)


def test_consistency_ends_with_the_teacher_s_own_answer(tiny_run: Path) -> None:
    config = student_of(str(tiny_run), {"method": "consistency", "guidance": 1.0}, SHORT)
    objective = Consistency(config, config.make_schedule(), torch.device("cpu"))
    lowest = torch.full((2,), int(objective.levels[0]))
    x0 = torch.zeros(2, 1, 8, 8)
    eps = torch.ones(2, 1, 8, 8)
    draws = Draws(x0, torch.zeros(2, dtype=torch.int64), lowest, eps)
    same = Networks(
        lambda x, *_: 0.5 * x,
        {"ema-900": lambda x, *_: torch.full_like(x, torch.nan)},
        lambda x, *_: 0.5 * x,
        pixels,
    )
    assert float(objective.losses(same, draws).max()) < 1e-3


@pytest.mark.parametrize("method", ["endpoint", "consistency"])
def test_a_student_comes_nearer_to_the_teacher_s_ends_in_one_call(
    tiny_run: Path, tmp_path: Path, method: str
) -> None:
    config = student_of(
        str(tiny_run),
        {**FEW, "method": method, "guidance": 1.0, "trajectories": 320},
        {**SHORT, **LEARNING, "name": "learns"},
    )
    teacher = teacher_of(config)
    label = np.arange(32) % 10
    seeds = list(range(32))
    # Ends of paths from noise that the student is not trained on.
    ends = Teacher.paths(teacher, seeds, label)[:, 0].astype(np.float32)

    def error(network: torch.nn.Module) -> float:
        x = noises(seeds, Stream.INITIAL, 0, (1, 8, 8))
        program = config.sample_program(steps=1)

        def call(*inputs: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return network(*map(torch.from_numpy, inputs)).numpy()

        return float(np.sqrt(np.mean((run(program, call, x, label=label) - ends) ** 2)))

    before = error(teacher.module)
    assert fit(config, tmp_path)
    after = error(from_run(tmp_path / "learns", 1.0).module)
    assert after < 0.9 * before


# --- A run like any other.


def test_a_stopped_student_ends_with_the_same_weights(
    student: Config, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the teacher is sampled, and again while the student is trained."""
    for stop_at in (1, 5):
        answers = iter([*[False] * stop_at, *[True] * 9])
        with monkeypatch.context() as patched:
            stop = nullcontext(answers.__next__)
            patched.setattr(fitting, "asked_to_stop", lambda found=stop: found)
            assert not fit(student, tmp_path)
    assert fit(student, tmp_path)
    one, two = (checkpoints.newest(p / "checkpoints") for p in (finished, tmp_path / "fast"))
    assert one is not None
    assert two is not None
    assert all(torch.equal(one.ema[name], two.ema[name]) for name in one.ema)
    assert files(finished) == files(tmp_path / "fast")


def test_a_step_s_draws_do_not_depend_on_the_number_of_processes(
    student: Config, tmp_path: Path
) -> None:
    def drawn(index: int, count: int) -> Draws:
        trainer = Trainer(student, load(student), alone(index, count))
        trainer.learn_from(teacher_of(student), tmp_path)
        source = trainer.source
        source.processes = join("cpu")  # type: ignore[attr-defined]  # no group to wait for
        assert source.prepare(lambda: False)
        return trainer.draw(3)

    whole = drawn(0, 1)
    for part, halves in zip(whole, zip(drawn(0, 2), drawn(1, 2), strict=True), strict=True):
        assert torch.equal(part, torch.cat(halves))


def test_a_smaller_student_takes_the_weights_that_fit_and_the_teacher_s_features(
    tiny_run: Path, tmp_path: Path
) -> None:
    options = {**SHORT, "steps": 2, "channels": (8, 8), "name": "smaller"}
    config = student_of(str(tiny_run), {**FEW, "trajectories": 20}, options)
    teacher = teacher_of(config)
    trainer = Trainer(config, load(config), alone())
    start(trainer)
    theirs = dict(teacher.module.named_parameters())
    first = make_network(config, (1, 8, 8), 10).state_dict()
    fits = {
        name for name, weight in trainer.state.weights.items() if weight.shape == theirs[name].shape
    }
    assert 0 < len(fits) < len(theirs)
    for name, weight in trainer.state.weights.items():
        assert torch.equal(weight, theirs[name] if name in fits else first[name])

    assert fit(config, tmp_path)
    assert read_starts(tmp_path / "smaller")[0][SHA256] == teacher.sha256
    last = checkpoints.newest(tmp_path / "smaller" / "checkpoints")
    assert last is not None
    assert {name: w.shape for name, w in last.ema.items()} == {n: w.shape for n, w in first.items()}


def test_a_teacher_that_changed_is_refused(student: Config, finished: Path, tmp_path: Path) -> None:
    starts = finished / "starts.json"
    before = starts.read_text()
    try:
        starts.write_text(before.replace('"start_sha256": "', '"start_sha256": "0'))
        with pytest.raises(CheckpointError, match="not the teacher"):
            fit(student, finished.parent)
        # A damaged file says nothing, and is moved aside.
        starts.write_text(before[:-3])
        assert from_run(finished, 1.0).distilled is not None
        assert fit(student, finished.parent)
        assert starts.with_name("starts.json.damaged").read_text() == before[:-3]
    finally:
        starts.with_name("starts.json.damaged").unlink(missing_ok=True)
        starts.write_text(before)


def test_the_config_goes_to_json_and_back(student: Config) -> None:
    assert Config.from_json(student.to_json()) == student
    assert "distillation" not in Config(data="digits").to_json()


@pytest.mark.parametrize(
    ("distillation", "message"),
    [
        ({"calls": (1, 1)}, "different numbers"),
        ({"calls": ()}, "different numbers"),
        ({"calls": (0,)}, "calls"),
        ({"method": "endpiont"}, "Did you mean 'endpoint'"),
        ({"solver": "tuned"}, "belongs to a bundle"),
        ({"solver": "ddpm"}, "adds noise on the way"),
        ({"solver": "dpmp_2m"}, "Did you mean 'dpmpp_2m'"),
        ({"solver_steps": 3}, "too few to learn 4 levels"),
        ({"trajectories": 0}, "trajectories"),
        ({"method": "data"}, "needs a network with conditions"),
        ({"method": "data", "guidance": 2.0}, "guidance 2 cannot be built in"),
    ],
)
def test_what_cannot_be_distilled_is_refused(
    tiny_run: Path, distillation: dict, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        student_of(str(tiny_run), distillation, SHORT)


def test_consistency_needs_whole_averages(tiny_run: Path) -> None:
    config = student_of(str(tiny_run), {"method": "consistency"}, {**SHORT, "batch": 16})
    assert config.ema_half_life == (5000, 900)
    split = Processes(0, 2, torch.device("cpu"), sharding=object())  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"consistency.*FSDP"):
        require_shares(config, split)


def test_another_solver_has_its_own_number_of_calls(root: Path) -> None:
    place = str(root / "bundles" / "emoji32")
    found = [student_of(place, given, {}) for given in ({}, {"solver": "unipc"})]
    known = [(c.distillation.solver, c.distillation.solver_steps) for c in found if c.distillation]
    assert known == [("tuned", 8), ("unipc", 16)]
    assert found[0].distillation is not None
    assert found[0].distillation.levels == (999, 738, 500, 256)
    assert found[0].distillation.guidance == 2.0


@pytest.mark.parametrize("calls", [(1,), (3,), (2, 5)])
def test_consistency_learns_the_levels_at_which_it_is_called(
    tiny_run: Path, calls: tuple[int, ...]
) -> None:
    config = student_of(str(tiny_run), {"method": "consistency", "calls": calls}, SHORT)
    assert config.distillation is not None
    objective = Consistency(config, config.make_schedule(), torch.device("cpu"))
    learned = set(objective.levels.tolist())
    assert learned >= {knot for n in calls for knot in config.distillation.knots(n, 1000)}
    assert objective.levels.tolist() == sorted(learned)


@pytest.mark.parametrize(
    "given",
    [
        {"levels": (5000, 749, 499, 249)},
        {"levels": ()},
        {"levels": (249, 499, 749, 999)},
        {"method": "consistency"},
        {"calls": (2000,), "levels": (999,)},
    ],
    ids=str,
)
def test_a_distillation_that_does_not_fit_its_config_is_refused(given: dict) -> None:
    fields = {"levels": (999, 749, 499, 249), **given}
    with pytest.raises(RequestError):
        Config(data="digits", distillation=Distillation(**fields))


def test_a_teacher_that_ends_in_pure_noise_has_levels_too(tmp_path: Path) -> None:
    """log-SNR is -inf at the last knot of these schedules."""
    config = Config(data="digits", channels=(8,), attention=(), zero_terminal_snr=True)
    for found in (
        config,
        replace(config, zero_terminal_snr=False, schedule="flow", prediction="flow"),
    ):
        schedule = found.make_schedule()
        program = make_program(schedule, found.prediction, "ddim", 8)
        levels = levels_of(program, found, (1, 2, 4))
        assert levels[0] == 999
        assert len(levels) == 4


def test_a_student_cannot_be_a_teacher(finished: Path) -> None:
    with pytest.raises(RequestError, match="distilled itself"):
        student_of(str(finished), {}, {})


@pytest.mark.parametrize("prediction", ["v", "x0", "flow", "edm"])
def test_every_prediction_but_epsilon_can_be_distilled(prediction: str) -> None:
    schedule = "flow" if prediction == "flow" else "cosine"
    config = Config(
        data="digits",
        prediction=prediction,
        schedule=schedule,
        sample_solver="lcm",
        sample_steps=4,
        distillation=Distillation(levels=(999, 749, 499, 249)),
    )
    assert len(config.sample_program(steps=2)) == 2


def test_epsilon_is_refused_where_its_error_is_multiplied() -> None:
    for schedule in ("cosine", "linear"):
        assert make_schedule(schedule).alpha[-1] < 0.01
        with pytest.raises(RequestError, match="v, x0, flow or edm"):
            Config(data="digits", prediction="epsilon", schedule=schedule,
                   distillation=Distillation(levels=(999, 749, 499, 249)))  # fmt: skip


def test_the_command_says_what_is_wrong(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "nothing"), "--runs", str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err
    assert main([str(tiny_run), "--calls", "1,1", "--runs", str(tmp_path)]) == 2
    assert "different numbers" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_tries_out_and_trains(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tiny_run), "--runs", str(tmp_path), "--trajectories", "40", "--batch", "8"]
    words += ["--steps", "2", "--sample-every", "2", "--calls", "1,2", "--name", "fast"]
    assert main([*words, "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert main(words) == 0
    assert (tmp_path / "fast" / "samples" / "step-00000002.png").is_file()
    assert "next: python -m export.build" in capsys.readouterr().out


# --- The model that is exported.


def test_the_model_knows_its_numbers_of_calls(finished: Path) -> None:
    model = from_run(finished, guidance=2.0)
    assert model.distilled is not None
    assert model.distilled.levels[2] == (999.0, 749.0)
    assert (model.defaults.solver, model.defaults.steps, model.defaults.guidance) == ("lcm", 4, 1.0)
    assert not model.can_guide
    assert model.program().call[:, 0].tolist() == [999.0, 749.0, 499.0, 249.0]
    assert len(model.program(steps=1)) == 1
    assert model.program(solver="ddim", steps=2).call[:, 0].tolist() == [999.0, 749.0]
    # Levels of the caller's own are run as they are.
    assert len(model.program(grid=[999.0, 700.0, 300.0])) == 3
    with pytest.raises(RequestError, match="one of 1, 2, 4, for which"):
        model.program(steps=3)
    with pytest.raises(RequestError, match="levels of its own"):
        model.program(steps=4, grid="trailing")
    assert [g.tolist() for g in (model.grid().time[:-1], model.grid(2).time[:-1])] == [
        [999.0, 749.0, 499.0, 249.0],
        [999.0, 749.0],
    ]
    with pytest.raises(RequestError, match="cannot invert"):
        model.program(solver="ddim", up=True)


@pytest.mark.slow
def test_a_student_is_exported_in_int8_and_sampled_in_any_batch(
    finished: Path, tmp_path: Path
) -> None:
    """It is calibrated and proved on its own levels, with fresh noise, as any other network."""
    model = from_run(finished, guidance=2.0)
    bundle = build(model, tmp_path / "fast", precisions=["int8"], plan=QUICK)
    assert {name.split("/")[0] for name in bundle.files} >= {"fp32", "int8"}
    for precision in ("fp32", "int8"):
        sampler = Sampler.load(tmp_path / "fast", precision=precision)
        for steps in (1, 2, 4):
            together = sampler.sample(3, seed=5, label=[1, 2, 3], steps=steps)
            alone = [sampler.sample(1, seed=5 + i, label=1 + i, steps=steps)[0] for i in range(3)]
            assert together.tobytes() == np.stack(alone).tobytes()
        with pytest.raises(RequestError, match="one of 1, 2, 4"):
            sampler.sample(1, label=1, steps=3)
