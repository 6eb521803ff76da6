"""What is learned of a conversation is exactly its answers, on the ids that every reader of the processor sees."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPVisionConfig, SiglipVisionConfig

from hf_llava_ft.data.schema import parse_llava_row
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.chat_templates_llava import CHAT_TEMPLATES
from hf_llava_ft.processing.conversation_llava import IGNORE_INDEX
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from tests import warm_python
from tests.examples import examples
from tests.processing.conversations import (
    CASES,
    IMAGE,
    NUM_IMAGE_TOKENS,
    PICTURE,
    RECORDS_DIR,
    answer,
    answers,
    as_the_original,
    conversations_of,
    encoded,
    messages_of,
    num_images,
    supervised_texts,
    text,
    texts_with,
    user,
)

GOLDEN = Path(__file__).parents[1] / "golden"

RECORDED = "llama, 32000 pieces"
SENTENCEPIECE = ["llama", "llama, chatml", RECORDED]
TEMPLATES = [
    ("llama", "v1"),
    ("llama", "plain"),
    ("llama", "llava_llama_2"),
    ("llama", "mistral"),
    ("llama", "own"),
    ("llama, chatml", "chatml"),
    ("llama, chatml", "own"),
    *(("byte-level", template) for template in ["v1", "plain", "llava_llama_2", "chatml", "mistral", "own"]),
]
# Offsets decide what is supervised, and nothing else.
TRIMMED = [("byte-level, trimmed offsets", template) for kind, template in TEMPLATES if kind == "byte-level"]


def learned(kind: str, template: str, value: str, eos: str) -> str:
    """What the supervised ids of the answer `value` decode to."""
    if template in ("chatml", "own"):
        return value.strip() + eos
    if template == "plain":
        return value + "\n"
    # The template's own space; the decoder of a SentencePiece tokenizer strips one, which is that.
    space = "" if kind in SENTENCEPIECE else " "
    return space + value + (" " if template == "llava_llama_2" else "") + eos


# ------------------------------------------------------------------ any conversation

FRAGMENTS = (
    ["\n", "\n\n", "\r\n", " ", "    ", "\t", "\u00a0", "\u3000", "\u2028", "\x1c", "\x85"]
    + ["<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "</s>", "<s>", "<unk>", "<pad>", "<image", "image>"]
    + ["ASSISTANT:", " ASSISTANT: ", "USER: ", "[INST]", " [/INST] ", "<<SYS>>", "### ", "<0x0A>"]
    + [
        "{{ x }}",
        "{% generation %}",
        "{%- endgeneration -%}",
        "🐱",
        "👩‍👩‍👧",
        "é",
        "你好",
        "The cat",
        "1. ",
        "'s",
        ":",
        ".",
    ]
)
TEXTS = texts_with(FRAGMENTS)
ANSWERS = TEXTS.filter(str.strip).map(answer)
CAPTIONS = st.builds(lambda words, caption: [user(IMAGE, words), caption], TEXTS.filter(bool), ANSWERS)


def conversations_for(template: str):
    return CAPTIONS if template == "plain" else conversations_of(TEXTS, max_rounds=4)


any_conversation = examples(40)


@pytest.mark.parametrize("kind, template", TEMPLATES + TRIMMED)
@any_conversation
@given(data=st.data())
def test_the_supervised_ids_are_the_answers_and_their_stop_tokens(processor_for, kind, template, data):
    processor = processor_for(kind, template)
    messages = data.draw(conversations_for(template))
    eos = processor.tokenizer.eos_token
    expected = [learned(kind, template, value, eos) for value in answers(messages)]
    assert supervised_texts(processor, encoded(processor, messages)["labels"]) == expected


@pytest.mark.parametrize("kind, template", TEMPLATES)
@any_conversation
@given(data=st.data())
def test_the_prompt_of_a_chat_is_the_beginning_of_the_training_row(processor_for, kind, template, data):
    """In text and in ids, at every answer: what generation continues from is what training continued from."""
    processor = processor_for(kind, template)
    messages = data.draw(conversations_for(template))
    row, spans = processor.render(messages)
    places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(places) == len(spans)
    for place, (start, end) in zip(places, spans, strict=True):
        prompt = processor.apply_chat_template(messages[:place], add_generation_prompt=True)
        assert prompt == row[:start]
        assert answers(messages[: place + 1])[-1].strip() in row[start:end]
        prompt_ids = processor.tokenizer(prompt).input_ids
        assert processor.tokenizer(row).input_ids[: len(prompt_ids)] == prompt_ids


@pytest.mark.parametrize("kind, template", TEMPLATES)
@any_conversation
@given(data=st.data())
def test_ids_and_pixels_are_those_of_the_native_call(processor_for, kind, template, data):
    """`__call__` is transformers' own: here it gets the training text, and gives what training sees."""
    processor = processor_for(kind, template)
    messages = data.draw(conversations_for(template))
    ours = encoded(processor, messages)
    images = [PICTURE] * num_images(messages)
    native = processor(text=[processor.render(messages)[0]], images=images or None, return_tensors="pt")
    assert torch.equal(ours["input_ids"], native["input_ids"][0])
    assert torch.equal(ours["attention_mask"], native["attention_mask"][0])
    assert ours.keys() - {"labels"} == native.keys()
    assert not images or torch.equal(ours["pixel_values"], native["pixel_values"])
    assert processor.num_tokens(messages) == len(ours["input_ids"])


