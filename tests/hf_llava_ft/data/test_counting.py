"""Tokens counted from words, in texts written around shapes, are those of the plain road: render, tokenise, count."""

from copy import deepcopy
from functools import cache

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_llava_ft.data.counting import borders, rendering, words
from hf_llava_ft.data.counting.borders import cuts_between_words
from hf_llava_ft.data.counting.rendering import ConversationTexts, messages_of, turns_of
from hf_llava_ft.data.counting.words import WordCounts
from hf_llava_ft.data.features import FEATURES
from hf_llava_ft.processing.chat_templates_llava import CHAT_TEMPLATES, chat_template_for, takes_texts_as_they_are
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer
from tests.examples import examples

MARKERS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<im_start>", "<im_end>"]
VERSIONS = list(CHAT_TEMPLATES)
CORPUS = [
    "The cat sat on the mat, didn't it? I'll say 1234 and 56 times: Yes.\n\n  - a list\n  - of things\n",
    "Ein Bär \U0001f431 said “Voilà” 你好 and 0.5 % of <Image> tags </Image> USER: ASSISTANT: ### Human:\n",
]
# Pieces that a text is put together from, with nothing between them.
PIECES = [
    *(
        "cat",
        "Cat.",
        "don't",
        "'ll",
        "1234567",
        "a",
        "I",
        "Bär",
        "\U0001f431",
        "你好",
        "e\u0301",
        "ﬁ",
        "\u1e9b\u0323",
        "1.",
        "(x)",
    ),
    *(
        " ",
        " ",
        " ",
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\u00a0",
        "\u2028",
        "\u3000",
        "\x85",
        "\x1c",
        "\u180e",
        "\u200b",
    ),
    *(
        "▁",
        "▁▁",
        "</s>",
        "<s>",
        "<unk>",
        "<|im_end|>",
        "<|im_start|>",
        "<im_start>",
        "<",
        "image>",
        "\ue000",
        "\uf8ff",
        "\u0301",
    ),
    *("[INST]", "###", "USER:", "ASSISTANT:", "Ġ", "Ċ", "�", "\x01"),
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join)


def byte_level(pre_tokenizer, normalizer=None):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.normalizer = pre_tokenizer, normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<unk>", "<s>", "</s>"],
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def split_by(expression):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), byte_level])


@cache
def processors(golden, tiny):
    """Of all kinds of tokenizers that are counted by words."""
    llama_3, qwen_2 = borders._EXPRESSIONS
    tokenizers = {
        "llama": load_tokenizer(golden / "tokenizer_llama"),
        "llama, a space in front of every part": load_tokenizer(golden / "tokenizer_tiny"),
        "GPT-2": byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "GPT-2 with a space in front": byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "digits": byte_level(
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        ),
        "LLaMA 3": byte_level(split_by(llama_3)),
        "Qwen 2": byte_level(split_by(qwen_2), normalizers.NFC()),
    }
    for tokenizer in tokenizers.values():
        tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    config = tiny.config().vision_config
    return {name: LlavaProcessor.build(tokenizer, config, version="v1") for name, tokenizer in tokenizers.items()}


@cache
def template_of(version, image_start_end, processor):
    return chat_template_for(processor.tokenizer, version, image_start_end).source


def with_template(processor, version, image_start_end=False):
    processor.chat_template = template_of(version, image_start_end, processor)
    return processor


@st.composite
def conversations(draw):
    """Turns as rows have them: images in the user's, and text on either side of each."""
    turns = [("system", [draw(TEXTS)])] if draw(st.booleans()) else []
    for place in range(draw(st.integers(1, 3))):
        parts = [draw(TEXTS)]
        for _ in range(draw(st.integers(0, 2)) if place == 0 else 0):
            parts += [None, draw(TEXTS)]
        turns += [("user", [part for part in parts if part != ""]), ("assistant", [draw(TEXTS) or "a"])]
    return turns


