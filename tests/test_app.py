"""The web page: what its buttons do, and the page itself in a headless Chromium.

The second half needs gradio, selenium (tests/requirements.txt) and Debian's chromium and
chromium-driver; it is skipped, saying what is missing, where they are not installed.
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny_model import make_tiny

from nexus_min.__main__ import main
from nexus_min.app import page as app
from nexus_min.app.page import Handlers, Limits
from nexus_min.model import flow
from nexus_min.pipeline import NexusGen
from nexus_min.sampling import SamplingParams
from nexus_min.toy.world import Object, Scene, render

ON_GRAY = Scene((Object("circle", "red", "large", 4),), "gray")
FORM = (2, 0, 64, 64)  # steps, seed, height, width
SCREENSHOTS = os.environ.get("SCREENSHOTS")  # a folder for them
PATIENCE = 600  # seconds; a page on a busy machine


@pytest.fixture(scope="module")
def handlers() -> Handlers:
    return Handlers(make_tiny(), Limits(num_steps=12, tokens=2))


@pytest.fixture
def photo(tmp_path) -> str:
    Image.linear_gradient("L").resize((50, 30)).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


# ---- what the buttons do -------------------------------------------------------------------------


def test_drawing_shows_images_on_the_way(handlers):
    seen = list(handlers.generate("a circle", 9, 3, 64, 48))
    assert all(facts.startswith("seed 3, 9 steps, cfg 1, 48 x 64 px; ") for *_, facts in seen[1:])
    images = [image for image, *_ in seen if image is not None]
    assert len(images) == 5 + 1 and len({p.tobytes() for p in images}) > 1  # every second step
    want = handlers.model.generate("a circle", num_steps=9, seed=3, width=48, max_new_tokens=2)
    assert images[-1].tobytes() == want.tobytes()


def test_editing_and_asking(handlers, photo):
    image, said, facts = list(handlers.edit(photo, "white", "editing", *FORM))[-1]
    assert image.size == (64, 64) and "2 steps" in facts
    model, options = handlers.model, {"max_new_tokens": 2, "num_steps": 1}
    assert said == dict(model.edit_steps(photo, "white", **options))["text"] != ""
    for image in (photo, None):
        want = model.understand(image, "what?", max_new_tokens=2)
        assert list(handlers.understand(image, "what?")) == [(want, "")]


def test_a_conversation_keeps_its_turns_and_takes_the_form_of_each(handlers, photo):
    chat, shown, _, _ = list(handlers.chat(None, "hello", photo, "slots", *FORM))[-1]
    assert [m["role"] for m in shown] == ["user", "assistant"]
    assert shown[0]["content"] == "[image] hello" and len(chat.messages) == 2
    again, shown, _, _ = list(handlers.chat(chat, "more", None, "slots", 3, 8, 64, 64))[-1]
    assert again is chat and len(shown) == 4 and chat.sampling == SamplingParams(64, 64, 3, seed=8)
    other, shown, _, _ = list(handlers.chat(chat, "more", None, "predicted", *FORM))[-1]
    assert other is not chat and len(shown) == 2  # another memory begins anew


@pytest.mark.parametrize(
    ("text", "form", "message"),
    [
        ("a", (13, 0, 64, 64), "num_steps must be 0 to 12, got 13"),
        ("a", (2, -1, 64, 64), "seed must be 0 to"),
        ("a", (2, 0, 2048, 64), "height must be 0 to 1024, got 2048"),
        ("a", (2, 0, 64, 1e9), "width must be 0 to 1024"),
        ("a", (None, 0, 64, 64), "num_steps must be 0 to 12, got None"),
        ("a", (2, float("nan"), 64, 64), "seed must be"),
        ("a" * 2001, FORM, "longer than 2000 characters"),
        ("", FORM, "prompt is empty"),
        (None, FORM, "prompt is empty"),
        ("a", (2, 0, 1024, 64), "height must be a whole number from 1 to 512"),
    ],
)
def test_what_is_asked_for_is_capped(handlers, text, form, message):
    with pytest.raises(ValueError, match=message):
        list(handlers.generate(text, *form))


def test_bad_images(handlers, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    for task in (
        lambda: list(handlers.edit(str(tmp_path / "bad.png"), "a", "editing", *FORM)),
        lambda: list(handlers.understand(str(tmp_path / "bad.png"), "a")),
        lambda: list(handlers.chat(None, "a", str(tmp_path / "bad.png"), "slots", *FORM)),
    ):
        with pytest.raises(ValueError, match="cannot read image 'bad.png'"):
            task()
    with pytest.raises(ValueError, match="upload an image first"):
        list(handlers.edit(None, "a", "editing", *FORM))


def test_without_gradio_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as end:
        main(["app"])
    told = "nexus_min: error: the web page needs gradio: pip install 'gradio>=6.7'\n"
    assert end.value.code == 2 and capsys.readouterr().err == told


def test_other_hosts_are_warned_of(monkeypatch, capsys):
    served = []
    monkeypatch.setattr(app, "find_gradio", lambda: None)
    monkeypatch.setattr(app, "listen", lambda *place: place)
    server = SimpleNamespace(run=lambda sockets: served.extend(sockets))
    monkeypatch.setattr(app, "server", lambda model: server)
    main(["app"])
    assert capsys.readouterr() == ("http://127.0.0.1:7860\n", "")
    main(["app", "--host", "0.0.0.0", "--port", "8000"])
    assert "anyone who reaches 0.0.0.0 can use this page" in capsys.readouterr().err
    main(["app", "--host", "::1"])
    assert capsys.readouterr() == ("http://[::1]:7860\n", "")
    assert served == [("127.0.0.1", 7860), ("0.0.0.0", 8000), ("::1", 7860)]


def test_a_place_that_cannot_be_had_is_one_line(monkeypatch, capsys):
    """Told before a model is loaded."""
    monkeypatch.setattr(app, "find_gradio", lambda: None)
    monkeypatch.setattr(NexusGen, "load", lambda *_, **__: pytest.fail("loaded"))
    with app.listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        for place in (["--port", port], ["--port", "70000"], ["--host", "192.0.2.1"]):
            with pytest.raises(SystemExit) as end:
                main(["app", *place])
            err = capsys.readouterr().err.splitlines()
            assert end.value.code == 2
            assert len(err) == 1 and "error: cannot listen on" in err[0]


# ---- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address():
    """The page of the shipped model, served by this process; it answers when it is ready."""
    pytest.importorskip("gradio", reason="the page needs gradio (tests/requirements.txt)")
    place, server = app.listen("127.0.0.1", 0), app.server(NexusGen.load("tiny"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{place.getsockname()[1]}"
    server.should_exit = True
    thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def browse(address):
    """browse(): a new window of a headless Chromium that shows the page."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    windows = []

    def window() -> Window:
        options = webdriver.ChromeOptions()
        options.binary_location = paths[0]
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,1000"):
            options.add_argument(flag)
        options.page_load_strategy = "none"  # selenium waits two minutes at most, `wait` does more
        service = webdriver.ChromeService(paths[1])
        windows.append(webdriver.Chrome(options=options, service=service))
        windows[-1].set_script_timeout(PATIENCE)
        windows[-1].get(address)
        return Window(windows[-1])

    yield window
    for driver in windows:
        driver.quit()


