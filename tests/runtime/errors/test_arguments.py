"""Arguments: scalars of every kind are accepted; anything else raises a typed error with a short
value.

UNNOISE_FUZZ_CASES=20000 tries more cases of arbitrary values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import runtime.images as pictures
import runtime.sampler.sampler
from runtime import (
    Batch,
    Bundle,
    Cancelled,
    Request,
    RequestError,
    Sampler,
    SamplingOptions,
    Schedule,
    Stream,
    UnnoiseError,
    make_program,
    make_schedule,
    noise,
    run,
)
from runtime.backends.registry import open_backend
from runtime.bundle.sampling import SolverOptions
from runtime.diffusion.grid import make_grid
from runtime.diffusion.schedule import SCHEDULES
from runtime.diffusion.slerp import slerp
from runtime.diffusion.solvers import SOLVERS, options_of
from runtime.engine.expand import MAX_SAMPLES
from runtime.errors.messages import shown

from ...arbitrary import Case, bounded_memory, cases, fuzz, hostile, one_of
from ...small_bundle import SmallBackend, write_small_bundle

SHAPE = (1, 4, 4)
IMAGE = np.zeros(SHAPE, np.float32)
IMAGES = np.zeros((2, *SHAPE), np.float32)
GREY = np.zeros((2, 4, 4, 1), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "bundle"
    write_small_bundle(path)
    return path


@pytest.fixture(scope="module")
def small(folder: Path) -> Sampler:
    bundle = Bundle.load(folder)
    return Sampler(bundle, SmallBackend(bundle), max_batch=4)


@pytest.mark.parametrize(
    ("arguments", "plain"),
    [
        ({"seed": np.array(3)}, {"seed": 3}),
        ({"seed": np.uint64(3)}, {"seed": 3}),
        ({"n": np.array(2)}, {"n": 2}),
        ({"steps": np.array(2)}, {"steps": 2}),
        ({"label": np.array(1)}, {"label": 1}),
        ({"label": np.array("one")}, {"label": "one"}),
        ({"label": np.str_("one")}, {"label": "one"}),
        ({"n": 2, "label": np.array(["one", "two"])}, {"n": 2, "label": ["one", "two"]}),
        ({"n": 2, "label": np.array([1, 2])}, {"n": 2, "label": [1, 2]}),
        ({"label": 1, "guidance": np.array(3.0)}, {"label": 1, "guidance": 3.0}),
        ({"label": 1, "guidance": np.float32(3)}, {"label": 1, "guidance": 3.0}),
        ({"solver": "ddim", "eta": np.array(0.5)}, {"solver": "ddim", "eta": 0.5}),
        ({"grid": np.array([7.0, 3.0])}, {"grid": [7.0, 3.0]}),
        (
            {"label": 1, "guidance_interval": np.array([0.0, 2.0])},
            {"label": 1, "guidance_interval": (0.0, 2.0)},
        ),
    ],
)
def test_a_scalar_of_numpy_is_a_scalar(small: Sampler, arguments: dict, plain: dict) -> None:
    assert small.sample(**arguments).tobytes() == small.sample(**plain).tobytes()


def test_a_tensor_without_dimensions_is_a_scalar(small: Sampler) -> None:
    torch = pytest.importorskip("torch")
    found = small.sample(
        seed=torch.tensor(3),
        label=torch.tensor(1),
        guidance=torch.tensor(3.0),
        steps=torch.tensor(2),
    )
    assert found.tobytes() == small.sample(seed=3, label=1, guidance=3.0, steps=2).tobytes()
    for name in ("seed", "guidance", "steps"):
        with pytest.raises(RequestError, match=f"`{name}` must be .* array of torch"):
            small.sample(1, label=1, **{name: torch.tensor([[1]])})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.sample(steps=0), "`steps` must be 1 to 8, got 0. Pass a larger one."),
        (
            lambda s: s.sample(2, label=np.array([[0, 1], [1, 2]])),
            "`label` must be a name or a number from 0 to 2, got an array",
        ),
        (
            lambda s: s.sample(label=b"x"),
            "`label` must be a name or a number from 0 to 2, got b'x' (bytes).",
        ),
        (lambda s: s.sample(label={"one"}), "`label` must be a name"),
        (lambda s: s.sample(label=10**400), "label an integer of 1329 bits is out of range"),
        (lambda s: s.sample(label="--1"), "unknown label '--1'"),
        (
            lambda s: s.sample(grid=5.0),
            "`grid` must be a name (leading, trailing, linspace, log_snr, karras) or a list",
        ),
        (lambda s: s.sample(grid=["7", "3"]), "`grid` must be"),
        (lambda s: s.sample(grid=[True, False]), "`grid` must be"),
        (lambda s: s.sample(grid=range(10**9)), "`grid` must be"),
        (lambda s: s.sample(solver=["ddim"]), "`solver` must be a name, got ['ddim'] (list)."),
        (lambda s: s.sample(solver=b"ddim"), "`solver` must be a name, got b'ddim' (bytes)."),
        (lambda s: s.sample(seed=True), "`seed` must be an integer"),
        (lambda s: s.sample(seed=np.bool_(True)), "`seed` must be an integer"),
        (lambda s: s.sample(seed=b"ab"), "`seed` must be an integer"),
        (
            lambda s: s.sample(seed=10**400),
            "`seed` must be 0 to 18446744073709551615, got an integer of 1329 bits",
        ),
        (lambda s: s.sample(label=1, guidance=10**400), "`guidance` must be a number"),
        (lambda s: s.sample(label=1, guidance=1j), "`guidance` must be a number"),
        (lambda s: s.sample(label=1, guidance=np.array(True)), "`guidance` must be a number"),
        (
            lambda s: s.sample(label=1, guidance=np.inf),
            "`guidance` must be a number from -1000 to 1000, got inf.",
        ),
        (lambda s: s.sample(label=1, guidance=b"2"), "`guidance` must be a number"),
        (
            lambda s: s.sample(label=1, guidance_interval="01"),
            "`guidance_interval` must be two noise levels",
        ),
        (
            lambda s: s.sample(label=1, guidance_interval=1.0),
            "`guidance_interval` must be two noise levels",
        ),
        (lambda s: s.sample(strength="1"), "`strength` must be a number from 0 to 1"),
        (lambda s: s.sample(on_step=5), "`on_step` must be a function, got 5."),
        (lambda s: s.animate(on_step=5), "`on_step` must be a function, got 5."),
        (
            lambda s: s.sample(10**9),
            "`n` must be 1 to 1000000, got 1000000000. Pass a smaller one.",
        ),
        (lambda s: s.sample(setps=5), "Did you mean 'steps'?"),
        (lambda s: s.sample(gudance=2), "Did you mean 'guidance'?"),
        (lambda s: s.sample(labl="one"), "Did you mean 'label'?"),
        (lambda s: s.sample(solver="ddim", ete=1), "Did you mean 'eta'?"),
        (lambda s: s.sample(solver="euler", setps=5), "Did you mean 'steps'?"),
        (lambda s: s.stylize(IMAGE, strenght=0.5), "Did you mean 'strength'?"),
        (lambda s: s.animate(pictures=IMAGE, setps=3), "Did you mean 'steps'?"),
        (lambda s: s.sample(schedule=3), "unknown option of solver 'ddim': 'schedule'"),
        (lambda s: s.sample(what=3, function=4), "unknown option of solver 'ddim': 'what'"),
        (lambda s: s.stylize(IMAGE, n=3), "`n` is set by this method. Leave it out."),
        (lambda s: s.invert(IMAGE, n=3), "`n` is set by this method. Leave it out."),
        (
            lambda s: s.stylize(IMAGE, convert="yes"),
            "`convert` must be True or False, got 'yes' (str).",
        ),
        (lambda s: s.stylize(None), "must be a path, a Pillow image or an array, got None"),
        (lambda s: s.stylize("\0"), "cannot be read as an image"),
        (lambda s: s.stylize("x" * 5000), "cannot be read as an image"),
        (lambda s: s.inpaint(IMAGE, np.full((4, 4), 1e300)), "`mask` must lie in 0 … 1"),
        (
            lambda s: s.inpaint(IMAGE, np.zeros((4, 4), complex)),
            "`mask` must be an array of bool or numbers",
        ),
        (lambda s: s.sample(start=np.full(SHAPE, 1e300)[None]), "`start` must be finite floats"),
        (
            lambda s: s.sample_requests(Request(0)),
            "`requests` must be a list of Requests, got Request(seed=0",
        ),
        (lambda s: s.sample_requests(None), "`requests` must be a list of Requests, got None."),
        (
            lambda s: s.sample_requests({"seed": 0}),
            "`requests` must be a list of Requests, got {'seed': 0}",
        ),
        (
            lambda s: s.sample_requests([{"seed": 0}]),
            "`request` must be a Request, got {'seed': 0} (dict).",
        ),
        (lambda s: s.sample_requests(5), "`requests` must be a list of Requests, got 5."),
        (
            lambda s: s.sample_requests([Request(0, options=None)]),
            "`options` must be a dict of the solver's options, got None.",
        ),
        (lambda s: s.sample_requests([Request(0, options=[1])]), "`options` must be a dict"),
        (
            lambda s: s.sample_requests([Request(0, options={1: 2})]),
            "unknown option of solver 'ddim': '1'",
        ),
        (
            lambda s: s.sample_requests([Request(0, options={"steps": 2})]),
            "unknown option of solver 'ddim': 'steps'",
        ),
        (lambda s: s.sample_requests([Request(0, up=1)]), "`up` must be True or False, got 1."),
        (lambda s: s.to_uint8([1]), "`samples` must be an array"),
        (
            lambda s: Sampler(None),
            "`bundle` must be a Bundle, got None. Sampler.load opens a folder.",
        ),
        (
            lambda s: Sampler(s.bundle, ["auto"]),
            "`backend` must be a name or a Backend, got ['auto'] (list).",
        ),
        (lambda s: Sampler(s.bundle, "auto", None), "`precision` must be a str, got None."),
        (
            lambda s: Sampler(s.bundle, "auto", "x" * 10**6),
            "`precision` must be the name of a precision",
        ),
        (lambda s: Sampler(s.bundle, threads=0), "`threads` must be 1 to 1024, got 0"),
        (lambda s: Sampler(s.bundle, max_batch=True), "`max_batch` must be an integer"),
        (
            lambda s: Sampler.load(None),
            "`path` must be a path, got None. Pass a str or a pathlib.Path.",
        ),
        (lambda s: Sampler.load(b"x"), "`path` must be a path, got b'x' (bytes)."),
        (
            lambda s: Sampler.load("x", bakend="auto"),
            "unknown option of Sampler.load: 'bakend'. Did you mean 'backend'? Known: path, ",
        ),
        (lambda s: Sampler(s.bundle, thread=2), "of Sampler: 'thread'. Did you mean 'threads'?"),
        (lambda s: Bundle.load(pth="x"), "of Bundle.load: 'pth'. Did you mean 'path'?"),
        (lambda s: Batch(None, SHAPE, capasity=2), "of Batch: 'capasity'. Did you mean 'capacity'"),
        (lambda s: SamplingOptions(setps=3), "of SamplingOptions: 'setps'. Did you mean 'steps'?"),
        (lambda s: Request(0, setps=3), "of Request: 'setps'. Did you mean 'steps'?"),
        (lambda s: s.bundle.program(up="x"), "`up` must be True or False"),
        (lambda s: s.bundle.program(setps=3), "Did you mean 'steps'?"),
        (
            lambda s: make_program(None, "v"),
            "`schedule` must be a Schedule, got None. Make one with make_schedule.",
        ),
        (
            lambda s: make_program(s.bundle.schedule, ["v"], steps=2),
            "`prediction` must be a name, got ['v'] (list).",
        ),
        (
            lambda s: make_program(s.bundle.schedule, "v", steps=2, clip="1"),
            "`clip` must be a number",
        ),
        (lambda s: make_program(s.bundle.schedule, "v", stesp=2), "Did you mean 'steps'?"),
        (
            lambda s: make_grid("cosine", "trailing", 2),
            "`schedule` must be a Schedule, got 'cosine' (str).",
        ),
        (lambda s: make_schedule(["cosine"]), "`name` must be a name, got ['cosine'] (list)."),
        (
            lambda s: make_schedule("cosine", T=4.0),
            "`T` must be an integer, 1 to 1000000, got 4.0.",
        ),
        (lambda s: make_schedule("edm", rho=b"7"), "`rho` must be a number"),
        (lambda s: SCHEDULES["edm"](rho=0), "cannot use"),
        (lambda s: SCHEDULES["linear"](beta_start=-(2**64), beta_end=0.3), "every beta must lie"),
        (lambda s: SCHEDULES["from_betas"](0.5), "`betas`"),
        (lambda s: Schedule("x", [1, None], [1, 2], [0, 1]), "alpha must be finite real numbers"),
        (lambda s: Schedule.from_json(None), "a schedule must be an object with name"),
        (lambda s: noise(0, "x", 0, (2,)), "`stream` must be an integer"),
        (lambda s: noise(0, Stream.STEP, 0, 5), "`shape` must be a tuple of sizes, got 5."),
        (lambda s: noise(0, Stream.STEP, 0, (-1,)), "`shape` must be 0 to"),
        (lambda s: noise(0, Stream.STEP, 0, (10**5, 10**5)), "`shape` must be of at most"),
        (lambda s: slerp(IMAGE, IMAGE[0], 0.5), "`a` and `b` must have one shape"),
        (lambda s: s.bundle.schedule.level(range(10**10)), "`time` must be a number or an array"),
        (lambda s: s.bundle.schedule.time_at([range(10**10)]), "`log_snr` must be a number or an"),
        (lambda s: s.sample_requests([Request(0, start=range(10**10))]), "`start` must be finite"),
        (lambda s: pictures.to_uint8([[range(10**10)]]), "`samples` must be an array of numbers"),
        (lambda s: slerp(None, IMAGE, 0.5), "`a` must be a float array"),
        (lambda s: pictures.tile(None), "`pictures` must be a uint8 array [n, H, W, C], got None."),
        (lambda s: pictures.tile(GREY, columns=10**7), "is too large"),
        (lambda s: pictures.save("a.png", GREY[0], least=10**7), "is too large"),
        (lambda s: pictures.save_animation("a.gif", GREY[:0]), "at least 1 frame"),
        (lambda s: pictures.to_uint8(None), "`samples` must be an array of numbers"),
        (lambda s: pictures.to_uint8(IMAGES, 1.0, 1.0), "`low` must be below `high`, got 1 and 1."),
    ],
)
def test_a_wrong_argument_is_named_with_its_rule_and_value(
    small: Sampler, call: Callable[[Sampler], Any], message: str
) -> None:
    with pytest.raises(RequestError) as refused:
        call(small)
    assert message in str(refused.value)
    assert len(str(refused.value)) < 600


def test_the_keywords_for_type_checkers_are_the_solvers_options() -> None:
    options = {option for solver in SOLVERS for option in options_of(solver)}
    assert SolverOptions.__optional_keys__ == options


def _raising() -> Iterator[Request]:
    yield Request(0)
    raise OSError("the disk is gone")


def test_an_error_of_the_callers_generator_is_the_cause(small: Sampler) -> None:
    with pytest.raises(RequestError, match="`requests` raised OSError: the disk") as refused:
        small.sample_requests(_raising())
    assert isinstance(refused.value.__cause__, OSError)
    assert small.sample_requests(iter([Request(0)])).shape == (1, *SHAPE)


def test_a_numpy_false_cancels_too(small: Sampler) -> None:
    with pytest.raises(Cancelled, match="after step 2 of 3"):
        small.sample(on_step=lambda preview: np.int64(preview.step) < 2)
    with pytest.raises(Cancelled, match="after step 2 of 3"):
        small.animate(on_step=lambda preview: np.array(preview.step < 2))


def test_an_error_of_the_callback_is_the_callers_own(small: Sampler) -> None:
    def stop(preview: Any) -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        small.sample(on_step=stop)


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(10_000_000, np.uint8),
        bytes(10_000_000),
        "x" * 10_000_000,
        [0.0] * 1_000_000,
        dict.fromkeys(range(1000), "x" * 1000),
        10**100_000,
        hostile("__repr__"),
        hostile("__repr__", "__str__", "__getattr__"),
        [hostile("__repr__")],
        {"a": {"b": hostile("__repr__", "__len__")}},
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_in_a_message_is_short_and_always_shown(small: Sampler, value: Any) -> None:
    assert len(shown(value)) <= 300
    for name in ("label", "solver", "steps", "grid", "guidance", "on_step", "start", "seed", "eta"):
        with pytest.raises(RequestError) as refused:
            small.sample(**{"label": 1, "solver": "ddim", name: value})
        assert len(str(refused.value)) < 600


def test_a_result_that_does_not_fit_in_memory_is_refused(
    small: Sampler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(small._loop, "run", full)
    with pytest.raises(RequestError, match="a batch of 2 samples does not fit in this"):
        small.sample(2)
    assert MAX_SAMPLES == 1_000_000


# The tests below try arbitrary values.

GOOD: dict[str, list[Any]] = {
    "n": [1, 2],
    "seed": [0, 7, [1, 2]],
    "label": [None, 1, "two", ["one", 2]],
    "guidance": [None, 1.0, 3, [2.0, None]],
    "guidance_interval": [None, (0.0, 2.0)],
    "solver": [None, *SOLVERS],
    "steps": [None, 1, 3, 8],
    "grid": [None, "trailing", "karras(5)", [7, 3.5, 1]],
    "start": [None, IMAGE, IMAGES],
    "strength": [1.0, 0.5],
    "on_step": [None, lambda preview: None],
    "options": [{}, {"eta": 0.5}],
    "up": [False, True],
    "picture": [None, IMAGE],
    "known": [None, IMAGE],
    "mask": [None, IMAGE],
    "pictures": [IMAGE, IMAGES, GREY, list(GREY)],
    "convert": [False, True],
    "eta": [0.5],
    "order": [2],
    "variant": ["bh1"],
    "corrector": [True],
    "variance": ["fixed_large"],
    "churn": [1.0],
    "s_min": [0.0],
    "s_max": [10.0],
    "s_noise": [1.0],
    "r": [0.5],
    "jump": [2],
    "resample": [2],
    "timestep_scaling": [10.0],
    "sigma_data": [0.5],
}
OPTIONS = "eta order variant corrector variance churn s_min s_max s_noise r jump resample"
OPTIONS += " timestep_scaling sigma_data"
HOW = f"label guidance guidance_interval solver steps grid on_step {OPTIONS}"
T = {
    "T": [1, 8],
    "beta_start": [1e-4, 1e-3],
    "beta_end": [0.02, 0.3],
    "s": [0.008],
    "max_beta": [0.999],
}
T |= {
    "start": [-3.0],
    "end": [3.0],
    "tau": [1.0],
    "clip_min": [1e-9],
    "time_scale": [1000.0],
    "rho": [7, 3.0],
}
T |= {
    "sigma_min": [0.002],
    "sigma_max": [80.0],
    "sigma_data": [0.5],
    "betas": [[0.1, 0.2], (0.5, 1.0)],
}


def _good(names: str, **more: list[Any]) -> dict[str, list[Any]]:
    return {name: GOOD[name] for name in names.split()} | more


def _of_request(small: Sampler) -> Callable[..., Any]:
    return lambda **fields: small.sample_requests([Request(**fields)])


def _targets(small: Sampler, folder: Path, out: Path) -> list[st.SearchStrategy[Case]]:
    s = small
    bundle = small.bundle
    schedule = bundle.schedule
    program = bundle.program(steps=2)
    fields = "seed label guidance solver steps grid options guidance_interval start picture"
    fields += " strength up known mask"
    requests = [[], [Request(0)], [Request(0, 1), Request(1, "two", steps=2)]]
    path = {"path": [folder, str(folder), "nowhere"]}
    opening = {"backend": ["auto", "onnxruntime"], "precision": ["auto", "fp32", "int8"]}
    opening |= {"threads": [None, 1], "max_batch": [1, 16]}
    making = _good("solver steps grid guidance guidance_interval " + OPTIONS)
    where = {"path": [out / "a.png", str(out / "b.gif"), out / "c.jpg", out / "d.xyz"]}
    found = [
        cases("sample", s.sample, _good(f"n seed start strength {HOW}"), more=True),
        cases("sample", s.sample, _good(f"n seed start strength {HOW}"), more=True),
        cases("pictures", s.pictures, _good(f"n seed {HOW}"), more=True),
        cases("Request", _of_request(s), _good(fields), ("seed",)),
        cases("Request", _of_request(s), _good(fields), ("seed",)),
        cases("requests", s.sample_requests, _good("on_step", requests=requests), ("requests",)),
        cases("to_uint8", s.to_uint8, {"samples": [IMAGES, IMAGE]}),
        cases(
            "stylize",
            s.stylize,
            _good(f"pictures seed strength convert {HOW}"),
            ("pictures",),
            True,
        ),
        cases("invert", s.invert, _good(f"pictures strength convert {HOW}"), ("pictures",), True),
        cases(
            "translate",
            s.translate,
            _good(f"pictures strength convert {HOW}", source=[0], target=[1]),
            ("pictures", "source", "target"),
            True,
        ),
        cases(
            "inpaint",
            s.inpaint,
            _good(
                f"pictures seed convert {HOW}",
                mask=[np.ones((4, 4)), IMAGES > 0, Image.new("L", (4, 4))],
            ),
            ("pictures", "mask"),
            True,
        ),
        cases(
            "interpolate",
            s.interpolate,
            _good(f"n convert {HOW}", first=[0, IMAGE], second=[1, IMAGE]),
            ("first", "second"),
            True,
        ),
        cases(
            "variations",
            s.variations,
            _good(f"n seed convert {HOW}", picture=[IMAGE], amount=[0.0, 0.5, 1]),
            ("picture",),
            True,
        ),
        cases("animate", s.animate, _good(f"n seed pictures convert {HOW}"), (), True),
        cases("animate", s.animate, _good("n seed steps grid on_step", pictures=[None])),
        cases("Sampler", Sampler, {"bundle": [bundle], **opening}, ("bundle",)),
        cases("Sampler.load", Sampler.load, {**path, **opening}, ("path",)),
        cases("Bundle.load", Bundle.load, path),
        cases("Bundle.program", bundle.program, making | _good("strength up"), (), True),
        cases("Bundle.grid", bundle.grid, _good("steps grid")),
        cases("Bundle.label_number", bundle.label_number, {"label": [0]}),
        cases("Bundle.read", bundle.read, {"name": ["x"]}),
        cases(
            "make_program",
            make_program,
            {"schedule": [schedule], "prediction": ["v", "epsilon"], "clip": [None, 1], **making},
            ("schedule", "prediction"),
            True,
        ),
        cases(
            "make_grid",
            make_grid,
            {"schedule": [schedule], "spacing": ["leading", [3, 1]], "steps": [2]},
            ("schedule", "spacing"),
        ),
        cases("make_schedule", make_schedule, {"name": list(SCHEDULES), **T}, ("name",)),
        cases(
            "Schedule",
            Schedule,
            {
                "name": ["x"],
                "alpha": [[0.9, 0.5]],
                "sigma": [[0.1, 0.9]],
                "time": [[0, 1]],
                "parameters": [{}],
            },
            ("name", "alpha", "sigma", "time"),
        ),
        cases("Schedule.from_json", Schedule.from_json, {"value": [schedule.to_json()]}),
        cases("Schedule.level", schedule.level, {"time": [1.0]}),
        cases("Schedule.time_at", schedule.time_at, {"log_snr": [0.0]}),
        cases(
            "noise",
            noise,
            {"seed": [0], "stream": [Stream.STEP], "step": [0, 3], "shape": [(2, 3), (0,)]},
            ("seed", "stream", "step", "shape"),
        ),
        cases(
            "run",
            run,
            {"program": [program], "network": [lambda x, t: 0 * x], "x": [IMAGES]},
            ("program", "network", "x"),
        ),
        cases("slerp", slerp, {"a": [IMAGE], "b": [IMAGE + 1], "t": [0.5]}, ("a", "b", "t")),
        cases(
            "read",
            pictures.read,
            _good("pictures convert", shape=[SHAPE], low=[-1.0], high=[1.0]),
            ("pictures", "shape"),
        ),
        cases(
            "tile",
            pictures.tile,
            {"pictures": [GREY], "columns": [None, 2], "gap": [0, 2]},
            ("pictures",),
        ),
        cases(
            "save",
            pictures.save,
            {**where, "picture": [GREY[0]], "least": [0, 9]},
            ("path", "picture"),
        ),
        cases(
            "save_animation",
            pictures.save_animation,
            {**where, "frames": [GREY], "least": [9], "frame_ms": [60], "last_ms": [100]},
            ("path", "frames"),
        ),
        cases(
            "runtime.to_uint8",
            pictures.to_uint8,
            {"samples": [IMAGES], "low": [-1.0], "high": [1.0]},
            ("samples",),
        ),
        cases(
            "from_uint8",
            pictures.from_uint8,
            {"pictures": [GREY], "low": [-1.0], "high": [1.0]},
            ("pictures",),
        ),
        cases("picture_format", pictures.picture_format, where),
        cases("animation_format", pictures.animation_format, where),
    ]
    for name, make in SCHEDULES.items():
        found.append(cases(name, make, {key: T[key] for key in _parameters(make)}))
    return found


def _parameters(function: Callable[..., Any]) -> list[str]:
    import inspect

    return list(inspect.signature(function).parameters)


@pytest.fixture(scope="module")
def quick_backend() -> Iterator[None]:
    """Sampler(…) checks its arguments as usual, and then opens a tiny backend."""

    def opened(bundle: Bundle, backend: str, precision: str, *cut: int | None) -> Any:
        usual = backend in ("auto", "onnxruntime") and precision in ("auto", "fp32")
        return SmallBackend(bundle) if usual else open_backend(bundle, backend, precision, *cut)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime.sampler.sampler, "open_backend", opened)
        yield


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to work in: a path of arbitrary text is relative to it."""
    folder = tmp_path_factory.mktemp("there")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.mark.usefixtures("quick_backend")
def test_any_value_of_any_argument_is_used_or_refused(
    small: Sampler,
    folder: Path,
    there: Path,
) -> None:
    @fuzz(400)
    @given(one_of(_targets(small, folder, there)))
    def attempt(case: Case) -> None:
        try:
            case.run()
        except UnnoiseError as error:
            message = str(error)
        else:
            return
        assert len(message) < 2000, message

    with bounded_memory():
        attempt()
