"The widgets in JupyterLab, in a real browser: every notebook is run, every control moved by mouse and by keyboard, and the picture changes."
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from vugen.lab.docs import project_root

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.timeout(1500), pytest.mark.skipif(not CHROMIUM and not os.environ.get("VUGEN_REQUIRE_BROWSER"), reason="no chromium here: install it to run the browser tests")]
ROOT = project_root(Path(__file__).parent)
WAIT = 400_000  # milliseconds; a notebook runs in one minute on two free cores
NOTEBOOKS = ("widgets_view", "widgets_latents", "widgets_binding", "widgets_sampling", "widgets")
SETTINGS = {"notebook-extension/tracker": {"windowingMode": "none"}, "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab of its own: address, token, and the folder with copies of the notebooks."
    assert CHROMIUM, "VUGEN_REQUIRE_BROWSER is set and chromium is not installed"
    home, port, token = tmp_path_factory.mktemp("lab"), free_port(), secrets.token_hex(16)
    books, settings = home / "books", home / "settings"
    books.mkdir()
    for name in NOTEBOOKS: shutil.copy(ROOT / "nbs" / "lab" / f"{name}.ipynb", books)
    for name, content in SETTINGS.items():
        path = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTERLAB_WORKSPACES_DIR": str(home / "spaces"),
           "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_RUNTIME_DIR": str(home / "runtime"), "IPYTHONDIR": str(home / "ipython")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={books}", "--allow-root",
               "--LabApp.extension_manager=readonly", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate"]
    with (home / "log").open("w") as out: server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=books)
    address = f"http://127.0.0.1:{port}"
    for _ in range(180):
        assert server.poll() is None, (home / "log").read_text()
        try:
            urllib.request.urlopen(f"{address}/api?token={token}", timeout=2).close()
            break
        except OSError: time.sleep(1)
    yield address, token, books
    server.terminate()
    server.wait(30)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield found
        found.close()


