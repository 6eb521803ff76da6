"""The original's prompts: byte for byte what it renders, and supervised where it should have been.

For v1, plain and llava_llama_2 its own records are compared in test_processing_llava.py; here are those with
`<im_start>`, and the rest written out by hand, from the rules of its `Conversation.get_prompt` and, for the `###`
prompts, of its `preprocess`. How the original makes ids of them is done over again in test_original_ids_llava.py.
"""

import json
import shutil
from copy import copy
from functools import cache
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from transformers import CLIPVisionConfig
from transformers.models.llava.processing_llava import LlavaProcessor as NativeLlavaProcessor

from hf_llava_ft.processing.chat_templates_llava import CHAT_TEMPLATES, chat_template_for
from hf_llava_ft.processing.conversation_llava import IGNORE_INDEX
from hf_llava_ft.processing.original_templates_llava import ORIGINAL_PROMPTS
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from tests.examples import examples
from tests.processing.conversations import (
    IMAGE,
    RECORDS_DIR,
    answer,
    answers,
    as_the_original,
    conversations_of,
    encoded,
    messages_of,
    supervised_texts,
    text,
    texts_with,
    user,
)

GOLDEN = Path(__file__).parents[1] / "golden"

# ------------------------------------------------------------------ what is rendered, and what of it is supervised

CHAT = [user(IMAGE, "\nWhat is it?"), answer("A cat."), user("Are you sure?"), answer("Yes.")]

CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, and assist the user with a "
    "variety of tasks using natural language.The visual content will be provided with the following format: "
    "<Image>visual content</Image>."
)
LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\nIf a question does not make "
    "any sense, or is not factually coherent, explain why instead of answering something not correct. If you don't "
    "know the answer to a question, please don't share false information."
)
LLAVA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."

# CHAT under each name, what is supervised in double brackets.
RENDERED = {
    "v0": f"{CURIOUS_HUMAN}\n\n### Human: <image>\nWhat is it?\n### Assistant:[[ A cat.\n###]]"
    " Human: Are you sure?\n### Assistant:[[ Yes.\n###]] ",
    "v0_mmtag": f"{MMTAG}\n\n### Human: <Image><image></Image>\nWhat is it?\n### Assistant:[[ A cat.\n###]]"
    " Human: Are you sure?\n### Assistant:[[ Yes.\n###]] ",
    "llava_v1": f"{CURIOUS_HUMAN} USER: <image>\nWhat is it? ASSISTANT:[[ A cat.</s>]]"
    "USER: Are you sure? ASSISTANT:[[ Yes.</s>]]",
    "v1_mmtag": f"{MMTAG} USER: <Image><image></Image>\nWhat is it? ASSISTANT:[[ A cat.</s>]]"
    "USER: Are you sure? ASSISTANT:[[ Yes.</s>]]",
    "llama_2": f"[INST] <<SYS>>\n{LLAMA_2}\n<</SYS>>\n\n<image>\nWhat is it? [/INST][[ A cat. </s>]]"
    "<s>[INST] Are you sure? [/INST][[ Yes. </s>]]",
    "mistral_instruct": "[INST] <image>\nWhat is it? [/INST][[ A cat. </s>]]"
    "[INST] Are you sure? [/INST][[ Yes. </s>]]",
    "mpt": f"<|im_start|>system\n{MPT}<|im_end|><|im_start|>user\n<image>\nWhat is it?<|im_end|>"
    "<|im_start|>assistant\n[[A cat.<|im_end|>]]<|im_start|>user\nAre you sure?<|im_end|>"
    "<|im_start|>assistant\n[[Yes.<|im_end|>]]",
    "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat is it?"
    "<|im_end|><|im_start|>assistant\n[[A cat.<|im_end|>]]<|im_start|>user\nAre you sure?<|im_end|>"
    "<|im_start|>assistant\n[[Yes.<|im_end|>]]",
    "qwen": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat is it?"
    "<|im_end|>\n<|im_start|>assistant\n[[A cat.<|im_end|>]]\n<|im_start|>user\nAre you sure?<|im_end|>\n"
    "<|im_start|>assistant\n[[Yes.<|im_end|>]]\n",
    "llama_3": f"<|start_header_id|>system<|end_header_id|>\n\n{LLAVA}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[A cat.<|eot_id|>]]"
    "<|start_header_id|>user<|end_header_id|>\n\nAre you sure?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[Yes.<|eot_id|>]]",
}
ALIASES = {
    "llava_v0": "v0",
    "vicuna_v1": "v1",
    "v0_plain": "plain",
    "mistral_direct": "chatml_direct",
}
# With the original's own records in test_processing_llava.py.
RECORDED = {"v1", "plain", "llava_llama_2"}

