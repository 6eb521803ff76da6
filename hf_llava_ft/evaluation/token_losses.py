"""The loss of training and evaluation.

What may surprise: rows of the head that stand for no token, and that of `<image>`, have no part in the loss. They were
added to give an id to an image, or to fill the head up to a round number; the original has none of them, and no answer
ever holds them. With them in the sum, every probability would be a little too small, and they would be trained.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional


@dataclass(frozen=True)
class LossOverTokens:
    """
    transformers' loss of a causal language model, over the tokens that an answer can hold.

    Args:
        num_tokens (`int`): ids from here on stand for no token.
        image_token_id (`int`): not a token either.
        label_smoothing (`float`): the share of a target that is spread over all tokens (arXiv 1512.00567), as in
            `torch.nn.CrossEntropyLoss`. transformers' own would compare each position with its own token and not with
            the next one, since it moves the labels of the classes on its list alone, and ours is not on it.
    """

    num_tokens: int
    image_token_id: int
    label_smoothing: float = 0.0

    def __call__(
        self,
        logits: torch.Tensor,
        labels: Any,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        As transformers calls a `loss_function`.

        Args:
            logits (`float[..., V]`): computed on in float32.
            labels (`int64[..., T]`, *optional*): of the same positions; moved by one here.
            vocab_size (`int`): what transformers gives along; `logits` tell.
            num_items_in_batch (*optional*): what the sum of the losses is divided by; default: the number of targets.
            shift_labels (`int64[...]`, *optional*): targets that are moved already, instead of `labels`.
        """
        logits = self.over_tokens(logits)
        if shift_labels is None:
            shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(-1).to(logits.device)
        logits = logits.reshape(-1, logits.shape[-1])
        if self.label_smoothing:
            loss = self.of_each(logits, targets, ignore_index).sum()
            loss = loss / (targets != ignore_index).sum() if num_items_in_batch is None else loss
        else:
            reduction = "mean" if num_items_in_batch is None else "sum"
            loss = functional.cross_entropy(logits.float(), targets, ignore_index=ignore_index, reduction=reduction)
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch

    def of_each(self, logits: torch.Tensor, targets: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
        """
        `float32[N]`, the losses of `targets` `int64[N]`, given `logits` `float[N, V]` of `over_tokens`; 0 for those
        that are ignored.
        """
        logits = logits.float()
        losses = functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
        if not self.label_smoothing:
            return losses
        # Not PyTorch's own smoothing, to which the image token's -inf is an infinite loss.
        log_probs = logits.log_softmax(-1)
        is_token = torch.arange(logits.shape[-1], device=logits.device) != self.image_token_id
        of_all = -log_probs.masked_fill(~is_token, 0.0).sum(-1) / is_token.sum()
        of_all = of_all.masked_fill(targets == ignore_index, 0.0)
        return (1 - self.label_smoothing) * losses + self.label_smoothing * of_all

    def over_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        """`float[..., V]` without the ids that stand for no token; that of the image token, among others, is -inf."""
        num_kept = min(self.num_tokens, logits.shape[-1])
        if self.image_token_id == num_kept - 1:
            num_kept -= 1
        logits = logits[..., :num_kept]
        if self.image_token_id < num_kept:
            image = torch.full((1,), self.image_token_id, device=logits.device)  # nothing is copied there
            logits = logits.index_fill(-1, image, float("-inf"))
        return logits


def row_losses(
    logits: torch.Tensor, targets: torch.Tensor, of_each: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """
    The summed loss of each row, and of how many tokens.

    Args:
        logits (`float[S, V]`): at the S supervised positions, in row-major order.
        targets (`int64[B, T]`): at each position the id to predict, or -100.
        of_each: the losses `float32[S]` of logits and targets.

    Returns:
        `float32[B, 2]`: sum and number.
    """
    is_supervised = targets != -100
    losses = of_each(logits, targets[is_supervised].to(logits.device))
    row_of = is_supervised.nonzero()[:, 0].to(logits.device)
    sums = torch.zeros(len(targets), device=logits.device).index_add(0, row_of, losses)
    return torch.stack((sums, is_supervised.sum(1).to(sums)), dim=1)
