"""Tokenizers of the two kinds there are, SentencePiece and byte-level BPE, and processors around them."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPVisionConfig, PreTrainedTokenizerFast

from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"

# ChatML without generation marks and without trimming, as Qwen and SmolLM2 write it.
OWN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "What is in the picture? A cat sitting on a mat, and a dog.\n\n1. a\n2. b\n\n",
    "The user asks, the assistant answers  politely\n    with spaces and\ttabs.",
    "system user assistant USER: hello ASSISTANT: hi, how can I help? [INST] yes [/INST] no",
]


def byte_level_tokenizer(trim_offsets: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@cache
def _tokenizer(kind: str):
    if kind.startswith("byte-level"):
        return byte_level_tokenizer(trim_offsets=kind == "byte-level, trimmed offsets")
    if kind.endswith("32000 pieces"):
        return load_tokenizer(GOLDEN / "tokenizer_llama")
    tokenizer = load_tokenizer(GOLDEN / "tokenizer_tiny", legacy=kind == "legacy")
    if kind == "llama, chatml":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_for():
    """
    `tokenizer_for(kind)` is a new tokenizer as a user would pass it in: of SentencePiece, with 1024 pieces, "llama",
    "llama, chatml" (with that markup's tokens added) or "legacy"; "llama, 32000 pieces", which takes half a second to
    copy and prepare: LLaMA's own, for the ids that are on record; or "byte-level", "byte-level, trimmed offsets".
    """
    return lambda kind: deepcopy(_tokenizer(kind))


@pytest.fixture(scope="session")
def vision_config():
    """The tower of `golden/tiny-clip`: 16 patches and a class token."""
    return CLIPVisionConfig.from_pretrained(GOLDEN / "tiny-clip")


@pytest.fixture(scope="session")
def processor_for(tokenizer_for, vision_config):
    """
    `processor_for(kind, template)`, made once each and not to be changed; the template "own" is one that comes with
    the tokenizer.
    """

    @cache
    def processor(kind: str, template: str) -> LlavaProcessor:
        tokenizer = tokenizer_for(kind)
        if template == "own":
            tokenizer.chat_template = OWN_CHAT_TEMPLATE
            return LlavaProcessor.build(tokenizer, vision_config, image_aspect_ratio="pad")
        return LlavaProcessor.build(tokenizer, vision_config, version=template, image_aspect_ratio="pad")

    return processor
