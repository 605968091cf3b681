"""The site: JavaScript's noise has Python's bits, and the same seed gives the same image, in Node
and in a browser, with a network and without."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import random
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.errors import ExportError
from export.web import libraries, write
from export.web.__main__ import main
from export.web.libraries import VERSION, library
from export.web.tables import menu
from export.web.write import PAGE, Site, write_site
from runtime import Bundle, RequestError, Sampler, noise
from runtime.diffusion.program import R
from runtime.engine.request import Planner, Request

HERE = Path(__file__).parent
SOLVERS = ("ddim", "ddpm", "dpmpp_2m", "unipc", "euler")
STEPS = 5
NEAR = 1e-4
"""The inference libraries round differently: 2e-5 was the largest difference seen."""
ORT_PACKAGE = "ONNXRUNTIME_WEB"
"""The variable that names the package, for machines without npm's registry."""
HANGING_S = 600
MOST_BYTES = 40_000
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
MB = 1e6


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """onnxruntime-web."""
    if ORT_PACKAGE in os.environ:
        return Path(os.environ[ORT_PACKAGE])
    try:
        return libraries._packed(tmp_path_factory.mktemp("npm"))
    except ExportError as error:
        pytest.skip(f"{ORT_PACKAGE} is not set, and {error}")


@pytest.fixture(scope="session")
def node() -> str:
    found = shutil.which("node")
    if found is None:
        pytest.skip("no Node.js is installed")
    return found


