"""Conversations for the tests of templates and processors: written out, any that a dataset may hold, or those that the
original was recorded with; and what of them is learned."""

import json
from pathlib import Path

from hypothesis import strategies as st
from PIL import Image

from hf_llava_ft.data.schema import parse_llava_row
from hf_llava_ft.processing.conversation_llava import IGNORE_INDEX

# The rows that the original made ids of, by name, and its records of them in `<prompt style>__legacyFalse.json`.
RECORDS_DIR = Path(__file__).parents[1] / "golden" / "a_tokenization"
CASES = {case["id"]: case for case in json.loads((RECORDS_DIR / "conversations.json").read_text())}
IMAGE = {"type": "image", "text": None}
PICTURE = Image.radial_gradient("L").resize((40, 24)).convert("RGB")
NUM_IMAGE_TOKENS = 16  # of the tower of `golden/tiny-clip`

# Not NUL and surrogates, which the schema refuses, nor the character that SentencePiece writes for a space.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\x00▁")


def text(value):
    return {"type": "text", "text": value}


def user(*parts):
    return {"role": "user", "content": [text(part) if isinstance(part, str) else part for part in parts]}


def answer(value):
    return {"role": "assistant", "content": [text(value)]}


def num_images(messages) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def answers(messages) -> list[str]:
    return [message["content"][0]["text"] for message in messages if message["role"] == "assistant"]


def texts_with(fragments: list[str]):
    """Any text without a placeholder, with some of `fragments`, the ones that a tokenizer may stumble over."""
    pieces = st.one_of(st.sampled_from(fragments), st.text(CHARACTERS, max_size=4))
    return st.lists(pieces, max_size=6).map("".join).filter(lambda value: "<image>" not in value)


@st.composite
def conversations_of(draw, texts, max_rounds: int):
    """1 to `max_rounds` rounds, with a system message or without, images anywhere in the questions; as the readers
    give them."""
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": [text(draw(texts))]})
    for _ in range(draw(st.integers(1, max_rounds))):
        pieces = draw(st.lists(texts, max_size=3))  # an image between each two
        parts = [part for piece in pieces for part in (IMAGE, piece) if part != ""]
        messages += [user(*parts[1:]), answer(draw(texts.filter(str.strip)))]
    return messages


def encoded(processor, messages):
    return processor.encode_conversation(messages, [PICTURE] * num_images(messages))


def supervised_texts(processor, labels) -> list[str]:
    """The text of each unbroken stretch of supervised ids."""
    stretches, before = [], IGNORE_INDEX
    for label in labels.tolist():
        if label != IGNORE_INDEX:
            if before == IGNORE_INDEX:
                stretches.append([])
            stretches[-1].append(label)
        before = label
    return [processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in stretches]


def messages_of(name: str):
    """Of one of `CASES`. Rows with two `<image>` name one file there: it is given twice."""
    case = CASES[name]
    files = [case["image"]] if "image" in case else []
    images = files * sum(turn["value"].count("<image>") for turn in case["conversations"])
    row = {"id": name, "images": images, "conversations": case["conversations"]}
    return parse_llava_row(row, "conversations.json")["messages"]


def as_the_original(processor, messages) -> tuple[list[int], list[int]]:
    """Ids and labels with -200 for each image, as they are before it takes its places."""
    row = encoded(processor, messages)
    ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
    short_ids, short_labels = [], []
    while ids:
        is_image = ids[0] == processor.image_token_id
        taken = NUM_IMAGE_TOKENS if is_image else 1
        assert len(set(ids[:taken])) == 1
        short_ids.append(-200 if is_image else ids[0])
        short_labels.append(labels[0])
        ids, labels = ids[taken:], labels[taken:]
    return short_ids, short_labels
