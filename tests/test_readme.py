"""Every command and every program in the README and the docs runs, word for word.

Blocks marked `sh` and `python` are run. Blocks marked `text` are not: they take hours, need other
hardware, or show an output.
"""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.backends.survey import backends
from runtime.terminal import verbs

from .documented import HANGING_S, IN_TURN, blocks, clone, commands, run
from .root import ROOT
from .small_pipeline import save_small_pipeline

MADE_BY_CI = {"make demo", "make test", "make lint"}
"""These make environments of their own; .ci/run runs them."""
ON_A_GPU = 'backend="tensorrt"'
SLOW_COMMANDS = re.compile(
    r"trainer\.|export\.|runtime\.bench|edit (inpaint|interpolate|variations)|animate .*--n"
    r"|precision int8|--n 8 |--steps 50|solver (unipc|tuned)|runtime\.generate"
)
"""Commands that take more than five seconds of a processor. `make test` parses them."""
SLOW_PROGRAMS = re.compile(r"build_bundle|sampler\.sample\(8")
"""The same for programs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the commands run."""
    return clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def networks(folder: Path) -> None:
    """The networks that the docs export, in the folder."""
    save_small_pipeline(folder / "ddpm-cifar10-32", "DDPM")
    (folder / "mynet.py").write_text(NETWORK)
    subprocess.run([sys.executable, "-c", SAVE], cwd=folder, check=True, timeout=HANGING_S)


NETWORK = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, time, label=None):
        answer = self.layer(x)
        return answer if label is None else answer + 0.1 * label[:, None, None, None]

net = Net
"""
SAVE = """
from safetensors.torch import save_model
from mynet import net
save_model(net(), "net.safetensors")
"""


def test_ci_runs_what_this_file_does_not() -> None:
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert set(ci) >= MADE_BY_CI
    assert {c for c in commands() if not c.startswith("python ")} == MADE_BY_CI


def test_the_speed_in_the_readme_is_that_of_the_benchmarks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    table = importlib.import_module("readme")
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert table.speed(page) in (ROOT / "README.md").read_text(encoding="utf-8")


def _marked(items: list[str], slow: re.Pattern[str]) -> list[object]:
    """Parameters of a test, with the slow ones marked."""
    return [
        pytest.param(item, marks=[pytest.mark.slow] if slow.search(item) else []) for item in items
    ]


COMMANDS = [c for c in commands() if c.startswith("python ") and c not in IN_TURN]


@pytest.mark.parametrize("command", _marked(COMMANDS, SLOW_COMMANDS))
def test_a_command_of_the_docs_runs(
    command: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    if "openvino" in command:
        asked = re.findall(r"--precision (\w+)", command)
        if not {*asked} <= {*backends()["openvino"]["precisions"]}:
            pytest.skip(f"this CPU does not compute {asked[0]} on openvino")
    if "export" in command:
        request.getfixturevalue("networks")
    run(command, folder)
    if "--out" in command:
        assert (folder / command.split("--out ")[1]).exists()


@pytest.mark.parametrize("command", [*IN_TURN, *(c for c in COMMANDS if SLOW_COMMANDS.search(c))])
def test_a_slow_command_of_the_docs_is_parsed(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "status", lambda _: 0)  # parses and does nothing
    _, _, module, *words = shlex.split(command)
    verb = next(verb for verb in verbs.VERBS.values() if verb.spelled == module)
    assert importlib.import_module(verb.module).main(words) == 0
    with pytest.raises(SystemExit):
        importlib.import_module(verb.module).main([*words, "--no-such-option"])


@pytest.mark.parametrize("program", _marked(blocks("python"), SLOW_PROGRAMS))
def test_a_program_of_the_docs_runs(
    program: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    if ON_A_GPU in program:
        pytest.skip("needs an NVIDIA GPU")
    if "mynet" in program:
        request.getfixturevalue("networks")
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, timeout=HANGING_S)


@pytest.mark.parametrize("program", [p for p in blocks("python") if SLOW_PROGRAMS.search(p)])
def test_a_slow_program_of_the_docs_imports_what_there_is(program: str) -> None:
    compile(program, "docs", "exec")
    imports = re.findall(r"^from ((?:runtime|export)[\w.]*) import (.+)$", program, re.MULTILINE)
    assert imports
    for module, names in imports:
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name)
