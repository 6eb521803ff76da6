"""Batches without padding: the rows of a batch one behind the other, where padding would be computed for nothing.

Which rows come together, and what a step learns, stays as it is. A batch is then computed as a pack is
(`packed_attention.py`), and no position of padding exists.

What may surprise: `auto` does so on a CPU alone. There it takes less time whatever the rows are, since attention is
computed row by row at each row's own length; on a GPU that was not measured.
"""

from typing import Any

from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.fsdp import uses_fsdp
from hf_llava_ft.training.speed.packed_attention import (
    BY_DOCUMENT,
    attention_of,
    documents_apart,
    use_packed_attention,
    why_no_packed_attention,
)


def goes_without_padding(model: Any, collator: Any, args: LlavaTrainingArguments, *, own_loss: bool = False) -> bool:
    """
    Whether `args.padding_free` asks for it; the language model of `model` can compute such batches from then on.

    Args:
        own_loss (`bool`): the loss is computed by somebody who may count on a row of the batch for each row of the
            data: then it has to be asked for.

    Raises:
        UserError: if it is `true`, and something is in the way.
    """
    if args.packing or args.padding_free == "false":  # a pack has no padding anyway
        return False
    reason = _why_not(model, collator, args)
    if args.padding_free == "true":
        if reason is not None:
            raise UserError(f"--padding_free true: {reason}; leave it out.")
        use_packed_attention(model, "--padding_free true")
        return True
    if reason is not None or own_loss or _is_not_for_auto(model, args):
        return False
    before = attention_of(model)
    use_packed_attention(model, "--padding_free auto")
    if documents_apart(model, model):
        return True
    model.set_attn_implementation({"text_config": before})
    return False


def _why_not(model: Any, collator: Any, args: LlavaTrainingArguments) -> str | None:
    is_ours = isinstance(collator, LlavaCollator) and type(collator).__call__ is LlavaCollator.__call__
    if not is_ours or collator.padding_side != "right":
        return "it needs a LlavaCollator as it is, which pads on the right"
    if args.n_gpu > 1:
        return f"it needs a process for each of the {args.n_gpu} GPUs"
    if args.neftune_noise_alpha:
        return "neftune_noise_alpha makes noise by the length of a batch, and rows would get that of all together"
    return why_no_packed_attention(model)


def _is_not_for_auto(model: Any, args: LlavaTrainingArguments) -> bool:
    # Under an engine the weights are not all here now, and a compiler takes each length for a new shape.
    by_engine = args.deepspeed_plugin is not None or uses_fsdp(args) or args.torch_compile
    return args.device.type != "cpu" or by_engine or attention_of(model) not in ("sdpa", BY_DOCUMENT)
