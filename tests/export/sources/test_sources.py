"""The command line distinguishes a run, a diffusers folder and a module, each with its options."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from export import build as building
from export.build import main
from export.sources.model import Model
from runtime import Bundle

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Conv1d(2, 2, width, padding=width // 2)
        self.tied = self.layer.weight

    def forward(self, x, time):
        return self.layer(x) + torch.sin(time)[:, None, None]

def net():
    return Net(3)

def needs(width):
    return Net(width)

def fails():
    raise RuntimeError("no luck")

def number():
    return 3

def leaves():
    import sys
    sys.exit("bye")

class Stop(BaseException):
    pass

def stops():
    raise Stop("now")

def net_in_two_lines():
    raise ValueError("first" + chr(10) + "second")

ready = Net(5)
"""
DESCRIBED = ["--sample-shape", "2,16", "--prediction", "epsilon", "--schedule", "linear_raw"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `mine` with factories in mine/nets.py, importable."""
    import sys

    folder = tmp_path / "code" / "mine"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "nets.py").write_text(CODE)
    (folder / "broken.py").write_text("import not_there_at_all")
    (folder / "wrong.py").write_text("1 / 0")
    (folder / "leaving.py").write_text("raise SystemExit(0)")
    (folder / "stopping.py").write_text("class Stop(BaseException): pass\nraise Stop")
    (folder / "syntax.py").write_text("def net(:")
    (folder / "latin.py").write_bytes(b"net = '\xff'")
    monkeypatch.syspath_prepend(folder.parent)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        del sys.modules[name]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Model]:
    """The models that the command would build, instead of building them."""
    models: list[Model] = []
    monkeypatch.setattr(building, "build", lambda model, *_, **__: models.append(model))
    return models


def test_a_module_with_its_weights_becomes_a_bundle(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    weight, bias = torch.full((2, 2, 3), 0.25), torch.tensor([0.5, -0.5])
    save_file({"layer.weight": weight, "layer.bias": bias}, tmp_path / "w.safetensors")
    options = [
        "--weights",
        str(tmp_path / "w.safetensors"),
        "--schedule-option",
        "T=200",
        "--steps",
        "5",
    ]
    out = tmp_path / "bundle"
    assert (
        main(["--module", "mine.nets:net", *DESCRIBED, *options, "--quick", "--out", str(out)]) == 0
    ), capsys.readouterr().err
    bundle = Bundle.load(out)
    assert (bundle.name, bundle.sample_shape, len(bundle.schedule), bundle.defaults.steps) == (
        "net",
        (2, 16),
        200,
        5,
    )
    weights = (out / "fp32/step.onnx").read_bytes()
    assert weight.numpy().tobytes() in weights
    assert bias.numpy().tobytes() in weights


def test_every_option_of_a_module_arrives(package: Path, built: list[Model]) -> None:
    options = "--clip 2 --sample-range=-2,2 --name mine --solver ddim --option eta=0.5 --grid leading --steps 7"
    assert main(["--module", "mine.nets:ready", *DESCRIBED, *options.split()]) == 0
    model = built[0]
    assert (model.clip, model.sample_range, model.name) == (2.0, (-2.0, 2.0), "mine")
    assert (model.defaults.solver, model.defaults.grid, model.defaults.steps) == (
        "ddim",
        "leading",
        7,
    )
    assert model.defaults.options == {"eta": 0.5}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine.nets", "--module must be package.file:factory"),
        ("nets.py", "--module must be package.file:factory"),
        ("", "--module must be package.file:factory"),
        (":", "--module must be package.file:factory"),
        ("mine.nets:", "--module must be package.file:factory"),
        (":net", "--module must be package.file:factory"),
        ("mynet.py:net", "Write --module mynet:net and run this from the file's folder"),
        ("./mynet.py:net", "Write --module mynet:net and run this from the file's folder"),
        ("./mynet:net", "Write --module mynet:net and run this from the file's folder"),
        (".\\mynet.py:net", "Write --module mynet:net and run this from the file's folder"),
        ("path/to/mynet.py:net", "--module mynet:net and put the folder path/to into PYTHONPATH"),
        ("path/mynet:net", "--module mynet:net and put the folder path into PYTHONPATH"),
        ("../mynet.py:net", "--module mynet:net and put the folder .. into PYTHONPATH"),
        ("/abs/mynet.py:net", "--module mynet:net and put the folder /abs into PYTHONPATH"),
        ("nets\\mynet.py:net", "--module mynet:net and put the folder nets into PYTHONPATH"),
        ("C:\\nets\\mynet.py:net", "mynet:net and put the folder C:\\nets into PYTHONPATH"),
        ("mine.nets.py:net", "--module mine.nets:net"),
        (".mynet:net", "--module mynet:net"),
        ("mine..nets:net", "--module must be a dotted name"),
        ("/:net", "--module must be a dotted name"),
        ("\udcff:net", "there is no module '\\udcff'"),
        ("mine.nets:\udcff", "unknown factory of mine.nets '\\udcff'"),
        ("mine.nets:nett", "unknown factory of mine.nets 'nett'. Did you mean 'net'?"),
        ("mine.nest:net", "there is no module 'mine.nest'. Run this from the folder"),
        ("mine.broken:net", "importing mine.broken needs 'not_there_at_all'"),
        ("mine.leaving:net", "importing mine.leaving fails with SystemExit: 0"),
        ("mine.stopping:net", "importing mine.stopping fails with Stop"),
        ("mine.syntax:net", "importing mine.syntax fails with SyntaxError"),
        ("mine.latin:net", "importing mine.latin fails with SyntaxError"),
        ("mine.nets:leaves", "the factory fails with SystemExit: bye"),
        ("mine.nets:stops", "the factory fails with Stop: now"),
        ("mine.nets:net_in_two_lines", "the factory fails with ValueError: first."),
        ("mine.nets:int", "unknown factory of mine.nets 'int'"),
        ("mine.wrong:net", "importing mine.wrong fails with ZeroDivisionError"),
        ("mine.nets:needs", "called without arguments, but missing a required argument: 'width'"),
        ("mine.nets:fails", "the factory fails with RuntimeError: no luck"),
        ("mine.nets:number", "the factory returns int"),
    ],
)
def test_a_factory_that_makes_no_module_is_explained(
    package: Path, spec: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["--module", spec, *DESCRIBED]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (
            {"layer.bias": (2,), "lay.weight": (1,)},
            "'tied' is missing; 'layer.weight' is missing; 'lay.weight' is unexpected.",
        ),
        (
            {"layer.weight": (2, 2, 5), "layer.bias": (2,)},
            "'layer.weight' is [2, 2, 5], [2, 2, 3] expected",
        ),
        ({f"w{i}": (1,) for i in range(9)}, "and 7 more"),
        (None, "there is no such file"),
        (b"no", "cannot be read as safetensors"),
        (b"", "cannot be read as safetensors"),
        ((1000).to_bytes(8, "little") + b"{}", "cannot be read as safetensors"),
        ((2).to_bytes(8, "little") + b"[]", "cannot be read as safetensors"),
        ("folder", "is a folder. Pass the .safetensors file in it"),
    ],
    ids=["names", "shape", "many", "none", "damaged", "empty", "cut", "list", "folder"],
)
def test_weights_that_do_not_fit_are_listed(
    package: Path,
    tmp_path: Path,
    stored: dict | bytes | str | None,
    message: str,
    capsys: pytest.CaptureFixture,
) -> None:
    path = tmp_path / "w.safetensors"
    if isinstance(stored, bytes):
        path.write_bytes(stored)
    elif stored == "folder":
        path.mkdir()
    elif isinstance(stored, dict):
        save_file({key: torch.zeros(shape) for key, shape in stored.items()}, path)
    assert main(["--module", "mine.nets:net", *DESCRIBED, "--weights", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_weights_that_can_run_code_are_not_opened(
    package: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["--module", "mine.nets:net", *DESCRIBED, "--weights", "model.pt"]) == 2
    assert "other formats can run code" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--module", "mine.nets:net"],
            "--module needs --sample-shape, --prediction, --schedule too",
        ),
        (
            ["somewhere", "--module", "mine.nets:net"],
            "give a folder, --module or --onnx, got a folder",
        ),
        (
            ["--module", "mine.nets:net", *DESCRIBED, "--variant", "fp16"],
            "--variant is for a diffusers folder, and",
        ),
        (
            ["--module", "mine.nets:net", *DESCRIBED, "--schedule-option", "U=3"],
            "unknown option of schedule",
        ),
        (
            ["--module", "mine.nets:net", "--schedule-option", "T=3"],
            "--schedule-option needs --schedule",
        ),
        (
            ["--module", "mine.nets:net", *DESCRIBED, "--option", "eta=0", "--option", "eta=1"],
            "'eta' twice",
        ),
        (["--module", "mine.nets:net", *DESCRIBED, "--name", ""], "name must be"),
        (["nowhere"], "nowhere is not a run"),
        (["RUN", "--weights", "emma"], "Did you mean 'ema'?"),
        (
            ["RUN", "--clip", "1"],
            "--clip is for a diffusers folder and --module and --onnx, and this is a run",
        ),
        (
            ["FOLDER", "--weights", "ema"],
            "--weights is for a run and --module, and this is a diffusers folder",
        ),
        (["FOLDER", "--runs", "runs"], "--runs is for a run, and this is a diffusers folder"),
    ],
)
def test_options_that_do_not_go_together_are_named(
    package: Path,
    tiny_run: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture,
) -> None:
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    places = {"RUN": str(tiny_run), "FOLDER": str(folder)}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_run_and_a_diffusers_folder_are_told_apart(
    tiny_run: Path, tmp_path: Path, built: list[Model]
) -> None:
    import diffusers

    network = diffusers.UNet2DModel(8, 1, 1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"))  # fmt: skip
    diffusers.DDIMPipeline(network, diffusers.DDIMScheduler()).save_pretrained(
        tmp_path / "pipeline"
    )
    assert main([str(tiny_run), "--weights", "weights"]) == 0
    assert main([str(tmp_path / "pipeline"), "--steps", "20", "--name", "other"]) == 0
    run, folder = built
    assert (run.name, run.provenance["weights"]) == ("tiny", "weights")
    assert (folder.name, folder.defaults.steps, folder.provenance["source"]) == (
        "other",
        20,
        "diffusers, DDIMPipeline",
    )
    json.dumps(dict(folder.provenance))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--sample-shape", "3,x", "must be integers with commas"),
        ("--sample-shape", "", "must be integers with commas"),
        ("--sample-range", "1", "must be two numbers with a comma"),
        ("--sample-range", "1,2,3", "must be two numbers with a comma"),
        ("--option", "eta", "must be NAME=VALUE"),
        ("--option", "=1", "must be NAME=VALUE"),
    ],
)
def test_an_option_that_cannot_be_read_says_its_form(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        main(["--module", "mine.nets:net", f"{option}={value}"])
    assert message in capsys.readouterr().err


def test_a_folder_whose_name_is_not_utf8_is_printed(tmp_path: Path, built: list[Model]) -> None:
    """Python reads such a name with characters that cannot be encoded."""
    import os

    path = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        path.mkdir()
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    (path / "model_index.json").write_text("{}")
    assert main([str(path)]) == 2
