"""What each template renders, what of it is supervised, and which template a tokenizer gets."""

import json

import pytest

from hf_llava_ft.processing.chat_templates_llava import CHAT_TEMPLATES, chat_template_for, own_chat_template
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from tests.processing.conversations import IMAGE, RECORDS_DIR, answer, messages_of, text, user

V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


SYSTEM = {"role": "system", "content": [text("Be brief.")]}
CHAT = [user(IMAGE, "\nWhat is it?"), answer("A cat."), user("Sure?"), answer(" Yes.\n")]

# (tokenizer, template): the rendered CHAT with a system message, [[what is supervised]] in double brackets; and how it
# begins without one.
RENDERED = {
    ("llama", "v1"): (
        "Be brief. USER: <image>\nWhat is it? ASSISTANT:[[ A cat.</s>]]USER: Sure? ASSISTANT:[[  Yes.\n</s>]]",
        f"{V1_SYSTEM} USER: <image>\nWhat",
    ),
    ("llama", "llava_llama_2"): (
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat is it? [/INST][[ A cat. </s>]]"
        "<s>[INST] Sure? [/INST][[  Yes.\n </s>]]",
        f"[INST] <<SYS>>\n{LLAMA_2_SYSTEM}\n<</SYS>>\n\n<image>\nWhat",
    ),
    ("llama", "mistral"): (
        "[INST] Be brief.\n\n<image>\nWhat is it? [/INST][[ A cat.</s>]][INST] Sure? [/INST][[  Yes.\n</s>]]",
        "[INST] <image>\nWhat",
    ),
    ("byte-level", "chatml"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n[[A cat.<|im_end|>]]\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n[[Yes.<|im_end|>]]\n",
        "<|im_start|>user\n<image>\nWhat",
    ),
    ("byte-level", "own"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n[[A cat.<|im_end|>]]\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n[[Yes.<|im_end|>]]\n",
        "<|im_start|>user\n<image>\nWhat",
    ),
}


def marked(processor: LlavaProcessor, messages) -> str:
    """The rendered text with its spans in double brackets."""
    rendered, spans = processor.render(messages)
    for start, end in reversed(spans):
        rendered = f"{rendered[:start]}[[{rendered[start:end]}]]{rendered[end:]}"
    return rendered


@pytest.mark.parametrize("kind, template", RENDERED)
def test_what_a_template_renders_and_supervises(processor_for, kind, template):
    whole, beginning = RENDERED[kind, template]
    processor = processor_for(kind, template)
    assert marked(processor, [SYSTEM, *CHAT]) == whole
    assert marked(processor, CHAT).startswith(beginning)


@pytest.mark.parametrize("kind", ["llama", "byte-level"])
def test_plain_is_the_image_and_its_caption(processor_for, kind):
    messages = [user(IMAGE, "\nDescribe it."), answer("A cat.")]
    assert marked(processor_for(kind, "plain"), messages) == "<image>[[A cat.\n]]"


def test_an_empty_system_message_leaves_out_the_default(processor_for):
    silent = {"role": "system", "content": []}
    question, reply = user("Hi"), answer("Yo")
    assert marked(processor_for("llama", "v1"), [silent, question, reply]) == "USER: Hi ASSISTANT:[[ Yo</s>]]"
    assert (
        marked(processor_for("llama", "llava_llama_2"), [silent, question, reply]) == "[INST] Hi [/INST][[ Yo </s>]]"
    )


