"""Commands with arbitrary words end with status 0 or 2 and a message, never with a traceback.

UNNOISE_FUZZ_CASES=20000 tries more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import runtime.bench.table
import runtime.sampler.sampler
from runtime import Bundle, RequestError, edit, info, sample
from runtime.backends.registry import open_backend

from ...arbitrary import bounded_memory, fuzz, one_of
from ...commands import Command, commands
from ...small_bundle import SmallBackend, write_small_bundle

SAMPLING = {
    "--seed": ["0", "3"],
    "--steps": ["2"],
    "--solver": ["ddim", "edm", "repaint"],
    "--option": ["eta=0.5", "churn=1", "x", "steps=2", "on_step=1", "eta=[[[", "=", "eta={}"],
    "--grid": ["trailing", "7,3"],
    "--guidance": ["2"],
    "--guidance-interval": ["0,2", "0,inf"],
}
MAKING = SAMPLING | {
    "--out": ["a.png", "b.npy", "c.gif", "d.xyz", "e.jpg", ".", "f/g.png", "a.webp"],
    "--columns": ["2"],
    "--width": ["1", "16"],
    "--backend": ["auto", "onnxruntime", "x"],
    "--precision": ["auto", "fp32", "int8"],
    "--threads": ["1"],
    "--max-batch": ["1"],
    "--label": ["one", "2"],
}
BENCH = SAMPLING | {
    "--label": ["one", "2"],
    "--backend": ["onnxruntime", "all", "auto,x"],
    "--precision": ["fp32", "all", "int8"],
    "--batch": ["1", "1,4"],
    "--threads": ["1"],
    "--seconds": ["0"],
    "--cold": ["0"],
    "--pictures": ["1"],
    "--plot": ["a.png", "b"],
}


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a bundle and images. Nothing is measured, and no library is
    opened."""
    write_small_bundle(tmp_path / "bundle")
    for name in ("0.png", "1.png"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")

    def opened(bundle: Bundle, backend: str, precision: str, *cut: int | None) -> Any:
        usual = backend in ("auto", "onnxruntime") and precision in ("auto", "fp32")
        return SmallBackend(bundle) if usual else open_backend(bundle, backend, precision, *cut)

    def measure(*_: Any) -> Any:
        raise RequestError("nothing is measured here")

    monkeypatch.setattr(runtime.sampler.sampler, "open_backend", opened)
    monkeypatch.setattr(runtime.bench.table, "measure", measure)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def every_command() -> list[st.SearchStrategy[Command]]:
    bundle = ["bundle", "bundle", "bundle", "0.png", "nowhere"]
    image = ["0.png", "1.png", "broken.png", "nowhere.png"]
    several = MAKING | {"--n": ["1", "2"]}
    strength = MAKING | {"--strength": ["0.5", "1"]}
    convert = ("--convert",)
    found = [
        commands("sample", sample.main, [bundle], several, ("--labels",)),
        commands("sample", sample.main, [bundle], several),
        commands("stylize", edit.main, [bundle, image], strength, convert, ("stylize",)),
        commands("invert", edit.main, [bundle, image], strength, convert, ("invert",)),
        commands(
            "translate",
            edit.main,
            [bundle, image],
            {**strength, "--from": ["one"], "--to": ["two"]},
            convert,
            ("translate", "--from=0", "--to=1"),
        ),
        commands(
            "inpaint",
            edit.main,
            [bundle, image],
            {**MAKING, "--mask": image},
            convert,
            ("inpaint", "--mask=1.png"),
        ),
        commands(
            "interpolate",
            edit.main,
            [bundle, ["0", "0.png"], ["3", "1.png"]],
            several,
            convert,
            ("interpolate",),
        ),
        commands(
            "variations",
            edit.main,
            [bundle, image],
            {**several, "--amount": ["0.5"]},
            convert,
            ("variations",),
        ),
        commands("animate", edit.main, [bundle], several, convert, ("animate",)),
        commands("animate", edit.main, [bundle, image], several, convert, ("animate",)),
        commands("edit", edit.main, [["x", "stylize"], bundle], {}),
        commands("info", info.main, [bundle], {}, ("--json",)),
        commands("bench", runtime.bench.table.main, [bundle], BENCH, ("--json",)),
    ]
    return found


@pytest.mark.usefixtures("there")
def test_any_word_is_used_or_refused_with_a_message() -> None:
    @fuzz(150)
    @given(one_of(every_command()))
    def attempt(command: Command) -> None:
        assert command.fault() is None, command

    with bounded_memory():
        attempt()