@pytest.mark.parametrize("kind, template", TEMPLATES + TRIMMED)
def test_image_prompt_and_nothing_else_are_masked(processor_for, kind, template):
    """Question and answer are the same words, so only the place can tell them apart."""
    processor = processor_for(kind, template)
    messages = [user(IMAGE, "\nThe cat"), answer("The cat")]
    row = encoded(processor, messages)
    ids, labels = row["input_ids"], row["labels"]
    supervised = labels != IGNORE_INDEX
    assert torch.equal(labels[supervised], ids[supervised])
    assert (ids == processor.image_token_id).sum() == NUM_IMAGE_TOKENS
    assert not (supervised & (ids == processor.image_token_id)).any()
    eos = processor.tokenizer.eos_token
    assert supervised_texts(processor, labels) == [learned(kind, template, "The cat", eos)]
    last = int(labels[supervised][-1])
    assert last == processor.stop_token_id
    assert processor.tokenizer.decode([last]) == ("\n" if template == "plain" else eos)


@pytest.mark.parametrize("kind, template", [("llama", "v1"), ("byte-level", "chatml"), ("byte-level", "own")])
def test_an_image_inside_an_answer_is_masked_too(processor_for, kind, template):
    """The schema refuses such a row; who calls the processor with one must not teach a model to say placeholders."""
    processor = processor_for(kind, template)
    reply = {"role": "assistant", "content": [text("It is\n"), IMAGE, text("\nhere.")]}
    row = encoded(processor, [user("Where?"), reply])
    assert (row["input_ids"] == processor.image_token_id).sum() == NUM_IMAGE_TOKENS
    assert not (row["labels"] == processor.image_token_id).any()
    before, after = supervised_texts(processor, row["labels"])
    assert before.endswith("It is\n") and after == "\nhere." + processor.tokenizer.eos_token


def test_spaces_are_learned_where_offsets_leave_them_out(processor_for):
    """A token of spaces alone has an empty range in the offsets of such a tokenizer."""
    processor = processor_for("byte-level, trimmed offsets", "chatml")
    offsets = processor.tokenizer("a  \n   b", return_offsets_mapping=True).offset_mapping
    assert any(start == end for start, end in offsets)
    labels = encoded(processor, [user("Hi"), answer("a  \n   b")])["labels"]
    assert supervised_texts(processor, labels) == ["a  \n   b<|im_end|>"]


# ------------------------------------------------------------------ the original's figures

RECORDS = {
    (version, record["id"]): record
    for version in ("v1", "plain", "llava_llama_2")
    for record in json.loads((RECORDS_DIR / f"{version}__legacyFalse.json").read_text())["records"]
}