@pytest.fixture(scope="session")
def site(package: Path, shipped: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """emoji32 with five solvers."""
    out = tmp_path_factory.mktemp("site") / "emoji32"
    steps = (STEPS, 10)
    write_site(Site(bundle=shipped, solvers=SOLVERS, steps=steps, package=package), out)
    return out


@pytest.fixture(scope="session")
def emoji(shipped: Bundle) -> Sampler:
    return Sampler(shipped, threads=1)


def ask(node: str, script: str, argument: Path, value: object) -> bytes:
    """Run a script of this folder."""
    run = subprocess.run(
        [node, str(HERE / script), str(argument)],
        input=json.dumps(value).encode(),
        capture_output=True,
        timeout=HANGING_S,
    )
    if run.returncode:
        raise AssertionError(run.stderr.decode()[-1000:])
    return run.stdout


def test_the_noise_of_javascript_has_pythons_bits(node: str) -> None:
    chance = random.Random(0)
    seeds = (0, 1, 2**32, 2**53, 2**64 - 1)
    cases = [
        {
            "seed": chance.choice((*seeds, chance.getrandbits(64))),
            "stream": i % 3,
            "step": chance.choice((0, 1, 49, 2**32 - 1, 2**40, 2**64 - 1)),
            "count": 3072 - i % 2,
        }
        for i in range(200)
    ]
    texts = [{**case, "seed": str(case["seed"]), "step": str(case["step"])} for case in cases]
    found = np.frombuffer(ask(node, "noise.mjs", PAGE / "noise.js", texts), "<u4")
    expected = [noise(c["seed"], c["stream"], c["step"], (c["count"],)) for c in cases]
    assert len(found) > 600_000
    assert (found == np.concatenate(expected).view("<u4")).all()


@pytest.mark.parametrize(
    "solver", [SOLVERS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in SOLVERS[1:])]
)
def test_the_same_seed_gives_the_same_image_in_node(
    node: str, site: Path, emoji: Sampler, solver: str
) -> None:
    requests = [
        {"seed": str(seed), "label": label, "guidance": scale, "solver": solver, "steps": STEPS}
        for seed in (SOLVERS.index(solver), 2**64 - 1)
        for label, scale in ((3, 1.0), (11, 2.5), (None, 2.0))
    ]
    size = 3 * 32 * 32
    data = ask(node, "sample.mjs", site, requests)
    assert len(data) == len(requests) * (4 * size + 4 * 32 * 32)
    for i, asked in enumerate(requests):
        part = data[i * len(data) // len(requests) :]
        x = np.frombuffer(part[: 4 * size], "<f4").reshape(3, 32, 32)
        expected = emoji.sample(1, **{**asked, "seed": int(asked["seed"])})[0]
        assert np.abs(x - expected).max() <= NEAR, asked
        # The pixels are those that Python makes of the same x.
        rgba = np.frombuffer(part[4 * size :][: 4 * 32 * 32], np.uint8).reshape(32, 32, 4)
        assert (rgba[..., :3] == emoji.to_uint8(x[None])[0]).all()
        assert (rgba[..., 3] == 255).all()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"solver": "ddim", "steps": 7}, "no program of 7 steps of ddim"),
        ({"solver": "ddim", "steps": STEPS, "label": 18}, "no label 18"),
    ],
)
def test_a_request_that_the_site_cannot_run_says_so(
    node: str, site: Path, request_: dict[str, object], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        ask(node, "sample.mjs", site, [{"seed": "1", **request_}])


def test_a_program_of_the_menu_is_that_of_python(shipped: Bundle) -> None:
    found = menu(shipped)
    numbers = np.frombuffer(found.table, "<f4")
    planner = Planner(shipped)
    assert {entry.solver for entry in found.entries} >= {"tuned", *SOLVERS}
    for entry in found.entries:
        table = planner.job(Request(seed=0, label=3, solver=entry.solver, steps=entry.steps)).table
        width = 6 + R * (R + 2)
        rows = numbers[entry.offset :][: entry.rows * width].reshape(entry.rows, width)
        call = rows[:, :6].copy()
        # The page writes the guidance scale into every row.
        call[:, 5] = 2.0
        assert (call == table.call).all()
        assert (rows[:, 6:].reshape(-1, R, R + 2) == table.update).all()
        assert (np.array(entry.noisy) == table.noisy).all()
        assert np.float32(entry.start) == table.start


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "most"), [("fp32", 15), ("fp16", 10)])
def test_the_download_is_small(
    package: Path, shipped: Bundle, tmp_path: Path, precision: str, most: float
) -> None:
    write_site(Site(bundle=shipped, precision=precision, package=package), tmp_path / "site")
    files = [path for path in (tmp_path / "site").rglob("*") if path.is_file()]
    # A browser fetches one of the two libraries.
    fetched = [path for path in files if "asyncify" not in path.name and "webgpu" not in path.name]
    size = sum(len(gzip.compress(path.read_bytes(), 6)) for path in fetched)
    assert size <= most * MB


def test_the_page_is_small_and_names_no_other_host() -> None:
    texts = {path.name: path.read_text() for path in PAGE.iterdir()}
    assert sum(map(len, texts.values())) <= MOST_BYTES
    for text in texts.values():
        assert not re.search(r"https?:", text)
    ids = re.findall(r'\sid="([^"]+)"', texts["index.html"])
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("(\w+)"\)', texts["app.js"])) <= set(ids)
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script[^>]*>[^<]", texts["index.html"])


