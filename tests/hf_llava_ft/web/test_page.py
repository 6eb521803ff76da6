"""The page in a browser without a screen: Chromium or Chrome on the PATH (Debian: apt-get install chromium).

Without Gradio and Playwright, `test_page_environment.py` runs this file in an environment that has them.
"""

import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from hf_llava_ft.answering.conversation import Conversation
from hf_llava_ft.answering.loading import load_for_answering
from hf_llava_ft.answering.shared_base import BASE, SharedBase
from hf_llava_ft.checkpoints.inspection import inspect_checkpoint
from hf_llava_ft.data.builder import load_llava_json
from hf_llava_ft.web.server import served

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LACKING = [name for name in ("gradio", "playwright") if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(LACKING), reason=f"without {LACKING}, test_page_environment.py runs this"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on the PATH: apt-get install chromium"),
]
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync".split()
SETTINGS = {"max_new_tokens": 12, "temperature": 0.0, "top_p": None}
PASSWORD = "correct horse battery"


@pytest.fixture(scope="module")
def reached():
    """The hosts that this process, which serves the page, looks up or connects to."""
    hosts = []

    def note(event, args):
        if event == "socket.getaddrinfo":
            hosts.append(args[0])
        elif event == "socket.connect" and isinstance(args[1], tuple):
            hosts.append(args[1][0])

    sys.addaudithook(note)
    return hosts


