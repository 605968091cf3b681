"""python -m runtime.sample: what it writes, and its errors for invalid input."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import Sampler
from runtime.images import tile
from runtime.sample import main


def test_the_sheet_holds_the_samplers_pictures(
    tiny_bundle: Path, sampler: Sampler, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "new folder" / "grid.png"
    arguments = "--n 4 --seed 3 --steps 5 --solver ddim --label 3 --guidance 2 --width 1 --out"
    assert main([str(tiny_bundle), *arguments.split(), str(out)]) == 0
    expected = tile(sampler.pictures(4, 3, steps=5, solver="ddim", label=3, guidance=2.0))
    np.testing.assert_array_equal(np.asarray(Image.open(out)), expected[..., 0])
    assert str(out) in capsys.readouterr().out


def test_labels_in_turn_options_and_explicit_grids(
    tiny_bundle: Path, sampler: Sampler, tmp_path: Path
) -> None:
    out = tmp_path / "samples.npy"
    arguments = "--n 3 --label 1 --label 2 --solver ddim --option eta=0.5 --grid 900,400,10 --out"
    assert main([str(tiny_bundle), *arguments.split(), str(out)]) == 0
    expected = sampler.sample(3, label=[1, 2, 1], solver="ddim", eta=0.5, grid=[900, 400, 10])
    assert np.load(out).tobytes() == expected.tobytes()


def test_labels_are_listed_without_an_inference_library(
    tiny_bundle: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampler, "load", lambda *_: pytest.fail("opened"))
    assert main([str(tiny_bundle), "--labels"]) == 0
    assert capsys.readouterr().out.split() == [text for i in range(10) for text in (str(i), str(i))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--n 0", "`n` must be at least 1"),
        ("--steps 0", "`steps` must be 1 to 1000"),
        ("--solver dimm", "Did you mean 'ddim'"),
        ("--label 12", "out of range"),
        ("--grid 1,x", "times with commas between"),
        ("--option eta=7 --solver ddim", "`eta` must be a number from 0 to 1"),
        ("--out grid.txt", "use a name that ends in .png"),
        ("--out grid.h5", "cannot write images of mode L as .h5"),
        ("--option self=1", "unknown option of a solver: 'self'"),
        ("--option eta=0 --option eta=1", "'eta' twice"),
        ("--option etta=1", "Did you mean 'eta'"),
        ("--columns 0", "`columns` must be at least 1"),
        ("--width -1", "`width` must be at least 0, got -1"),
        ("--seed -1", "`seed` must be 0 to"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    tiny_bundle: Path,
    arguments: str,
    message: str,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(tiny_bundle), *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize("arguments", ["--width 100000", "--n 4 --columns 100000000"])
def test_a_sheet_that_is_too_large_is_refused_before_anything_is_sampled(
    arguments: str,
    tiny_bundle: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Sampler, "run", lambda *_, **__: pytest.fail("sampled"))
    assert main([str(tiny_bundle), *arguments.split()]) == 2
    assert "bytes is too large" in capsys.readouterr().err


def test_a_folder_that_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(tmp_path)]) == 2
    assert "has no bundle.json" in capsys.readouterr().err


def test_a_place_that_cannot_be_written(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert (
        main(
            [
                str(tiny_bundle),
                "--n",
                "1",
                "--steps",
                "1",
                "--out",
                str(tmp_path / "file" / "grid.png"),
            ]
        )
        == 2
    )
    assert "file is not a folder" in capsys.readouterr().err
