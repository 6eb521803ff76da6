"""Writes small exported folders that carry their code, each with what the model made of a few questions.

`python tests/travelling/exporting.py OUTPUT_DIR` writes one folder for each entry of `CASES`, always with the same
weights. Besides what `save_pretrained` writes, each holds `expected.safetensors`, which `loading.py` compares with.
The folders in `exported_0.1.0/` were written by this file with that version and transformers 5.23.0.
"""

import sys
from pathlib import Path

import torch
from loading import ForcedToken
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LogitsProcessorList, SiglipVisionConfig

import hf_llava_ft
from hf_llava_ft.checkpoints.opening import fit_to_processor
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer

TOKENIZER = Path(__file__).parents[1] / "golden" / "tokenizer_tiny"
ANYRES = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[56, 28], [28, 56]]}
# name: (tower, whether the embeddings are tied, fields of the configuration); transformers' own can express none.
CASES = {
    "mlp3x": ("clip", False, {"projector_type": "mlp3x_gelu", "image_aspect_ratio": "pad"}),
    "flat": ("clip", False, {"projector_type": "mlp2x_gelu", "patch_merge_type": "flat", **ANYRES}),
    "siglip-linear": ("siglip", True, {"projector_type": "linear", "image_aspect_ratio": "pad"}),
}
# Width and height of the pictures of each row: one, none, two.
PICTURES = (((40, 24),), (), ((24, 40), (30, 30)))
QUESTIONS = ("What is in the picture?", "What is the number?", "Are they the same?")
NUM_NEW_TOKENS = 8
# One logit of so many is kept: 34 of each position, more than the model is wide, so that none can differ unseen.
EVERY = 32
# By how much the best next token must beat the second, so that rounding cannot make another answer.
CLEARLY = 1e-3


def build(case: str):
    """Model and processor of a case; the weights are large enough that every part of the input shows in the logits."""
    tower, tied, fields = CASES[case]
    text_config = LlamaConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        vocab_size=1024,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    vision_class = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[tower]
    vision_config = vision_class(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
    )
    config = hf_llava_ft.LlavaConfig(
        text_config=text_config,
        vision_config=vision_config,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        image_token_index=1024,
        image_seq_length=16,
        tie_word_embeddings=tied,
        **fields,
    )
    processor = hf_llava_ft.LlavaProcessor.build(
        load_tokenizer(TOKENIZER),
        config.vision_config,
        version="plain",
        image_aspect_ratio=config.image_aspect_ratio,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_grid_pinpoints=config.image_grid_pinpoints,
        patch_merge_type=config.patch_merge_type,
    )
    torch.manual_seed(0)
    model = hf_llava_ft.LlavaForCausalLM(config).eval()
    fit_to_processor(model, processor)
    generator = torch.Generator().manual_seed(list(CASES).index(case))
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(std=0.2, generator=generator)
    return model, processor


def pictures(seed: int) -> list[torch.Tensor]:
    """The pictures of all rows, `uint8[height, width, 3]`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [size for row in PICTURES for size in row]
    return [torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8) for width, height in sizes]


def expected_outputs(model, processor) -> dict[str, torch.Tensor]:
    """
    What `loading.py` compares with. B rows of T positions, padded on the left, the second of which has no picture.

    Returns:
        `picture.{n}` (`uint8[H, W, 3]`) and `text.{row}` (`uint8[bytes]`, UTF-8), what goes in; what the processor
        makes of them (`input_ids`, `attention_mask`, `pixel_values`, and `image_sizes` for LLaVA-1.6);
        `logits` (`float32[B, T, V / EVERY]`); `generated` (`int64[B, 8]`), greedy; `generated_with_image_token`, the
        same where the second new token is made to be the image token.
    """
    images = pictures(0)
    texts = [f"{'<image>' * len(row)}{question}" for row, question in zip(PICTURES, QUESTIONS, strict=True)]
    processor.tokenizer.padding_side = "left"
    inputs = processor(
        images=[Image.fromarray(image.numpy()) for image in images], text=texts, padding=True, return_tensors="pt"
    )
    length = inputs["input_ids"].shape[1]
    settings = {"do_sample": False, "min_new_tokens": NUM_NEW_TOKENS, "max_new_tokens": NUM_NEW_TOKENS}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    forced = LogitsProcessorList([ForcedToken(model.config.image_token_id, length + 1)])
    with torch.no_grad():
        logits = model(**inputs).logits
        plain = model.generate(**inputs, **settings)
        with_image_token = model.generate(**inputs, **settings, logits_processor=forced)
    for answer in (plain, with_image_token):
        best = torch.stack(answer.logits).topk(2).values
        assert (best[..., 0] - best[..., 1]).min() > CLEARLY, "two tokens are as good as each other: take another seed"
    expected = {f"picture.{index}": image for index, image in enumerate(images)}
    expected |= {f"text.{row}": torch.tensor(list(text.encode()), dtype=torch.uint8) for row, text in enumerate(texts)}
    names = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
    expected |= {name: inputs[name] for name in names if name in inputs}
    expected |= {"logits": logits[..., ::EVERY].float()}
    for name, answer in (("generated", plain), ("generated_with_image_token", with_image_token)):
        expected[name] = answer.sequences[:, length:]
    return {name: tensor.contiguous() for name, tensor in expected.items()}


def main(output_dir: str) -> int:
    for case in CASES:
        folder = Path(output_dir, case)
        model, processor = build(case)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        save_file(expected_outputs(model, processor), folder / "expected.safetensors")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
