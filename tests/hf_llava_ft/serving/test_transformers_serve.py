"""`transformers serve`, an OpenAI-compatible server, gives a merged folder's own answer about a picture; it runs
without this package."""

import base64
import io
import json
import os
import socket
import subprocess
import time
import urllib.request
from importlib.metadata import version

import pytest
from PIL import Image

from hf_llava_ft.answering.conversation import Conversation
from hf_llava_ft.answering.loading import load_for_answering
from tests.layered_environment import layered_python

pytestmark = pytest.mark.slow

SERVE = "from transformers.cli.transformers import main; main()"
WAIT_SECONDS = 240


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An environment of its own over this one, with what serving needs besides."""
    return layered_python(
        tmp_path_factory.mktemp("serving") / "venv", f"transformers[serving]=={version('transformers')}"
    )


@pytest.fixture
def server(python, tiny_checkpoint, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    log = (tmp_path / "log").open("w")
    command = [python, "-c", SERVE, "serve", tiny_checkpoint, "--device", "cpu", "--port", str(port)]
    process = subprocess.Popen(command, cwd=tmp_path, env=clean, stdout=log, stderr=log)
    address = f"http://localhost:{port}"
    try:
        for _ in range(WAIT_SECONDS):
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def test_it_answers_about_a_picture_as_the_folder_does(server, tiny_checkpoint):
    picture = Image.radial_gradient("L").resize((60, 40)).convert("RGB")
    stream = io.BytesIO()
    picture.save(stream, format="PNG")

    def asked(picture_url):
        content = [{"type": "text", "text": "What is in the picture?"}]
        if picture_url:
            content.insert(0, {"type": "image_url", "image_url": {"url": picture_url}})
        request = {"model": str(tiny_checkpoint), "messages": [{"role": "user", "content": content}]}
        request |= {"max_tokens": 8, "temperature": 0}
        body = json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        sent = urllib.request.Request(f"{server}/v1/chat/completions", data=body, headers=headers)
        with urllib.request.urlopen(sent, timeout=120) as reply:
            return json.load(reply)["choices"][0]["message"]["content"].strip()

    parts = load_for_answering(str(tiny_checkpoint), device="cpu")
    with_picture = asked("data:image/png;base64," + base64.b64encode(stream.getvalue()).decode())
    assert with_picture == Conversation(*parts).ask("What is in the picture?", [picture], max_new_tokens=8)
    assert with_picture != asked(None)
