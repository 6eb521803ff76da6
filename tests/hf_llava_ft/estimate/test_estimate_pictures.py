"""Crops and tokens of LLaVA-1.6's pictures, against its processor and its model."""

import json

import pytest
import torch

import hf_llava_ft
from hf_llava_ft.estimate.pictures import TYPICAL_SIZE, parsed_size, picture_of, worst_picture
from hf_llava_ft.estimate.trace import Batch, trace_micro_batch
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer
from hf_llava_ft.training.trainer import LossOverTokens
from hf_llava_ft.training.tuning import with_tuning
from tests.hf_llava_ft.estimate.test_estimate import FLOAT32, real_inputs, run, saved_bytes, tuning

PINPOINTS = [[112, 56], [56, 112], [112, 112], [56, 168], [168, 56]]
SIZES = [(40, 100), (56, 56), (480, 640), (640, 480), (100, 1000), (1000, 100), (333, 334)]


def next_config(tiny, merge_type: str = "spatial_unpad"):
    return tiny.config(image_aspect_ratio="anyres", patch_merge_type=merge_type, image_grid_pinpoints=PINPOINTS)


@pytest.mark.parametrize("merge_type", ["flat", "spatial_unpad"])
def test_tokens_are_those_of_the_processor(tiny, golden, merge_type):
    config = next_config(tiny, merge_type)
    processor = hf_llava_ft.LlavaProcessor.build(
        load_tokenizer(golden / "tokenizer_tiny"),
        config.vision_config,
        version="v1",
        image_aspect_ratio="anyres",
        image_grid_pinpoints=PINPOINTS,
        patch_merge_type=merge_type,
    )
    found = [picture_of(config, size).tokens for size in SIZES]
    assert found == [processor.num_image_tokens_at(*size) for size in SIZES]
    assert len(set(found)) > 2
    worst = worst_picture(config)
    assert worst.tokens == max(processor.num_image_tokens_at(h, w) for h in range(8, 300, 9) for w in range(8, 300, 9))
    assert worst.tokens == processor.num_image_tokens_at(*worst.size) and worst.crops == 5


def test_sizes_that_transformers_publishes_for_llava_next():
    """Its default pinpoints and a tower of 336 pixels in patches of 14: a row of 48 patches ends in a newline."""
    text = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 99}
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
    config = hf_llava_ft.LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=98,
        image_aspect_ratio="anyres",
        patch_merge_type="spatial_unpad",
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    )
    typical, worst = picture_of(config, TYPICAL_SIZE), worst_picture(config)
    assert (typical.crops, typical.tokens) == (5, 576 + 36 * (48 + 1))
    assert (worst.size, worst.crops, worst.tokens) == ((672, 672), 5, 576 + 48 * (48 + 1))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_held_is_what_autograd_saves(tiny, checkpointing):
    config = next_config(tiny)
    config.text_config.num_hidden_layers = 6
    size = (40, 100)
    rows = Batch(size=2, images=1, text_tokens=24, supervised=10, picture_size=size)
    picture = picture_of(config, size)
    real = hf_llava_ft.LlavaForCausalLM(config)
    real.loss_function = LossOverTokens(num_tokens=1088, image_token_id=1024)
    model = with_tuning(real, tuning("lora"), "").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = real_inputs(picture.tokens)
    inputs["pixel_values"] = torch.randn(2 * picture.crops, 3, 56, 56)
    inputs["image_sizes"] = torch.tensor([size, size])
    measured = saved_bytes(model, inputs)

    def held(rows: Batch) -> float:
        return trace_micro_batch(config, tuning("lora"), FLOAT32, rows, gradient_checkpointing=checkpointing).held

    assert held(rows) == pytest.approx(measured, rel=0.15)
    assert held(Batch(2, 1, 24, 10, worst_picture(config).size)) > 1.15 * measured


def test_the_command_tells_what_kept_features_take(tiny, tmp_path):
    next_config(tiny).save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--json", str(tmp_path / "out.json"), "--rows", "1000"]
    words += ["--picture_size", "112x112"]
    assert "vision features" not in run(*words).output
    for dtype, bytes_of_one in (("float32", 5 * 16 * 32 * 4), ("bfloat16", 5 * 16 * 32 * 2)):
        bf16 = str(dtype == "bfloat16")
        result = run(*words, "--dtype", "float32", "--bf16", bf16, "--cache_vision_features", "DIR")
        content = json.loads((tmp_path / "out.json").read_text())
        assert content["bytes_on_disk_of_the_features_of_a_picture"] == bytes_of_one
        assert f"{bytes_of_one / 1e3:.1f} kB on disk for a picture" in result.output
        assert f"{bytes_of_one / 1e3:.1f} MB for 1,000, if each is another" in result.output


def test_the_command_tells_of_the_picture(tiny, tmp_path):
    next_config(tiny).save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--json", str(tmp_path / "out.json")]
    sizes = {}
    for size in ("100x40", "worst"):
        result = run(*words, "--picture_size", size)
        assert result.exit_code == 0, result.output
        content = json.loads((tmp_path / "out.json").read_text())
        sizes[size] = content["bytes_on_a_device"]["together"]
        assert content["plan"]["batch"]["picture_size"] == content["picture"]["size"]
    assert content["picture"] == content["worst_picture"] and sizes["worst"] > sizes["100x40"]
    assert "at worst 112x112: 5 crops, 88 tokens" in result.output
    for size in ("big", "0x10", "640"):
        refused = run(*words, "--picture_size", size)
        assert refused.exit_code == 2 and "WIDTHxHEIGHT" in refused.output


def test_a_size_is_width_first():
    assert parsed_size("640x480") == (480, 640) == TYPICAL_SIZE
