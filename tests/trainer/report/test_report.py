"""The page contains the curves, the grids, the config and who trained it, loads nothing from other
hosts, and is written even for damaged logs."""

import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.files import to_json
from trainer.config import Config
from trainer.fit import fit
from trainer.report import curves, main, report
from trainer.report.charts import Chart, item, library, ticks
from trainer.report.grids import MOST, chosen, grids, reduced
from trainer.runs.log import QUALITY_COLUMNS

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
CONFIG = Config(
    data="digits", name="<b>", channels=(8, 8), attention=(), batch=8, steps=20, log_every=4, sample_every=10,
    sample_steps=3, T=50, device="cpu",
)  # fmt: skip


class Elements(HTMLParser):
    """The elements of a page, and the text of those of one name."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script":
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("reported")
    assert fit(CONFIG, runs)
    rows = ["10,4.5,0.2,0.5,0.6", "20,1.25,0.1,0.7,0.8"]
    (runs / "<b>" / "quality.csv").write_text("\n".join([",".join(QUALITY_COLUMNS), *rows]))
    return runs / "<b>"


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    assert main([str(run)]) == 0
    return (run / "report.html").read_text(encoding="utf-8")


def items(page: str) -> list[dict]:
    return json.loads(Elements(page).scripts[1])


def own(page: str) -> str:
    """The page without BokehJS."""
    return page.replace(library(), "")


def test_it_holds_what_happened(page: str) -> None:
    for text in ("20 of 20", "160 images", "1797 images", "Best Fréchet", "learning_rate", "torch"):
        assert text in own(page)
    for text in ("commit", "peak_flops", "fingerprint", "11 changed from their defaults"):
        assert text in own(page)
    headings = re.findall(r"<h3>(.*?)</h3>", page)
    assert headings[:5] == [
        "Fréchet distance",
        "Precision and recall",
        "Kernel distance",
        "Loss",
        "Loss by noise level",
    ]
    assert {"Gradient norm", "Learning rate", "Throughput"} <= set(headings)
    assert len(items(page)) == len(headings)
    assert re.findall(r'data-step="(\d+)"', page) == ["10", "20"]
    assert len(page) < 1_600_000  # BokehJS is 1.27 MB of it


def test_it_asks_for_nothing_from_elsewhere(page: str) -> None:
    assert not re.search(r"https?://", own(page))
    elements = Elements(page).found
    sources = [a.get("src") or a.get("href") for _, a in elements if {"src", "href"} & set(a)]
    assert len(sources) == 2
    assert all(source and source.startswith("data:image/png;base64,") for source in sources)
    policy = next(a["content"] for t, a in elements if t == "meta" and "http-equiv" in a)
    assert policy
    assert policy.startswith("default-src 'none'; img-src data: blob:;")


def test_only_scripts_of_the_page_run(page: str) -> None:
    nonce = re.findall(r"script-src 'nonce-([\w-]+)'", page)[0]
    scripts = [attributes for tag, attributes in Elements(page).found if tag == "script"]
    assert scripts == [
        {"nonce": nonce},
        {"type": "application/json", "id": "items"},
        {"nonce": nonce},
    ]
    assert nonce not in own(page).replace(f"'nonce-{nonce}'", "").replace(f'nonce="{nonce}"', "")


def test_references_of_charts_follow_what_they_refer_to(page: str) -> None:
    """BokehJS draws nothing if the order of the JSON is another one."""

    def walk(value: object, known: set[str]) -> Iterator[str]:
        if isinstance(value, dict):
            if set(value) == {"id"}:
                yield from set() if value["id"] in known else {value["id"]}
            elif value.get("type") == "object":
                known.add(value["id"])
            for part in value.values():
                yield from walk(part, known)
        elif isinstance(value, list):
            for part in value:
                yield from walk(part, known)

    for chart in items(page):
        assert list(walk(chart["doc"], set())) == []
        assert f'id="{chart["target_id"]}"' in page


@pytest.fixture
def hostile(run: Path, tmp_path: Path) -> Path:
    """A run in which every file except config.json's options is damaged or hostile."""
    folder = tmp_path / ATTACK.replace("/", "\\")
    folder.mkdir()
    record = json.loads((run / "config.json").read_text())
    record["data_record"] = {"name": ATTACK, "pictures": ATTACK, "fingerprint": [], "note": {}}
    record["classes"] = [ATTACK]
    (folder / "config.json").write_text(to_json(record))
    (folder / "log.csv").write_text(
        f'step,loss,{ATTACK},my_{ATTACK}_loss,note,"$$x$$"\n'
        "0,1e308,1,1,text,1\n4,1e-320,2,2,,2\n-5,1,1,1,1,1\nx,1,1,1,1,1\n8,inf,3,3,,3\n"
        "1e300,1,1,1,1,1\n12,-1,nan,4,,1,extra,extra\n16,0.1\n"
    )
    (folder / "quality.csv").write_bytes(b"\xff\xfe\x00step\n" + bytes(range(256)) * 9)
    start = {"time": ATTACK, "step": ATTACK, "environment": {ATTACK: ATTACK}, "flops": 10**400}
    (folder / "starts.json").write_text(to_json([{**start, "parameters": 10**400}]))
    samples = folder / "samples"
    samples.mkdir()
    (samples / "step-1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
    (samples / f"step-2{ATTACK.replace('/', '')}.png").write_bytes(b"")
    (samples / "step-3.png").mkdir()
    return folder


def test_a_hostile_run_is_text(hostile: Path) -> None:
    page = report(hostile)
    elements = Elements(page).found
    assert len([tag for tag, _ in elements if tag == "script"]) == 3
    assert "alert(1)" in own(page)
    assert not any(name.startswith("on") for _, attributes in elements for name in attributes)
    assert "<img src=x" not in own(page)
    assert "There are no samples yet." in page
    # No column name reaches a chart with characters that it could interpret as markup or
    # mathematics.
    charts = json.dumps(items(page))
    assert "$$" not in charts
    assert "<" not in charts


def test_what_was_left_out_of_the_logs_is_said(hostile: Path) -> None:
    page = report(hostile)
    assert "log.csv: values that are not numbers were left out (step, note)." in page
    assert "quality.csv cannot be read: its first line names no column `step`." in page
    (hostile / "starts.json").write_text("{")
    (hostile / "log.csv").unlink()
    (hostile / "log.csv").mkdir()
    page = report(hostile)
    assert "starts.json is not a list of starts" in page
    assert "log.csv cannot be read" in page
    assert "The log has no rows yet." in page


def test_a_log_is_read_as_far_as_it_can_be(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    assert len(curves.read(path).step) == 0
    path.write_text("step,loss,empty\n8,0.25,\n4,0.5,\n12,,\n16,0.1")
    log = curves.read(path)
    np.testing.assert_array_equal(log.step, [4, 8, 12])  # the last row was cut short
    np.testing.assert_array_equal(log.get("loss"), [0.5, 0.25, math.nan])
    assert set(log.columns) == {"loss"}
    assert log.fault == ""


def test_smoothing_keeps_lines_and_skips_gaps() -> None:
    line = np.arange(200.0)
    np.testing.assert_allclose(curves.smooth(line)[20:-20], line[20:-20])
    gap = np.where((line > 90) & (line < 95), math.nan, 3.0)
    np.testing.assert_allclose(curves.smooth(gap), 3.0)
    np.testing.assert_allclose(curves.smooth(np.array([7.0])), [7.0])
    assert np.isnan(curves.smooth(np.full(5, math.nan))).all()


def test_a_long_curve_is_thinned_and_keeps_its_spikes() -> None:
    values = np.ones(50_000)
    values[[7, 31_234]] = [9.0, -3.0]
    values[40_000:41_000] = math.nan
    rows = curves.kept(values)
    assert curves.MOST_POINTS // 2 <= len(rows) <= curves.MOST_POINTS
    assert (np.diff(rows) > 0).all()
    assert {7, 31_234} <= set(rows.tolist())


@pytest.mark.parametrize("high", [0.3, 0.9, 3.0, 40.0, 1e3, 1e9, 1e29])
def test_a_logarithmic_axis_has_enough_ticks(high: float) -> None:
    within = [tick for tick in ticks(0.1, high) if 0.1 <= tick <= high]
    assert 3 <= len(within) <= 12


STEPS = np.arange(3.0)


def chart(values: list[float], **more: object) -> Chart:
    return Chart("title", "unit", STEPS, 8, {"a": np.array(values)}, **more)  # type: ignore[arg-type]


def test_the_best_is_marked_and_hovering_says_the_values() -> None:
    drawn = json.dumps(item(chart([3, 1, 2], by_images=True, best=1), "here"))
    assert drawn.count('"star"') >= 1
    assert '"location": 8.0' in drawn
    assert '["a", "@y0{%.4g}"]' in drawn
    assert '["images", "@images{0,0}"]' in drawn


def test_a_chart_of_nothing_is_not_drawn() -> None:
    assert chart([math.nan] * 3).drawn() == {}
    assert chart([0, -1, math.nan], logarithmic=True).drawn() == {}
    np.testing.assert_array_equal(chart([0, 1, 2], logarithmic=True).drawn()["a"], [math.nan, 1, 2])


@pytest.mark.parametrize("count", [0, 1, 6, 7, 100])
def test_grids_are_chosen_evenly_with_the_last_one(count: int) -> None:
    some = chosen(range(count), 6)
    assert len(some) == len(set(some)) == min(6, count)
    assert some[-1:] == list(range(count))[-1:]


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 3)])
def test_an_enlarged_image_is_reduced_to_its_pixels(shape: tuple[int, ...]) -> None:
    small = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.testing.assert_array_equal(reduced(small.repeat(6, 0).repeat(6, 1)), small)
    np.testing.assert_array_equal(reduced(small), small)


def test_grids_stay_within_what_a_page_may_hold(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for i in range(60):
        Image.fromarray(noise[: 8 if i < 50 else 64]).save(tmp_path / f"step-{i:08d}.png")
    found = grids(tmp_path)
    assert 2 <= len(found) <= MOST
    assert (found[0].step, found[-1].step) == (0, 59)
    assert sum(len(grid.url) for grid in found) < 1_000_000


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err