# Rows that the schema refuses: the original loses the first turn, trains without an image, or learns an empty answer.
REFUSED = {
    "gpt_first_img_in_skipped": "begins with an assistant turn",
    "text_only_with_image_tag": "1 <image> placeholder and 0 images",
    "empty_answer_img": "turn 2 is an empty answer",
    "two_humans_in_row": "turns 1 and 2 are both human turns",
    "capital_role": "unknown role 'Human'",
}
# Two images in one turn, which the original makes one.
COLLAPSED = "two_images_one_turn"
# Text that the original cuts at model_max_length.
CUT = "long_text_trunc64"


def is_masked(record) -> bool:
    return "tokenization mismatch" in record.get("stdout", "")


def cases(condition):
    return [key for key, record in RECORDS.items() if key[1] not in REFUSED and condition(key[1], record)]


EQUAL = cases(lambda name, record: "error" not in record and not is_masked(record) and name not in (COLLAPSED, CUT))
MASKED = cases(lambda name, record: is_masked(record))
FAILED = cases(lambda name, record: "error" in record)


def test_most_records_are_compared_exactly():
    assert (len(EQUAL), len(MASKED), len(FAILED)) == (21, 7, 12)


@pytest.mark.parametrize("version, name", EQUAL)
def test_ids_and_labels_are_the_originals(processor_for, version, name):
    record = RECORDS[version, name]
    ids, labels = as_the_original(processor_for(RECORDED, version), messages_of(name))
    assert ids == record["input_ids"]
    assert labels == record["labels"]


@pytest.mark.parametrize("version, name", MASKED)
def test_where_the_original_learns_nothing_the_answers_are_learned(processor_for, version, name):
    """It loses count at an empty question, a literal `</s>` or its own separators, and masks the whole row."""
    assert set(RECORDS[version, name]["labels"]) == {IGNORE_INDEX}
    processor = processor_for(RECORDED, version)
    messages = messages_of(name)
    ids, labels = as_the_original(processor, messages)
    expected = [learned(RECORDED, version, value, "</s>") for value in answers(messages)]
    assert supervised_texts(processor, torch.tensor(labels)) == expected
    assert ids == RECORDS[version, name]["input_ids"]


@pytest.mark.parametrize("version", ["v1", "llava_llama_2"])
def test_text_is_not_cut(processor_for, version):
    record = RECORDS[version, CUT]
    assert len(record["input_ids"]) == 64 and set(record["labels"]) == {IGNORE_INDEX}
    messages = messages_of(CUT)
    processor = processor_for(RECORDED, version)
    ids, labels = as_the_original(processor, messages)
    assert ids[:64] == record["input_ids"]
    expected = [learned(RECORDED, version, value, "</s>") for value in answers(messages)]
    assert supervised_texts(processor, torch.tensor(labels)) == expected


@pytest.mark.parametrize("version, between", [("v1", [29871, 13]), ("llava_llama_2", [29871, 13]), ("plain", [])])
def test_two_images_in_a_turn_stay_two(processor_for, version, between):
    record = RECORDS[version, COLLAPSED]
    place = record["input_ids"].index(-200)
    ids, labels = as_the_original(processor_for(RECORDED, version), messages_of(COLLAPSED))
    assert ids == [*record["input_ids"][:place], -200, *between, *record["input_ids"][place:]]
    assert labels == [IGNORE_INDEX] * (1 + len(between)) + record["labels"]


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_could_only_train_wrongly_are_refused_before_they_are_encoded(name):
    with pytest.raises(UserError, match=REFUSED[name]):
        parse_llava_row(CASES[name], "conversations.json")


@pytest.mark.parametrize("version, name", FAILED)
def test_where_the_original_fails(processor_for, version, name):
    """What is no caption is refused, with a sentence; an empty question is no reason to fail."""
    processor = processor_for(RECORDED, version)
    if version == "plain":
        with pytest.raises(ValueError, match="the plain template (takes|needs) an image"):
            encoded(processor, messages_of(name))
    else:
        assert (version, name) == ("llava_llama_2", "empty_human_text")
        labels = encoded(processor, messages_of(name))["labels"]
        assert supervised_texts(processor, labels) == ["I say something anyway. </s>"]


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "places, images, numbers", [(2, 1, "2 <image> and there are 1 images"), (0, 1, "0 <image> and there are 1 images")]
)
def test_places_and_images_must_be_as_many(processor_for, places, images, numbers):
    messages = [user(*[IMAGE] * places, "\nWhat?"), answer("A cat.")]
    with pytest.raises(ValueError, match=numbers):
        processor_for("llama", "v1").encode_conversation(messages, [PICTURE] * images)