@pytest.fixture
def opened(browser, lab, request):
    "The notebook that the test names, opened and run from top to bottom; its kernel ends with the test."
    address, token, books = lab
    name = request.param
    context = browser.new_context(viewport={"width": 1400, "height": 1500})
    page, outside, errors = context.new_page(), [], []
    page.on("request", lambda r: outside.append(r.url) if not r.url.startswith((address, address.replace("http", "ws"), "data:", "blob:")) else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto(f"{address}/lab/tree/{name}.ipynb?token={token}&reset")
    page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for(timeout=WAIT)
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for(timeout=WAIT)
    page.keyboard.press("Control+B")  # the list of files goes, the notebook has the window
    for _ in range(5):  # a kernel may say that it is idle before it takes cells
        page.wait_for_timeout(2000)
        for dialog in page.locator("dialog.jp-Dialog").all():  # such as the question which kernel to take
            print("JupyterLab asks:", " ".join(dialog.inner_text().split())[:200])
            dialog.locator("button.jp-mod-accept").click()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_timeout(3000)
        if page.evaluate("() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].some(e => /[*\\d]/.test(e.textContent))"): break
    done = "() => { const p = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.textContent); return p.some(t => /\\d/.test(t)) && !p.some(t => t.includes('*')); }"
    page.wait_for_function(done, timeout=WAIT)
    wrong = page.locator("[data-mime-type='application/vnd.jupyter.error']").all_inner_texts()
    assert not wrong, wrong
    yield page
    for session in json.load(urllib.request.urlopen(f"{address}/api/sessions?token={token}")):
        urllib.request.urlopen(urllib.request.Request(f"{address}/api/sessions/{session['id']}?token={token}", method="DELETE"))
    context.close()
    assert not outside, "requests left this machine: " + ", ".join(outside[:3])
    assert not errors, errors


def notebook(name): return pytest.mark.parametrize("opened", [name], indirect=True)


def widget(page, label):
    found = page.locator(f"section.vugen[aria-label='{label}']").first
    found.scroll_into_view_if_needed()
    found.wait_for()
    return found


def sources(part): return part.locator("img").evaluate_all("found => found.map(one => one.src)")


def changes(page, part, act):
    "The pictures of a part are other ones after `act`."
    before = sources(part)
    act()
    deadline = time.monotonic() + 120
    while sources(part) == before:
        assert time.monotonic() < deadline, "the picture did not change"
        page.wait_for_timeout(50)
    page.wait_for_timeout(200)


def says(page, place, text):
    "A place comes to hold a text."
    deadline = time.monotonic() + 200
    while text not in place.inner_text():
        assert time.monotonic() < deadline, f"{text!r} is not in {place.inner_text()!r}"
        page.wait_for_timeout(100)


# texts and controls that leave the widget or are cut
HIDDEN = """(root) => {
  const wrong = [], edge = root.getBoundingClientRect();
  for (const e of root.querySelectorAll('button, select, input, p, figcaption, label > span, svg')) {
    const box = e.getBoundingClientRect(); if (!box.width || e.closest('.vugen-scroll, .vugen-grid')) continue;
    if (box.right > edge.right + 1 || box.left < edge.left - 1) wrong.push('outside: ' + (e.textContent || e.tagName));
    if (e.scrollWidth > e.clientWidth + 1 && e.matches('p, figcaption, button')) wrong.push('cut: ' + e.textContent);
  }
  for (const e of root.querySelectorAll('button, select, input, textarea, [role=application], [role=gridcell], g[tabindex]')) {
    const named = e.getAttribute('aria-label') || e.textContent || (e.labels && e.labels.length);
    if (!named && !e.querySelector('img[alt]')) wrong.push('no name: ' + e.outerHTML.slice(0, 80));
  }
  for (const e of root.querySelectorAll('img')) if (!e.alt) wrong.push('no alternative text: ' + e.outerHTML.slice(0, 60));
  return wrong;
}"""


def assert_all_is_seen(page, found):
    "In a wide and in a narrow window, with nothing cut, nothing nameless."
    for size in ({"width": 560, "height": 1200}, {"width": 1400, "height": 1500}):
        page.set_viewport_size(size)
        page.wait_for_timeout(400)
        if os.environ.get("VUGEN_SHOTS"): found.screenshot(path=f"{os.environ['VUGEN_SHOTS']}/{found.get_attribute('aria-label').replace(' ', '-')}-{size['width']}.png")
        assert not (wrong := found.evaluate(HIDDEN)), wrong


def saved(page, lab, name):
    "The notebook as it is on disk after saving."
    page.keyboard.press("Escape")
    page.keyboard.press("Control+S")
    page.wait_for_timeout(2500)
    return json.loads((lab[2] / f"{name}.ipynb").read_text(encoding="utf-8"))


def static_texts(book):
    "The sentences of the static pictures, each of which is there as PNG and as HTML too."
    found = [output["data"] for cell in book["cells"] for output in cell.get("outputs", []) if "data-vugen-static" in "".join(output.get("data", {}).get("text/html", ""))]
    assert all("image/png" in data for data in found)
    return ["".join(data["text/plain"]) for data in found]


@notebook("widgets_view")
def test_the_smallest_widget(opened, lab):
    found = widget(opened, "brightness")
    slider, picture = found.locator("input[type=range]"), found.locator("[data-block=sight]")
    slider.focus()
    changes(opened, picture, lambda: opened.keyboard.press("ArrowRight"))
    says(opened, picture, "50%")
    assert slider.evaluate("e => document.activeElement === e") # the keyboard stays
    assert not opened.locator("[data-vugen-static]").first.is_visible() # the static picture hides while the widget lives
    opened.wait_for_timeout(1500)
    assert static_texts(saved(opened, lab, "widgets_view"))[-1] == "A plain grey square at a level of 50%."
    assert_all_is_seen(opened, found)


@notebook("widgets_latents")
def test_latents(opened, lab):
    found = widget(opened, "latent inspector")
    block = lambda name: found.locator(f"[data-block={name}]")
    sight, dots = block("sight"), block("map").locator("circle")
    changes(opened, sight, lambda: dots.nth(20).click(force=True))  # a click on a point, or on the one that lies over it
    svg = block("map").locator("svg")
    svg.focus()
    changes(opened, sight, lambda: opened.keyboard.press("ArrowDown"))
    box = svg.bounding_box()
    opened.mouse.move(box["x"] + 5, box["y"] + 5)
    opened.mouse.down()
    opened.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=5)
    opened.mouse.up()
    says(opened, block("selection"), "first colour")
    svg.focus()
    opened.keyboard.press("Escape")
    says(opened, block("selection"), "Selected: 0 of 160")
    opened.keyboard.press("Enter")
    says(opened, block("selection"), "Selected: 1 of 160")
    block("change").get_by_text("reset").click()
    opened.wait_for_timeout(1000)
    perturb = block("change").locator("input[type=range]")
    perturb.focus()
    changes(opened, sight, lambda: [opened.keyboard.press("ArrowRight") for _ in range(12)])
    changes(opened, block("neighbours"), lambda: dots.nth(60).click(force=True))
    block("neighbours").locator("button").first.click()
    block("change").get_by_label("swap with picture").select_option("all")
    opened.wait_for_timeout(500)
    cell = block("patch").locator("[role=gridcell]").nth(27)
    cell.scroll_into_view_if_needed()
    changes(opened, block("patch"), lambda: cell.click())
    changes(opened, block("patch"), lambda: [opened.keyboard.press("ArrowRight"), opened.keyboard.press("Space")])
    says(opened, block("patch"), "Change in 2 patches")
    colors = dots.evaluate_all("found => found.map(one => one.getAttribute('fill')).join()")
    block("settings").get_by_label("colour by").select_option("relation")
    opened.wait_for_function("colors => [...document.querySelectorAll('[data-block=map] circle')].map(one => one.getAttribute('fill')).join() !== colors", arg=colors, timeout=WAIT)
    print("redraw of the inspector, ms:", found.get_attribute("data-ms"))
    opened.wait_for_timeout(3000)
    assert any("coloured by relation, 1 selected" in text for text in static_texts(saved(opened, lab, "widgets_latents")))
    assert_all_is_seen(opened, found)

    explorer = widget(opened, "reducer explorer")
    film, slider = explorer.locator("[data-block=film]"), explorer.locator("[data-block=film] input[type=range]")
    slider.focus()
    changes(opened, film, lambda: opened.keyboard.press("ArrowRight"))
    changes(opened, film, lambda: slider.click(position={"x": 3, "y": 5}))
    print("redraw of the explorer, ms:", film.locator("> div").get_attribute("data-ms"))
    changes(opened, film, lambda: explorer.locator("[data-block=choices] button").nth(2).click())
    assert_all_is_seen(opened, explorer)