class Window:
    """A visitor: fills in fields by their labels, presses buttons by their names."""

    def __init__(self, driver):
        self.driver = driver

    def find(self, path: str, shown: bool = True):
        def look(driver):
            found = driver.find_elements("xpath", path)
            found = [e for e in found if not shown or e.is_displayed()]
            return found[0] if found else None

        return self.wait(look, path)

    def wait(self, condition, what: str = ""):
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if value := condition(self.driver):
                    return value
            except Exception as error:  # an element that has just been replaced
                if "stale" not in type(error).__name__.lower():
                    raise
            time.sleep(0.1)
        self.shoot("timeout")
        raise AssertionError(f"never came: {what}")

    def tab(self, name: str) -> None:
        self.find(f"//button[@role='tab' and normalize-space()='{name}']").click()

    def field(self, label: str):
        inside = f"//label[.//span[normalize-space()='{label}']]"
        slider = f"//input[@aria-label='number input for {label}']"
        return self.find(f"({inside}//textarea | {inside}//input | {slider})")

    def fill(self, label: str, text) -> None:
        field = self.field(label)
        field.clear()
        field.send_keys(str(text))

    def press(self, name: str) -> None:
        mine = f"normalize-space()='{name}'"  # the tabs have the same names
        self.find(f"//button[contains(@class, 'ary') and {mine}]").click()  # primary, secondary

    def upload(self, path: str, nth: int) -> None:
        inputs = self.wait(lambda d: d.find_elements("css selector", "input[type=file]"))
        inputs[nth].send_keys(path)

    def facts(self) -> str:
        return self.field("Made with").get_attribute("value")

    def made(self, text: str) -> str:
        """Wait for the facts to hold a text, and for the task to end."""
        self.wait(lambda d: text in self.facts(), text)
        self.wait(lambda d: not d.find_elements("css selector", ".generating"), "the end")
        return self.facts()

    def shoot(self, name: str) -> None:
        if SCREENSHOTS:
            self.driver.save_screenshot(str(Path(SCREENSHOTS) / f"{name}.png"))


def test_stop_ends_a_task_between_two_steps(browse, monkeypatch):
    steps, denoise = [], flow.denoise

    def watched(*args):
        for step in denoise(*args):
            steps.append(step.i)
            yield step

    monkeypatch.setattr(flow, "denoise", watched)
    visitor = browse()
    visitor.fill("Prompt", "a red star")
    visitor.fill("Steps", 100)
    visitor.press("Draw")
    visitor.wait(lambda d: "100 steps" in visitor.facts(), "the settings")
    visitor.find("//*[contains(@class, 'image')]//img")  # a preview
    visitor.shoot("sampling")
    visitor.press("Stop")
    visitor.made("100 steps")
    visitor.fill("Steps", 8)
    visitor.fill("Seed", 9)
    visitor.press("Draw")
    visitor.made("seed 9, 8 steps")
    visitor.wait(lambda d: steps.count(7) == 2 and steps[-1] == 7, "the second image")
    assert max(steps) < 99


