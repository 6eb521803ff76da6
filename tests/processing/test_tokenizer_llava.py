"""Text around images is cut as SentencePiece itself cuts it, and what is saved cuts it so for every reader."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, CanineTokenizer

from hf_llava_ft.processing.tokenizer_llava import IMAGE_TOKEN, file_if_there, load_tokenizer, prepare_tokenizer
from tests.examples import examples

GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA = "llama, 32000 pieces"
FOLDERS = {LLAMA: GOLDEN / "tokenizer_llama", "legacy": GOLDEN / "tokenizer_tiny"}

CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\x00")
PIECES = st.sampled_from(
    [" ", "  ", "      ", "\n", "\t", "▁", "🐱", "é", "你好", "The cat", "1.", "<0x41>", "<image", "s>"]
)
CHUNKS = st.lists(st.one_of(PIECES, st.text(CHARACTERS, max_size=4)), max_size=6).map("".join)
CHUNKS = CHUNKS.filter(lambda text: not any(special in text for special in ("<image>", "<s>", "</s>", "<unk>")))


@pytest.fixture(scope="module")
def prepared(tokenizer_for):
    return {kind: prepare_tokenizer(tokenizer_for(kind)) for kind in FOLDERS}


@cache
def sentencepiece(kind: str) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(FOLDERS[kind] / "tokenizer.model"))


def cut_by_sentencepiece(kind: str, image_token_id: int, chunks: list[str]) -> list[int]:
    """As the original: `<s>`, then every chunk between two images on its own."""
    pieces = sentencepiece(kind)
    ids = [pieces.bos_id()]
    for index, chunk in enumerate(chunks):
        ids += [image_token_id] * (index > 0) + pieces.encode(chunk)
    return ids


@pytest.mark.parametrize("kind", FOLDERS)
@examples(300)
@given(chunks=st.lists(CHUNKS, min_size=1, max_size=4))
def test_text_around_images_is_cut_as_sentencepiece_cuts_it(prepared, kind, chunks):
    tokenizer = prepared[kind]
    if kind == LLAMA:
        # A tokenizer that is not `legacy` takes a space at the very start for the dummy space. No prompt begins so.
        chunks[0] = chunks[0].lstrip(" ▁")
    expected = cut_by_sentencepiece(kind, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), chunks)
    assert tokenizer(IMAGE_TOKEN.join(chunks)).input_ids == expected


@pytest.mark.parametrize("kind, text", [(LLAMA, "a      b"), ("legacy", "a</s> b"), (LLAMA, "a<image>b")])
def test_transformers_alone_cuts_some_text_differently(prepared, kind, text):
    """Otherwise the corrections could go: runs of spaces, spaces behind a special token, text behind an image."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS[kind])
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    assert prepared[kind](text).input_ids != tokenizer(text).input_ids


def test_text_behind_an_image_begins_with_the_dummy_space_and_nothing_else_does(prepared):
    tokens = {
        text: prepared[LLAMA].tokenize(text)
        for text in ("a<image>b", "a<image>", "<image><image>b", "<image></s>", "</s>b", "< image>b")
    }
    assert tokens == {
        "a<image>b": ["▁a", "<image>", "▁b"],
        "a<image>": ["▁a", "<image>"],
        "<image><image>b": ["<image>", "<image>", "▁b"],
        "<image></s>": ["<image>", "</s>"],
        "</s>b": ["</s>", "b"],
        "< image>b": ["▁<", "▁image", ">", "b"],
    }


def test_byte_level_text_behind_an_image_is_left_as_it_is(tokenizer_for):
    tokenizer = prepare_tokenizer(tokenizer_for("byte-level"))
    before, after = tokenizer("the").input_ids, tokenizer(" cat").input_ids
    assert tokenizer("the<image> cat").input_ids == [*before, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), *after]


@pytest.mark.parametrize("kind", ["llama", "legacy", "byte-level"])
def test_the_image_is_one_new_special_token(tokenizer_for, kind):
    size = len(tokenizer_for(kind))
    tokenizer = prepare_tokenizer(tokenizer_for(kind))
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == size
    assert len(tokenizer) == size + 1
    assert tokenizer.decode([size], skip_special_tokens=True) == ""


@pytest.mark.parametrize("kind", ["llama", "legacy", "byte-level"])
def test_preparing_twice_changes_nothing(tokenizer_for, kind):
    once = prepare_tokenizer(tokenizer_for(kind))
    state = once.backend_tokenizer.to_str()
    twice = prepare_tokenizer(once)
    assert twice is once
    assert twice.backend_tokenizer.to_str() == state


def test_a_tokenizer_that_needs_the_rule_stays_as_it_is(tokenizer_for):
    tokenizer = tokenizer_for("llama")
    state = tokenizer.backend_tokenizer.to_str()
    assert prepare_tokenizer(tokenizer) is not tokenizer
    assert tokenizer.backend_tokenizer.to_str() == state


@pytest.mark.parametrize("kind, pad_token", [("llama", "<unk>"), ("byte-level", "<|endoftext|>")])
def test_padding_is_the_tokenizers_own_or_unknown(tokenizer_for, kind, pad_token):
    tokenizer = tokenizer_for(kind)
    tokenizer.padding_side = "left"
    tokenizer = prepare_tokenizer(tokenizer)
    assert tokenizer.pad_token == pad_token
    assert tokenizer.padding_side == "right"


def test_padding_is_never_the_stop_token(tokenizer_for):
    tokenizer = tokenizer_for("byte-level")
    tokenizer.pad_token = None
    size = len(tokenizer)
    tokenizer = prepare_tokenizer(tokenizer)
    assert tokenizer.pad_token == "<pad>"
    assert tokenizer.pad_token_id == size + 1  # behind <image>
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_special_tokens_that_were_there_stay(tokenizer_for):
    tokenizer = prepare_tokenizer(tokenizer_for("llama, chatml"))
    assert tokenizer.tokenize("<|im_start|>a<|im_end|>") == ["<|im_start|>", "a", "<|im_end|>"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.model_max_length == 512


@pytest.mark.parametrize("kind", ["llama", "legacy", "byte-level", "byte-level, trimmed offsets"])
@pytest.mark.parametrize("load", [AutoTokenizer.from_pretrained, load_tokenizer])
def test_a_saved_tokenizer_cuts_as_before(tokenizer_for, tmp_path, kind, load):
    tokenizer = prepare_tokenizer(tokenizer_for(kind))
    tokenizer.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    for text in ("a<image>b", "<image>\n  c <image><image> d</s> e      f", "🐱é<0x41>\n<unk>"):
        assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map


def test_a_tokenizer_without_offsets_is_refused(tmp_path):
    CanineTokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no fast version"):
        load_tokenizer(tmp_path)


def test_a_file_that_is_not_there_is_an_answer_and_a_name_that_is_none_is_not(tmp_path):
    (tmp_path / "there.json").write_text("{}")
    assert file_if_there(tmp_path, "there.json") == str(tmp_path / "there.json")
    assert file_if_there(tmp_path, "missing.json") is None
    assert file_if_there("user/nothing", "missing.json") is None
    with pytest.raises(OSError, match="a name/that is none"):
        file_if_there("a name/that is none", "missing.json")
