"""The playground in a real browser, under voila and in JupyterLab: what a person would click, and what they would see.

Screenshots are written to _docs/screenshots/. Without Chromium these tests are skipped; `.ci/run` sets TINYDIFF_BROWSER=required.
"""
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import psutil
import pytest

from tinydiff.sample import TextToImage, read_settings

ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT / "_docs/screenshots"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run"]
APP = "import sys; from tinydiff.playground import main; sys.argv = ['tinydiff-app', '--no_browser', '--port', '{port}', '--idle', '8']; main()"
PROMPT = "two orange fish under the sea"
SECOND = 1000  # Playwright counts milliseconds
pytestmark = pytest.mark.skipif(BROWSER is None and os.environ.get("TINYDIFF_BROWSER") != "required",
                                reason="no browser: install chromium to run the tests of the page")


@contextmanager
def serving(arguments: list[str], folder: Path, path: str = ""):
    "A server in a process group of its own, on a free port: (address, process) once it answers, ended with all its kernels."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"JUPYTER_CONFIG_DIR": str(folder / "config"), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen([sys.executable, *(a.replace("{port}", str(port)) for a in arguments)], env=env, cwd=folder, stdout=log, stderr=log)
    try:
        yield wait_for(f"http://127.0.0.1:{port}/{path}", server, folder / "server.log"), psutil.Process(server.pid)
    finally:
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)] if server.poll() is None else []
        server.terminate()
        for process in psutil.wait_procs(family, timeout=10)[1]:
            process.kill()


def wait_for(address: str, server: subprocess.Popen, log: Path) -> str:
    "The address, once something answers there; asking for a file that is not there starts no kernel."
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(address.rstrip("/") + "/static/none", timeout=2)
        except urllib.error.HTTPError:
            return address
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture
def browser():
    "Chromium without a window."
    assert BROWSER, "TINYDIFF_BROWSER=required, but there is neither chromium nor google-chrome"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


def open_page(browser, address: str):
    "A tab whose waits are patient, for busy machines."
    page = browser.new_page(viewport={"width": 1180, "height": 1480})
    page.set_default_timeout(90 * SECOND)
    page.goto(address)
    return page


def screenshot(page, name: str):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


# --- what a person does

def ready(page):
    "The page is there, and the model is warm."
    page.wait_for_selector(".td-page button.td-stop:disabled")
    page.wait_for_timeout(0.5 * SECOND)
    page.wait_for_selector(".td-page button.td-stop:disabled")


def status(page) -> str:
    return page.inner_text(".td-stage .td-status")


def wait_for_status(page, text: str):
    page.wait_for_function("text => document.querySelector('.td-stage .td-status').innerText.includes(text)", arg=text)


def picture(page) -> str:
    "The picture on the page, as the text of its address."
    return page.get_attribute(".td-stage img", "src")


def generate(page, prompt: str) -> list[str]:
    "Type, click, and look several times while the picture forms; returns the different pictures seen before the last."
    page.fill(".td-prompt input", prompt)
    page.click(".td-generate")
    page.wait_for_selector(".td-stage img")
    seen = []
    while "finished" not in status(page):
        if picture(page) not in seen:
            seen.append(picture(page))
        page.wait_for_timeout(0.05 * SECOND)
    return [earlier for earlier in seen if earlier != picture(page)]


def stop_halfway(page):
    "Generate, and stop once three steps are done; returns the number of steps that were taken."
    page.click(".td-generate")
    wait_for_status(page, "step 3 of")
    page.click("button.td-stop")
    wait_for_status(page, "stopped after")
    return int(status(page).split()[2])


def restore(page, index: int):
    page.click(f".td-thumb >> nth={index}")
    wait_for_status(page, "restored")


def open_tab(page, name: str):
    page.click(f".td-inside .lm-TabBar-tab >> text={name}")


def click_word(page, word: str):
    "The captions under the maps, once they are this word's."
    open_tab(page, "Words")
    page.click(f".td-words button >> text={word}")
    page.wait_for_function("word => [...document.querySelectorAll('.td-panel figcaption')].some(c => c.innerText.startsWith(word + ', step'))", arg=word)


def draw(page, tab: str, name: str):
    "Press a panel's Draw, and wait for the end."
    open_tab(page, tab)
    page.click(".td-panel:visible button >> text=Draw")
    page.wait_for_selector("button.td-stop:enabled")
    page.wait_for_selector("button.td-stop:disabled")
    page.wait_for_selector(".td-panel:visible figure")
    screenshot(page, name)


# --- the tests

def test_app(browser, tmp_path):
    "`make app`: no code, nothing from other machines, the whole story, two tabs, and a tab that is closed on the way."
    with serving(["-c", APP], tmp_path, "voila/") as (address, server):
        elsewhere = []
        page = open_page(browser, "about:blank")
        page.on("requestfinished", lambda request: elsewhere.append(request.url) if "://127.0.0.1" not in request.url and request.url.startswith("http") else None)
        page.goto(address.removesuffix("voila/"))
        ready(page)
        assert "import" not in page.inner_text("body") and not elsewhere

        assert len(generate(page, PROMPT)) >= 3, "the picture did not form before the eyes"
        screenshot(page, "app-finished")
        seed = page.input_value(".td-seed input")
        check_download(page, int(seed), tmp_path)
        scrub(page)
        click_word(page, "orange")
        screenshot(page, "app-words")

        page.fill(".td-prompt input", "<b>a red boat</b>")
        assert 3 <= stop_halfway(page) <= 8
        assert page.locator(".td-thumb").count() == 1, "a stopped picture is not history"
        restore(page, 0)
        assert (page.input_value(".td-prompt input"), page.input_value(".td-seed input")) == (PROMPT, seed)

        for _ in range(6):
            page.click(".td-generate")
        wait_for_status(page, "finished")
        assert page.locator(".td-thumb").count() == 2, "the last of many clicks wins"
        draw(page, "Guidance", "app-guidance")
        repaint_with_mask(page)
        two_tabs(browser, page, address.removesuffix("voila/"), server)