# What ends an answer, where it is not the end token.
STOP = dict.fromkeys(RENDERED, "</s>") | {"v0": "###", "v0_mmtag": "###", "llama_3": "<|eot_id|>"}
STOP |= dict.fromkeys(["mpt", "chatml_direct", "qwen"], "<|im_end|>")

MARKUP = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
IMAGE_START_END = ["<im_start>", "<im_end>"]
# As Llama 3's tokenizer cuts text: what counts is that newlines stay together, whatever follows.
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SENTENCEPIECE = ("llama", "legacy")
BYTE_LEVEL = ("byte-level", "byte-level, trimmed offsets")


@pytest.fixture(scope="module")
def original_processor_for(tokenizer_for):
    """`original_processor_for(kind, version)`, with a tokenizer that has every template's tokens."""

    @cache
    def with_every_token(kind: str, keeps_newlines_together: bool) -> LlavaProcessor:
        tokenizer = tokenizer_for(kind)
        if keeps_newlines_together:
            cut = pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated")
            bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, bytes_only])
        tokenizer.add_tokens([*IMAGE_START_END, *MARKUP], special_tokens=True)
        vision_config = CLIPVisionConfig.from_pretrained(GOLDEN / "tiny-clip")
        return LlavaProcessor.build(tokenizer, vision_config, version="v1", image_aspect_ratio="pad")

    @cache
    def processor(kind: str, version: str, image_start_end: bool = False) -> LlavaProcessor:
        made = copy(with_every_token(kind, version == "llama_3" and kind in BYTE_LEVEL))
        made.chat_template = chat_template_for(made.tokenizer, version, image_start_end).source
        return made

    return processor


def marked(processor, messages) -> str:
    rendered, spans = processor.render(messages)
    for start, end in reversed(spans):
        rendered = f"{rendered[:start]}[[{rendered[start:end]}]]{rendered[end:]}"
    return rendered


def test_every_name_of_the_original_is_here_and_checked():
    of_conversation_py = {
        "v0",
        "v1",
        "vicuna_v1",
        "llama_2",
        "mistral_instruct",
        "chatml_direct",
        "mistral_direct",
    } | {*("plain", "v0_plain", "llava_v0", "v0_mmtag", "llava_v1", "v1_mmtag", "llava_llama_2", "mpt")}
    assert set(ORIGINAL_PROMPTS) == of_conversation_py | {"llama_3"}
    assert set(ORIGINAL_PROMPTS) | {"qwen"} == set(RENDERED) | set(ALIASES) | RECORDED


@pytest.mark.parametrize("version", RENDERED)
def test_the_prompt_is_the_originals_and_its_answers_are_supervised(original_processor_for, version):
    processor = original_processor_for("llama", version)
    assert marked(processor, CHAT) == RENDERED[version]


@pytest.mark.parametrize("version", RENDERED)
def test_the_open_prompt_is_the_originals(original_processor_for, version):
    whole = RENDERED[version].replace("[[", "").replace("]]", "")
    expected = whole[: whole.rindex(" Yes." if " Yes." in whole else "Yes.")]
    prompt = original_processor_for("llama", version).apply_chat_template(CHAT[:3], add_generation_prompt=True)
    assert prompt == expected


@pytest.mark.parametrize("alias, version", ALIASES.items())
def test_two_names_for_one_template(alias, version):
    assert CHAT_TEMPLATES[alias] == CHAT_TEMPLATES[version]


