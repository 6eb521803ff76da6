"""What the lines of a chat do, and what is said when there is no room left."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from hf_llava_ft.answering.chat import Chat
from hf_llava_ft.answering.conversation import ContextFull, Conversation
from hf_llava_ft.answering.loading import load_for_answering
from hf_llava_ft.answering.prompts import encode_row, question_content
from hf_llava_ft.answering.shared_base import SharedBase
from hf_llava_ft.checkpoints.opening import load_model
from hf_llava_ft.data.builder import load_llava_json
from hf_llava_ft.errors import UserError


@pytest.fixture(scope="module")
def parts(tiny_checkpoint):
    return load_for_answering(str(tiny_checkpoint), device="cpu")


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint, tiny_processor, tmp_path_factory):
    """LoRA and a projector, far enough from the base to answer otherwise."""
    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=["multi_modal_projector"])
    model = get_peft_model(load_model(str(tiny_checkpoint)), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.5)
    folder = tmp_path_factory.mktemp("adapter") / "out"
    model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture
def chat(parts):
    said, told = [], []
    chat = Chat(SharedBase(*parts), [], write=said.append, tell=told.append, max_new_tokens=4)
    chat.said, chat.told = said, told
    return chat


def test_commands_answer_in_a_line_and_ask_nothing(chat, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for line, told in (
        ("/help", "/image PATH_OR_URL adds a picture"),
        ("/imagine", "error: /imagine is no command here; /help names those that are."),
        ("/image", "error: /image wants a path or an address"),
        ("/image nowhere.png", "error: the image nowhere.png does not exist."),
        (f"/image {tmp_path}/text.png", "error: the image"),
        ("/new", "A new conversation."),
    ):
        assert chat.take(line)
        assert told in chat.told.pop() and not chat.told
    assert chat.take("") and not chat.said and not chat.conversation.messages
    assert not chat.take("/quit")


def test_a_picture_goes_with_the_next_question_and_no_further(chat, tmp_path):
    Image.new("RGB", (30, 20), "green").save(tmp_path / "green one.png")
    chat.take(f'/image "{tmp_path}/green one.png"')
    assert "it goes with your next question" in chat.told[-1]
    chat.take("What is it?")
    chat.take(" /etc is what?")
    contents = [message["content"] for message in chat.conversation.messages if message["role"] == "user"]
    assert [part["type"] for part in contents[0]] == ["image", "text"]
    assert contents[1] == [{"type": "text", "text": "/etc is what?"}]


def test_a_conversation_that_outgrows_the_context_offers_a_new_one(chat, parts):
    chat.take("Hello")
    before = list(chat.conversation.messages)
    chat.take("many words " * 300)
    assert "leaves no room for an answer: start a new one. /new starts over." in chat.told[-1]
    assert chat.conversation.messages == before and len(before) == 2
    chat.take("And now?")
    assert len(chat.conversation.messages) == 4
    with pytest.raises(ContextFull, match="ask a shorter question"):
        Conversation(*parts).ask("many words " * 300)


def test_an_answer_that_the_context_cuts_is_said_to_be_cut(chat, parts, monkeypatch):
    model, processor = parts
    monkeypatch.setattr(model.generation_config, "eos_token_id", [1087])
    chat.take("Hello")
    assert not chat.conversation.is_cut and not chat.told
    asked = [{"role": "user", "content": question_content("Hello", 0)}]
    length = encode_row(processor, asked, [])["input_ids"].shape[1]
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", length + 2)
    chat.take("/new")
    chat.take("Hello")
    assert "the model's context is full" in chat.told[-1] and chat.conversation.is_cut


def test_an_answer_that_is_ended_leaves_the_conversation_as_it_was(chat, parts):
    conversation = Conversation(*parts)
    pieces = conversation.stream("Hello", max_new_tokens=200)
    next(pieces)
    pieces.close()  # waits for one token more, not for 200
    assert conversation.messages == []

    def interrupted(*args, **kwargs):
        yield "a"
        raise KeyboardInterrupt

    chat.conversation.stream = interrupted
    assert chat.take("Hello") and "The answer was ended" in chat.told[-1]


def test_the_last_question_is_asked_again_and_its_answer_replaced(chat, tmp_path):
    Image.new("RGB", (30, 20), "green").save(tmp_path / "green.png")
    chat.take("/retry")
    assert chat.told[-1] == "error: nothing was asked yet." and not chat.conversation.messages
    chat.take("Hello")
    chat.take(f"/image {tmp_path}/green.png")
    chat.take("What is it?")
    before, images = list(chat.conversation.messages), list(chat.conversation.images)
    chat.told.clear()
    chat.take("/retry")
    assert chat.told == ["Greedy answers are the same each time; /retry 0.7 samples."]
    assert chat.conversation.messages == before and chat.conversation.images == images and not chat.pending
    chat.take("/retry 5")
    assert chat.conversation.messages[:-1] == before[:-1] and chat.conversation.messages != before
    assert len(chat.conversation.images) == 1
    for wrong in ("hot", "-1", "inf", "nan"):
        chat.take(f"/retry {wrong}")
        assert "a temperature is 0 or a number above it" in chat.told.pop()

    kept = list(chat.conversation.messages)

    def interrupted(*args, **kwargs):
        yield "a"
        raise KeyboardInterrupt

    chat.conversation.stream = interrupted
    chat.take("/retry 1")
    assert chat.conversation.messages == kept and len(chat.conversation.images) == 1


def test_a_system_message_stays_in_front_when_a_question_is_taken_back(parts):
    conversation = Conversation(*parts, system="Be short.")
    conversation.ask("Hello", max_new_tokens=2)
    conversation.ask("And?", max_new_tokens=2)
    conversation.take_back()
    assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant"]
    conversation.take_back()
    assert conversation.messages == []
    conversation.ask("Hello", max_new_tokens=2)
    assert conversation.messages[0]["role"] == "system"


def test_the_base_of_an_adapter_is_asked_too_and_the_conversation_stays(chat, adapter, tiny_checkpoint):
    chat.take("Hello")
    chat.take("/compare")
    assert "this model is no adapter" in chat.told.pop()
    said, told = [], []
    models = SharedBase(*load_for_answering(str(adapter), device="cpu"))
    tuned = Chat(models, [], write=said.append, tell=told.append, max_new_tokens=6)
    tuned.take("Hello")
    messages = list(tuned.conversation.messages)
    said.clear()
    tuned.take("/compare")
    base = Conversation(*load_for_answering(str(tiny_checkpoint), device="cpu")).ask("Hello", max_new_tokens=6)
    answer = messages[-1]["content"][0]["text"]
    assert told[-1] == f"tuned: {answer}" and "".join(said).strip() == f"base: {base}".strip() and base != answer
    assert tuned.conversation.messages == messages
    tuned.take("/retry")
    assert tuned.conversation.messages == messages  # the adapter answers again


def test_a_conversation_that_is_saved_can_be_trained_on(chat, tmp_path):
    Image.new("RGB", (30, 20), "green").save(tmp_path / "green.png")
    file = tmp_path / "talks.json"
    chat.take(f"/save {file}")
    assert "nothing to save" in chat.told.pop() and not file.exists()
    chat.take(f"/image {tmp_path}/green.png")
    chat.take("What is it?")
    chat.take(f"/save {file}")
    chat.take("And what else?")
    chat.take(f"/save {file}")
    assert "has 1 conversation;" in chat.told[-1]
    said = [message["content"] for message in chat.conversation.messages]
    chat.take("/new")
    chat.take("Hello")
    chat.take(f"/save {file}")
    assert "has 2 conversations;" in chat.told[-1]
    rows = load_llava_json(file, tmp_path, cache_dir=tmp_path / "cache")
    first = [message["content"] for message in rows[0]["messages"]]

    def texts(contents):  # of a picture's line too
        return [[part["text"].strip() for part in content if part["type"] == "text"] for content in contents]

    assert texts(first) == texts(said)
    assert first[0][0]["type"] == "image" and len(rows[0]["images"]) == 1 and len(rows) == 2
    assert json.loads(file.read_text())[0]["conversations"][0]["value"] == "<image>\nWhat is it?"
    for name, told in (("talks.txt", "does not end in .json"), ("other.json", "holds no rows of conversations")):
        (tmp_path / name).write_text('{"a": 1}')
        chat.take(f"/save {tmp_path / name}")
        assert told in chat.told.pop() and (tmp_path / name).read_text() == '{"a": 1}'


@pytest.mark.parametrize(
    "question, kinds",
    [
        ("What?", ["image", "image", "text"]),
        ("<image> or <image>?", ["image", "text", "image", "text"]),
        ("Is <image><image> one?", ["text", "image", "image", "text"]),
    ],
)
def test_pictures_stand_where_the_question_says(question, kinds):
    assert [part["type"] for part in question_content(question, 2)] == kinds


def test_a_picture_in_front_of_its_question_may_be_written():
    written = question_content("<image>\nWhat?", 1)
    assert written == question_content("What?", 1) == [{"type": "image"}, {"type": "text", "text": "What?"}]
    with pytest.raises(UserError, match="holds 2 <image> and comes with 1 picture: write"):
        question_content("<image><image>", 1)


# ------------------------------------------------------------------ settings


def test_what_generate_is_told_of_weights_and_sampling(llava_ft, tiny_checkpoint, tmp_path):
    def asked(*flags):
        code, out, err = llava_ft(
            "generate", "--model", tiny_checkpoint, "--prompt", "q", "--max_new_tokens", 8, *flags
        )
        assert code == 0, err
        return out

    plain = asked("--device", "cpu")
    assert asked("--bits", 4) != plain != asked("--system", "Speak of many other things.")
    assert asked("--dtype", "float32", "--temperature", 0.9, "--top_p", 1e-6) == plain  # the likeliest token alone


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--bits", 3], "--bits 3: weights are quantised to 4 or 8 bits"),
        (["--dtype", "int8"], "--dtype int8 is no dtype of weights"),
        (["--device", "gpu"], "--device gpu is no device: use cpu, cuda, cuda:1 or mps"),
        (["--device", "cuda:99"], "--device cuda:99: there is no such device here"),
        (["--top_p", 0.5], "--top_p chooses among sampled tokens"),
        (["--data_path", "d.json"], "generate answers either --prompt or the rows of --data_path"),
        (["--output", "a.jsonl"], "--output is for the answers to --data_path"),
    ],
)
def test_wrong_settings_are_one_sentence(llava_ft, tiny_checkpoint, flags, told):
    code, _, err = llava_ft("generate", "--model", tiny_checkpoint, "--prompt", "q", *flags)
    assert code == 2 and told in err and err.count("error: ") == 1
