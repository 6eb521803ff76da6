"""Rows in packs, beside padded batches grouped by tokens, the default, and random ones with a mask.

    OMP_NUM_THREADS=1 python benchmarks/packing.py [--pairs 4 --rows 64 --budget 1024 --batch_size 4 --width 512]

Model, rows and batches are those of `row_order.py`, and so is what is compared: processor time of an epoch, forward
and backward, the sides in turn. Documents of a pack are computed one after the other, as on every CPU.
"""

import argparse
import statistics

import numpy as np
import torch
from row_order import batch_of, lengths_of, model_of, processor_seconds

from hf_llava_ft.data.packing import PackSampler
from hf_llava_ft.data.sampler import like_lengths, modality_length_grouped_indices
from hf_llava_ft.training.speed.packed_attention import attention_of, packed_inputs, use_packed_attention


def pack_of(signed: np.ndarray, implementation: str) -> dict:
    """The rows of these lengths, one behind the other."""
    rows, lengths = [batch_of(signed[place : place + 1], with_mask=False) for place in range(len(signed))], abs(signed)
    pack = {name: torch.cat([row[name] for row in rows], dim=1) for name in ("input_ids", "labels")}
    pixels = [row["pixel_values"] for row in rows if "pixel_values" in row]
    pack |= {"pixel_values": torch.cat(pixels)} if pixels else {}
    pack["position_ids"] = torch.cat([torch.arange(length) for length in lengths.tolist()])[None]
    borders = torch.tensor([0, *lengths.tolist()]).cumsum(0).to(torch.int32)
    inputs = packed_inputs({**pack, "document_lengths": lengths.tolist(), "borders": borders}, implementation)
    return {name: value for name, value in inputs.items() if name != "use_cache"}  # which is said for all sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("pairs", 4), ("rows", 64), ("budget", 1024), ("batch_size", 4), ("width", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    own = parser.parse_args()
    torch.set_num_threads(1)
    model, signed = model_of(own.width), lengths_of(own.rows)
    use_packed_attention(model)
    sampler = PackSampler(signed, own.budget)
    ratios: dict[str, list[float]] = {"grouped": [], "random": []}
    for pair in range(own.pairs):
        generator = torch.Generator().manual_seed(pair)
        grouped = modality_length_grouped_indices(
            *(signed, own.batch_size, 1, generator),
            **like_lengths(own.rows, own.batch_size),
            accumulation_steps=1,
        )
        orders = {"grouped": np.array(grouped), "random": torch.randperm(own.rows, generator=generator).numpy()}
        batches = {"packed": [pack_of(signed[pack], attention_of(model)) for pack in sampler.packs(pair)]}
        for name, order in orders.items():
            parts = [signed[order[start : start + own.batch_size]] for start in range(0, own.rows, own.batch_size)]
            batches[name] = [batch_of(part, with_mask=name == "random") for part in parts]
        seconds = {name: processor_seconds(model, batches[name]) for name in sorted(batches, reverse=bool(pair % 2))}
        for name, found in ratios.items():
            found.append(seconds[name] / seconds["packed"])
    filled = 100 * np.abs(signed).sum() / (len(sampler) * own.budget)
    print(f"packs of {own.budget} tokens: {len(sampler)}, {filled:.1f}% full")
    for name, found in ratios.items():
        print(f"{name} over packed: {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    main()
