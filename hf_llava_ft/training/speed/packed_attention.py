"""Attention over a pack: several documents one behind the other in one row, each of which sees itself alone.

FlashAttention, also as a kernel from the Hub, takes the borders and needs nothing of ours. For `sdpa` there is
`sdpa_by_document`, registered with transformers: PyTorch's kernel for documents of different lengths where there is
one (CUDA, 16 bits), and else one document after the other. transformers itself would build a dense mask of all
positions by all positions, which is slower than padding.

What may surprise: the mask of a pack is an empty tensor of four dimensions. transformers takes a mask of four for
finished and builds none, and whatever would use it by mistake fails instead of letting documents see each other.
"""

import inspect
from functools import cache
from itertools import groupby
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, TrainerCallback

from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM

BY_DOCUMENT = "sdpa_by_document"
_ROUNDING = 0.02  # what 16 bits may make of the same logits
_TAKE_BORDERS = ("flash_attention_2", "flash_attention_3", "flash_attention_4")


def without_mask_the_same(model: Any) -> bool:
    """Whether rows padded on the right give the same loss without their mask: what a language model does beside causal
    attention, as counting how its experts are loaded, may ask for it."""
    if not isinstance(model, LlavaForCausalLM):
        return False
    text = model.config.text_config
    looks_ahead = not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", False)
    return not looks_ahead and not getattr(text, "output_router_logits", False)


def why_no_packed_attention(model: Any) -> str | None:
    """Why the language model of `model` cannot keep rows apart, as the end of a sentence; None if it can."""
    if not without_mask_the_same(model):
        return "it needs a LLaVA whose language model looks back alone"
    text = model.model.language_model
    if not text._supports_flash_attn or getattr(text.config, "attention_chunk_size", None) is not None:
        # What such a model's attention is about stands in its mask alone, and a pack has none.
        return f"{text.config.model_type} cannot keep packed rows apart"
    name = text.config._attn_implementation
    if name not in (*_TAKE_BORDERS, BY_DOCUMENT, "sdpa") and "/" not in name:
        return (
            f"it needs an attention that keeps rows apart without a dense mask, and {name} has none: use "
            "--attn_implementation sdpa or flash_attention_2"
        )
    return None


def use_packed_attention(model: Any, flag: str = "--packing") -> None:
    """
    Lets the language model of `model` compute packs; batches of rows are computed as before.

    Args:
        flag (`str`): what asked for it, for the message.

    Raises:
        UserError: if its attention, or the implementation that was asked for, cannot keep documents apart.
    """
    reason = why_no_packed_attention(model)
    if reason is not None:
        raise UserError(f"{flag}: {reason}; or leave it out.")
    if model.model.language_model.config._attn_implementation == "sdpa":
        AttentionInterface.register(BY_DOCUMENT, attention_by_document)
        AttentionMaskInterface.register(BY_DOCUMENT, AttentionMaskInterface()["sdpa"])
        model.set_attn_implementation({"text_config": BY_DOCUMENT})


class Documents:
    """
    Where the documents of a pack begin and end. One object, opaque to a compiler, which would compile a layer anew for
    each list of lengths.

    Args:
        lengths (`list[int]`): their sum is the length of the pack.
        borders (`int32[documents + 1]`): the same added up, where the model is.

    Attributes:
        runs (`list[int]`): how many neighbours are of one length each.
        run_lengths (`list[int]`): how long they are together.
    """

    __slots__ = ("borders", "lengths", "run_lengths", "runs")

    def __init__(self, lengths: list[int], borders: torch.Tensor):
        self.lengths, self.borders = lengths, borders
        neighbours = [(length, len(list(same))) for length, same in groupby(lengths)]
        self.runs = [number for _, number in neighbours]
        self.run_lengths = [length * number for length, number in neighbours]


def packed_inputs(inputs: dict[str, Any], implementation: str) -> dict[str, Any]:
    """
    What the model takes, of a batch of `PackCollator`.

    Args:
        inputs: with `document_lengths` and `borders`.
        implementation (`str`): of the language model's attention.
    """
    own = ("document_lengths", "borders", "num_rows")
    kept = {name: value for name, value in inputs.items() if name not in own}
    lengths, borders = inputs["document_lengths"], inputs["borders"]
    kept["use_cache"] = False
    if implementation == BY_DOCUMENT:
        kept["documents"] = Documents(lengths, borders)
        kept["attention_mask"] = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=borders.device)
        return kept
    kept |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "attention_mask": None}
    return kept | {"max_length_q": max(lengths), "max_length_k": max(lengths)}


