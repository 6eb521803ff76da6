"""How likely a model finds given answers: the losses that training has of them, without training.

What may surprise: the loss is over the tokens that an answer can hold (`token_losses.py`), its stop token among them,
so it is the `eval_loss` of a run with the same rows.

Legend of the shapes: B rows, T positions, S supervised positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from PIL import Image

from hf_llava_ft.answering.batches import Question
from hf_llava_ft.answering.prompts import context_length, on_model
from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.errors import UserError
from hf_llava_ft.evaluation.token_losses import LossOverTokens, row_losses


def losses_of(
    model: Any, processor: Any, conversations: Sequence[Question], *, batch_size: int = 16
) -> Iterator[tuple[int, tuple[float, int]]]:
    """
    Yields (place of a conversation, (sum of the losses of its answers' tokens, how many)); 0 tokens where a picture
    can't be read or the conversation is longer than the model's context.

    Args:
        model, processor: as `load_for_answering` gives them.
        conversations (`list[Question]`): with their answers.

    Raises:
        UserError: if a batch does not fit into the GPU's memory.
    """
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    loss = LossOverTokens(
        num_tokens=max(processor.tokenizer.get_vocab().values()) + 1, image_token_id=processor.image_token_id
    )
    encode = LlavaCollator(processor)
    limit = context_length(model)
    for start in range(0, len(conversations), batch_size):
        rows: dict[int, Any] = {}
        for place in range(start, min(start + batch_size, len(conversations))):
            each = conversations[place]
            try:
                row = encode.encoded({"messages": each.messages, "images": each.images, "id": None})
            except (UserError, OSError, SyntaxError, Image.DecompressionBombError):
                row = None
            if row is None or (limit is not None and len(row["input_ids"]) > limit):
                yield place, (0.0, 0)
            else:
                rows[place] = row
        if not rows:
            continue
        batch = on_model(processor.pad(list(rows.values())), model)
        targets = plain.next_token_targets(batch["labels"], batch["input_ids"], batch["attention_mask"])  # (B, T)
        try:
            logits = model(**batch, supervised_logits_only=True).logits  # (S, V)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{len(rows)} rows at once need more memory than the GPU has: use a smaller --batch_size."
            ) from error
        sums = row_losses(loss.over_tokens(logits), targets, loss.of_each).double().cpu().tolist()
        for place, (total, number) in zip(rows, sums, strict=True):
            yield place, (total, int(number))


def with_answer(question: Question, answer: str) -> Question:
    """The question with an answer behind it."""
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return Question([*question.messages, turn], question.images)