def check_download(page, seed: int, folder: Path):
    "The link gives a PNG that knows how it was made, and the command line would make the same."
    with page.expect_download() as download:
        page.click("text=download PNG")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    settings = read_settings(path)
    assert path.name == f"two-orange-fish-under-the-sea-{seed}.png" and (settings["prompt"], settings["seed"]) == (PROMPT, seed)
    from PIL import Image
    again = TextToImage.from_pretrained(settings["checkpoint"])(
        settings["prompt"], seed=seed, num_inference_steps=settings["steps"], guidance_scale=settings["guidance_scale"])[0]
    with Image.open(BytesIO(path.read_bytes())) as saved:
        assert max(abs(a - b) for a, b in zip(saved.convert("RGB").tobytes(), again.tobytes())) <= 1


def scrub(page):
    "The step slider, moved with the keyboard, shows other pictures."
    latest = page.get_attribute(".td-panel:visible figure:first-child img", "src")
    page.focus(".td-panel:visible .noUi-handle")
    for _ in range(8):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function("document.querySelector('.td-panel figcaption').innerText.includes('step 17')")
    assert page.get_attribute(".td-panel:visible figure:first-child img", "src") != latest


def repaint_with_mask(page):
    "Draw a stroke, wipe a part of it, and repaint what is left: outside, the picture stays."
    open_tab(page, "From a picture")
    page.locator(".td-mask").scroll_into_view_if_needed()
    empty = drawn(page)
    stroke(page, (0.3, 0.4), (0.7, 0.6))
    whole = drawn(page)
    stroke(page, (0.3, 0.4), (0.35, 0.4))
    assert empty == 0 < drawn(page) < whole < 256 / 2
    draw(page, "From a picture", "app-repaint")
    assert page.locator(".td-panel:visible figure").count() == 2
    before, after = (page.locator(".td-panel:visible figure img").nth(i).get_attribute("src") for i in range(2))
    assert before != after
    page.click("text=Clear the mask")
    page.wait_for_function("!document.querySelector('.td-mask').getContext('2d').getImageData(0, 0, 256, 256).data.some(value => value)")


def stroke(page, start: tuple[float, float], end: tuple[float, float]):
    "From one place of the mask to another, as shares of its width and height, with the mouse button down."
    box = page.locator(".td-mask").bounding_box()
    places = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in (start, end)]
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=20)
    page.mouse.up()


def drawn(page) -> float:
    "How many of the mask's cells are marked on the page, by their color."
    return page.evaluate("[...document.querySelector('.td-mask').getContext('2d').getImageData(0, 0, 256, 256).data].filter((value, i) => i % 4 == 3 && value).length") / 256


def kernels(server: psutil.Process) -> int:
    "How many kernels live; one that ends while we look does not."
    living = 0
    for child in server.children(recursive=True):
        with suppress(psutil.Error):
            living += "ipykernel_launcher" in " ".join(child.cmdline())
    return living


def two_tabs(browser, page, address: str, server: psutil.Process):
    "A second tab has a kernel of its own; closed in mid-sampling it takes that kernel along, and the first tab goes on."
    other = open_page(browser, address)
    ready(other)
    assert kernels(server) == 2 and other.locator(".td-thumb").count() == 0
    other.click(".td-generate")
    wait_for_status(other, "step 2 of")
    other.close(run_before_unload=True)
    deadline = time.monotonic() + 60
    while kernels(server) > 1 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert kernels(server) == 1, "the closed tab's kernel lives on"
    count = page.locator(".td-thumb").count()
    page.click(".td-generate")
    page.wait_for_function("count => document.querySelectorAll('.td-thumb').length > count", arg=count)


def test_jupyterlab(browser, tmp_path):
    "The committed notebook opens without a widget error; the page works in a cell."
    from tinydiff.playground import write_notebook
    write_notebook(tmp_path / "play.ipynb")
    (tmp_path / "config/labconfig").mkdir(parents=True)
    (tmp_path / "config/labconfig/page_config.json").write_text('{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}')
    shutil.copy(ROOT / "nbs/14_playground.ipynb", tmp_path)
    lab = ["-m", "jupyterlab", "--no-browser", "--allow-root", "--port={port}", "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0",
           "--IdentityProvider.token=", f"--ServerApp.root_dir={tmp_path}"]
    with serving(lab, tmp_path) as (address, _):
        page = open_page(browser, f"{address}doc/tree/play.ipynb")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        page.wait_for_selector("text=| Idle")
        page.click(".jp-Notebook .jp-CodeCell .cm-content")
        page.keyboard.press("Shift+Enter")
        ready(page)
        assert len(generate(page, PROMPT)) >= 3
        click_word(page, "fish")
        screenshot(page, "lab")
        assert 3 <= stop_halfway(page) <= 8
        restore(page, 0)
        assert page.input_value(".td-prompt input") == PROMPT
        opens_without_errors(page, f"{address}doc/tree/14_playground.ipynb")


def opens_without_errors(page, address: str):
    "A notebook from somebody else, not yet run, shows its widgets' names in their place, and no error."
    page.goto(address)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_selector("text=| Idle")
    cell = page.locator(".jp-Notebook .jp-CodeCell", has_text="playground = Playground()").first
    cell.scroll_into_view_if_needed()
    cell.locator(".jp-OutputArea-output").first.wait_for()
    screenshot(page, "lab-not-run")
    assert "Error" not in cell.inner_text() and "Error displaying widget" not in page.inner_text("body")