def attention_by_document(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    As transformers calls an attention; without `documents` its own sdpa.

    Args:
        query, key, value: `float[1, heads, T, width]`; key and value may have fewer heads.
        documents (`Documents`, *optional*): of the pack.

    Returns:
        `float[1, T, heads, width]`.
    """
    sdpa = AttentionInterface()["sdpa"]
    if documents is None:
        return sdpa(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )  # whose mask knows the window
    if _has_kernel(query, dropout):
        return _by_kernel(query, key, value, documents, scaling, sliding_window), None
    parts = []
    runs = zip(*(each.split(documents.run_lengths, dim=2) for each in (query, key, value)), strict=True)
    for number, run in zip(documents.runs, runs, strict=True):
        # `[1, heads, number x length, width]` to `[number, heads, length, width]`: neighbours of one length at once.
        rows = [each[0].unflatten(1, (number, -1)).transpose(0, 1) for each in run]
        mask = _window(rows[0], sliding_window)
        found = sdpa(module, *rows, mask, dropout=dropout, scaling=scaling, **kwargs)[0]
        parts.append(found.flatten(0, 1))
    return torch.cat(parts)[None], None


def _window(query: torch.Tensor, sliding_window: int | None) -> torch.Tensor | None:
    """The mask of one document, `bool[1, 1, T, T]`, if it is longer than what a position looks back."""
    length = query.shape[2]
    if sliding_window is None or length <= sliding_window:
        return None
    places = torch.arange(length, device=query.device)
    behind = places[:, None] - places[None, :]
    return ((behind >= 0) & (behind < sliding_window))[None, None]


def _has_kernel(query: torch.Tensor, dropout: float) -> bool:
    of_kernel = query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16) and not dropout
    return of_kernel and _kernel_takes_all()


def _by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    flat_query, flat_key, flat_value = (each[0].transpose(0, 1) for each in (query, key, value))  # (T, heads, width)
    borders, longest = documents.borders, max(documents.lengths)
    look_back = -1 if sliding_window is None else sliding_window - 1
    found = varlen_attn(
        *(flat_query, flat_key, flat_value, borders, borders, longest, longest),
        scale=scaling,
        window_size=(look_back, 0),
        enable_gqa=True,
    )
    assert isinstance(found, torch.Tensor)  # nothing else was asked for
    return found[None]


@cache
def _kernel_takes_all() -> bool:
    """Whether PyTorch's kernel takes a window and fewer heads of keys than of queries, as that of 2.13 does."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


class DocumentsApart(TrainerCallback):
    """
    Before a run of packs or without padding begins, sees to it that documents are apart.

    Args:
        trainer (`LlavaTrainer`): of the run; all its processes take part.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """
        Raises:
            UserError: if they are not, as of a language model that carries a state from position to position.
        """
        if not args.packing and not self.trainer.is_padding_free:
            return
        unwrapped = self.trainer._unwrapped_model
        if not documents_apart(self.trainer.model_wrapped, unwrapped):
            raise UserError(
                f"{'--packing' if args.packing else '--padding_free'}: in {unwrapped.config.text_config.model_type} a "
                "row is not computed as it is alone when another one stands before it; leave it out."
            )


def documents_apart(model: Any, unwrapped: LlavaForCausalLM) -> bool:
    """
    Whether a short document gives the logits that it gives alone, behind each of two others.

    Args:
        model: what computes, be it wrapped in an engine.
        unwrapped (`LlavaForCausalLM`): inside of it.
    """
    device, was_training = next(unwrapped.parameters()).device, model.training
    document = [3, 5, 4, 7]
    model.eval()
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([document], device=device), use_cache=False).logits[0].float()
        behind = []
        for first in ([3, 4, 5, 6], [9, 8, 7, 6]):
            pack = {
                "input_ids": torch.tensor([[*first, *document]], device=device),
                "position_ids": torch.tensor([[0, 1, 2, 3] * 2], device=device),
                "document_lengths": [4, 4],
                "borders": torch.tensor([0, 4, 8], dtype=torch.int32, device=device),
            }
            behind.append(model(**packed_inputs(pack, attention_of(unwrapped))).logits[0, 4:].float())
    model.train(was_training)
    for module in model.modules():
        if hasattr(module, "reshard"):  # FSDP2 gathers for a backward pass, and none comes
            module.reshard()
    return all(float((each - alone).abs().max() / alone.abs().max()) < _ROUNDING for each in behind)


def attention_of(model: LlavaForCausalLM) -> str:
    """The implementation of the language model's attention."""
    return str(model.model.language_model.config._attn_implementation)