@notebook("widgets_binding")
def test_binding(opened, lab):
    found = widget(opened, "binding board")
    block = lambda name: found.locator(f"[data-block={name}]")
    thing = lambda n: block("board").locator("g[tabindex]").nth(n)
    at = lambda n: thing(n).get_attribute("transform")
    rows = block("verdict").locator("tbody tr")
    says(opened, rows.first, "false now")
    box, board = thing(0).bounding_box(), block("board").locator("svg").bounding_box()
    opened.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    opened.mouse.down()
    opened.mouse.move(board["x"] + 30, board["y"] + board["height"] - 60, steps=6)
    opened.mouse.up()
    opened.wait_for_timeout(1500)
    box = thing(1).bounding_box()
    opened.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    opened.mouse.down()
    opened.mouse.move(board["x"] + board["width"] - 40, board["y"] + board["height"] - 60, steps=6)
    opened.mouse.up()
    says(opened, rows.first, "true now")
    says(opened, block("verdict"), "best")
    print("redraw of the board, ms:", found.get_attribute("data-ms"))
    place = at(0)
    thing(0).focus()
    opened.keyboard.press("ArrowUp")
    opened.wait_for_timeout(800)
    assert at(0) != place and thing(0).evaluate("e => document.activeElement === e")
    opened.keyboard.press("c")
    says(opened, rows.first, "false now")
    assert "orange circle" in thing(0).get_attribute("aria-label")
    block("caption").get_by_text("tell what is there").click()
    says(opened, rows.first, "an orange circle")
    caption = block("caption").locator("input[type=text]")
    caption.fill("a florble")
    caption.press("Enter")
    says(opened, found.locator(".vugen-message"), "florble")
    judged = rows.first.locator("th, td").first.inner_text()
    thing(0).focus()
    opened.keyboard.press("ArrowUp")
    opened.wait_for_function("() => document.querySelector('[data-block=caption] input[type=text]').value !== 'a florble'", timeout=WAIT)
    assert caption.input_value() in judged and not found.locator(".vugen-message").is_visible()  # with the refusal goes what was refused
    caption.fill("a blue square right of an orange circle")
    caption.press("Enter")
    says(opened, rows.first, "a blue square right of")
    block("thing").get_by_text("add a thing").click()
    opened.wait_for_timeout(1000)
    assert block("board").locator("g[tabindex]").count() == 3 and not found.locator(".vugen-message").is_visible()
    assert block("thing").locator(".vugen-heading").inner_text() == "Thing 3 of 3"
    thing(0).focus()
    says(opened, block("thing").locator(".vugen-heading"), "Thing 1 of 3")
    done = "() => !document.querySelector('[data-block=verdict]').textContent.includes('…')"
    opened.wait_for_function(done, timeout=WAIT)
    assert_all_is_seen(opened, found)