def test_a_conversation_without_an_answer_is_refused(processor_for):
    with pytest.raises(ValueError, match="marks no answer"):
        processor_for("llama", "v1").encode_conversation([user("Hi")])


@pytest.fixture
def processor_with_own(tokenizer_for, vision_config):
    def build(kind: str, source: str) -> LlavaProcessor:
        tokenizer = tokenizer_for(kind)
        tokenizer.chat_template = source
        return LlavaProcessor.build(tokenizer, vision_config)

    return build


@pytest.mark.parametrize(
    "source, reason",
    [
        # As those that drop the reasoning of earlier answers: what a chat saw is not what training would see.
        (
            "{% for m in messages %}{{ m['role'] + ': ' + (m['content'] if loop.last else 'dropped') + eos_token }}"
            "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
            "earlier turns are rewritten",
        ),
        (
            "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}",
            "no stop token, and prompts shorter than its name",
        ),
        (
            "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}",
            "the prompt is not what stands before the answer",
        ),
    ],
)
def test_own_templates_without_spans_are_refused(processor_with_own, source, reason):
    processor = processor_with_own("byte-level", source)
    with pytest.raises(ValueError, match="own chat template cannot be used for training.*--version chatml"):
        processor.encode_conversation([user("a"), answer("b")] * 2)
    assert processor.apply_chat_template([user("a")]).startswith(("user: a", "a")), reason


