"""The endpoint's handler: what it answers, and that a request is data and no more."""

import base64
import importlib.util
import io
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image

from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.checkpoints.remote_code import ENDPOINT_HANDLER
from hf_llava_ft.checkpoints.verify import Probe, default_image, default_messages, reference_outputs
from hf_llava_ft.serving import export_for_serving
from tests import warm_python
from tests.examples import examples
from tests.parts import parts_of

QUESTION = "What is in the picture?"


def data_url(picture: Image.Image, kind: str = "PNG") -> str:
    stream = io.BytesIO()
    picture.save(stream, format=kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(stream.getvalue()).decode()


def request(question=QUESTION, url=None, pictures: int = 1, **parameters):
    item = {"type": "image_url", "image_url": {"url": data_url(default_image()) if url is None else url}}
    content = [item] * pictures + [{"type": "text", "text": question}]
    return {"inputs": {"messages": [{"role": "user", "content": content}]}, "parameters": parameters}


def said(*messages, **parameters):
    return {"inputs": {"messages": list(messages)}, "parameters": {"max_new_tokens": 2} | parameters}


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("handler", ENDPOINT_HANDLER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def handler(module, tiny_checkpoint):
    return module.EndpointHandler(str(tiny_checkpoint))


def test_an_endpoint_answers_as_the_model(handler, tiny_checkpoint):
    processor = load_processor(str(tiny_checkpoint))
    model = load_model(str(tiny_checkpoint), processor)
    answer = reference_outputs(model, processor, Probe(max_new_tokens=8))["answer_ids"]
    expected = processor.tokenizer.decode(answer[0], skip_special_tokens=True).strip()
    assert default_messages()[0]["content"][1]["text"] == QUESTION
    assert handler(request(max_new_tokens=8)) == {"generated_text": expected}
    text_only = {"inputs": {"messages": [{"role": "user", "content": "Hello"}]}, "parameters": {"max_new_tokens": 3}}
    assert handler(text_only)["generated_text"] != expected
    # Stopped at a text of its own answer.
    stop = expected[5:8]
    assert handler(request(max_new_tokens=8, stop=stop))["generated_text"] == expected.partition(stop)[0].strip()


def test_sampling_is_seeded_and_leaves_the_server_alone(handler):
    hot = request(max_new_tokens=12, temperature=5.0, top_k=500)
    before = torch.get_rng_state()
    first, again, other = (handler(hot | {"parameters": hot["parameters"] | {"seed": seed}}) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)
    assert handler(request(max_new_tokens=12, temperature=0)) == handler(request(max_new_tokens=12))


REFUSED = [
    ({"inputs": "a string"}, 'a request needs {"inputs": {"messages": [...]}}'),
    ([], 'a request is {"inputs"'),
    ({"inputs": {"messages": []}}, "with 1 to 100 messages"),
    (said({"role": "user", "content": "a"}) | {"options": {}}, "and nothing else"),
    (said("hello"), "message 1 needs a role"),
    (said({"role": "tool", "content": "a"}), "message 1 needs a role"),
    (said({"role": "user"}), "the content of message 1 has to be"),
    (
        said({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}),
        "the content of message 1 has to be",
    ),
    (said({"role": "user", "content": [{"type": "video"}]}), "the content of message 1 has to be"),
    (said({"role": "user", "content": "see <image>"}), "a text holds <image>"),
    (said({"role": "user", "content": "a " * 200_000}), "characters, more than this model takes"),
    (said({"role": "user", "content": "a b c " * 400}), "tokens, and with max_new_tokens 2"),
    (request(url="https://example.org/cat.png"), "a picture has to be a data URL"),
    (request(url="file:///etc/passwd"), "a picture has to be a data URL"),
    (request(url="data:image/png;base64,%%%"), "a picture can't be read"),
    (request(url="data:image/png;base64,AAAA"), "a picture is none of JPEG, PNG"),
    (request(url=data_url(Image.new("RGB", (8, 8)), "TIFF")), "a picture is none of JPEG, PNG"),
    (request(url="data:image/png;base64," + "A" * 29_000_000), "a picture takes at most 20 MiB"),
    (request(url=data_url(Image.new("1", (11_000, 11_000)))), "a picture of 11000 x 11000 is too large"),
    (request(pictures=9), "a request takes at most 8 pictures"),
    (request(max_new_tokens=10_000_000), "max_new_tokens has to be from 1 to 1024"),
    (request(max_new_tokens="9"), "max_new_tokens has to be a whole number"),
    (request(max_new_tokens=True), "max_new_tokens has to be a whole number"),
    (request(temperature=float("nan")), "temperature has to be from 0 to 10"),
    (request(temperature=0, do_sample=True), "exclude each other"),
    (request(top_p=0.5, do_sample=False), "top_p does nothing without sampling"),
    (request(stop=["a"] * 5), "parameter stop has to be a text, or up to 4"),
    (request(stop=""), "parameter stop has to be a text"),
    (request(num_beams=64), "parameter 'num_beams' is none of max_new_tokens"),
    (
        {"inputs": {"messages": [{"role": "user", "content": "a"}]}, "parameters": [1]},
        "parameters have to be an object",
    ),
]


@pytest.mark.parametrize(("data", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_an_endpoint_refuses_what_is_no_request(handler, data, sentence):
    with pytest.raises(ValueError) as refusal:
        handler(data)
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_request_names_no_code(handler, tmp_path):
    """`custom_generate` of transformers runs a file: here a harmless one, whose marker must not appear."""
    marker = tmp_path / "marker"
    (tmp_path / "custom_generate").mkdir()
    program = f"open({str(marker)!r}, 'w').close()\ndef generate(model, **kwargs): return kwargs['input_ids']\n"
    (tmp_path / "custom_generate" / "generate.py").write_text(program)
    asked = {"custom_generate": str(tmp_path), "trust_remote_code": True}
    with pytest.raises(ValueError, match="parameter 'custom_generate' is none of"):
        handler(request(**asked))
    assert not marker.exists()
    # Passed on, as it once was, it would have run.
    ids = torch.tensor([[1, 5]])
    handler.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **asked)
    assert marker.exists()


LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ANYTHING = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
ITEMS = ANYTHING | st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "image"])}, optional={"text": ANYTHING, "image_url": ANYTHING}
)
MESSAGES = ANYTHING | st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]) | ANYTHING, "content": ANYTHING | st.lists(ITEMS)}
)
NAMES = st.sampled_from(
    ["max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop", "num_beams"]
)
BODIES = ANYTHING | st.fixed_dictionaries(
    {"inputs": ANYTHING | st.fixed_dictionaries({"messages": st.lists(MESSAGES, max_size=3) | ANYTHING})},
    optional={"parameters": st.dictionaries(NAMES, LEAF) | ANYTHING},
)


