"""Configurations of LLaVA-1.5 in its own sizes and small ones, for models of random weights."""

from transformers import CLIPVisionConfig, LlamaConfig

import hf_llava_ft


def llava_1_5(
    hidden_size: int = 4096, num_layers: int = 32, vocab_size: int = 32064, **fields
) -> hf_llava_ft.LlavaConfig:
    """Vicuna of a width and depth, by default those of 7B, and CLIP ViT-L/14 of 336 pixels: 576 tokens a picture."""
    text = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=int(hidden_size * 2.6875),
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 128,
        vocab_size=vocab_size,
        max_position_embeddings=4096,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    return hf_llava_ft.LlavaConfig(text_config=text, vision_config=vision, **{"image_token_index": 32000, **fields})


def tiny() -> hf_llava_ft.LlavaConfig:
    """Everything there and nothing large: 16 tokens a picture, three layers of width 64."""
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=1088,
        max_position_embeddings=512,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        projection_dim=16,
    )
    return hf_llava_ft.LlavaConfig(text_config=text, vision_config=vision, image_token_index=1024)