def test_a_template_that_marks_no_stop_token_serves_for_answering_only(tokenizer_for, vision_config):
    """As that of `llava-hf/llava-1.5-7b-hf`: the answer is marked, and a space, but nothing that ends it."""
    source = (
        "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
        "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}"
        "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    processor = LlavaProcessor.build(tokenizer_for("llama"), vision_config)
    processor.chat_template = source
    assert processor.stop_token_id is None
    assert processor.apply_chat_template([user("Hi")], add_generation_prompt=True) == "USER: Hi ASSISTANT:"
    with pytest.raises(ValueError, match="never learn to stop.*--version v1"):
        processor.encode_conversation([user("Hi"), answer("Yo")])
    processor.use_chat_template("v1")
    assert processor.stop_token_id == processor.tokenizer.eos_token_id
    labels = processor.encode_conversation([user("Hi"), answer("Yo")])["labels"]
    assert supervised_texts(processor, labels) == ["Yo</s>"]


@pytest.mark.parametrize("bos", ["", "{{ bos_token }}"])
def test_a_row_begins_with_one_bos_token_whether_or_not_the_template_writes_it(processor_with_own, bos):
    source = (
        bos + "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    processor = processor_with_own("llama", source)
    messages = [user("a"), answer("b")]
    row = processor.encode_conversation(messages)
    tokens = processor.tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert tokens[0] == "<s>" and tokens.count("<s>") == 1
    assert processor.num_tokens(messages) == len(tokens)
    assert supervised_texts(processor, row["labels"]) == ["b</s>"]


# ------------------------------------------------------------------ rows and batches


def test_images_stay_in_the_order_of_their_places(processor_for):
    processor = processor_for("llama", "v1")
    pictures = [
        Image.new("RGB", size, color) for size, color in [((9, 5), "red"), ((4, 8), "green"), ((6, 6), "blue")]
    ]
    messages = [user(IMAGE, "\nA ", IMAGE, " b?"), answer("c"), user(IMAGE, "\nd"), answer("e")]
    row = processor.encode_conversation(messages, pictures)
    assert row["pixel_values"].shape == (3, 3, 56, 56)
    assert (row["input_ids"] == processor.image_token_id).sum() == 3 * NUM_IMAGE_TOKENS
    for pixels, picture in zip(row["pixel_values"], pictures, strict=True):
        assert torch.equal(pixels, processor.image_processor([picture], return_tensors="pt")["pixel_values"][0])


def test_a_text_row_has_no_pixels(processor_for):
    row = processor_for("llama", "v1").encode_conversation([user("Hi"), answer("Yo")])
    assert row.keys() == {"input_ids", "labels", "attention_mask"}


def test_placeholders_follow_the_tower_and_the_strategy(tokenizer_for):
    clip = CLIPVisionConfig(image_size=28, patch_size=14)
    siglip = SiglipVisionConfig(image_size=28, patch_size=14)
    for config, strategy, number in [(clip, None, 4), (clip, "full", 5), (siglip, None, 4)]:
        processor = LlavaProcessor.build(tokenizer_for("byte-level"), config, vision_feature_select_strategy=strategy)
        assert processor.num_image_tokens == number
        ids = encoded(processor, [user(IMAGE, "\nWhat?"), answer("A cat.")])["input_ids"]
        assert (ids == processor.image_token_id).sum() == number


@pytest.fixture(scope="module")
def rows(processor_for):
    processor = processor_for("llama", "v1")
    pictures = [Image.new("RGB", (5, 9), color) for color in ("red", "green", "blue")]
    return [
        processor.encode_conversation([user(IMAGE, "\nWhat is it?"), answer("A cat.")], pictures[:1]),
        processor.encode_conversation([user("Hi"), answer("Yo")]),
        processor.encode_conversation([user(IMAGE, IMAGE, "Same?"), answer("No, it is not.")], pictures[1:]),
    ]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [None, 1, 64])
def test_padding_is_masked_and_changes_nothing_else(processor_for, rows, side, multiple):
    processor = processor_for("llama", "v1")
    batch = processor.pad(rows, padding_side=side, pad_to_multiple_of=multiple)
    longest = max(len(row["input_ids"]) for row in rows)
    length = batch["input_ids"].shape[1]
    assert length == (-(-longest // 64) * 64 if multiple == 64 else longest)
    fill = {"input_ids": processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}
    assert batch.keys() == {*fill, "pixel_values"}
    for name, value in fill.items():
        assert batch[name].shape == (3, length) and batch[name].dtype == torch.int64
        for padded, row in zip(batch[name], rows, strict=True):
            size = len(row[name])
            kept, rest = (padded[:size], padded[size:]) if side == "right" else (padded[-size:], padded[:-size])
            assert torch.equal(kept, row[name])
            assert (rest == value).all()


def test_pixels_of_a_batch_are_those_of_its_rows_one_after_the_other(processor_for, rows):
    batch = processor_for("llama", "v1").pad(rows)
    assert torch.equal(batch["pixel_values"], torch.cat([rows[0]["pixel_values"], rows[2]["pixel_values"]]))


def test_a_batch_of_text_has_no_pixels(processor_for, rows):
    assert "pixel_values" not in processor_for("llama", "v1").pad(rows[1:2])


# ------------------------------------------------------------------ folders

CHATS = {
    "plain": [user(IMAGE, "\nDescribe it."), answer(" A  cat, 一只猫🐱.")],
    "chat": [
        {"role": "system", "content": [text("Be brief.")]},
        user(IMAGE, "\nIs ", IMAGE, "  a cat 猫?\n"),
        answer("Yes,    a 🐱.\n\nIt says ASSISTANT: </s>"),
        user("Sure"),
        answer("1. yes\n2. no"),
    ],
}


def chat_for(template: str):
    return CHATS["plain" if template == "plain" else "chat"]


@pytest.mark.parametrize("kind, template", TEMPLATES)
def test_a_saved_processor_encodes_as_before(processor_for, tmp_path, kind, template):
    processor = processor_for(kind, template)
    before = encoded(processor, chat_for(template))
    processor.save_pretrained(tmp_path)
    loaded = LlavaProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LlavaProcessor
    after = encoded(loaded, chat_for(template))
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name])
    assert loaded.stop_token_id == processor.stop_token_id
    assert loaded.tokenizer.pad_token_id == processor.tokenizer.pad_token_id


NATIVE = """
import json, sys
from pathlib import Path

sys.modules["hf_llava_ft"] = None  # importing it is an error now
import numpy as np
from transformers import AutoProcessor

for folder in map(Path, sys.argv[1:]):
    processor = AutoProcessor.from_pretrained(folder)
    messages = json.loads((folder / "messages.json").read_text())
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="np")
    np.savez(folder / "inputs.npz", module=type(processor).__module__, **inputs)
"""


def test_without_this_package_the_folder_is_a_native_processor_with_the_same_ids_and_pixels(processor_for, tmp_path):
    PICTURE.save(tmp_path / "picture.png")
    folders = {}
    for kind, template in TEMPLATES:
        folder = folders[kind, template] = tmp_path / f"{kind} {template}"
        processor_for(kind, template).save_pretrained(folder)
        messages = json.loads(json.dumps(chat_for(template)))
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image":
                    part["path"] = str(tmp_path / "picture.png")
        (folder / "messages.json").write_text(json.dumps(messages))
    done = warm_python.run(["-c", NATIVE, *map(str, folders.values())], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for (kind, template), folder in folders.items():
        ours = encoded(processor_for(kind, template), chat_for(template))
        native = np.load(folder / "inputs.npz")
        assert str(native["module"]) == "transformers.models.llava.processing_llava"
        assert native["input_ids"][0].tolist() == ours["input_ids"].tolist(), (kind, template)
        assert np.array_equal(native["pixel_values"], ours["pixel_values"].numpy()), (kind, template)


def test_a_folder_of_the_original_gets_a_processor(monkeypatch):
    monkeypatch.chdir(GOLDEN)  # the checkpoint names its tower as `tiny-clip`
    processor = LlavaProcessor.from_pretrained("c_forward/mlp2x_patch/checkpoint")
    assert processor.chat_template == CHAT_TEMPLATES["v1"].source
    assert processor.image_processor.do_pad is True
    assert processor.image_processor.crop_size == {"height": 56, "width": 56}
    assert processor.num_image_tokens == NUM_IMAGE_TOKENS
    assert processor.stop_token_id == processor.tokenizer.eos_token_id == 2
    assert processor.image_token_id == 1024
    assert processor.tokenizer.model_max_length == 512
    assert processor.tokenizer.pad_token_id == 0
    labels = encoded(processor, [user(IMAGE, "\nWhat is it?"), answer("A  cat.")])["labels"]
    assert supervised_texts(processor, labels) == ["A  cat.</s>"]


def test_an_original_with_start_and_end_tokens_keeps_them(tmp_path, monkeypatch):
    """The ids of the original's own `mm_use_im_start_end`, from a checkpoint that says so in its config.json."""
    shutil.copytree(GOLDEN / "c_forward/mlp2x_patch/checkpoint", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text()) | {"mm_use_im_start_end": True, "vocab_size": 32002}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(GOLDEN / "tokenizer_llama" / name, tmp_path / "m" / name)
    monkeypatch.chdir(GOLDEN)
    processor = LlavaProcessor.from_pretrained(tmp_path / "m")
    records = json.loads((RECORDS_DIR / "v1__legacyFalse__imse.json").read_text())["records"]
    record = next(record for record in records if record["id"] == "single_img_first")
    content = [{"type": "image"}, {"type": "text", "text": "\nWhat is in the picture?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat sitting on a mat."}]
    encoded = processor.encode_conversation(messages, [Image.new("RGB", (60, 40))])
    ids = encoded["input_ids"].tolist()
    places = [index for index, token in enumerate(ids) if token == processor.image_token_id]
    assert len(places) == 16 and ids[places[0] - 1] == 32000 and ids[places[-1] + 1] == 32001
    assert ids[: places[0]] + [-200] + ids[places[-1] + 1 :] == record["input_ids"]
    processor.use_chat_template("llava_llama_2")
    assert "<im_start><image><im_end>" in processor.render(messages)[0]
