"""What the lines of a chat do, and what is said when there is no room left."""

import pytest
from PIL import Image

from hf_llava_ft.answering.chat import Chat
from hf_llava_ft.answering.conversation import ContextFull, Conversation
from hf_llava_ft.answering.loading import load_for_answering
from hf_llava_ft.answering.prompts import encode_row, question_content
from hf_llava_ft.errors import UserError


@pytest.fixture(scope="module")
def parts(tiny_checkpoint):
    return load_for_answering(str(tiny_checkpoint), device="cpu")


@pytest.fixture
def chat(parts):
    said, told = [], []
    chat = Chat(*parts, [], write=said.append, tell=told.append, max_new_tokens=4)
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
    with pytest.raises(UserError, match="holds 2 <image> and comes with 1 pictures"):
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