@examples(100, suppress_health_check=list(HealthCheck))
@given(body=BODIES)
def test_any_body_is_answered_or_refused_in_a_sentence(handler, body):
    try:
        assert set(handler(body)) == {"generated_text"}
    except ValueError as error:
        assert str(error)


ASK_A_STRANGER = """
import json, sys
sys.modules["hf_llava_ft"] = None
sys.path.insert(0, sys.argv[1])
from handler import EndpointHandler
print(json.dumps(EndpointHandler(sys.argv[1])(json.load(open(sys.argv[2])))))
"""


@pytest.mark.slow
def test_a_model_of_no_native_kind_is_served_by_its_own_code(tiny, golden, tmp_path):
    model, processor = parts_of(tiny, golden, projector_type="mlp3x_gelu")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    export_for_serving(str(tmp_path / "model"), tmp_path / "served", "endpoints")
    (tmp_path / "request.json").write_text(json.dumps(request(max_new_tokens=8)))
    shutil.copytree(tmp_path / "served", tmp_path / "elsewhere")
    arguments = ["-c", ASK_A_STRANGER, str(tmp_path / "elsewhere"), str(tmp_path / "request.json")]
    done = warm_python.run(arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = reference_outputs(model, processor, Probe(max_new_tokens=8))["answer_ids"]
    expected = processor.tokenizer.decode(answer[0], skip_special_tokens=True).strip()
    assert json.loads(done.stdout.splitlines()[-1]) == {"generated_text": expected}


def test_pictures_are_opened_as_by_transformers_other_doors(module, tmp_path):
    picture, exif = Image.linear_gradient("L").resize((40, 20)).convert("RGB"), Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    url = "data:image/jpeg;base64," + base64.b64encode((tmp_path / "turned.jpg").read_bytes()).decode()
    opened = module._picture(url)
    assert opened == load_image(str(tmp_path / "turned.jpg")) and opened.size == (20, 40)