def plainly(processor, turns):
    """Text and spans, tokens and those that are learned; None for a row that the template refuses."""
    try:
        rendered = processor.render(messages_of(turns))
    except ValueError:
        return None, None
    [(ids, supervised)] = processor.tokenize_rendered([rendered])
    return rendered, (len(ids), int(supervised.sum()))


@examples(200)
@given(st.lists(conversations(), min_size=1, max_size=3), st.sampled_from(VERSIONS), st.booleans(), st.integers(0, 6))
def test_texts_and_counts_are_those_of_the_plain_road(golden, tiny, rows, version, image_start_end, kind):
    processor = with_template(list(processors(golden, tiny).values())[kind], version, image_start_end)
    texts, counts = ConversationTexts(processor), WordCounts(processor)
    rendered, expected = [], []
    for turns in rows * 2:  # by the second time shapes and words are known
        text, counted = plainly(processor, turns)
        if text is None:
            with pytest.raises(ValueError, match="template"):
                texts.render(turns)
        else:
            assert texts.render(turns) == text
            rendered.append(text)
            expected.append(counted)
    for found, counted in zip(counts.counts(rendered), expected, strict=True):
        assert found is None or found == counted


HOSTILE = [
    "a▁ 你好 b▁▁ 你 ▁ 你",
    "see <image> here",
    "\n\n leading and trailing \n",
    " \t",
    "end </s> 你 <s> 你 of</s>it",
    "\n\n  - one\n\n\n  - two  \n three",
    "x\u180e y\u200b z\x85 w\u3000 v\u0301 u",
    "12 345 6789 's 'll I'm ...  ,, (a) [b]",
    "\ue000 \ue001\uf8ff",
    "a",
]


@pytest.mark.parametrize("version", ["v1", "v1_mmtag", "v0", "chatml", "llama_2", "llama_3"])
def test_hostile_text_is_counted_as_on_the_plain_road(golden, tiny, version):
    rows = [
        [("user", [None, question]), ("assistant", [answer]), ("user", [answer]), ("assistant", ["你 ok"])]
        for question, answer in zip(HOSTILE, HOSTILE[3:] + HOSTILE[:3], strict=True)
    ]
    for processor in processors(golden, tiny).values():
        with_template(processor, version)
        texts, expected = zip(*(plainly(processor, turns) for turns in rows), strict=True)
        renderer, counter = ConversationTexts(processor), WordCounts(processor)
        assert [renderer.render(turns) for turns in rows * 2] == list(texts) * 2
        found = counter.counts(texts)
        assert [each or plain for each, plain in zip(found, expected, strict=True)] == list(expected)
        assert sum(each is not None for each in found) >= len(rows) // 2


@pytest.mark.parametrize("kind", range(7))
def test_usual_text_is_counted_by_words(golden, tiny, kind):
    processor = with_template(list(processors(golden, tiny).values())[kind], "chatml")
    assert cuts_between_words(processor) and takes_texts_as_they_are(processor.chat_template)
    answers = [
        "A cat.",
        "Two lines:\n\n1. One\n2. Two",
        "  - a list\n  - of things",
        "end </s> of it",
        "Bär “你好” 🐱.",
    ]
    rows = [[("user", [None, f"\nWhat is {answer}"]), ("assistant", [answer])] for answer in answers]
    expected = [plainly(processor, turns) for turns in rows]
    assert WordCounts(processor).counts([text for text, _ in expected]) == [counted for _, counted in expected]


