"""Ids and labels of every prompt style against the original's way of making them, done over again from strings.

The original writes the whole row as one text, cuts it at `<image>`, and gives each piece to a slow SentencePiece
tokenizer. No chat template, no offsets and no fast tokenizer take part in what is expected here. Its own records are
compared in test_processing_llava.py; these are the styles, tokenizers and rows that the records do not have.
"""

import json
import re
import shutil
from copy import copy
from functools import cache
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from hf_llava_ft.data.schema import parse_llava_row
from hf_llava_ft.processing.conversation_llava import IGNORE_INDEX
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer
from tests.processing.conversations import NUM_IMAGE_TOKENS, PICTURE

GOLDEN = Path(__file__).parents[1] / "golden"

IMAGE_INDEX = -200  # the original's id of an image

# Questions and answers in turn.
CONVERSATIONS = {
    "picture first": ["<image>\nWhat is it?", "A cat."],
    "picture last": ["What is it?\n<image>", "A cat."],
    "picture last, no newline": ["What is it? <image>", "A cat."],
    "picture alone": ["<image>", "Only a picture."],
    "picture without a newline": ["<image>q", "a"],
    "picture between spaces": [" <image> q ", " a "],
    "picture in the second question": ["Hello!", "Hi.", "<image>\nWhat is this?", "A tree."],
    "a picture in each question": ["<image>\nFirst?", "A.", "Second? <image>", "B."],
    "text": ["What is 2 + 2?", "2 + 2 = 4."],
    "text, three rounds": ["q1", "a1", "q2", "a2", "q3", "a3"],
    "three rounds": ["<image>\nq1", "a1", "q2", "a2", "q3", "a3"],
    "emoji": ["<image>\n👩‍👩‍👧 what? 🐱🐱", "A 👨‍👩‍👧‍👦 ☕️.", "ok? é", "é ñ ü"],
    "scripts": ["<image>\nこれは何ですか", "猫です。你好", "ما هذا؟", "네, 고양이예요."],
    "unicode spaces": ["<image>\na\u200bb\u00a0c\u3000d", "\ufeffx\u2028y"],
    "compatibility forms": ["<image>\ne\u0301 ﬁ ①", "Å"],
    "carriage returns": ["<image>\nline 1\r\nline 2", "ans\r\nwer\r\n"],
    "tabs": ["<image>\n\tq\t", "\ta\tb\t", "\t", "x"],
    "runs of spaces": ["<image>\nq  q   q", " a  a   a ", "  q", "a      "],
    "newlines at the edges": ["\n<image>\n\nq\n\n", "\n\na\n\n", "\nq2\n", "\na2"],
    "code": ["<image>\n```py\nprint(1)\n    x = 2\n```", "```\n\tif a:\n        b\n```"],
    "markdown": ["<image>\n# Title ## x", "## Heading\n# C#"],
    "quotes": ["<image>\n\"it's\" 'q'", "‘x’ “y” — z…"],
    "control characters": ["<image>\na\x07b", "c\x1bd"],
    "long": ["<image>\n" + "word " * 300, "answer " * 300],
    "special tokens": ["<image>\nwhat is <unk> or <s>?", "It is <unk> </s> , so.", "ok", "bye </s>"],
    "image markup as text": ["<image>\n<im_start> and <im_patch>", "<im_end>"],
    "separators as text": ["USER: x ASSISTANT: y [INST] z [/INST] ### Human: w", "ASSISTANT: [/INST] ### <|im_end|>"],
    "a question without words": ["<image>\nq", "a", "", "b"],
}

# (system message, and for each turn what stands before it, and behind it)
HUMANS = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
USERS = HUMANS.replace("curious human", "curious user").replace("human's", "user's")
TAGGED = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language.The "
    "visual content will be provided with the following format: <Image>visual content</Image>."
)
TWO = {"question": ("USER: ", " "), "answer": ("ASSISTANT:", " {}</s>"), "silent": "USER:"}
SINGLE = {"question": (" Human: ", "\n###"), "answer": (" Assistant:", " {}\n###"), "end": " "}
MPT = {
    "question": ("<|im_start|>user\n", "<|im_end|>"),
    "answer": ("<|im_start|>assistant\n", "{}<|im_end|>"),
    "silent": "<|im_start|>user\n",
}
STYLES = {
    "v1": (f"{USERS} ", TWO),
    "llava_v1": (f"{HUMANS} ", TWO),
    "v1_mmtag": (f"{TAGGED} ", TWO),
    "llava_v0": (f"{HUMANS}\n\n###", SINGLE),
    "v0_mmtag": (f"{TAGGED}\n\n###", SINGLE),
    "mistral_instruct": ("", {"question": ("[INST] ", " [/INST]"), "answer": ("", " {} </s>")}),
    "chatml_direct": ("<|im_start|>system\nAnswer the questions.<|im_end|>", MPT),
}


def picture_first(question: str, version: str, image_start_end: bool) -> str:
    """The question as `preprocess_multimodal` of the original changes it."""
    if "<image>" not in question:
        return question
    question = ("<image>\n" + question.replace("<image>", "").strip()).strip()
    markup = "<im_start><image><im_end>" if image_start_end else "<image>"
    return question.replace("<image>", f"<Image>{markup}</Image>" if "mmtag" in version else markup)


def written_out(version: str, name: str, image_start_end: bool) -> list[tuple[str, bool]]:
    """The row as the original writes it: stretches of text, and whether each is an answer and what ends it."""
    opening, style = STYLES[version]
    stretches = [(opening, False)]
    for index, turn in enumerate(CONVERSATIONS[name]):
        if index % 2:
            before, answer = style["answer"]
            stretches += [(before, False), (answer.format(turn), True)]
        else:
            before, behind = style["question"]
            question = picture_first(turn, version, image_start_end)
            silent = not question and "silent" in style
            stretches.append((style["silent"] if silent else before + question + behind, False))
    return [*stretches, (style.get("end", ""), False)]


