"The playground in a real browser, as a visitor would use it."
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from PIL import Image

from vugen.data.images import sample_photographs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM and not os.environ.get("VUGEN_REQUIRE_BROWSER"), reason="no chromium here: install it to run the browser tests")]
WAIT = 120_000  # milliseconds; two slow cores answer well within


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    assert CHROMIUM, "VUGEN_REQUIRE_BROWSER is set and chromium is not installed"
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    code = f"from vugen.lab.playground import launch; launch(port={port}, open_browser=False)"
    with log.open("w") as out:
        server = subprocess.Popen([sys.executable, "-c", code], stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    address = f"http://127.0.0.1:{port}"
    for _ in range(180):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=2).close()
            break
        except OSError:
            time.sleep(1)
    yield address
    assert server.poll() is None, "the server ended during the tests:\n" + log.read_text()
    server.terminate()
    server.wait(20)
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield found
        found.close()


@pytest.fixture
def page(browser, url, request):
    width = getattr(request, "param", 1280)
    context = browser.new_context(viewport={"width": width, "height": 1600})
    found, outside, errors = context.new_page(), [], []
    found.on("request", lambda r: outside.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None)
    found.on("pageerror", lambda e: errors.append(str(e)))
    found.goto(url)
    found.get_by_role("button", name="Score").wait_for(timeout=WAIT)
    yield found
    context.close()
    assert not outside, "requests left this machine: " + ", ".join(outside[:3])
    assert not errors, errors


def tab(page, name):
    page.get_by_role("tab", name=name).click()


def upload(page, path):
    page.locator("#picture input[type=file]").set_input_files(str(path))


def clear_picture(page):
    page.locator("#picture").get_by_role("button", name=re.compile("clear|remove", re.I)).first.click()


def message(page):
    toast = page.locator(".toast-wrap, [data-testid=toast-body]").first
    toast.wait_for(timeout=WAIT)
    return toast.inner_text()


@pytest.mark.parametrize("page", [1280, 390], indirect=True)
def test_bind_scores_a_caption_and_its_foils(page):
    page.get_by_role("button", name="Score").click()
    page.locator("#verdict table").wait_for(timeout=WAIT)
    text = page.locator("#verdict").inner_text()
    assert "swap" in text and "contrastive" in text and "best" in text
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1"), "the page scrolls sideways"


def test_drawn_emoji_scene_reaches_every_panel(page):
    page.locator("#wanted textarea, #wanted input").first.fill("a dog left of a tree")
    page.get_by_role("button", name="Draw").click()
    page.wait_for_function("document.querySelector('#caption textarea, #caption input').value === 'a dog left of a tree'", timeout=WAIT)
    tab(page, "Classify")
    page.locator("#candidates textarea").fill("a dog left of a tree\na cat on a chair")
    page.get_by_role("button", name="Classify").click()
    page.locator("#classes table").wait_for(timeout=WAIT)
    tab(page, "Reconstruct")
    page.get_by_role("button", name="Reconstruct").click()
    page.locator("#reconstructions img").nth(2).wait_for(timeout=WAIT)
    assert "PSNR" in page.locator("#reconstructions").inner_text()


def test_uploaded_photograph_is_reconstructed_and_classified(page, tmp_path):
    photograph = tmp_path / "photograph.jpg"
    next(iter(sample_photographs().values())).save(photograph)
    clear_picture(page)
    upload(page, photograph)
    tab(page, "Classify")
    page.locator("#candidates textarea").fill("a photograph of a person\na bowl of fruit")
    page.wait_for_timeout(1500)
    page.get_by_role("button", name="Classify").click()
    page.locator("#classes table").wait_for(timeout=WAIT)
    assert "scorer 'contrastive'" in page.locator("#classes").inner_text()
    tab(page, "Reconstruct")
    page.get_by_role("button", name="Reconstruct").click()
    page.locator("#reconstructions img").nth(2).wait_for(timeout=WAIT)


def test_prompt_becomes_pictures(page):
    tab(page, "Generate")
    page.get_by_role("button", name="Generate").click()
    page.locator("#generated img").nth(3).wait_for(timeout=WAIT)
    assert "asked" in page.locator("#generated").inner_text()


def test_mistakes_become_sentences_and_the_server_stays(page, tmp_path):
    tab(page, "Generate")
    page.locator("#prompt textarea, #prompt input").first.fill("a red xylophone")
    page.get_by_role("button", name="Generate").click()
    assert "xylophone" in message(page)
    broken = tmp_path / "broken.png"
    whole = tmp_path / "whole.png"
    Image.effect_noise((200, 200), 60).save(whole)
    broken.write_bytes(whole.read_bytes()[:5000])
    page.reload()
    page.get_by_role("button", name="Score").wait_for(timeout=WAIT)
    clear_picture(page)
    upload(page, broken)
    page.wait_for_timeout(1500)
    page.get_by_role("button", name="Score").click()
    assert "broken.png" in message(page)
