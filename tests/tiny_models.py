"""Tiny real models and processors, made in moments."""

from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig, set_seed

import hf_llava_ft
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
TEXT_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def tiny_config(
    text: str = "llama", vision: str = "clip", tie: bool = False, rope: dict | None = None, **fields
) -> hf_llava_ft.LlavaConfig:
    """2 layers of width 64, a vocabulary of 1024 + 64, and a tower of 3 layers of width 32 with 16 patches."""
    text_config = TEXT_CONFIGS[text](
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1088,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=tie,
        rope_parameters=rope and dict(rope),
    )
    sizes = {
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    }
    if vision == "clip":
        vision_config = CLIPVisionConfig(hidden_size=32, projection_dim=16, **sizes)
    else:
        vision_config = SiglipVisionConfig(hidden_size=32, **sizes)
    fields = {"image_token_index": 1024, "image_seq_length": 16, "tie_word_embeddings": tie, **fields}
    strategy = "default" if vision == "clip" else "full"
    return hf_llava_ft.LlavaConfig(
        text_config=text_config, vision_config=vision_config, vision_feature_select_strategy=strategy, **fields
    )


def tiny_model(text: str = "llama", vision: str = "clip", tie: bool = False, **fields) -> hf_llava_ft.LlavaForCausalLM:
    """Random weights large enough that every part of the input shows in the logits."""
    set_seed(0)
    model = hf_llava_ft.LlavaForCausalLM(tiny_config(text, vision, tie, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return model


def tiny_batch(image_token_id: int = 1024, image_seq_length: int = 16, padding_side: str = "right") -> dict:
    """Three rows: one image, text alone, two images; the labels are the ids, so that masking is up to the model."""
    generator = torch.Generator().manual_seed(1)

    def words(count):
        return torch.randint(3, 1000, (count,), generator=generator).tolist()

    image = [image_token_id] * image_seq_length
    rows = [[1, *words(4), *image, *words(5)], [1, *words(9)], [1, *image, *words(3), *image, *words(6)]]
    length = max(map(len, rows))
    ids = torch.zeros(3, length, dtype=torch.int64)
    mask = torch.zeros(3, length, dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if padding_side == "right" else slice(length - len(row), length)
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    pixels = torch.randn(3, 3, 56, 56, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone(), "pixel_values": pixels}


def build_tiny_processor() -> hf_llava_ft.LlavaProcessor:
    config = tiny_config()
    return hf_llava_ft.LlavaProcessor.build(
        load_tokenizer(GOLDEN / "tokenizer_tiny"), config.vision_config, version="v1", image_aspect_ratio="pad"
    )


def save_tiny_checkpoint(folder: Path) -> Path:
    """A whole native `llava` folder: model and processor."""
    model = tiny_model()
    model.generation_config.eos_token_id = [2]
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    build_tiny_processor().save_pretrained(folder)
    return folder