@pytest.mark.parametrize(
    "parts, rendered",
    [
        ([IMAGE, "\nWhat?"], "<image>\nWhat?"),
        ([IMAGE, "What?"], "<image>\nWhat?"),
        ([IMAGE], "<image>"),
        ([IMAGE, IMAGE, "What?"], "<image>\n<image>\nWhat?"),
        ([IMAGE, "\n", IMAGE, "\nWhat?"], "<image>\n<image>\nWhat?"),
        (["Is ", IMAGE, " a cat?"], "Is <image> a cat?"),
        (["Is ", IMAGE, IMAGE, " a cat?"], "Is <image><image> a cat?"),
        (["What?\n", IMAGE], "What?\n<image>"),
        ([], ""),
    ],
)
@pytest.mark.parametrize("kind, template", RENDERED)
def test_a_leading_image_is_followed_by_one_newline_and_any_other_stays_where_it_is(
    processor_for, kind, template, parts, rendered
):
    processor = processor_for(kind, template)
    as_parts, _ = processor.render([user(*parts), answer("Yes.")])
    as_string, _ = processor.render([{"role": "user", "content": rendered}, answer("Yes.")])
    assert as_parts == as_string
    assert rendered in as_parts


@pytest.mark.parametrize("version", ["v1", "plain", "llava_llama_2"])
def test_the_text_is_the_originals(processor_for, version):
    """Byte for byte; what the ids and labels are is for test_processing_llava.py to say."""
    records = json.loads((RECORDS_DIR / f"{version}__legacyFalse.json").read_text())["records"]
    prompts = {record["id"]: record["prompt"] for record in records if record["id"] in ("img_end", "single_img_first")}
    assert len(prompts) == 2
    for name, prompt in prompts.items():
        assert processor_for("llama", version).render(messages_of(name))[0] == prompt


@pytest.mark.parametrize(
    "messages, message",
    [
        ([user("Describe it."), answer("A cat.")], "plain template needs an image"),
        ([{"role": "user", "content": "<image>"}, answer("A cat.")], "plain template needs an image"),
        (CHAT, "an image and its caption, not 4 turns"),
    ],
)
def test_plain_refuses_what_is_no_caption(processor_for, messages, message):
    with pytest.raises(ValueError, match=message):
        processor_for("llama", "plain").encode_conversation(messages)


OWN = (
    "{% for message in messages %}{{ message['role'] + '> ' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant> ' }}{% endif %}"
)
UNTEACHABLE = "{{ messages[0]['content'] }}"


def test_a_tokenizer_gets_its_own_template_else_chatml_else_v1(tokenizer_for):
    tokenizer = tokenizer_for("byte-level")
    assert chat_template_for(tokenizer) is CHAT_TEMPLATES["chatml"]
    tokenizer.chat_template = OWN
    assert OWN in chat_template_for(tokenizer).source
    assert chat_template_for(tokenizer, "mistral") is CHAT_TEMPLATES["mistral"]
    tokenizer.chat_template = UNTEACHABLE
    assert chat_template_for(tokenizer).source.endswith(UNTEACHABLE)
    assert chat_template_for(tokenizer_for("llama")) is CHAT_TEMPLATES["v1"]


def test_of_several_own_templates_the_default_is_used(tokenizer_for):
    tokenizer = tokenizer_for("byte-level")
    assert own_chat_template(tokenizer) is None
    tokenizer.chat_template = {"tool_use": "{{ 'tools' }}", "default": "{{ 'chat' }}"}
    assert own_chat_template(tokenizer).source.endswith("{{ 'chat' }}")
    tokenizer.chat_template = {"tool_use": "{{ 'tools' }}"}
    assert own_chat_template(tokenizer) is None


def test_an_unknown_name_is_refused_with_the_known_ones(tokenizer_for):
    names = ", ".join(CHAT_TEMPLATES)
    assert {"v0", "v1", "plain", "llava_llama_2", "chatml", "mistral", "qwen"} < set(CHAT_TEMPLATES)
    with pytest.raises(ValueError, match=f"'v2'; known: {names}"):
        chat_template_for(tokenizer_for("byte-level"), "v2")


def test_a_template_whose_stop_token_is_missing_is_refused(tokenizer_for):
    with pytest.raises(ValueError, match=r"'chatml' ends an answer with <\|im_end\|>, which the tokenizer does not"):
        chat_template_for(tokenizer_for("llama"), "chatml")
    assert chat_template_for(tokenizer_for("llama, chatml"), "chatml") is CHAT_TEMPLATES["chatml"]


