"""Numbers over all rows of a check: how long they are, and what padding costs."""

import numpy as np
import torch

from hf_llava_ft.data.sampler import like_lengths, modality_length_grouped_indices, padding_share

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_NUM_BINS = 24


def length_statistics(lengths: np.ndarray) -> dict:
    """
    Args:
        lengths (`int[N]`): tokens of each row.

    Returns:
        `dict`: `min`, `mean`, `max`; `percentiles`, each the smallest length that as many percent of the rows do not
        exceed; and `histogram` with `edges` `[B + 1]`, whole numbers, and `counts` `[B]`. The last bin includes its
        upper edge.
    """
    ordered = np.sort(lengths)
    places = [max(0, -(-len(ordered) * percent // 100) - 1) for percent in PERCENTILES]
    low, high = int(ordered[0]), int(ordered[-1])
    width = max(1, -(-(high - low + 1) // _NUM_BINS))
    edges = np.arange(low, high + width + 1, width)
    counts, _ = np.histogram(ordered, bins=edges)
    return {
        "min": low,
        "mean": round(float(ordered.mean()), 2),
        "max": high,
        "percentiles": {str(percent): int(ordered[place]) for percent, place in zip(PERCENTILES, places, strict=True)},
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def padding_waste(
    lengths: np.ndarray, has_images: np.ndarray, batch_size: int, accumulation_steps: int = 1
) -> dict[str, float]:
    """
    The share of a batch's positions that hold padding, over one epoch, for each way to make batches.

    Args:
        lengths (`int[N]`): tokens of each row.
        has_images (`bool[N]`): rows with images are grouped apart.
        batch_size (`int`): rows in a forward pass.
        accumulation_steps (`int`): forward passes in an optimiser step.
    """
    how = like_lengths(len(lengths), batch_size * accumulation_steps)
    signed = np.where(has_images, lengths, -lengths)
    generator = torch.Generator().manual_seed(0)
    orders = {
        "random": torch.randperm(len(lengths), generator=generator).numpy(),
        "group_by_modality_length": np.array(
            modality_length_grouped_indices(
                *(signed, batch_size, accumulation_steps, generator), accumulation_steps=accumulation_steps, **how
            )
        ),
    }
    return {name: round(padding_share(lengths[order], batch_size), 4) for name, order in orders.items()}
