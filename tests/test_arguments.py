"""Arbitrary values as arguments of `build_bundle` and of the exporter's and trainer's commands.

They raise a typed error, or reach the actual work, which is replaced here. UNNOISE_FUZZ_CASES=20000
tries more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from runtime import RequestError, UnnoiseError, make_schedule

from .arbitrary import Case, bounded_memory, cases, fuzz, one_of
from .commands import Command, commands
from .small_bundle import write_small_bundle


def left_out(*_: Any, **__: Any) -> Any:
    """Raised in place of the work that follows if the arguments are valid."""
    raise RequestError("the work is left out here")


def _net() -> Any:
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x: Any, time: Any) -> Any:
            return self.layer(x) + 0 * time[:, None, None, None]

    return Net().eval()


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a bundle and an image. Nothing is exported, fitted or trained."""
    from export import build, engines, tune
    from trainer import average, evaluate, fit

    write_small_bundle(tmp_path / "bundle")
    (tmp_path / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    monkeypatch.setattr(build, "build", left_out)
    monkeypatch.setattr(tune, "tune", left_out)
    monkeypatch.setattr(engines, "build_all", left_out)
    for name in ("fit", "dry_run"):
        monkeypatch.setattr(fit, name, left_out)
    monkeypatch.setattr(evaluate, "of_bundle", left_out)
    monkeypatch.setattr(average, "write", left_out, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("there")
def test_any_argument_of_build_bundle_is_used_or_refused() -> None:
    from export import build_bundle

    valid: dict[str, list[Any]] = {
        "module": [_net()],
        "out": [None, "out"],
        "sample_shape": [(1, 8, 8)],
        "prediction": ["v", "x0"],
        "schedule": ["cosine", make_schedule("cosine", T=8)],
        "name": [None, "net"],
        "num_classes": [0],
        "null_label": [None],
        "label_names": [None],
        "clip": [None, 1.0],
        "sample_range": [(-1.0, 1.0)],
        "solver": ["ddim"],
        "steps": [None, 2],
        "grid": ["trailing"],
        "options": [None, {"eta": 0.5}],
        "guidance": [1.0],
        "provenance": [None, {"a": 1}],
        "bounds": [None],
        "plan": [None],
        "precisions": [(), ["fp16"]],
        "calibration": [None],
        "winograd": [True],
        "same_bytes": [True],
    }
    required = ("module", "sample_shape", "prediction", "schedule")

    @fuzz(60)
    @given(one_of([cases("build_bundle", build_bundle, valid, required)]))
    def attempt(case: Case) -> None:
        with pytest.raises(UnnoiseError):
            case.run()

    with bounded_memory():
        attempt()


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"out": ()}, r"`out` must be a path, got \(\) \(tuple\)"),
        ({"precisions": "fp16"}, "`precisions` must be a list of names, got 'fp16'"),
        ({"precisions": ["fp61"]}, "unknown precision 'fp61'. Did you mean 'fp16'"),
        ({"plan": "quick"}, "`plan` must be a Plan, got 'quick'"),
        ({"winograd": 1}, "`winograd` must be True or False, got 1"),
        ({"label_name": ["a"]}, "Did you mean 'label_names'"),
        ({"plna": None}, "Did you mean 'plan'"),
    ],
)
def test_a_wrong_argument_of_build_bundle_is_named(argument: dict, message: str) -> None:
    from export import build_bundle

    given = {"sample_shape": (1, 8, 8), "prediction": "v", "schedule": "cosine", **argument}
    with pytest.raises(RequestError, match=message):
        build_bundle(_net(), **given)


def every_command() -> list[Any]:
    from export import build, engines, tune
    from trainer import average, distill, evaluate, fit, report

    bundle = ["bundle", "0.png", "nowhere"]
    modules = {
        "--module": ["x:y", "json:dumps", "a.b"],
        "--sample-shape": ["1,8,8", "8"],
        "--sample-range": ["-1,1", "0"],
        "--clip": ["1"],
        "--num-classes": ["2"],
        "--option": ["eta=0.5", "x"],
        "--prediction": ["v"],
        "--schedule": ["cosine"],
        "--schedule-option": ["T=8", "name=3", "T=[["],
        "--variant": ["fp16"],
        "--null-label": ["0"],
        "--label-names": ["a,b"],
        "--name": ["x"],
        "--guidance": ["2"],
        "--solver": ["ddim"],
        "--steps": ["2"],
        "--grid": ["trailing"],
        "--runs": ["runs"],
        "--checkpoint": ["1"],
    }
    for_gpus = {
        "--engine": ["tensorrt", "x"],
        "--compute-capability": ["8.9"],
        "--batch-buckets": ["1,2"],
        "--timing-cache": ["f"],
    }
    training = {f"--{name}": ["1", "0.5", "digits", "auto"] for name in _trainer_options()}
    evaluating = ("--n", "--solver", "--steps", "--guidance", "--features", "--device")
    return [
        commands(
            "export.build",
            build.main,
            [bundle],
            {**modules, **for_gpus, "--out": ["out"]},
            ("--quick", "--int8"),
        ),
        commands(
            "export.engines",
            engines.main,
            [["build"], bundle],
            {**for_gpus, "--precision": ["fp32"]},
        ),
        commands(
            "export.tune",
            tune.main,
            [bundle],
            {**modules, "--calls": ["2,3"], "--threads": ["1"], "--work": ["w"]},
        ),
        commands("trainer.fit", fit.main, [], {**training, "--runs": ["runs"]}, ("--dry-run",)),
        commands(
            "trainer.distill",
            distill.main,
            [bundle],
            {
                "--calls": ["1,2"],
                "--method": ["consistency"],
                "--guidance": ["2"],
                "--runs": ["runs"],
            },
            ("--dry-run",),
        ),
        commands(
            "trainer.evaluate",
            evaluate.main,
            [bundle],
            {name: ["1", "cpu"] for name in evaluating},
            ("--best",),
        ),
        commands("trainer.average", average.main, [bundle], {"--width": ["0.1"]}),
        commands("trainer.report", report.main, [bundle], {}),
    ]


def _trainer_options() -> list[str]:
    from dataclasses import fields

    from trainer.config.options import Options

    return [field.name.replace("_", "-") for field in fields(Options)]


@pytest.mark.usefixtures("there")
def test_any_word_of_an_exporters_or_trainers_command_is_used_or_refused() -> None:
    @fuzz(60)
    @given(one_of(every_command()))
    def attempt(command: Command) -> None:
        assert command.fault() is None, command

    with bounded_memory():
        attempt()
