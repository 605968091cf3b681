"""The page holds the curves, the grids, the config and who trained it, and asks for nothing from
elsewhere."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from trainer.config import Config
from trainer.fit import fit
from trainer.report import chart, chosen, main


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    runs = tmp_path_factory.mktemp("reported")
    config = Config(
        data="digits", name="<b>", channels=(8, 8), attention=(), batch=8, steps=20, log_every=4, sample_every=10,
        sample_steps=3, T=50, device="cpu",
    )  # fmt: skip
    assert fit(config, runs)
    assert main([str(runs / "<b>")]) == 0
    return (runs / "<b>" / "report.html").read_text()


def test_it_holds_what_happened(page: str) -> None:
    for text in (
        "20 of 20 steps, 160 pictures",
        "learning_rate",
        "torch",
        "commit",
        "digits: 1797 pictures",
        "parameters",
    ):
        assert text in page
    assert page.count("data:image/png;base64,") == 2
    assert page.count("<svg") == 7  # all but the four of quality, which was not measured


def test_it_asks_for_nothing_from_elsewhere_and_runs_nothing(page: str) -> None:
    assert not re.search(r"https?://|<script|src=\"(?!data:)", page)
    assert "<b>" not in page  # the run's name is text


def test_a_curve_has_a_point_for_every_row_and_rises_where_the_values_do() -> None:
    figure = chart("loss", {"loss": [(0, 1.0), (10, 10.0), (20, 100.0)]}, logarithmic=True)
    line = ET.fromstring(figure).find(".//polyline")
    assert line is not None
    found = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert len(found) == 3
    (x0, y0), (x1, y1), (x2, y2) = found
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)  # SVG counts from the top
    assert y0 > y2


@pytest.mark.parametrize("curves", [{}, {"loss": []}, {"loss": [(0, 0.0)]}])
def test_a_chart_of_nothing_is_nothing(curves: dict) -> None:
    assert chart("loss", curves, logarithmic=True) == ""


def test_one_point_is_a_chart_too() -> None:
    assert "polyline" in chart("loss", {"loss": [(4, 2.0)]})


@pytest.mark.parametrize("count", [0, 1, 6, 7, 100])
def test_grids_are_chosen_evenly_with_the_last_one(count: int) -> None:
    paths = [Path(f"{i}.png") for i in range(count)]
    found = chosen(paths)
    assert len(found) == len(set(found)) == min(6, count)
    assert found[-1:] == paths[-1:]


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err