def test_a_tokenizer_with_tokens_across_spaces_is_not_cut_at_them(golden, tiny):
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁b", "a▁b"]
    model = models.BPE(
        {piece: index for index, piece in enumerate(pieces)}, [("▁", "b"), ("a", "▁b")], byte_fallback=True
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    processor = LlavaProcessor.build(tokenizer, tiny.config().vision_config, version="v1")
    assert not cuts_between_words(processor)
    rendered, counted = plainly(processor, [("user", ["b a b"]), ("assistant", ["a b a b"])])
    assert WordCounts(processor).counts([rendered]) != [counted]  # as these tests would notice


@pytest.mark.parametrize("change", ["unigram", "rstrip", "lowercase", "expression", "dropout", "no bytes"])
def test_what_is_not_known_to_be_cut_between_words_is_not(golden, tiny, change):
    tokenizer = load_tokenizer(golden / "tokenizer_tiny")
    if change == "unigram":
        backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("▁", -1.0)], 0))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    elif change == "expression":
        tokenizer = byte_level(split_by(r"\w+ \w+|."))
    elif change == "lowercase":
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Strip(), normalizers.Replace(" ", "▁")]
        )
    elif change == "dropout":
        tokenizer.backend_tokenizer.model.dropout = 0.1
    elif change == "no bytes":
        tokenizer.backend_tokenizer.model.byte_fallback = False
    processor = LlavaProcessor.build(tokenizer, tiny.config().vision_config, version="v1")
    if change == "rstrip":
        processor.tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True)])
    assert not cuts_between_words(processor)


def test_a_template_that_looks_into_texts_is_run_for_every_row(golden, tiny):
    processor = deepcopy(with_template(processors(golden, tiny)["llama"], "v1"))
    processor.chat_template += "{{ 'Meow' if 'cat' in messages[0]['content'] | string }}"
    rows = [[("user", [question]), ("assistant", ["Yes."])] for question in ("A dog?", "A cat?")]
    expected = [plainly(processor, turns)[0] for turns in rows]
    assert [ConversationTexts(processor).render(turns) for turns in rows] == expected
    forced = ConversationTexts(processor)
    forced._has_frames = True
    assert [forced.render(turns) for turns in rows] != expected


def test_blanks_at_the_ends_of_texts_make_another_shape(golden, tiny):
    processor = with_template(processors(golden, tiny)["llama"], "v1")
    renderer = ConversationTexts(processor)
    for before, after in [("", ""), (" ", ""), ("  ", ""), ("", " "), ("\n", ""), ("\n", "\n")]:
        turns = [("user", [None, f"{before}What is it?{after}"]), ("assistant", [f"{before}A cat.{after}"])]
        assert renderer.render(turns) == plainly(processor, turns)[0]
    assert len(renderer._frames) == 6


def test_words_are_those_of_split():
    texts = ["a  b ", "", " ", "b \u3000c\n a", "Bär\x00 🐱"]
    found, codes, ends = words._words_of(texts)
    assert len(set(found)) == len(found)
    said = [found[code] for code in codes]
    starts = [0, *ends[:-1].tolist()]
    assert [said[start:end] for start, end in zip(starts, ends.tolist(), strict=True)] == [
        text.split(" ") for text in texts
    ]
    assert words._words_of([])[0] == []


def test_few_shapes_and_words_are_kept(golden, tiny, monkeypatch):
    monkeypatch.setattr(rendering, "_MAX_SHAPES", 3)
    monkeypatch.setattr(words, "_MAX_KEPT", 20)
    processor = with_template(processors(golden, tiny)["llama"], "v1")
    texts, counts = ConversationTexts(processor), WordCounts(processor)
    for number in range(12):
        turns = [("user", [" " * number + f"Question {number} ?"]), ("assistant", [f"word{number} " * 5 + "."])]
        rendered, counted = plainly(processor, turns)
        assert texts.render(turns) == rendered and counts.counts([rendered]) == [counted]
        assert len(texts._frames) <= 3 and len(counts._words) <= 40


def test_turns_of_a_column_are_those_of_its_rows():
    rows = [
        [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]}],
        [],
        [{"role": "user", "content": []}, {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}],
    ]
    features = datasets.Features({"messages": FEATURES["messages"]})
    dataset = datasets.Dataset.from_list([{"messages": row} for row in rows * 3], features=features)
    for part in (dataset, dataset.select(range(4, 9)), dataset.select([8, 0, 5])):
        column = part.with_format("arrow")[:]["messages"]
        assert [messages_of(turns) for turns in turns_of(column)] == column.to_pylist()
    plain_texts = datasets.Dataset.from_list([{"messages": [{"role": "user", "content": "What?"}]}])
    assert turns_of(plain_texts.with_format("arrow")[:]["messages"]) is None