def test_use_chat_template_replaces_the_template(tokenizer_for, vision_config):
    processor = LlavaProcessor.build(tokenizer_for("byte-level"), vision_config, version="chatml")
    processor.use_chat_template("v1")
    assert marked(processor, [SYSTEM, user("Hi"), answer("Yo")]) == "Be brief. USER: Hi ASSISTANT:[[ Yo<|im_end|>]]"


@pytest.mark.parametrize("template", ["mpt", "chatml_direct", "mistral_direct"])
def test_no_token_of_two_turns_is_learned(processor_for, template):
    """In LLaMA's vocabulary `><`, which ends one turn and begins the next."""
    processor = processor_for("llama, 32000 pieces", template)
    encoded = processor.encode_conversation([user("Sure?"), answer("Yes."), user("Sure?"), answer("No.")])
    learned = processor.tokenizer.convert_ids_to_tokens(encoded["labels"][encoded["labels"] != -100].tolist())
    stop = [".<", "|", "im", "_", "end", "|"]
    assert learned == ["Yes", *stop, "No", *stop, ">"]


SPEAKS = "{{ '<|im_start|>' + message['role'] + '\n' }}"
SAYS = "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
ASKS = "{{ message['content'] + '<|im_end|>\n' }}"
MARKED_INSIDE = {
    "nothing": "{% for message in messages %}SPEAKS{% if message['role'] == 'assistant' %}SAYS"
    "{% else %}ASKS{% endif %}{% endfor %}",
    "a macro": "{% macro turn(message) %}SPEAKSSAYS{% endmacro %}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ turn(message) }}{% else %}SPEAKSASKS{% endif %}{% endfor %}",
    "a set block": "{% for message in messages %}{% if message['role'] == 'assistant' %}{% set turn %}SPEAKSSAYS"
    "{% endset %}{{ turn }}{% else %}SPEAKSASKS{% endif %}{% endfor %}",
    "a filter": "{% for message in messages %}{% if message['role'] == 'assistant' %}{% filter trim %}SPEAKSSAYS"
    "{% endfilter %}{% else %}SPEAKSASKS{% endif %}{% endfor %}",
    "too much": "{% for message in messages %}{% if message['role'] == 'assistant' %}SPEAKS{% generation %}"
    "{{ message['content'] + '<|im_end|>\n<|im_start|>' }}{% endgeneration %}{% else %}SPEAKSASKS{% endif %}"
    "{% endfor %}",
}


@pytest.mark.parametrize("place", MARKED_INSIDE)
def test_marks_that_do_not_hold_the_answer_are_refused(tokenizer_for, vision_config, place):
    source = MARKED_INSIDE[place].replace("SPEAKS", SPEAKS).replace("SAYS", SAYS).replace("ASKS", ASKS)
    tokenizer = tokenizer_for("byte-level")
    tokenizer.chat_template = source
    processor = LlavaProcessor.build(tokenizer, vision_config)
    chat = [user("Sure?"), answer("Yes."), user("Sure?"), answer("No.")]
    if place == "nothing":
        assert marked(processor, chat).count("[[Yes.<|im_end|>]]") == 1
        processor.encode_conversation(chat)
        return
    with pytest.raises(ValueError, match="marks .* as an answer, which is none"):
        processor.encode_conversation(chat)
    processor.use_chat_template("chatml")
    processor.encode_conversation(chat)


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_our_own_marks_hold_the_answer(tokenizer_for, vision_config, template):
    tokenizer = tokenizer_for("llama, chatml")
    tokenizer.add_tokens(["<|eot_id|>"], special_tokens=True)
    assert LlavaProcessor.build(tokenizer, vision_config, version=template).misplaced_mark is None
