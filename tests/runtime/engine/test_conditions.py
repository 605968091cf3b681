"""Conditions through the whole runtime: what is passed, what is refused, and the same bytes."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from runtime import Engine, Request, RequestError, Sampler, Stream, edit, noise, resolve
from runtime.diffusion.program import run
from runtime.engine.batch import Batch
from runtime.engine.request import Planner
from runtime.sample import main

CAPACITY = 5
SHAPE = (1, 8, 8)
HOW = {"label": 1, "guidance": 2.0, "steps": 4}


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def each(request: pytest.FixtureRequest, second_format: Path) -> Sampler:
    return Sampler.load(second_format / "bundle", backend=request.param, threads=1)


@pytest.fixture(scope="module")
def conditioned(second_format: Path) -> Sampler:
    return Sampler.load(second_format / "bundle", threads=1)


@pytest.fixture
def given(conditioned: Sampler) -> dict[str, Any]:
    """Conditions for two samples."""
    return {**conditioned.bundle.draw_conditions(2), "style": np.array([1, 3])}


def test_samples_are_those_of_the_reference_loop(each: Sampler, given: dict[str, Any]) -> None:
    """The plain graph as a network of `run`, with guidance in numpy."""
    bundle = each.bundle
    buffers = each.backend.bind(2)

    def network(x: Any, time: Any, label: Any, **conditions: Any) -> Any:
        buffers.state[:] = 0
        buffers.state[:, 0] = x
        buffers.noise[:] = 0
        buffers.update[:] = 0
        buffers.call[:] = (0, 1, 0, 1, np.inf, 1)
        buffers.call[:, 0] = time
        buffers.label[:] = label
        for condition in bundle.conditions:
            buffers.conditions[condition.port][:] = conditions[condition.name]
        buffers.step(False)
        return buffers.denoised.copy()

    program = bundle.program("ddim", 4, guidance=2.0)
    x = np.stack([noise(seed, Stream.INITIAL, 0, SHAPE) for seed in range(2)])
    nulls = bundle.null_conditions()
    assert list(nulls) == ["low_res", "text"]
    expected = run(
        program,
        network,
        x,
        label=np.array([1, 1]),
        null_label=3,
        conditions=given,
        null_conditions=nulls,
    )
    samples = each.sample(2, conditions=given, solver="ddim", **HOW)
    np.testing.assert_allclose(samples, expected, atol=1e-5)
    # Each condition matters.
    for name in given:
        other = {**given, name: given[name][::-1]}
        assert np.abs(each.sample(2, conditions=other, solver="ddim", **HOW) - samples).max() > 1e-3


def test_none_is_the_null_value(conditioned: Sampler, given: dict[str, Any]) -> None:
    bundle = conditioned.bundle
    null = bundle.null_of(bundle.conditions[1])
    explicit = conditioned.sample(2, conditions={**given, "text": null}, **HOW)
    assert conditioned.sample(2, conditions={**given, "text": None}, **HOW).tobytes() == (
        explicit.tobytes()
    )
    mixed = conditioned.sample(2, conditions={**given, "text": [None, given["text"][1]]}, **HOW)
    assert mixed[0].tobytes() == explicit[0].tobytes()
    # If all that guidance contrasts with is null, it changes nothing and is not computed.
    nothing = {**given, "low_res": None, "text": None}
    request = conditioned.requests(1, conditions={**nothing, "style": 1}, guidance=2.0)[0]
    assert resolve(bundle, request).options.guidance == 1.0
    one = conditioned.requests(1, label=0, conditions={**nothing, "style": 1}, guidance=2.0)[0]
    assert resolve(bundle, one).options.guidance == 2.0


def test_a_sample_has_the_same_bytes_in_any_batch(each: Sampler) -> None:
    """100 random interleavings, with conditions of their own, null values and merged steps."""
    generator = np.random.Generator(np.random.Philox(key=3))
    planner = Planner(each.bundle)
    drawn = each.bundle.draw_conditions(20)
    jobs = []
    for i in range(20):
        conditions: dict[str, Any] = {name: values[i] for name, values in drawn.items()}
        if i % 4 == 1:
            conditions["text"] = None
        steps = int(generator.integers(1, 6))
        guidance = float(generator.choice([1.0, 2.5]))
        solver = str(generator.choice(["ddim", "ddpm", "dpmpp_2m"]))
        label = None if i % 5 == 2 else i % 3
        request = Request(
            i, label, conditions=conditions, solver=solver, steps=steps, guidance=guidance
        )
        jobs.append(planner.job(request))
    expected = [each._loop.run([job]).samples[0].tobytes() for job in jobs]
    room = 3
    batch = Batch(each.backend.bind(room), SHAPE, CAPACITY, room)
    order = [int(i) for i in generator.integers(len(jobs), size=100)]
    under_way: dict[int, int] = {}
    while order or under_way:
        while order and len(batch) < CAPACITY and generator.random() < 0.7:
            job = order.pop()
            under_way[batch.admit(jobs[job])] = job
        number = min(int(generator.integers(room + 1)), len(under_way))
        slots = [int(slot) for slot in generator.permutation(sorted(under_way))[:number]]
        batch.step(slots)
        for slot, x in batch.finished().items():
            assert x.tobytes() == expected[under_way.pop(slot)]


def test_the_engine_and_a_pickled_sampler_give_the_same_bytes(
    conditioned: Sampler, given: dict[str, Any]
) -> None:
    requests = conditioned.requests(2, conditions=given, **HOW)
    expected = conditioned.sample_requests(requests).tobytes()
    with Engine(conditioned) as engine:
        assert engine.submit(requests).result().tobytes() == expected
    again = pickle.loads(pickle.dumps(conditioned))
    assert again.sample(2, conditions=given, **HOW).tobytes() == expected
    through_json = [Request.from_json(json.loads(json.dumps(r.to_json()))) for r in requests]
    assert conditioned.sample_requests(through_json).tobytes() == expected
    assert resolve(conditioned.bundle, requests[0]).to_json()["conditions"] == {
        "low_res": [1, 8, 8],
        "text": [3, 4],
        "style": [],
    }


def test_edits_take_conditions(conditioned: Sampler, given: dict[str, Any]) -> None:
    image = np.zeros(SHAPE, np.float32)
    found = conditioned.stylize([image, image], 0.5, conditions=given, steps=4)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    one = {name: values[0] for name, values in given.items()}
    inverted = conditioned.invert(image, conditions=one, steps=10)
    way: dict[str, Any] = {"solver": "dpmpp_2m", "grid": "log_snr", "guidance": 1.0, "steps": 10}
    again = conditioned.sample(1, start=inverted.noise, conditions=one, **way)
    np.testing.assert_array_equal(again, inverted.back)
    assert conditioned.interpolate(1, 2, 3, conditions=one, steps=4).shape == (3, *SHAPE)
    assert conditioned.animate(2, conditions=given, steps=3).shape == (4, 2, *SHAPE)


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("stylize", "0.png"),
        ("invert", "0.png"),
        ("translate", "0.png --from 1 --to 2"),
        ("inpaint", "0.png --mask mask.png"),
        ("interpolate", "1 2 --n 2"),
        ("variations", "0.png --n 1"),
        ("animate", "--n 1"),
    ],
)
def test_every_verb_fits_images_of_conditions(
    second_format: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, size in (("0", (8, 8)), ("mask", (8, 8)), ("large", (20, 16))):
        Image.new("L", size, 200).save(f"{name}.png")
    np.save("text.npy", np.ones((3, 4), np.float32))
    bundle = str(second_format / "bundle")
    given = "--condition low_res=large.png --condition text=text.npy --condition style=1"
    asked = [verb, bundle, *words.split(), *given.split(), "--steps", "6", "--out", "out.png"]
    assert edit.main([*asked, "--convert"]) == 0
    assert edit.main(asked) == 2


def test_the_loop_graph_takes_conditions(
    conditioned: Sampler, given: dict[str, Any], second_format: Path
) -> None:
    bundle = conditioned.bundle
    program = bundle.program("ddim", 4, guidance=2.0)
    x = np.stack([noise(seed, Stream.INITIAL, 0, SHAPE) for seed in range(2)])
    path = second_format / "bundle" / "fp32" / "sampler_guided.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {
        "x": x,
        "noise": np.zeros((4, *x.shape), np.float32),
        "call": np.repeat(program.call.astype(np.float32)[:, None], 2, axis=1),
        "update": np.repeat(program.update.astype(np.float32)[:, None], 2, axis=1),
        "label": np.array([1, 1]),
        **{f"condition_{name}": values for name, values in given.items()},
    }
    (looped,) = session.run(["sample"], feeds)
    samples = conditioned.sample(2, conditions=given, solver="ddim", **HOW)
    np.testing.assert_allclose(looped, samples, atol=1e-5)


WANTED = r"It takes low_res: an image of 1×8×8 in -1 … 1 \(the image, blurred\); text: 3×4 floats"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lowres": 0}, r"unknown condition 'lowres' .* Did you mean 'low_res'\? " + WANTED),
        ({5: 0}, "unknown condition 5"),
        ({"style": ...}, "needs the condition 'style'. " + WANTED),
        ({"style": None}, "was trained with the condition 'style' only, got None. " + WANTED),
        ({"style": 5}, r"`style` must be integers of shape \(\) .* in 0 … 4, got 5. " + WANTED),
        ({"style": 1.0}, r"`style` must be integers of shape \(\)"),
        ({"style": [0, 1, 2]}, "`style` must be one value or 2 of them, got 3"),
        ({"text": np.zeros((4, 3))}, r"`text` must be finite numbers of shape \(3, 4\)"),
        ({"text": np.full((3, 4), np.nan)}, "`text` must be finite numbers"),
        ({"text": np.full((3, 4), 1e300)}, "`text` must be finite numbers"),
        ({"text": "a text"}, "`text` must be finite numbers"),
        ({"text": object()}, "`text` must be finite numbers"),
        ({"low_res": np.full(SHAPE, 9.0)}, r"`low_res` must be .* in -1 … 1, got 9.0. " + WANTED),
        ({"low_res": np.zeros((1, 4, 4))}, r"`low_res` must be finite numbers of shape"),
        ({"low_res": Image.new("L", (4, 4))}, "4×4 L, 8×8 L expected"),
        ({"low_res": "missing.png"}, "there is no image missing.png"),
        ({"low_res": []}, "no low_res was given"),
        ({"low_res": [None]}, "`low_res` must be one value or 2 of them, got 1"),
    ],
)
def test_what_cannot_be_used_is_refused_with_what_is_wanted(
    conditioned: Sampler, given: dict[str, Any], changed: dict[Any, Any], message: str
) -> None:
    conditions = {name: v for name, v in {**given, **changed}.items() if v is not ...}
    with pytest.raises(RequestError, match=message):
        conditioned.sample(2, conditions=conditions, steps=2)


def test_a_bundle_without_conditions_takes_none(shipped: Any, first_release: Path) -> None:
    sampler = Sampler.load(first_release / "bundle")
    expected = sampler.sample(1, label=1, steps=2)
    assert sampler.sample(1, label=1, steps=2, conditions={}).tobytes() == expected.tobytes()
    assert sampler.sample(1, label=1, steps=2, conditions=None).tobytes() == expected.tobytes()
    with pytest.raises(RequestError, match=r"'low_res' .* It has no conditions"):
        sampler.sample(1, label=1, conditions={"low_res": 0})
    with pytest.raises(RequestError, match="`conditions` must be a dict by name"):
        sampler.sample(1, label=1, conditions=[1])  # type: ignore[arg-type]


def test_images_are_read_sized_and_checked(
    conditioned: Sampler, given: dict[str, Any], tmp_path: Path
) -> None:
    generator = np.random.Generator(np.random.Philox(key=1))
    pixels = generator.integers(0, 256, (2, 8, 8), np.uint8)
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    floats = pixels[:, None].astype(np.float32) / 255 * 2 - 1
    expected = conditioned.sample(2, conditions={**given, "low_res": floats}, **HOW)
    opened = [Image.open(path) for path in paths]
    for images in (paths, [str(path) for path in paths], opened, list(pixels), list(floats)):
        found = conditioned.sample(2, conditions={**given, "low_res": images}, **HOW)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    both = conditioned.sample(2, conditions={**given, "low_res": paths[0]}, **HOW)
    np.testing.assert_allclose(both[0], expected[0], atol=1e-6)
    large = Image.new("RGB", (20, 10), "red")
    with pytest.raises(RequestError, match="20×10 RGB, 8×8 L expected"):
        conditioned.sample(2, conditions={**given, "low_res": large}, **HOW)
    conditioned.sample(2, conditions={**given, "low_res": large}, convert=True, **HOW)
    image = np.zeros(SHAPE, np.float32)
    how: dict[str, Any] = {"conditions": {**given, "low_res": large}, "steps": 2}
    conditioned.stylize([image, image], convert=True, **how)


def test_the_command_reads_conditions(
    second_format: Path, tmp_path: Path, conditioned: Sampler, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(second_format / "bundle")
    image = tmp_path / "a.png"
    text = tmp_path / "text.npy"
    out = tmp_path / "out.npy"
    Image.new("L", (8, 8), 255).save(image)
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 24
    np.save(text, values)
    words = [bundle, "--n", "2", "--steps", "3", "--out", str(out)]
    conditions = [f"low_res={image}", f"text={text}", "style=1", "style=2"]
    assert main([*words, *(word for c in conditions for word in ("--condition", c))]) == 0
    given = {"low_res": np.ones(SHAPE, np.float32), "text": values, "style": [1, 2]}
    expected = conditioned.sample(2, steps=3, conditions=given)
    np.testing.assert_allclose(np.load(out), expected, atol=1e-6)
    assert main([*words, "--condition", "low_res=null", "--condition", "style=9"]) == 2
    assert "needs the condition 'text'" in capsys.readouterr().err
    for bad in ("low_res", "low_res=", f"text={tmp_path / 'none.npy'}", "=1"):
        with pytest.raises(SystemExit):
            main([*words, "--condition", bad])