class SlowTokenizer:
    """LLaMA's tokenizer of transformers 4.37 with `use_fast=False`: SentencePiece between special tokens."""

    def __init__(self, folder: Path, legacy: bool, added: list[str]):
        self.pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self.legacy = legacy
        size = self.pieces.get_piece_size()
        self.special = {"<unk>": 0, "<s>": 1, "</s>": 2} | {token: size + i for i, token in enumerate(added)}

    def __call__(self, text: str) -> list[int]:
        ids = []
        for index, part in enumerate(re.split(f"({'|'.join(map(re.escape, self.special))})", text)):
            if part in self.special:
                ids.append(self.special[part])
            elif self.legacy or index == 0:
                ids += self.pieces.encode(part)  # with SentencePiece's space in front
            elif part:
                ids += self.pieces.encode("\n" + part)[2:]  # without: a newline is joined to nothing
        return ids

    def with_images(self, text: str) -> list[int]:
        ids = [1]
        for index, piece in enumerate(text.split("<image>")):
            ids += [IMAGE_INDEX] * (index > 0) + self(piece)
        return ids


# (folder, legacy): LLaMA's vocabulary also in the older manner, as Vicuna 1.3 and before have it.
TOKENIZERS = {
    "llama": ("tokenizer_llama", False),
    "llama, legacy": ("tokenizer_llama", True),
    "tiny": ("tokenizer_tiny", True),
}


@pytest.fixture(scope="module")
def pair_for(tmp_path_factory, vision_config):
    """`pair_for(kind, version, image_start_end)`: our processor, and the original's tokenizer."""

    @cache
    def folder_of(kind: str) -> Path:
        name, legacy = TOKENIZERS[kind]
        folder = tmp_path_factory.mktemp("tokenizer") / "t"
        shutil.copytree(GOLDEN / name, folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"legacy": legacy}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    @cache
    def pair_under_v1(kind: str, image_start_end: bool) -> tuple[LlavaProcessor, SlowTokenizer]:
        processor = LlavaProcessor.build(
            load_tokenizer(folder_of(kind)),
            vision_config,
            version="v1",
            image_start_end=image_start_end,
            image_aspect_ratio="pad",
        )
        added = ["<im_start>", "<im_end>"] if image_start_end else []
        return processor, SlowTokenizer(folder_of(kind), TOKENIZERS[kind][1], added)

    def pair(kind: str, version: str, image_start_end: bool) -> tuple[LlavaProcessor, SlowTokenizer]:
        processor, slow = pair_under_v1(kind, image_start_end)
        processor = copy(processor)
        processor.use_chat_template(version)
        return processor, slow

    return pair


def encoded(processor: LlavaProcessor, name: str) -> tuple[list[int], list[int]]:
    """Ids and labels from the row of a data file, with -200 for each picture."""
    turns = [
        {"from": "gpt" if index % 2 else "human", "value": turn} for index, turn in enumerate(CONVERSATIONS[name])
    ]
    count = sum(turn.count("<image>") for turn in CONVERSATIONS[name])
    messages = parse_llava_row({"id": name, "images": ["x.png"] * count, "conversations": turns}, "data")["messages"]
    row = processor.encode_conversation(messages, [PICTURE] * count)
    ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
    place = 0
    while place < len(ids):
        if ids[place] == processor.image_token_id:
            stop = place + NUM_IMAGE_TOKENS
            assert set(ids[place:stop]) == {processor.image_token_id} and set(labels[place:stop]) == {IGNORE_INDEX}
            ids[place:stop], labels[place:stop] = [IMAGE_INDEX], [IGNORE_INDEX]
        place += 1
    return ids, labels


@pytest.mark.parametrize("image_start_end", [False, True], ids=["", "start and end"])
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("version", STYLES)
def test_ids_are_the_originals(pair_for, version, kind, image_start_end):
    processor, slow = pair_for(kind, version, image_start_end)
    for name in CONVERSATIONS:
        text = "".join(stretch for stretch, _ in written_out(version, name, image_start_end))
        assert encoded(processor, name)[0] == slow.with_images(text), name


# Not chatml_direct: with these tokenizers the text `<|im_end|><|im_start|>` has a token that both words share.
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("version", [version for version in STYLES if version != "chatml_direct"])
def test_labels_are_the_answers_and_what_ends_them(pair_for, version, kind):
    """Counted from the front: the tokens of the text in front of an answer, and with it."""
    processor, slow = pair_for(kind, version, False)
    for name in CONVERSATIONS:
        ids, labels = encoded(processor, name)
        expected, text = [IGNORE_INDEX] * len(ids), ""
        for stretch, is_answer in written_out(version, name, False):
            if is_answer:
                learned = range(len(slow.with_images(text)), len(slow.with_images(text + stretch)))
                expected = [ids[i] if i in learned else label for i, label in enumerate(expected)]
            text += stretch
        assert labels == expected, name


def test_the_older_manner_and_cutting_at_images_show_in_the_ids(pair_for):
    """Otherwise the tests above could not tell."""
    row = "".join(stretch for stretch, _ in written_out("v1", "three rounds", False))
    _, slow = pair_for("llama", "v1", False)
    _, legacy = pair_for("llama, legacy", "v1", False)
    assert slow.with_images(row) != legacy.with_images(row)
    before, after = row.split("<image>")
    assert slow.with_images(row) != [1, *slow(before + after)]