def test_draw_edit_and_ask_in_a_browser(browse, tmp_path):
    first = browse()
    first.fill("Prompt", "a small blue star on a gray background")
    first.press("Draw")
    assert first.made("3 steps").startswith("seed 0, 3 steps")
    first.shoot("draw")

    second = browse()  # both at once: one waits for the other
    first.fill("Seed", 7)
    first.press("Draw")
    second.fill("Prompt", "two red circles")
    second.press("Draw")
    first.made("seed 7, 3 steps")
    second.made("seed 0, 3 steps")
    second.shoot("second")

    toy = Scene((Object("circle", "red", "large", 4),), "gray")
    Image.fromarray(render(toy)).save(tmp_path / "photo.png")
    first.tab("Edit")
    first.upload(str(tmp_path / "photo.png"), 0)
    first.fill("Instruction", "Change the background to white.")
    first.find("//img[contains(@src, 'photo')]")
    first.press("Edit")
    first.made("64 x 64 px")
    assert "Here is the image" in first.field("Reply").get_attribute("value")
    first.shoot("edit")

    first.tab("Ask")
    (tmp_path / "bad.png").write_text("no image")
    first.upload(str(tmp_path / "bad.png"), 1)
    first.fill("Question", "What color is the background?")
    first.find("//img[contains(@src, 'bad')]", shown=False)  # it has arrived
    first.press("Ask")
    first.find("//*[contains(text(), 'cannot read image')]")
    first.shoot("bad_upload")


def test_a_conversation_in_a_browser(browse, address):
    visitor, asked = browse(), "What color is the background?"
    visitor.tab("Conversation")
    for text in ("Generate an image according to the following description: a red star", asked):
        visitor.fill("Message", text)
        visitor.press("Send")
        visitor.wait(lambda d: not visitor.field("Message").get_attribute("value"), "the end")
        visitor.made(" s")
    visitor.shoot("conversation")
    said = visitor.driver.find_element("css selector", "body").text
    assert "description: [image]" in " ".join(said.split()) and said.count(asked) == 1
    visitor.press("New conversation")
    visitor.wait(lambda d: asked not in d.find_element("css selector", "body").text, "nothing")

    entries = "return performance.getEntriesByType('resource').map(e => e.name)"
    names = visitor.driver.execute_script(entries)
    assert len(names) > 5 and all(n.startswith((address, "data:", "blob:")) for n in names)


def asked(address: str, file) -> str:
    """What a request about an image, made by hand, is answered; the file as gradio names it."""
    body = json.dumps({"data": [file, "What color is the background?"]}).encode()
    headers = {"Content-Type": "application/json"}
    call = f"{address}/gradio_api/call/understand"
    request = urllib.request.Request(call, body, headers)
    event = json.load(urllib.request.urlopen(request, timeout=PATIENCE))["event_id"]
    with urllib.request.urlopen(f"{call}/{event}", timeout=PATIENCE) as stream:
        return stream.read().decode()


def test_no_address_is_fetched(address):
    hits = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            hits.append(self.path)
            self.send_error(404)

    server = http.server.HTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/x.png"
    file = {"path": url, "url": url, "meta": {"_type": "gradio.FileData"}}
    answer = asked(address, file)
    server.shutdown()
    assert "event: error" in answer and not hits


@pytest.mark.parametrize(
    "path", ["secret.png", "pipe", "/etc/passwd", "/dev/zero", "/", "a\0b", ""]
)
def test_no_file_of_this_machine_is_read(address, tmp_path, path):
    """A request can name any path; only what a browser has uploaded is an image."""
    import gradio

    Image.fromarray(render(ON_GRAY)).save(tmp_path / "secret.png")
    os.mkfifo(tmp_path / "pipe")
    path = str(tmp_path / path) if path in ("secret.png", "pipe") else path
    kept = Path(gradio.utils.get_upload_folder())
    before = set(kept.rglob("*"))
    for file in ({"path": path, "meta": {"_type": "gradio.FileData"}}, {"path": path}):
        answer = asked(address, file)
        assert "event: error" in answer and "gray" not in answer and "such file" not in answer
    assert set(kept.rglob("*")) == before  # nothing was copied to where it could be downloaded
    assert urllib.request.urlopen(address, timeout=PATIENCE).status == 200


def test_what_a_browser_uploads_is_read(address, tmp_path):
    Image.fromarray(render(ON_GRAY)).save(tmp_path / "mine.png")
    parts = b'--x\r\nContent-Disposition: form-data; name="files"; filename="mine.png"\r\n\r\n'
    parts += (tmp_path / "mine.png").read_bytes() + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{address}/gradio_api/upload", parts, headers)
    [path] = json.load(urllib.request.urlopen(request, timeout=PATIENCE))
    answer = asked(address, {"path": path, "meta": {"_type": "gradio.FileData"}})
    assert "event: complete" in answer and "gray" in answer
