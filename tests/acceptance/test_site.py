"The site as smalldocs renders it, its links and words, and every page in a real browser."
import functools
import http.server
import json
import os
import re
import shutil
import threading
from pathlib import Path

import pytest

from vugen.lab.docs import notebooks, project_root, render_site
from vugen.lab.pages import broken_links, introduction, says_something, speechless, taught
from vugen.paths import checkpoints_dir

ROOT = project_root(Path(__file__).parent)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser_test = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM and not os.environ.get("VUGEN_REQUIRE_BROWSER"), reason="no chromium here: install it to run the browser tests")]
WAIT = 120_000  # milliseconds
CODE = [(p.relative_to(ROOT / "nbs").as_posix(), cell) for p in notebooks(ROOT) for cell in json.loads(p.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
SHOWN = ["index", "tour", "models/flow", "api/models.flow", "api/index", "gallery", "cards/index", "cards/generator", "experiment/findings"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words): pass


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The rendered site: `VUGEN_SITE` names one that `make site` just made, or it is rendered here."
    made = os.environ.get("VUGEN_SITE")
    found = Path(made) if made else render_site(ROOT, tmp_path_factory.mktemp("site") / "built")
    assert (found / "index.html").is_file(), f"VUGEN_SITE names {found}, which holds no site"
    return found


@pytest.fixture(scope="module")
def url(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "VUGEN_REQUIRE_BROWSER is set and chromium is not installed"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield found
        found.close()


def watched(browser, url, width):
    "A page and the list of what went wrong in it: errors, failed requests, requests to another host."
    page, wrong = browser.new_context(viewport={"width": width, "height": 900}).new_page(), []
    page.on("request", lambda r: wrong.append(f"asked {r.url}") if not r.url.startswith((url, "data:", "blob:")) else None)
    page.on("response", lambda r: wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    page.on("pageerror", lambda e: wrong.append(f"{page.url}: {e}"))
    page.on("console", lambda m: wrong.append(f"{page.url}: {m.text}") if m.type == "error" else None)
    return page, wrong


def test_every_picture_of_a_notebook_has_words():
    "Seen here at once, without rendering."
    bad = []
    for name, cell in CODE:
        source = "".join(cell["source"])
        kinds = {kind for output in cell["outputs"] for kind in output.get("data", {})}
        alt = re.search(r'^#\|\s*fig-alt:\s*"?(.+?)"?\s*$', source, re.MULTILINE)
        drawn = any(kind.startswith("image/") for kind in kinds) and "text/html" not in kinds
        if drawn and not re.search(r"^#\|\s*hide", source, re.MULTILINE) and not (alt and says_something(alt[1])): bad.append(f"{name}: {source[:60]}")
    assert not bad, "say with `#| fig-alt:` what these cells show"


def test_words_are_of_one_picture():
    "A text that was copied along with its cell describes another picture."
    texts = [re.search(r"fig-alt:\s*(.+)", "".join(cell["source"])) for _, cell in CODE if any("image/png" in output.get("data", {}) for output in cell["outputs"])]
    said = [found[1] for found in texts if found]
    assert len(said) > 100 and len(said) == len(set(said))


def test_every_notebook_module_and_card_has_a_page(site):
    pages = {p.relative_to(site).with_suffix("").as_posix() for p in site.rglob("*.html")}
    assert pages >= {p.relative_to(ROOT / "nbs").with_suffix("").as_posix() for p in notebooks(ROOT)}
    assert pages >= {f"api/{name}" for name in taught(ROOT)} | {f"cards/{p.parent.name}" for p in checkpoints_dir("tiny").glob("*/README.md")} | {"api/index", "cards/index"}


def test_links_and_anchors_lead_somewhere_and_pictures_have_words(site):
    assert not broken_links(site) and not speechless(site)


def test_a_lost_link_and_a_wordless_picture_are_seen(site, tmp_path):
    page = (site / "api/models.flow.html").read_text(encoding="utf-8")
    (tmp_path / "one.html").write_text(page.replace("</main>", '<a href="#nowhere">x</a><img src="one.html" alt="output"></main>'), encoding="utf-8")
    assert "one.html: #nowhere" in broken_links(tmp_path) and speechless(tmp_path) == ['one.html: alt="output"']


def test_the_introduction_of_a_notebook_reaches_its_page(site):
    "nbdev makes the first cell into title and description, and drops the rest of it."
    bare = functools.partial(re.sub, r"<[^>]+>|\W|_", "")
    for path in notebooks(ROOT):
        said = re.sub(r"\$\$?[^$]*\$\$?|`[^`]*`|\]\([^)]*\)|[<>&\\]", "\n", introduction(json.loads(path.read_text(encoding="utf-8"))))
        words = max(re.split(r"[\[.,:;()\"'“”’\n]", re.sub(r"[*_|]", "", said)), key=len).strip()
        page = (site / path.relative_to(ROOT / "nbs")).with_suffix(".html").read_text(encoding="utf-8")
        assert bare(words) in bare(page) or not words, (path.name, words)


def test_an_api_page_tells_signature_parameters_and_docstring(site):
    text = re.sub(r"<[^>]+>", "", (site / "api/models.flow.html").read_text(encoding="utf-8"))
    assert "interpolate(data: torch.Tensor" in text and "The noisy sample at time" in text and "[B, …], standard Gaussian" in text and "required" in text
    assert "/home/" not in text and str(ROOT) not in text


class TestInABrowser:
    pytestmark = browser_test

    def test_every_page_opens_without_errors_or_requests_to_others(self, browser, url, site):
        page, wrong = watched(browser, url, 1280)
        opened = sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html") if "site_libs" not in p.parts)
        for name in opened:
            page.goto(f"{url}/{name}", wait_until="load", timeout=WAIT)
            lost = page.evaluate("[...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.src.slice(0, 80))")
            assert page.title() and page.locator("h1").count() and not lost, (name, lost)
        assert len(opened) > 200 and not wrong, wrong[:5]

    @pytest.mark.parametrize("width", [1280, 390])
    def test_pages_fit_the_screen(self, browser, url, width):
        "Nothing makes a page scroll sideways; what is wide scrolls in itself. `VUGEN_SHOTS` names a folder for screenshots."
        page, wrong = watched(browser, url, width)
        wide = {}
        for name in SHOWN:
            page.goto(f"{url}/{name}.html", wait_until="load", timeout=WAIT)
            page.wait_for_timeout(200)
            if os.environ.get("VUGEN_SHOTS"): page.screenshot(path=f"{os.environ['VUGEN_SHOTS']}/{name.replace('/', '-')}-{width}.png", clip={"x": 0, "y": 0, "width": width, "height": 1800}, full_page=True)
            if (over := page.evaluate("document.documentElement.scrollWidth - innerWidth")) > 1: wide[name] = over
        assert not wide and not wrong, (wide, wrong[:5])

    def test_search_finds_a_page_and_opens_it(self, browser, url):
        page, wrong = watched(browser, url, 1280)
        page.goto(f"{url}/index.html", wait_until="load", timeout=WAIT)
        box = page.get_by_role("searchbox", name="Search").first
        for words, target in (("dimension_shift", "models.flow"), ("model cards", "cards/")):
            box.fill(words)
            page.locator(f".search-result[href*='{target}']").first.wait_for(timeout=WAIT)
        page.locator(".search-result[href*='cards/']").first.click()
        page.wait_for_url("**/cards/**", timeout=WAIT)
        assert page.locator("h1").first.inner_text() and not wrong, wrong

    def test_from_the_home_page_every_part_is_one_click_away(self, browser, url):
        page, wrong = watched(browser, url, 1280)
        for name, title in (("Tour", "Tour"), ("Gallery", "Gallery"), ("Findings", "Findings"), ("Model cards", "Model cards"), ("API", "API")):
            page.goto(f"{url}/index.html", wait_until="load", timeout=WAIT)
            page.locator(".navbar").get_by_role("link", name=name, exact=True).first.click()
            page.wait_for_load_state("load")
            assert page.locator("h1").first.inner_text().startswith(title)
        assert not wrong, wrong
