"The playground in a real browser, as a visitor would use it."
import json
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
from vugen.paths import checkpoints_dir

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


# what a visitor cannot read or see: text wider than its box, or over a picture; boxes that leave the window or the box around them
HIDDEN = """() => {
  const shown = e => e.offsetParent !== null, box = e => e.getBoundingClientRect(), wrong = [];
  for (const e of document.querySelectorAll('.caption-label, .verdict th, .verdict td, .verdict p, #told p, [role=tab]')) if (shown(e)) {
    if (e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1) wrong.push('cut: ' + e.textContent);
    if (box(e).left < 0 || box(e).right > innerWidth + 1) wrong.push('outside the window: ' + e.textContent);
    if (e.tagName === 'TD' && box(e).right > box(e.closest('tr')).right + 1) wrong.push('beyond its row: ' + e.textContent);
  }
  for (const e of document.querySelectorAll('.caption-label')) if (shown(e)) {
    const item = e.closest('.thumbnail-item'), picture = item.querySelector('img'), frame = item.closest('.block');
    if (box(e).top < box(picture).bottom - 1) wrong.push('over its picture: ' + e.textContent);
    if (box(e).bottom > box(item).bottom + 1 || box(e).right > box(item).right + 1) wrong.push('beyond its frame: ' + e.textContent);
    if (box(item).bottom > box(frame).bottom + 1 || box(item).right > box(frame).right + 1 || box(picture).width < 40) wrong.push('hidden picture: ' + e.textContent);
    if (box(frame).bottom - box(frame.querySelector('.grid-container')).bottom > 40) wrong.push('empty room below: ' + e.textContent);
  }
  for (const e of document.querySelectorAll('.icon-button-wrapper, label.float')) if (shown(e) && box(e).width > 10)
    for (const picture of e.closest('.block').querySelectorAll('img')) if (box(picture).top < box(e).bottom - 1 && box(picture).bottom > box(e).top + 1) wrong.push('a label over a picture: ' + e.textContent);
  if (document.documentElement.scrollWidth > innerWidth + 1) wrong.push('the page scrolls sideways');
  return wrong;
}"""


def assert_all_is_seen(page):
    page.wait_for_timeout(300)  # pictures take their places
    assert not (found := page.evaluate(HIDDEN)), found


def choose(page, title):
    page.locator("#starters .thumbnail-item", has_text=title).click()


def field(page, name): return page.locator(f"#{name} textarea, #{name} input").first


def write_candidates(page, *captions):
    "Type into the Classify tab and see that the words stay: a box that was mounted a moment ago may still take its first value."
    tab(page, "Classify")
    box, text = page.locator("#candidates textarea"), "\n".join(captions)
    for _ in range(5):
        box.fill(text)
        box.blur()
        page.wait_for_timeout(700)
        if box.input_value() == text: return
    raise AssertionError(f"the candidates read {box.input_value()!r} again")


def wait_for(page, name, value):
    page.wait_for_function("([name, value]) => document.querySelector(`#${name} textarea, #${name} input`).value === value", arg=[name, value], timeout=WAIT)


def ask(page, panel):
    "Press the button of a panel and wait for its answer."
    button, answer = PANELS[panel]
    tab(page, panel)
    page.get_by_role("button", name=button, exact=True).click()
    page.locator(answer).last.wait_for(timeout=WAIT)


PANELS = {"Bind": ("Score", "#verdict table"), "Reconstruct": ("Reconstruct", "#reconstructions .thumbnail-item:nth-child(3) img, #reconstructions :nth-child(3) > .thumbnail-item img"),
          "Generate": ("Generate", "#generated :nth-child(4) > .thumbnail-item img"), "Classify": ("Classify", "#classes table")}


@pytest.mark.parametrize("page", [1280, 390], indirect=True)
@pytest.mark.parametrize("title", ["a drawn scene", "an emoji scene", "a photograph"])
def test_every_panel_can_be_read_and_seen(page, title):
    assert all(page.get_by_role("tab", name=name).is_visible() for name in PANELS), "a tab hides"
    if title != "a drawn scene":
        before = field(page, "caption").input_value()
        choose(page, title)
        page.wait_for_function("before => document.querySelector('#caption textarea, #caption input').value !== before", arg=before, timeout=WAIT)
    for panel in ("Bind", "Reconstruct", "Classify", *(["Generate"] if title == "a drawn scene" else [])):
        ask(page, panel)
        assert_all_is_seen(page)
    assert not set("✓✗") & set(page.locator("#classes").inner_text() or "•"), "nobody said which of the captions is true"