@notebook("widgets_sampling")
def test_sampling(opened, lab):
    found = widget(opened, "denoising film")
    film, settings = found.locator("[data-block=film]"), found.locator("[data-block=settings]")
    slider = film.locator("input[type=range]")
    slider.focus()
    changes(opened, film, lambda: opened.keyboard.press("ArrowRight"))
    changes(opened, film, lambda: slider.click(position={"x": 4, "y": 5}))
    print("redraw of the film, ms:", film.locator("> div").get_attribute("data-ms"))
    changes(opened, film, lambda: film.locator("button").click())  # play
    says(opened, film, "the sample.")
    seed = settings.get_by_label("seed", exact=True)
    seed.fill("7")
    changes(opened, film, lambda: seed.press("Enter"))
    seed.fill("-3")
    seed.press("Enter")
    says(opened, found.locator(".vugen-message"), "seed is -3")
    steps = settings.get_by_label("steps", exact=True)
    steps.fill("200")
    steps.press("Enter")
    found.locator(".vugen-busy").wait_for(state="visible")
    found.get_by_role("button", name="cancel").click()
    says(opened, found.locator(".vugen-message"), "Cancelled")
    assert_all_is_seen(opened, found)

    explorer = widget(opened, "guidance explorer")
    film = explorer.locator("[data-block=film]")
    film.locator("input[type=range]").focus()
    changes(opened, film, lambda: opened.keyboard.press("ArrowRight"))
    print("redraw of guidance, ms:", film.locator("> div").get_attribute("data-ms"))
    first = explorer.get_by_label("first seed")
    first.fill("2")
    changes(opened, film, lambda: first.press("Enter"))
    says(opened, film, "seed 5")
    assert_all_is_seen(opened, explorer)


@notebook("widgets")
def test_the_overview(opened, lab):
    found = widget(opened, "reducer explorer")
    film = found.locator("[data-block=film]")
    film.locator("input[type=range]").focus()
    changes(opened, film, lambda: opened.keyboard.press("ArrowLeft"))
    assert_all_is_seen(opened, found)
