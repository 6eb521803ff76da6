"""Rows of the embedding for tokens that were added."""

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
    with torch.no_grad():
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            if embedding is not None:
                weight = cast(torch.Tensor, embedding.weight)
                weight[old:] = weight[:old].mean(dim=0)
