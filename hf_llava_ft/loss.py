"""The loss of training and evaluation.

What may surprise: rows of the head that stand for no token, and that of `<image>`, have no part in the loss. They were
added to give an id to an image, or to fill the head up to a round number; the original has none of them, and no answer
ever holds them. With them in the sum, every probability would be a little too small, and they would be trained.
"""

from dataclasses import dataclass

import torch
from transformers.loss.loss_utils import ForCausalLMLoss


@dataclass(frozen=True)
class LossOverTokens:
    """
    transformers' loss of a causal language model, over the tokens that an answer can hold.

    Args:
        num_tokens (`int`): ids from here on stand for no token.
        image_token_id (`int`): not a token either.
    """

    num_tokens: int
    image_token_id: int

    def __call__(self, logits: torch.Tensor, labels, vocab_size: int, **kwargs) -> torch.Tensor:
        """As `ForCausalLMLoss`, with `logits` `float[..., V]`."""
        logits = self.over_tokens(logits)
        return ForCausalLMLoss(logits, labels, logits.shape[-1], **kwargs)

    def over_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        """`float[..., V]` without the ids that stand for no token; that of the image token, among others, is -inf."""
        num_kept = min(self.num_tokens, logits.shape[-1])
        if self.image_token_id == num_kept - 1:
            num_kept -= 1
        logits = logits[..., :num_kept]
        if self.image_token_id < num_kept:
            image = torch.tensor([self.image_token_id], device=logits.device)
            logits = logits.index_fill(-1, image, float("-inf"))
        return logits
