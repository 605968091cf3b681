"""Modules with conditions are exported with the same proof, in every precision, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export import Condition, ExportError, build_bundle
from export.build import main
from export.graph.calibrate import Calibration, Trajectories
from export.sources.module import from_module
from export.tune import tune
from runtime import Bundle, RequestError, Sampler
from runtime.bundle.conditions import PREFIX

from ..conditioned import CONDITIONS, NULL, SHAPE, described, net, write_conditioned
from ..traces import traced_step

EXAMPLES = {"low_res": np.random.default_rng(0).uniform(-1, 1, (5, *SHAPE)).astype(np.float32)}
CALIBRATION = Calibration(pictures=2, steps=4, judged=2, ranked=1, ways=(("ddim", 4),))


def modeled(module: nn.Module | None = None, **more: Any) -> Any:
    """The module as a `Model`."""
    given = described(**more)
    for name in ("plan", "winograd"):
        del given[name]
    return from_module(module or net(), **given)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The module without labels, also in int8."""
    out = tmp_path_factory.mktemp("conditioned") / "bundle"
    return write_conditioned(
        out, precisions=["int8"], calibration=CALIBRATION, examples=EXAMPLES, name="conditioned"
    )


def test_the_proof_covers_conditions(exported: Bundle) -> None:
    assert exported.conditions == CONDITIONS
    assert exported.can_guide
    for precision in ("fp32", "int8"):
        assert exported.report[precision]["onnxruntime"]["missed"] == 0
    np.testing.assert_array_equal(exported.null_of(CONDITIONS[1]), NULL)
    card = (exported.path / "README.md").read_text(encoding="utf-8")
    assert "| `text` | 3×4, float32 | any | learned | an embedding |" in card
    assert 'conditions={"low_res": low_res' in card
    graph = onnx.load(exported.path / "fp32" / "sampler_guided.onnx", load_external_data=False)
    names = {port.name for port in graph.graph.input}
    assert names == {"x", "noise", "call", "update", *(f"{PREFIX}{c.name}" for c in CONDITIONS)}


def test_samples_in_int8_have_the_same_bytes_in_any_batch(exported: Bundle) -> None:
    sampler = Sampler(exported, precision="int8")
    given = exported.draw_conditions(5)
    together = sampler.sample(5, conditions=given, steps=3)
    for i in range(5):
        one = {name: values[i] for name, values in given.items()}
        assert sampler.sample(1, i, conditions=one, steps=3).tobytes() == together[i].tobytes()


def test_guidance_contrasts_with_the_null_values(exported: Bundle) -> None:
    """The guided graph against two calls of the module."""
    buffers = Sampler(exported).backend.bind(2)
    given = exported.draw_conditions(2)
    generator = np.random.Generator(np.random.Philox(key=0))
    x = generator.standard_normal((2, *SHAPE)).astype(np.float32)
    buffers.state[:] = 0
    buffers.state[:, 0] = x
    buffers.noise[:] = 0
    buffers.update[:] = 0
    buffers.call[:] = (10, 1, 0, 1, np.inf, 3.0)
    for condition in CONDITIONS:
        buffers.conditions[condition.port][:] = given[condition.name]
    buffers.step(True)

    def F(**changed: Any) -> Any:
        tensors = {name: torch.from_numpy(np.array(v)) for name, v in {**given, **changed}.items()}
        with torch.inference_mode():
            return net()(torch.from_numpy(x), torch.full((2,), 10.0), **tensors).numpy()

    null = F(low_res=np.zeros_like(given["low_res"]), text=np.stack([NULL, NULL]))
    expected = F() + 2 * (F() - null)
    np.testing.assert_allclose(buffers.denoised, expected, atol=1e-5)


def test_calibration_runs_under_the_examples() -> None:
    model = modeled(examples=EXAMPLES)
    way = Trajectories(model, 3, 1_000_000)
    taken = [1_000_000 % 5, 1_000_001 % 5, 1_000_002 % 5]
    # The last one has the null values.
    found = way.conditions["condition_low_res"][:-1]
    np.testing.assert_array_equal(found, EXAMPLES["low_res"][taken[:-1]])
    assert way.conditions["condition_style"].dtype == np.int64


@pytest.mark.parametrize("name", ["low_res", "text"])
def test_a_module_that_uses_the_conditions_of_others_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"depends on the condition {name} of other samples"):
        build_bundle(net(fault=name), tmp_path / "out", **described())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_few_examples_do_not_hide_a_condition_of_others(count: int, tmp_path: Path) -> None:
    examples = {"low_res": EXAMPLES["low_res"][:count]}
    with pytest.raises(ExportError, match="depends on the condition low_res of other samples"):
        build_bundle(net(fault="low_res"), tmp_path / "out", **described(examples=examples))


