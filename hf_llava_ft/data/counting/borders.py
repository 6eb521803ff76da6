"""Which tokenizers cut a text between words, as far as their own files tell.

A border is a space, where what stands before it is a visible character and not the end of an added token. The two
kinds:
* SentencePiece BPE (LLaMA, Vicuna, Mistral), where a space is the first character of a piece or a piece is of spaces
  alone: no merge joins a character and a space behind it.
* Byte-level BPE that cuts a text first, by an expression in which only blanks follow blanks (GPT-2, LLaMA 3, Qwen).
"""

import json
import re
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.processing.tokenizer_llava import IMAGE_RULE, IMAGE_TOKEN

BEFORE = "a"  # stands in front of a word that is tokenised alone: a border follows it
SPACE = "▁"  # as SentencePiece writes it

# Of LLaMA 3 and Qwen 2. All of them, and GPT-2's, cut between a visible character and a space, and only what they do
# with blanks depends on what follows.
_EXPRESSIONS = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
]


def cuts_between_words(processor: LlavaProcessor) -> bool:
    """Whether the tokens of a text are those of its words, as far as its tokenizer's own file tells."""
    tokenizer, added = processor.tokenizer, list(processor.tokenizer.added_tokens_decoder.values())
    backend = tokenizer.backend_tokenizer
    if (
        not isinstance(backend.model, BPE)
        or backend.model.dropout
        or getattr(tokenizer, "split_special_tokens", False)
    ):
        return False
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return False
    not_in_a_word = re.compile(rf"[\s{SPACE}]|^{BEFORE}|^$")
    if any(not_in_a_word.search(token.content) for token in added):
        return False
    # The number of its places is counted in the text.
    image = processor.image_token
    others = [token.content for token in added if token.content != image]
    if len(others) == len(added) or any(_overlap(image, other) for other in others):
        return False
    if not {step["type"] for step in _steps(backend.post_processor)} <= {"TemplateProcessing", "ByteLevel"}:
        return False
    return _is_sentencepiece(backend) or _is_byte_level(backend)


def _is_sentencepiece(backend: Tokenizer) -> bool:
    model, normalizers, cutters = backend.model, _steps(backend.normalizer), _steps(backend.pre_tokenizer)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    known = [
        {"type": "Prepend", "prepend": SPACE},
        spaces,
        {"type": "Replace", "pattern": {"Regex": IMAGE_RULE}, "content": f"{IMAGE_TOKEN} "},
    ]
    if any(step not in known for step in normalizers):
        return False
    are_spaces = [step["type"] == "Metaspace" and step["replacement"] == SPACE for step in cutters]
    if not all(are_spaces) or not (are_spaces or spaces in normalizers):
        return False
    if model.continuing_subword_prefix or model.end_of_word_suffix or model.ignore_merges:
        return False
    vocabulary = backend.get_vocab()
    # Without an unknown token, of which several would be one.
    if not model.byte_fallback or any(f"<0x{byte:02X}>" not in vocabulary for byte in range(256)):
        return False
    return not any(SPACE in piece.lstrip(SPACE) for piece in vocabulary)


def _is_byte_level(backend: Tokenizer) -> bool:
    if any(step["type"] != "NFC" for step in _steps(backend.normalizer)):
        return False
    *first, last = _steps(backend.pre_tokenizer) or [{"type": None}]
    if last["type"] != "ByteLevel" or len(first) > 1:
        return False
    if not first or first[0]["type"] == "Digits":
        return bool(last["use_regex"])
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    return any(first[0] == {**split, "pattern": {"Regex": expression}} for expression in _EXPRESSIONS)


def _steps(component: Any) -> list[dict[str, Any]]:
    """The settings of a part of a tokenizer, as its file has them."""
    if component is None:
        return []
    step = json.loads(component.__getstate__())
    steps = [each for name in ("normalizers", "pretokenizers", "processors") for each in step.get(name, ())]
    return steps if step["type"] == "Sequence" else [step]


def _overlap(one: str, other: str) -> bool:
    """Whether the two can share characters of a text."""
    if one in other or other in one:
        return True
    ends = range(1, min(len(one), len(other)))
    return any(one.endswith(other[:size]) or other.endswith(one[:size]) for size in ends)
