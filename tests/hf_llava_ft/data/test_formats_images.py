"""Pictures of every kind arrive as they are; addresses are fetched only when that is allowed, and not for ever."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_llava_ft.data.collator import LlavaCollator, open_picture
from hf_llava_ft.data.formats import images as images_module
from hf_llava_ft.data.formats import load_data
from hf_llava_ft.data.formats.images import ImageStore
from hf_llava_ft.data.values import image_ref
from hf_llava_ft.errors import UserError


def encoded(picture, kind, **options):
    stream = io.BytesIO()
    picture.save(stream, format=kind, **options)
    return stream.getvalue()


def gradient(width=64, height=48):
    return Image.fromarray(np.arange(width * height * 3, dtype=np.uint32).reshape(height, width, 3).astype(np.uint8))


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    return encoded(gradient(), "JPEG", exif=exif)


PICTURES = {
    "gif": encoded(gradient(), "GIF"),
    "animated.gif": encoded(gradient(), "GIF", save_all=True, append_images=[gradient().rotate(90)]),
    "webp": encoded(gradient(), "WEBP"),
    "bmp": encoded(gradient(), "BMP"),
    "tiff": encoded(gradient(), "TIFF"),
    "cmyk.jpg": encoded(gradient().convert("CMYK"), "JPEG"),
    "gray.png": encoded(gradient().convert("L"), "PNG"),
    "gray16.png": encoded(Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) % 256), "PNG"),
    "one_bit.png": encoded(gradient().convert("1"), "PNG"),
    "transparent.png": encoded(gradient().convert("RGBA"), "PNG"),
    "palette.png": encoded(gradient().convert("P"), "PNG", transparency=3),
    "turned.jpg": turned(),
    "one_high.png": encoded(gradient(300, 1), "PNG"),
    "one_wide.png": encoded(gradient(1, 300), "PNG"),
    "one_pixel.png": encoded(gradient(1, 1), "PNG"),
}


@pytest.mark.parametrize("how", ["path", "address"])
def test_pictures_of_every_kind_become_batches(tmp_path, tiny_processor, how):
    (tmp_path / "images").mkdir()
    rows = []
    for name, content in PICTURES.items():
        (tmp_path / "images" / name).write_bytes(content)
        image = name if how == "path" else f"data:image;base64,{base64.b64encode(content).decode()}"
        user = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}
        rows.append({"id": name, "messages": [user, {"role": "assistant", "content": "This."}]})
    (tmp_path / "data").write_text(json.dumps(rows))
    data = load_data(tmp_path / "data", tmp_path / "images", cache_dir=tmp_path / "cache")
    batch = LlavaCollator(tiny_processor)([data[index] for index in range(len(data))])
    assert len(batch["pixel_values"]) == len(PICTURES) and batch["pixel_values"].isfinite().all()
    for row in data:
        opened = open_picture(row["images"][0])
        lies = Image.open(io.BytesIO(PICTURES[row["id"]])).size
        assert opened.mode == "RGB" and opened.size == (lies[::-1] if row["id"] == "turned.jpg" else lies)
        assert open_picture(row["images"][0], "original").size == lies


@pytest.mark.parametrize(
    ("values", "kind"),
    [(np.arange(64 * 48, dtype=np.uint16) * 21, "PNG"), (np.linspace(0, 1, 3072, dtype="f4"), "TIFF")],
)
def test_gray_that_would_be_cut_to_white_or_black_is_refused(tmp_path, values, kind):
    content = encoded(Image.fromarray(values.reshape(48, 64)), kind)
    # What it would be trained as: one value nearly everywhere.
    trained = np.asarray(open_picture({"bytes": content, "path": None}))
    assert (trained == np.median(trained)).mean() > 0.95
    (tmp_path / "deep").write_bytes(content)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "deep", "text": "A scan."}\n')
    with pytest.raises(UserError, match=r"row 1: image 'deep' can't be decoded \(its values, .* would be cut at 255"):
        load_data(tmp_path, cache_dir=tmp_path / "cache")


def test_what_an_image_may_be_in_python():
    picture, content = gradient(), PICTURES["webp"]
    store = ImageStore()
    for value in (content, {"bytes": content, "path": "a.webp"}, {"bytes": content}):
        assert store.locate(image_ref(value, "row 1"), "row 1")["bytes"] == content
    (stored,) = [store.locate(image_ref(picture, "row 1"), "row 1")]
    assert np.array_equal(open_picture(stored), picture)


# Addresses


class Web:
    """A web server on this computer: `answers[path]` is bytes, or a function of the handler."""

    def __init__(self):
        self.answers, self.asked = {}, []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                web.asked.append(self.path)
                answer = web.answers.get(self.path)
                if callable(answer):
                    answer(self)
                elif answer is None:
                    self.send_error(404)
                else:
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(answer)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def address(self, path):
        return f"http://127.0.0.1:{self.server.server_port}{path}"


@pytest.fixture
def web():
    web = Web()
    yield web
    web.server.shutdown()
    web.server.server_close()


def load(tmp_path, *addresses, **kwargs):
    rows = [
        {
            "image": address,
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A picture."}],
        }
        for address in addresses
    ]
    (tmp_path / "data").write_text(json.dumps(rows))
    return load_data(tmp_path / "data", tmp_path, cache_dir=tmp_path / "cache", **kwargs)


def refusal(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        load(*args, **kwargs)
    message = str(caught.value)
    assert "data: row " in message and "\n" not in message and message.endswith(".")
    return message


def test_addresses_are_fetched_once_and_only_when_allowed(tmp_path, web):
    web.answers["/a.webp"] = PICTURES["webp"]
    assert "row 1: image 'http://127.0.0.1:" in refusal(tmp_path, web.address("/a.webp"))
    assert web.asked == []
    for _ in range(2):
        data = load(tmp_path, web.address("/a.webp"), web.address("/a.webp"), allow_urls=True)
        assert open_picture(data[1]["images"][0]).size == (64, 48)
    assert web.asked == ["/a.webp"]


def redirect(to):
    def answer(handler):
        handler.send_response(302)
        handler.send_header("Location", to)
        handler.end_headers()

    return answer


def drip(handler):
    handler.send_response(200)
    handler.end_headers()
    while True:
        try:
            handler.wfile.write(b"x")
        except OSError:
            return
        threading.Event().wait(0.05)


def silence(handler):
    threading.Event().wait(10)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "can't be fetched (Not Found)"),
        (b"<html>not a picture</html>", "can't be decoded (no image format that Pillow knows)"),
        (b"", "can't be decoded (the file is empty)"),
        (b"x" * 20_000, "has more than 12,000 bytes"),
        (redirect("file:///etc/passwd"), "can't be fetched ("),
        (redirect("ftp://127.0.0.1/a.png"), "can't be fetched (redirected to ftp)"),
        (drip, "can't be fetched (it took more than 1 seconds)"),
        (silence, "can't be fetched (timed out)"),
        (lambda handler: handler.wfile.write(b"nonsense\r\n\r\n"), "can't be fetched ("),
    ],
)
def test_servers_that_give_no_picture(tmp_path, web, monkeypatch, answer, says):
    monkeypatch.setattr(images_module, "MAX_IMAGE_BYTES", 12_000)
    monkeypatch.setattr(images_module, "FETCH_TIMEOUT", 1)
    monkeypatch.setattr(images_module, "FETCH_DEADLINE", 1)
    web.answers |= {"/good.webp": PICTURES["webp"], "/bad": answer}
    assert says in (message := refusal(tmp_path, web.address("/good.webp"), web.address("/bad"), allow_urls=True))
    assert "row 2: " in message
    web.answers["/bad"] = PICTURES["bmp"]  # the server is mended: nothing of what it gave before was kept
    assert len(load(tmp_path, web.address("/good.webp"), web.address("/bad"), allow_urls=True)) == 2


@pytest.mark.parametrize("address", ["http://", "http://[", "https://256.256.256.256/a.png", "http://a b/c.png"])
def test_addresses_that_are_none(tmp_path, address):
    assert "row 1: image " in refusal(tmp_path, address, allow_urls=True)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def test_a_missing_image_asks_for_the_folder_where_nobody_named_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, allow_outside in ((".", False), (".", True), (None, True)):
        with pytest.raises(UserError, match="name the folder that the images are in with --image_folder, add"):
            ImageStore(folder, allow_outside).locate("no.png", "row 1")
    (tmp_path / "images").mkdir()
    for allow_outside in (False, True):
        with pytest.raises(UserError, match="; add the file or remove the row"):
            ImageStore("images", allow_outside).locate("no.png", "row 1")