def test_the_service_worker_changes_with_every_file(
    shipped: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "library", lambda *_: {"ort.wasm.min.mjs": b""})
    for name, steps in (("one", 4), ("same", 4), ("other", 5)):
        site = Site(bundle=shipped, solvers=["ddim"], steps=[steps])
        write_site(site, tmp_path / name)
    worker = (tmp_path / "one" / "sw.js").read_text()
    assert (tmp_path / "same" / "sw.js").read_text() == worker
    assert (tmp_path / "other" / "sw.js").read_text() != worker
    kept = json.loads(re.search(r"FILES = (\[.*\]);", worker)[1])
    files = [path.name for path in (tmp_path / "one").iterdir() if path.is_file()]
    on_disk = {*files} - {"sw.js", "_headers"}
    assert {*kept} == {"./", *on_disk}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--solvers dimm", "Did you mean 'ddim'"),
        ("--steps 0", "`steps` must be at least 1"),
        ("--precision fp8", "unknown precision 'fp8'"),
        ("--library none.tgz", "cannot be read"),
        ("--library {root}/README.md", f"is not onnxruntime-web {VERSION}"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    root: Path,
    shipped: Bundle,
    arguments: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = arguments.format(root=root).split()
    assert main([str(shipped.path), *words, "--out", str(tmp_path / "site")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "site").exists()


def test_a_folder_of_other_files_is_not_replaced(shipped: Bundle, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RequestError, match="files that are not of a site"):
        write_site(Site(bundle=shipped), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("way", ["folder", "link", "dot"])
def test_files_of_the_user_stay_in_a_site(
    shipped: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(write, "library", lambda *_: {"ort.wasm.min.mjs": b""})
    out = tmp_path / "site"
    site = Site(bundle=shipped, solvers=["ddim"], steps=[4])
    write_site(site, out)
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("mine")
    (out / "CNAME").write_text("mine")
    (out / "ort" / "ort.webgpu.min.mjs").write_text("of the last site")
    (tmp_path / "link").symlink_to(out)
    monkeypatch.chdir(out)
    write_site(site, {"folder": out, "link": tmp_path / "link", "dot": Path(".")}[way])
    assert (out / ".git" / "HEAD").read_text() == (out / "CNAME").read_text() == "mine"
    assert [path.name for path in (out / "ort").iterdir()] == ["ort.wasm.min.mjs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "site"]
    assert (tmp_path / "link").is_symlink()


FETCHES = """
import { graphsOf } from "./sampler.js";
let calls = 0;
const read = async (name) => {
  if (++calls <= 2) throw new Error("no network");
  return new Uint8Array(1);
};
const ort = { InferenceSession: { create: async () => "a session" } };
const graphs = graphsOf(ort, {}, read);
const first = await graphs.guided().catch((error) => error.message);
console.log(first, "-", await graphs.guided());
"""


def test_a_graph_that_could_not_be_fetched_is_fetched_again(node: str) -> None:
    command = [node, "--input-type=module", "--eval", FETCHES]
    run = subprocess.run(command, cwd=PAGE, capture_output=True, text=True, timeout=HANGING_S)
    assert run.stdout == "no network - a session\n", run.stderr


def test_without_npm_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries.shutil, "which", lambda _: None)
    with pytest.raises(ExportError, match=r"npm is not installed\..* --library"):
        library(None, webgpu=False)


class Host(http.server.SimpleHTTPRequestHandler):
    """Any static host, without a log."""

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hosted(site: Path) -> Iterator[str]:
    """The address of a host that serves a site."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Host, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with hosted(site) as found:
        yield found


Launch = Callable[..., Any]


@pytest.fixture(scope="module")
def launch() -> Iterator[Launch]:
    """launch(flag, …): Chromium, without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as started:
        yield lambda *flags: started.chromium.launch(executable_path=path, args=flags)


@pytest.fixture(scope="module")
def browser(launch: Launch) -> Iterator[Any]:
    with launch() as found:
        yield found


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A page on which no script may fail, and which may contact no other host."""
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    page.set_default_timeout(HANGING_S * 1000)
    errors: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    yield page
    context.close()
    assert errors == []
    assert all(url.startswith((address, "blob:", "data:")) for url in asked), asked


def result(page: Any) -> np.ndarray:
    """The x of the page's last image, float32."""
    page.wait_for_selector("body[data-done]")
    return np.array(page.evaluate("Array.from(globalThis.unnoise.x)"), np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_same_seed_gives_the_same_image_in_a_browser(
    page: Any, address: str, emoji: Sampler, solver: str
) -> None:
    numbers = f"label=11&solver={solver}&steps={STEPS}&guidance=2.5&seed={2**64 - 1}"
    page.goto(f"{address}/?backend=wasm#{numbers}")
    x = result(page)
    expected = emoji.sample(1, 2**64 - 1, label=11, guidance=2.5, solver=solver, steps=STEPS)
    assert np.abs(x - expected.ravel()).max() <= NEAR
    assert numbers in page.url


@pytest.mark.slow
def test_an_image_is_made_by_the_form_without_a_network(
    page: Any, address: str, emoji: Sampler, tmp_path: Path
) -> None:
    page.goto(f"{address}/?backend=wasm")
    page.wait_for_selector("body[data-ready=wasm]")
    page.evaluate("navigator.serviceWorker.ready")
    page.reload()  # the second visit runs under the service worker, which keeps the library
    page.wait_for_selector("body[data-ready=wasm]")
    page.context.set_offline(True)
    page.reload()
    page.wait_for_selector("body[data-ready=wasm]")
    page.select_option("#label", "3")
    page.select_option("#solver", "dpmpp_2m")
    page.select_option("#steps", str(STEPS))
    page.fill("#guidance", "1")
    page.fill("#seed", "7")
    page.click("#make")
    expected = emoji.sample(1, 7, label=3, guidance=1.0, solver="dpmpp_2m", steps=STEPS)
    assert np.abs(result(page) - expected.ravel()).max() <= NEAR
    assert "seed 7, dpmpp_2m, 5 steps" in page.inner_text("#facts")
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as image:
        difference = np.asarray(image)[..., :3].astype(int) - emoji.to_uint8(expected)[0]
    assert np.abs(difference).max() <= 1
    assert page.locator("#gallery img").count() == 1


@pytest.mark.slow
def test_cancelling_ends_a_sample(page: Any, address: str) -> None:
    page.goto(f"{address}/?backend=wasm#label=3&solver=ddpm&steps=10&seed=1&guidance=2")
    page.wait_for_selector("body[data-step]")
    page.click("#cancel")
    page.locator("#facts", has_text="Cancelled").wait_for()
    page.fill("#seed", "2")
    page.click("#make")
    result(page)


@pytest.mark.slow
def test_the_facts_of_an_image_are_those_that_it_was_made_with(page: Any, address: str) -> None:
    page.goto(f"{address}/?backend=wasm#label=3&solver=ddpm&steps=10&seed=1&guidance=2")
    page.wait_for_selector("body[data-step]")
    page.fill("#seed", "9")
    result(page)
    assert "seed 1, ddpm, 10 steps" in page.inner_text("#facts")
    assert "seed=1&" in page.url + "&"


@pytest.mark.slow
def test_a_seed_that_is_none_is_refused(page: Any, address: str) -> None:
    page.goto(f"{address}/?backend=wasm")
    page.wait_for_selector("body[data-ready=wasm]")
    page.fill("#seed", str(2**64))
    page.click("#make")
    assert "at most 18446744073709551615" in page.inner_text("#facts")


@pytest.mark.slow
def test_webgpu_draws_nearly_the_same(
    package: Path, launch: Launch, first_release: Path, tmp_path: Path
) -> None:
    """On a GPU in software, which rounds in its own way. It shows that the graphs run."""
    bundle = Bundle.load(first_release / "bundle")
    site = Site(bundle=bundle, solvers=["ddim"], steps=[STEPS], package=package)
    write_site(site, tmp_path / "site")
    flags = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
    with hosted(tmp_path / "site") as address, launch(*flags) as browser:
        page = browser.new_page()
        page.set_default_timeout(HANGING_S * 1000)
        page.goto(f"{address}/#label=3&solver=ddim&steps={STEPS}&guidance=2&seed=5")
        page.wait_for_selector("body[data-ready]")
        if page.get_attribute("body", "data-ready") != "webgpu":
            pytest.skip("this Chromium has no WebGPU")
        expected = Sampler(bundle).sample(1, 5, label=3, guidance=2.0, solver="ddim", steps=STEPS)
        assert np.abs(result(page) - expected.ravel()).max() <= 1e-3
