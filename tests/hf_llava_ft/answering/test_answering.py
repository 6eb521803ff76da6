"""Pictures from files and URLs, and answers in pieces."""

import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest
import torch
from PIL import Image

from hf_llava_ft.answering.conversation import Conversation
from hf_llava_ft.answering.loading import load_for_answering
from hf_llava_ft.answering.pictures import open_image
from hf_llava_ft.answering.prompts import up_to
from hf_llava_ft.checkpoints.opening import fit_to_processor
from hf_llava_ft.data.collator import open_picture
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture
def web(tmp_path):
    """A real web server on this machine that serves `tmp_path`; gives its address."""
    Image.new("RGB", (30, 20), "green").save(tmp_path / "green.png")
    (tmp_path / "page.html").write_text("<p>no picture</p>")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_picture_from_the_web(web):
    assert open_image(f"{web}/green.png").getpixel((3, 3)) == (0, 128, 0)


def test_what_is_wrong_on_the_web_is_said(web):
    with pytest.raises(UserError, match="page.html cannot be read"):
        open_image(f"{web}/page.html")
    with pytest.raises(UserError, match="cannot be fetched: Not Found|cannot be fetched: File not found"):
        open_image(f"{web}/nothing.png")
    with pytest.raises(UserError, match="cannot be fetched"):
        open_image("http://127.0.0.1:9/refused.png")


def test_a_conversation_remembers(tiny_checkpoint, tiny_processor):
    conversation = Conversation(*load_for_answering(str(tiny_checkpoint)), system="Be brief.")
    picture = Image.new("RGB", (30, 20), "green")
    pieces = list(conversation.stream("What is it?", [picture], max_new_tokens=8))
    assert len(pieces) > 1
    first = "".join(pieces).strip()
    conversation.ask("And now?", max_new_tokens=4)
    assert [message["role"] for message in conversation.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert conversation.messages[2]["content"][0]["text"] == first
    text, _ = tiny_processor.render(conversation.messages)
    assert text.startswith("Be brief. USER: <image>\nWhat is it? ASSISTANT:") and text.count("<image>") == 1


def test_an_error_in_generation_reaches_the_reader(tiny_checkpoint):
    model, processor = load_for_answering(str(tiny_checkpoint))
    model.model.language_model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Conversation(model, processor).ask("q", max_new_tokens=2)


@pytest.mark.parametrize("opening", ["upright", "original"])
def test_training_and_answering_turn_a_picture_alike(tmp_path, opening):
    """By its EXIF data, as transformers does, or not at all, as the original."""
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (0, 0, 20, 20))
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif)
    for opened in (
        open_image(tmp_path / "turned.jpg", opening),
        open_picture({"path": str(tmp_path / "turned.jpg"), "bytes": None}, opening),
    ):
        upright = opening == "upright"
        assert opened.size == ((20, 40) if upright else (40, 20))
        assert opened.getpixel((10, 5) if upright else (5, 10))[2] > 200


def test_a_model_answers_of_pictures_as_it_was_trained(tiny_checkpoint, tmp_path, llava_ft):
    photo = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.linear_gradient("L").resize((40, 20)).convert("RGB").save(photo, exif=exif)
    answers = {}
    for opening in ("upright", "original"):
        folder = tmp_path / opening
        model, processor = load_for_answering(str(tiny_checkpoint))
        processor.picture_opening = opening
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        asked = ("--prompt", "What?", "--image", photo, "--max_new_tokens", 24)
        code, answers[opening], err = llava_ft("generate", "--model", folder, *asked)
        assert code == 0, err
        expected = Conversation(model, processor).ask("What?", [open_image(photo, opening)], max_new_tokens=24)
        assert answers[opening].strip() == expected
    assert answers["upright"] != answers["original"]


# ------------------------------------------------------------------ where a text and no token ends the answer


@pytest.mark.parametrize(
    "pieces, shown",
    [
        (["A cat.\n", "###"], ["A cat.\n"]),
        (["A cat.\n#", "##", " Human: x"], ["A cat.\n"]),
        (["C# ", "and ", "##"], ["C# ", "and ", "##"]),
        (["a#", "b##", "c"], ["a", "#b", "##c"]),
        (["a####"], ["a"]),
        (["###"], []),
        ([], []),
    ],
)
def test_a_text_is_shown_up_to_its_stop(pieces, shown):
    assert list(up_to("###", pieces)) == shown


def test_a_chat_under_the_oldest_prompt_ends_at_its_stop_and_does_not_show_it(tiny):
    """The model learns two rounds by heart. Without the stop it goes on with a question of its own."""
    processor = LlavaProcessor.build(
        load_tokenizer(GOLDEN / "tokenizer_tiny"), tiny.config().vision_config, version="v0"
    )
    model = tiny.model()
    fit_to_processor(model, processor)
    turns = [[{"type": "text", "text": text}] for text in ("Hi", "A cat.", "Sure?", "Yes.")]
    messages = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
    row = {name: value[None] for name, value in processor.encode_conversation(messages).items()}
    row["labels"] = row["input_ids"].clone()  # the questions too, so that it could go on
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(**row).loss.backward()
        optimizer.step()

    conversation = Conversation(model, processor)
    assert conversation.ask("Hi", max_new_tokens=40) == "A cat."
    assert conversation.ask("Sure?", max_new_tokens=40) == "Yes."
    assert processor.render(conversation.messages) == processor.render(messages)

    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    inputs = processor(text=[prompt], return_tensors="pt")
    going_on = model.generate(**inputs, do_sample=False, max_new_tokens=40)
    assert "A cat.\n### Human: Sure?" in processor.decode(going_on[0])