@pytest.fixture(scope="module")
def models(adapters_of_one_base):
    first = str(adapters_of_one_base / "one")
    models = SharedBase(*load_for_answering(first, device="cpu"), inspect_checkpoint(first))
    models.add(str(adapters_of_one_base / "two"))
    return models


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def serve(models, tmp_path, monkeypatch, reached):
    """A function that opens the page, with what it is told; closed in the end, when nothing of it is left, and nobody
    elsewhere was called."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name, value in {
        "GRADIO_ALLOWED_PATHS": str(tmp_path),  # what is for other pages is not heeded
        "GRADIO_SHARE": "True",
        "GRADIO_ANALYTICS_ENABLED": "True",
        "HTTP_PROXY": "http://127.0.0.1:9",
    }.items():
        monkeypatch.setenv(name, value)
    opened = []
    reached.clear()

    def start(password=None, **settings):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        page = served(
            models,
            host="127.0.0.1",
            port=port,
            password=password,
            history=tmp_path / "talks.json",
            system=None,
            generation=SETTINGS | settings,
        )
        opened.append(page)
        return page.__enter__().rstrip("/")

    yield start
    for page in opened:
        page.__exit__(None, None, None)
    assert not opened or not Path(os.environ["GRADIO_TEMP_DIR"]).exists()
    assert set(reached) == {"127.0.0.1"}  # itself


@pytest.fixture
def look(browser):
    """A function that opens an address; in the end, nothing was asked of elsewhere, and nothing went wrong."""
    contexts, elsewhere, wrong = [], [], []

    def open_page(address, width=1400, height=900):
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: elsewhere.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text) if "Content Security Policy" in line.text else None)
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [url for url in elsewhere if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))] == []
    assert wrong == []


def ask(page, question, picture=None):
    if picture:
        page.set_input_files("#question input[type=file]", str(picture))
        page.wait_for_selector("#question img")
    page.fill("#question textarea", question)
    page.keyboard.press("Enter")


def shows(page, columns):
    """Waits until these are the answers in the columns, and none is being written."""
    page.wait_for_function(
        """expected => {
            const texts = side => [...side.querySelectorAll('[data-testid=bot]')].map(
                each => each.innerText.trim().split(/\\s+/).join(' '));
            const sides = [...document.querySelectorAll('.side')].filter(each => each.offsetParent);
            const idle = document.querySelector('#question .submit-button');
            return idle && JSON.stringify(sides.map(texts)) == JSON.stringify(expected);
        }""",
        arg=columns,
    )


def told(page, words):
    page.wait_for_function("words => document.querySelector('#told').innerText.includes(words)", arg=words)


def choose(page, label, name):
    page.get_by_label(label).click()
    page.get_by_role("option", name=name, exact=True).click()


def answer(models, name, question, picture=None):
    conversation = Conversation(models.model, models.processor(name))
    with models.active(name):
        said = conversation.ask(question, [picture] if picture else [], **SETTINGS)
    return " ".join(said.split())


@pytest.fixture
def picture(tmp_path):
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "grey.png")
    return tmp_path / "grey.png"


def test_a_picture_is_asked_about_on_both_sides_and_kept_for_training(serve, look, models, picture, tmp_path):
    page = look(serve())
    ask(page, "What is it?", picture)
    opened = Image.open(picture)
    expected = [answer(models, name, "What is it?", opened) for name in ("one", BASE)]
    assert expected[0] != expected[1]
    shows(page, [[expected[0]]])
    choose(page, "Beside it", BASE)
    shows(page, [[expected[0]]] * 2)  # the one on the right takes over what was said
    page.get_by_role("button", name="Ask again").click()
    shows(page, [[each] for each in expected])
    page.get_by_role("button", name="Keep for training").click()
    told(page, "talks.json has 1 conversation; train takes it as --data_path")
    (row,) = load_llava_json(tmp_path / "talks.json", tmp_path, cache_dir=tmp_path / "cache")
    assert len(row["messages"]) == 2 and len(row["images"]) == 1
    said = json.loads((tmp_path / "talks.json").read_text())[0]["conversations"]
    assert said[0]["value"] == "<image>\nWhat is it?" and " ".join(said[1]["value"].split()) == expected[0]
    choose(page, "Model", "two")
    page.get_by_role("button", name="New").click()
    shows(page, [[], []])
    ask(page, "Hello")
    shows(page, [[answer(models, name, "Hello")] for name in ("two", BASE)])


def test_an_answer_streams_and_is_ended_and_others_go_on(serve, look, models):
    page = look(serve(max_new_tokens=400))
    ask(page, "Hello")
    page.wait_for_selector("#question .stop-button")
    page.wait_for_function("document.querySelector('[data-testid=bot]')?.innerText.trim().length > 5")
    page.click("#question .stop-button")
    told(page, "the answer was ended, and the question is as if it had not been asked")
    shows(page, [[]])
    assert page.input_value("#question textarea") == "Hello"
    ask(page, "Hello")
    page.wait_for_selector("#question .stop-button")
    page.reload()  # nobody reads that answer any further
    page.wait_for_selector("#question textarea")
    ask(page, "Hello")
    page.wait_for_function("document.querySelector('[data-testid=bot]')?.innerText.trim().length > 5")


def test_what_is_wrong_is_a_sentence_on_the_page(serve, look, picture, tmp_path):
    page = look(serve())
    (tmp_path / "odd.png").write_bytes(picture.read_bytes()[:200])
    ask(page, "What is it?", tmp_path / "odd.png")
    told(page, "odd.png cannot be read: it is damaged")
    page.reload()
    page.wait_for_selector("#question textarea")
    ask(page, "<b>many</b> words " * 300)
    told(page, "leaves no room for an answer")
    shows(page, [[]])
    page.get_by_role("button", name="Ask again").click()
    told(page, "nothing was asked yet.")
    page.get_by_role("button", name="Keep for training").click()
    told(page, "nothing was answered yet")
    assert "Traceback" not in page.content()


ELSEWHERE = "http://elsewhere.example/a.png"
# Gives what the browser refused to load.
LOAD = """address => new Promise(done => {
    document.addEventListener("securitypolicyviolation", event => done(event.blockedURI));
    const image = new Image();
    image.onerror = () => setTimeout(() => done("nothing"), 500);
    image.src = address;
})"""


def test_what_is_said_is_shown_as_text_and_no_picture_of_elsewhere_is_loaded(serve, look, browser):
    address = serve()
    page = look(address)
    said = f"![]({ELSEWHERE}) <img src={ELSEWHERE}> <unk> &amp; $$x^2$$\nif a < b:\n    return *b*"
    ask(page, said)
    page.wait_for_function("said => document.querySelector('[data-testid=user]')?.innerText == said", arg=said)
    assert page.query_selector(f'img[src="{ELSEWHERE}"]') is None
    other = browser.new_page()  # not looked at as the others are: here something is to go wrong
    other.goto(address)
    assert other.evaluate(LOAD, ELSEWHERE) == ELSEWHERE
    other.close()


@pytest.mark.parametrize("width, height", [(390, 844), (1400, 900)])
def test_it_fits_a_telephone_and_a_screen(serve, look, models, picture, width, height):
    page = look(serve(), width, height)
    choose(page, "Beside it", BASE)
    ask(page, "What is it?", picture)
    shows(page, [[answer(models, name, "What is it?", Image.open(picture))] for name in ("one", BASE)])
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("scrollTo(0, 0)")
    question = page.query_selector("#question").bounding_box()
    assert question["y"] + question["height"] <= height  # both answers are seen, and where to go on
    left, right = (each.bounding_box() for each in page.query_selector_all(".side"))
    if width < 700:
        assert right["y"] >= left["y"] + left["height"] and left["width"] > 340
        assert min(left["height"], right["height"]) > 200
    else:
        assert right["x"] >= left["x"] + left["width"] and abs(right["y"] - left["y"]) < 2
    for unwanted in ("Share", "Clear"):
        assert not any(each.is_visible() for each in page.query_selector_all(f'.side [aria-label="{unwanted}"]'))


def status(address, data=None, **headers):
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers)) as response:
            return response.status, response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.headers


def test_no_file_but_uploads_is_served_and_no_other_name_is_heeded(serve, look, picture):
    address = serve()
    for file in (picture, "/etc/passwd", Path(__file__)):
        assert status(f"{address}/gradio_api/file={file}")[0] in (403, 404)
    with urllib.request.urlopen(f"{address}/gradio_api/info") as response:
        assert not any(json.load(response).values())  # nothing here is an address for programs
    code, headers = status(address)
    assert code == 200 and "default-src 'self'" in headers["content-security-policy"]
    assert status(address, Host="elsewhere.example")[0] == 400
    page = look(address)
    page.set_input_files("#question input[type=file]", str(picture))
    upload = page.wait_for_selector("#question img").get_attribute("src")
    assert status(upload)[0] == 200  # the control: what was sent is shown
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert folder.stat().st_mode & 0o077 == 0 and any(folder.rglob("grey.png"))


@pytest.fixture
def other_site():
    """The address of another page on this machine, as a stranger's would be."""

    class Empty(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


SEND = """async address => {
    const form = new FormData();
    form.append("files", new Blob(["x"]), "sent.png");
    const answer = await fetch(address + "/gradio_api/upload", {method: "POST", mode: "no-cors", body: form});
    return answer.status;
}"""


def test_another_site_cannot_have_the_browser_ask(serve, look, other_site):
    address = serve()
    stranger = look(other_site)
    stranger.evaluate(SEND, address)
    assert not list(Path(os.environ["GRADIO_TEMP_DIR"]).rglob("sent.png"))
    assert look(address).evaluate(SEND, address) == 200  # the control: the page itself
    assert list(Path(os.environ["GRADIO_TEMP_DIR"]).rglob("sent.png"))


def test_another_site_cannot_use_the_login_of_a_visitor(serve):
    address = serve(PASSWORD)
    login = status(f"{address}/login", f"username=me&password={PASSWORD.replace(' ', '+')}".encode())
    cookie = "; ".join(each.split(";")[0] for each in login[1].get_all("set-cookie"))
    asked = {"Cookie": cookie, "Host": "chat.example"}
    assert status(f"{address}/config", **asked)[0] == 200  # the control
    assert status(f"{address}/config", Origin="https://chat.example", **asked)[0] == 200
    assert status(f"{address}/config", Origin="https://evil.example", **asked)[0] == 403
    assert status(f"{address}/config", Origin="https://chat.example", Sec_Fetch_Site="cross-site", **asked)[0] == 403


def test_a_password_stands_before_all_of_it(serve, look, models):
    address = serve(PASSWORD)
    for path in ("/config", "/gradio_api/info", "/gradio_api/file=x", "/gradio_api/queue/data?session_hash=a"):
        assert status(f"{address}{path}")[0] == 401
    page = look(address)
    for said, is_right in (("wrong horse battery", False), (PASSWORD, True)):
        page.wait_for_selector("input[type=password]")
        page.locator("input:not([type=password]), textarea").first.fill("me")
        page.fill("input[type=password]", said)
        page.get_by_role("button", name="Login").click()
        if is_right:
            page.wait_for_selector("#question textarea")
        else:
            page.wait_for_timeout(500)
            assert page.query_selector("#question textarea") is None
    ask(page, "Hello")
    shows(page, [[answer(models, "one", "Hello")]])
