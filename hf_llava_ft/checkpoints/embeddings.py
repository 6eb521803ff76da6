"""Rows of the embedding for tokens that were added."""

from collections.abc import Collection
from typing import cast

import torch
from transformers import PreTrainedModel

# As llava-hf has it; tensor cores want it, and servers that shard the vocabulary.
ROW_MULTIPLE = 64


def grow_embeddings(model: PreTrainedModel, num_tokens: int, multiple: int | None = ROW_MULTIPLE) -> None:
    """
    Makes room for `num_tokens` ids in input and output embeddings; the new rows are the mean of the old, the same in
    every run.

    Does nothing when there is room. The rows of `<image>` and padding are never read or learned; a new word would
    start from the middle of what the model knows.
    """
    old = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if num_tokens <= old:
        return
    model.resize_token_embeddings(num_tokens, pad_to_multiple_of=multiple, mean_resizing=False)
    fill_rows(model, range(old, model.get_input_embeddings().num_embeddings))  # type: ignore[arg-type]


def fill_rows(model: PreTrainedModel, added: Collection[int]) -> None:
    """
    Gives the ids `added` the mean of the rows before the first of them, in input and output embeddings.

    A language model may have rows to spare, as Qwen has: what stands there is what its training began with, or what
    its optimiser made of it.
    """
    if not added:
        return
    ids, first = sorted(added), min(added)
    with torch.no_grad():
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            if embedding is not None:
                weight = cast(torch.Tensor, embedding.weight)
                weight[ids] = weight[:first].mean(dim=0)