@pytest.mark.parametrize("page", [1280, 390], indirect=True)
def test_bind_scores_a_caption_and_its_foils(page):
    ask(page, "Bind")
    text = page.locator("#verdict").inner_text()
    assert "swap" in text and "best" in text and "add-attribute" in text
    named = page.locator("#verdict td[data-scorer=contrastive]").first.evaluate("e => getComputedStyle(e, '::before').content") if page.viewport_size["width"] < 500 else text
    assert "contrastive" in named
    choose(page, "an emoji scene")
    wait_for(page, "caption", "a dog left of a tree")
    page.wait_for_function("!document.querySelector('#verdict table')", timeout=WAIT)
    ask(page, "Bind")
    assert "small dog" not in page.locator("#verdict").inner_text(), "its dog is small"


def test_another_picture_takes_the_verdicts_on_the_last_one_along(page):
    answers = {"#verdict table": 1, "#classes table": 1, "#reconstructions img": 3}
    def shown(): return {name: page.locator(name).count() for name in answers}
    def all_gone(): page.wait_for_function("names => names.every(name => !document.querySelector(name))", arg=list(answers), timeout=WAIT)
    for panel in ("Classify", "Reconstruct", "Bind"): ask(page, panel)
    assert shown() == answers
    field(page, "wanted").fill("a red xylophone")
    page.get_by_role("button", name="Draw").click()
    assert "xylophone" in message(page)
    assert shown() == answers and page.locator("#picture img").is_visible() and not page.locator("[data-testid=status-tracker] .error:visible").count()
    choose(page, "two of a kind")
    wait_for(page, "caption", "a green star above a pink star")
    all_gone()
    ask(page, "Bind")
    field(page, "wanted").fill("a cat above a car")
    page.get_by_role("button", name="Draw").click()
    wait_for(page, "caption", "a cat above a car")
    all_gone()
    assert field(page, "candidates").input_value().startswith("a cat above a car\n")
    ask(page, "Bind")
    page.get_by_role("button", name="Score").click()
    choose(page, "a photograph")  # while the models are still at the last picture
    wait_for(page, "caption", "a cat looking into the camera")
    page.wait_for_timeout(4000)
    all_gone()
    ask(page, "Bind")
    assert "a cat looking into the camera" in page.locator("#verdict").inner_text()
    clear_picture(page)
    all_gone()


def test_a_caption_that_the_scene_contradicts_is_refused(page):
    ask(page, "Bind")
    field(page, "caption").fill("a blue circle left of a red square")
    page.get_by_role("button", name="Score").click()
    assert "does not show" in message(page)
    page.wait_for_function("!document.querySelector('#verdict table')", timeout=WAIT)


def test_drawn_emoji_scene_reaches_every_panel(page):
    field(page, "wanted").fill("a dog left of a tree")
    page.get_by_role("button", name="Draw").click()
    wait_for(page, "caption", "a dog left of a tree")
    write_candidates(page, "a dog left of a tree", "a cat on a chair")
    ask(page, "Classify")
    ask(page, "Reconstruct")
    text = page.locator("#reconstructions").inner_text()
    assert len(re.findall(r"\d+\.\d dB", text)) == 2 and "PCA" in text and "learned" in text


def test_uploaded_photograph_is_reconstructed_and_classified(page, tmp_path):
    photograph = tmp_path / "photograph.jpg"
    next(iter(sample_photographs().values())).save(photograph)
    clear_picture(page)
    upload(page, photograph)
    page.locator("#picture img").wait_for(timeout=WAIT)
    write_candidates(page, "a photograph of a person", "a bowl of fruit")
    ask(page, "Classify")
    assert "scorer 'contrastive'" in page.locator("#classes").inner_text()
    ask(page, "Reconstruct")


@pytest.mark.parametrize("page", [1280, 390], indirect=True)
def test_prompt_becomes_pictures(page):
    tab(page, "Generate")
    defaults = {name: page.locator(f"#{name} input[type=number]").input_value() for name in ("guidance", "steps")}
    trained = json.loads((checkpoints_dir("tiny") / "generator" / "config.json").read_text())
    assert {name: float(value) for name, value in defaults.items()} == {"guidance": trained["guidance_scale"], "steps": trained["num_inference_steps"]}
    field(page, "prompt").fill("a red circle")
    page.locator("#pictures input[type=number]").fill("8")
    page.get_by_role("button", name="Generate").click()
    page.locator("#generated img").nth(7).wait_for(timeout=WAIT)
    said = page.locator("#generated .caption-label").all_inner_texts()
    right = sum("✓" in text for text in said)
    assert len(said) == 8 and all(("✓" in text) != ("✗" in text) for text in said)
    told = page.locator("#told").inner_text()
    assert "a red circle" in told and f"{right} of 8" in told
    assert_all_is_seen(page)


def test_mistakes_become_sentences_and_the_server_stays(page, tmp_path):
    tab(page, "Generate")
    field(page, "prompt").fill("a red xylophone")
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