def test_calibration_sees_the_null_values() -> None:
    """Guidance computes them, and they may be far from real values."""
    way = Trajectories(modeled(), 3, 0)
    np.testing.assert_array_equal(way.conditions["condition_text"][-1], NULL)
    assert not (way.conditions["condition_text"][:-1] == NULL).all(axis=(1, 2)).any()
    assert Trajectories(modeled(), 1, 0).conditions["condition_low_res"].any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"conditions": "low_res"}, "`conditions` must be a list of at most 16 Conditions"),
        ({"conditions": ["low_res"]}, "`conditions` must be a list"),
        ({"conditions": CONDITIONS * 2}, "must have different names"),
        ({"conditions": [Condition("label")]}, "none of them 'label'"),
        ({"nulls": None}, "the null value of 'text' is 'learned', so `nulls` must hold it"),
        ({"nulls": {"text": NULL, "low_res": NULL}}, "unknown condition in nulls 'low_res'"),
        ({"nulls": {"text": NULL[0]}}, r"`nulls\['text'\]` must be finite numbers of shape \[3, 4"),
        ({"nulls": {"text": NULL * np.nan}}, "must be finite numbers"),
        ({"nulls": [NULL]}, "`nulls` must be a dict"),
        ({"examples": {"text": NULL}}, r"finite numbers of shape \[m, 3, 4\]"),
        ({"examples": {"style": np.ones(3)}}, "in int64"),
        ({"examples": {"style": np.array([1, 7])}}, r"`style` must be .* in 0 … 4, got 7"),
    ],
)
def test_what_cannot_be_declared_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        modeled(**changed)


def test_a_module_that_lacks_a_condition_is_named() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return x

    with pytest.raises(ExportError, match=r"low_res \[2, 1, 8, 8\].* fails with TypeError"):
        modeled(Plain().eval())


def test_a_parameter_may_be_the_learned_null_value() -> None:
    parameter = nn.Parameter(torch.from_numpy(NULL.copy()))
    found = modeled(nulls={"text": parameter}).null_conditions()
    np.testing.assert_array_equal(found["text"], NULL)


def test_a_network_without_null_values_has_no_guided_graph() -> None:
    plain = [Condition(c.name, c.shape, c.dtype, c.range) for c in CONDITIONS]
    model = modeled(conditions=plain, nulls=None)
    assert not model.can_guide
    assert model.defaults.guidance == 1.0
    ports = [port.name for port in traced_step(model, guided=False).graph.input]
    assert ports[4:] == ["condition_low_res", "condition_text", "condition_style"]


def test_the_command_declares_conditions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options as far as the call of `build`."""
    null = tmp_path / "null.npy"
    examples = tmp_path / "examples.npy"
    np.save(null, NULL)
    np.save(examples, EXAMPLES["low_res"])
    models: list[Any] = []
    monkeypatch.setattr("export.build.build", lambda model, *_, **__: models.append(model))
    monkeypatch.setattr("export.engines.after_export", lambda *_: None)
    words = ["--module", "tests.conditioned:net", "--sample-shape", "1,8,8", "--prediction", "v"]
    words += ["--schedule", "cosine"]
    for condition in (
        f"low_res:1,8,8:range=-1,1:null=0:meaning=the image, blurred:examples={examples}",
        f"text:3,4:meaning=an embedding:null={null}",
        "style::dtype=int64:range=0,4:meaning=a style's number",
    ):
        words += ["--condition", condition]
    assert main(words) == 0
    (model,) = models
    assert model.conditions == CONDITIONS
    np.testing.assert_array_equal(model.nulls["text"], NULL)
    np.testing.assert_array_equal(model.examples["low_res"], EXAMPLES["low_res"])
    (tmp_path / "empty.npy").touch()
    empty = f"a:1:examples={tmp_path}/empty.npy"
    for bad in (
        empty,
        "x:1",
        "a:1,b",
        "a:1:rang=0,1",
        "a:1:null=none.npy",
        "a:1:null=b",
        "a:1:range=1",
        "a:1:null=0:null=1",
    ):
        with pytest.raises(SystemExit):
            main([*words, "--condition", bad])


def test_no_solver_is_fitted_yet(second_format: Path) -> None:
    with pytest.raises(ExportError, match=r"has conditions \(low_res, text, style\)"):
        tune(Bundle.load(second_format / "bundle"), [4])


class Years(nn.Module):
    """A network conditioned on a year, which is never 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)
        self.table = nn.Embedding(11, 1)

    def forward(self, x: Tensor, time: Tensor, year: Tensor) -> Tensor:
        shift = self.table(year - 2000) + time[:, None] / 1000
        return self.layer(x) + shift[:, :, None, None]


def test_zero_need_not_be_a_condition(tmp_path: Path) -> None:
    year = Condition("year", (), "int64", (2000, 2010))
    given = described(conditions=[year], nulls=None)
    bundle = build_bundle(Years().eval(), tmp_path / "out", **given)
    assert bundle.report["fp32"]["onnxruntime"]["missed"] == 0