@pytest.mark.parametrize(
    "version, beginning",
    [
        ("v0", "Be brief.\n\n### Human: Hi"),
        ("v1_mmtag", "Be brief. USER: Hi"),
        ("llama_2", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi"),
        ("mistral_instruct", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi"),
        ("chatml_direct", "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nHi"),
        ("llama_3", "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"),
    ],
)
def test_a_system_message_replaces_the_default_and_an_empty_one_leaves_it_out(
    original_processor_for, version, beginning
):
    processor = original_processor_for("llama", version)
    brief, silent = ({"role": "system", "content": parts} for parts in ([text("Be brief.")], []))
    turns = [user("Hi"), answer("Yo")]
    assert processor.render([brief, *turns])[0].startswith(beginning)
    without = processor.render([silent, *turns])[0]
    assert without.startswith(
        ("### Human: Hi", "USER: Hi", "[INST] Hi", "<|im_start|>user", "<|start_header_id|>user")
    )


@pytest.mark.parametrize("version", RENDERED)
def test_generation_stops_on_what_every_answer_teaches(original_processor_for, version):
    processor = original_processor_for("llama", version)
    row = encoded(processor, CHAT)
    assert [stretch.endswith(STOP[version]) for stretch in supervised_texts(processor, row["labels"])] == [True] * 2
    if STOP[version] == "###":
        assert (processor.stop_token_id, processor.stop_string) == (None, "###")
    else:
        assert processor.tokenizer.convert_ids_to_tokens(processor.stop_token_id) == STOP[version]
        assert processor.stop_string is None
        assert row["labels"].tolist().count(processor.stop_token_id) == 2


@pytest.mark.parametrize("version", ["mpt", "chatml_direct"])
def test_a_stop_token_that_the_tokenizer_has_not_is_text_as_in_the_original(tokenizer_for, vision_config, version):
    processor = LlavaProcessor.build(tokenizer_for("llama, 32000 pieces"), vision_config, version=version)
    assert (processor.stop_token_id, processor.stop_string) == (None, "<|im_end|>")
    first, last = supervised_texts(processor, encoded(processor, CHAT)["labels"])
    assert first == "A cat.<|im_end|"  # in LLaMA's vocabulary `><` is one token, and of the next turn too
    assert last == "Yes.<|im_end|>"
    processor.use_chat_template("v1")
    assert (processor.stop_token_id, processor.stop_string) == (2, None)


def test_a_template_that_marks_no_answer_stops_on_nothing(tokenizer_for, vision_config):
    processor = LlavaProcessor.build(tokenizer_for("llama"), vision_config, version="v1")
    processor.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert (processor.stop_token_id, processor.stop_string) == (None, None)
    with pytest.raises(ValueError, match="does not mark what ends an answer"):
        processor.encode_conversation([{"role": "user", "content": "q"}])


@pytest.mark.parametrize("version, token", [("chatml", "im_end"), ("qwen", "im_end"), ("llama_3", "eot_id")])
def test_a_template_whose_stop_token_is_missing_is_refused(tokenizer_for, version, token):
    with pytest.raises(ValueError, match=rf"'{version}' ends an answer with <\|{token}\|>, which the tokenizer does"):
        chat_template_for(tokenizer_for("llama"), version)


@pytest.mark.parametrize(
    "version, expected",
    [
        ("v1", "USER:ASSISTANT:[[ Yo</s>]]"),
        ("chatml_direct", "<|im_start|>user\n<|im_start|>assistant\n[[Yo<|im_end|>]]"),
        ("v0", "### Human: \n### Assistant:[[ Yo\n###]] "),
        ("mistral_instruct", "[INST]  [/INST][[ Yo </s>]]"),
    ],
)
def test_a_question_without_words(original_processor_for, version, expected):
    silent = {"role": "system", "content": []}
    assert marked(original_processor_for("llama", version), [silent, user(), answer("Yo")]) == expected


@pytest.mark.parametrize(
    "model_type, tokens, version",
    [
        ("llava_llama", [], "v1"),
        ("llava_mistral", [], "mistral_instruct"),
        ("llava_llama", ["<|im_start|>", "<|im_end|>"], "chatml_direct"),  # llava-v1.6-34b
        ("llava_qwen", ["<|im_start|>", "<|im_end|>"], "qwen"),
        ("llava_llama", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "llama_3"),
    ],
)
def test_a_checkpoint_of_the_original_is_asked_in_its_style(tmp_path, monkeypatch, model_type, tokens, version):
    """Also where the tokenizer comes with a template of its own, as those of Mistral and Qwen do."""
    shutil.copytree(GOLDEN / "c_forward/mlp2x_patch/checkpoint", tmp_path / "m")
    for name, more in {
        "config.json": {"model_type": model_type},
        "tokenizer_config.json": {"additional_special_tokens": tokens}
        | ({"chat_template": "{{ messages[0]['content'] + eos_token }}"} if version != "v1" else {}),
    }.items():
        settings = json.loads((tmp_path / "m" / name).read_text()) | more
        (tmp_path / "m" / name).write_text(json.dumps(settings))
    monkeypatch.chdir(GOLDEN)  # the checkpoint names its tower as `tiny-clip`
    assert LlavaProcessor.from_pretrained(tmp_path / "m").chat_template == CHAT_TEMPLATES[version].source


# ------------------------------------------------------------------ any conversation

SPECIAL_TEXTS = ["<|im_end|>", "<|im_start|>", "<|eot_id|>", "</s>", "<s>", "<unk>"]
FRAGMENTS = (
    SPECIAL_TEXTS
    + ["\n", "\n\n", "\r\n", " ", "    ", "\t", "\u00a0", "\u3000", "\x1c", "\x85", "#", "##", "###", " ### "]
    + ["<|im_start|>assistant\n", "<Image>", "</Image>", "<image"]
    + [" ASSISTANT: ", "USER: ", "Human: ", "###Assistant:", "[INST]", " [/INST] ", "<<SYS>>", "{{ x }}", "{% raw %}"]
    + ["🐱", "👩‍👩‍👧", "é", "你好", "The cat", "1. ", "'s", ":", "."]
)
TEXTS = texts_with(FRAGMENTS)

any_conversation = examples(15)
each_version = pytest.mark.parametrize("version", RENDERED)
each_kind = pytest.mark.parametrize("kind", [*SENTENCEPIECE, *BYTE_LEVEL])


def learned(kind: str, version: str, value: str, eos: str) -> str:
    """What the supervised ids of an answer decode to."""
    stop = STOP[version]
    if version in ("qwen", "llama_3"):
        return value.strip() + stop
    if version in ("mpt", "chatml_direct"):
        return (value.removeprefix(" ") if kind in SENTENCEPIECE else value) + stop
    # The template's own space; the decoder of a SentencePiece tokenizer strips one, which is that.
    space = "" if kind in SENTENCEPIECE else " "
    if stop == "###":
        return space + value + "\n" + stop
    return space + value + (" " if version in ("llama_2", "mistral_instruct") else "") + eos


def fuses_with_the_prompt(kind: str, version: str, value: str) -> bool:
    """Byte-level tokenizers make one token of the prompt's last newline and white space that an answer begins with."""
    return version in ("mpt", "chatml_direct") and kind in BYTE_LEVEL and value[0].isspace()


@each_kind
@each_version
@any_conversation
@given(data=st.data())
def test_the_supervised_ids_are_the_answers_and_what_ends_them(original_processor_for, kind, version, data):
    processor = original_processor_for(kind, version)
    messages = data.draw(conversations_of(TEXTS, max_rounds=3))
    values = answers(messages)
    # A `legacy` tokenizer puts a space of its own behind each special token, also behind one in an answer.
    assume(kind != "legacy" or not any(token in value for token in SPECIAL_TEXTS for value in values))
    found = supervised_texts(processor, encoded(processor, messages)["labels"])
    assert len(found) == len(values)
    for value, stretch in zip(values, found, strict=True):
        expected = learned(kind, version, value, processor.tokenizer.eos_token)
        if fuses_with_the_prompt(kind, version, value) and stretch != expected:
            expected = "\n" + expected
        assert stretch == expected


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@pytest.mark.parametrize("value", ["cat", " cat", "  cat", "    cat", "\tcat", "\n cat", " \n  cat", "    <|im_end|>"])
def test_spaces_before_an_answer_are_learned_also_where_they_are_one_token_with_the_prompt(
    original_processor_for, kind, value
):
    processor = original_processor_for(kind, "chatml_direct")
    [found] = supervised_texts(processor, encoded(processor, [user("q"), answer(value)])["labels"])
    assert found in (f"{value}<|im_end|>", f"\n{value}<|im_end|>")


@each_kind
@each_version
@any_conversation
@given(data=st.data())
def test_the_prompt_of_a_chat_is_the_beginning_of_the_training_row(original_processor_for, kind, version, data):
    processor = original_processor_for(kind, version)
    messages = data.draw(conversations_of(TEXTS, max_rounds=3))
    row, spans = processor.render(messages)
    row_ids = processor.tokenizer(row).input_ids
    places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for place, (start, _), value in zip(places, spans, answers(messages), strict=True):
        prompt = processor.apply_chat_template(messages[:place], add_generation_prompt=True)
        assert prompt == row[:start]
        if not fuses_with_the_prompt(kind, version, value):
            prompt_ids = processor.tokenizer(prompt).input_ids
            assert row_ids[: len(prompt_ids)] == prompt_ids


# ------------------------------------------------------------------ <im_start> and <im_end>

RECORDS = {
    record["id"]: record for record in json.loads((RECORDS_DIR / "v1__legacyFalse__imse.json").read_text())["records"]
}
# Two images in one turn, which the original makes one; and text that it cuts.
COLLAPSED, CUT = "two_images_one_turn", "long_text_trunc64"
REFUSED = {"gpt_first_img_in_skipped", "text_only_with_image_tag", "empty_answer_img"}  # by the schema
COMPARED = [name for name in RECORDS if "error" not in RECORDS[name] and name not in {COLLAPSED, CUT, *REFUSED}]


@pytest.fixture(scope="module")
def imse_processor(tokenizer_for):
    tokenizer = tokenizer_for("llama, 32000 pieces")
    tokenizer.add_tokens(IMAGE_START_END, special_tokens=True)
    vision_config = CLIPVisionConfig.from_pretrained(GOLDEN / "tiny-clip")
    processor = LlavaProcessor.build(tokenizer, vision_config, version="v1", image_aspect_ratio="pad")
    processor.chat_template = chat_template_for(processor.tokenizer, "v1", image_start_end=True).source
    return processor


def test_the_tokens_have_the_originals_ids(imse_processor):
    assert imse_processor.tokenizer.convert_tokens_to_ids([*IMAGE_START_END, "<image>"]) == [32000, 32001, 32002]


@pytest.mark.parametrize("name", COMPARED)
def test_prompt_ids_and_labels_between_start_and_end_are_the_originals(imse_processor, name):
    assert len(COMPARED) == 13
    record, messages = RECORDS[name], messages_of(name)
    ids, labels = as_the_original(imse_processor, messages)
    assert imse_processor.render(messages)[0] == record["prompt"]
    assert ids == record["input_ids"]
    if "tokenization mismatch" in record.get("stdout", ""):  # the original lost count, and learns nothing
        assert set(record["labels"]) == {IGNORE_INDEX} != set(labels)
    else:
        assert labels == record["labels"]


def test_two_images_are_each_between_start_and_end(imse_processor):
    prompt, _ = imse_processor.render(messages_of(COLLAPSED))
    assert "USER: <im_start><image><im_end>\n<im_start><image><im_end>\nCompare them." in prompt


@pytest.mark.parametrize("version", [*RENDERED, *sorted(RECORDED)])
def test_every_template_but_plain_takes_start_and_end(original_processor_for, version):
    messages = CHAT[:2] if version == "plain" else CHAT
    bare = marked(original_processor_for("llama", version), messages)
    wrapped = marked(original_processor_for("llama", version, True), messages)
    markup = "<image>" if version == "plain" else "<im_start><image><im_end>"
    assert bare.count("<image>") == 1
    assert wrapped == bare.replace("<image>", markup)


def test_content_given_as_a_string_takes_them_too(imse_processor):
    as_string = {"role": "user", "content": "<image>\nWhat is it?"}
    assert imse_processor.render([as_string, *CHAT[1:]]) == imse_processor.render(CHAT)


def test_a_tokenizers_own_template_takes_them_too(tokenizer_for):
    tokenizer = tokenizer_for("byte-level")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    tokenizer.add_tokens(IMAGE_START_END, special_tokens=True)
    processor = LlavaProcessor.build(tokenizer, CLIPVisionConfig.from_pretrained(GOLDEN / "tiny-clip"))
    processor.chat_template = chat_template_for(tokenizer, image_start_end=True).source
    assert processor.apply_chat_template(CHAT[:1]) == "<im_start><image><im_end>\nWhat is it?<|im_end|>"


@pytest.mark.parametrize("version", ["v1", "v0_mmtag"])
def test_a_native_processor_renders_them(original_processor_for, tmp_path, version):
    processor = original_processor_for("llama", version, True)
    processor.save_pretrained(tmp_path)
    native = NativeLlavaProcessor.from_pretrained(tmp_path)
    prompt = native.apply_chat_template(CHAT[:3], add_generation_prompt=True)
    assert prompt == processor.apply_chat_template(CHAT[:3], add_generation_prompt=True)
    assert "<im_start><image><im_end>" in prompt


def test_without_the_tokens_start_and_end_are_refused(tokenizer_for):
    tokenizer = tokenizer_for("llama")
    with pytest.raises(ValueError, match="does not have <im_start> and <im_end>: add them"):
        chat_template_for(tokenizer, "v1", image_start_end=True)
    tokenizer.add_tokens(["<im_start>"], special_tokens=True)
    with pytest.raises(ValueError, match="does not have <im_end>: add them"):
        chat_template_for(tokenizer, "v1", image_start_end=True)
