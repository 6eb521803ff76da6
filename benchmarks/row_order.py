"""Rows grouped by tokens and without a mask, the default of training, beside random rows with one.

    OMP_NUM_THREADS=1 python benchmarks/row_order.py [--pairs 8 --rows 64 --batch_size 4 --width 512]

Each side takes an epoch of the same rows through the same model, forward and backward; rows have a picture or none,
and lengths as mixed chats have them. The sides come in turn, one thread each, and what is compared is processor time.
Printed are the padding of each side, and median, least and greatest of the ratios of the pairs.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from hf_llava_ft.data.sampler import like_lengths, modality_length_grouped_indices, padding_share
from hf_llava_ft.modeling.configuration_llava import LlavaConfig
from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM

_IMAGE_TOKENS, _EDGE = 49, 224


def model_of(width: int) -> LlavaForCausalLM:
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=int(width * 2.6875),
        num_hidden_layers=8,
        num_attention_heads=width // 64,
        vocab_size=32_064,
    )
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=_EDGE,
        patch_size=32,
    )
    model = LlavaForCausalLM(LlavaConfig(text_config=text, vision_config=vision, image_token_index=32_000)).train()
    model.model.vision_tower.requires_grad_(False)
    return model


def lengths_of(rows: int) -> np.ndarray:
    """`int64[N]`, tokens of each row, negative without a picture."""
    random = np.random.default_rng(0)
    text = np.clip(random.lognormal(4.6, 0.8, rows), 16, 600).astype(np.int64)
    return np.where(random.random(rows) < 0.6, text + _IMAGE_TOKENS, -text)


def batch_of(signed: np.ndarray, with_mask: bool) -> dict[str, torch.Tensor]:
    """Rows of these lengths, padded on the right; the second half of each row's text is learned."""
    lengths = np.abs(signed)
    generator = torch.Generator().manual_seed(int(lengths.sum()))
    ids = torch.randint(3, 32_000, (len(signed), int(lengths.max())), generator=generator)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, length in enumerate(signed):
        begin = _IMAGE_TOKENS if length > 0 else 0
        ids[row, :begin] = 32_000
        ids[row, abs(length) :] = 0
        mask[row, : abs(length)] = 1
        learned = slice((begin + abs(length)) // 2, abs(length))
        labels[row, learned] = ids[row, learned]
    batch = {"input_ids": ids, "labels": labels}
    if (signed > 0).any():
        shape = (int((signed > 0).sum()), 3, _EDGE, _EDGE)
        batch["pixel_values"] = torch.randn(shape, generator=generator)
    return batch | ({"attention_mask": mask} if with_mask else {})


def processor_seconds(model: LlavaForCausalLM, batches: list[dict[str, torch.Tensor]]) -> float:
    begin = time.process_time()
    for batch in batches:
        model(**batch, use_cache=False, supervised_logits_only=True).loss.backward()
        model.zero_grad()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("pairs", 8), ("rows", 64), ("batch_size", 4), ("width", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    own = parser.parse_args()
    torch.set_num_threads(1)
    model, signed = model_of(own.width), lengths_of(own.rows)
    ratios, padding = [], {"grouped": [], "random": []}
    for pair in range(own.pairs):
        generator = torch.Generator().manual_seed(pair)
        grouped = modality_length_grouped_indices(
            *(signed, own.batch_size, 1, generator),
            **like_lengths(own.rows, own.batch_size),
            accumulation_steps=1,
        )
        orders = {"grouped": np.array(grouped), "random": torch.randperm(own.rows, generator=generator).numpy()}
        seconds = {}
        for name in sorted(orders, reverse=bool(pair % 2)):
            order = orders[name]
            padding[name].append(padding_share(np.abs(signed)[order], own.batch_size))
            parts = [signed[order[start : start + own.batch_size]] for start in range(0, own.rows, own.batch_size)]
            batches = [batch_of(part, with_mask=name == "random") for part in parts]
            seconds[name] = processor_seconds(model, batches)
        ratios.append(seconds["random"] / seconds["grouped"])
    for name, shares in padding.items():
        print(f"padding, {name}: {100 * statistics.mean(shares):.1f}%")
    print(f"random over grouped: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
