"""Causal attention of several documents, forward and backward, in the ways that training can take.

* `padded`: a row for each document, filled up to the longest; PyTorch's SDPA without a mask;
* `masked`: one row of all documents, SDPA under a block-diagonal mask;
* `varlen_attn`: the same row in PyTorch's kernel for documents of different lengths;
* `flash_attn`: the same in the package flash-attn.

A way that this machine lacks is told with the reason.
"""

import inspect
from collections.abc import Callable

import torch
from repeats import seconds_in_turn
from torch.nn.functional import scaled_dot_product_attention

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def compare(lengths: list[int], heads: int, width: int, device: torch.device, dtype: torch.dtype, rounds: int) -> dict:
    """Seconds of each way, and how far its result is from that of each document alone in float32."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (3, sum(lengths), heads, width)
    query, key, value = torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_(True)
    expected = alone(lengths, query.detach().float(), key.detach().float(), value.detach().float())
    ways = {
        "padded": padded(lengths),
        "masked": masked(lengths, device),
        "varlen_attn": varlen(lengths, device),
        "flash_attn": flash(lengths, device),
    }
    found: dict = {"lengths": lengths, "heads": heads, "width": width, "dtype": str(dtype), "ways": {}}
    runs: dict[str, Callable[[], object]] = {}
    for name, way in ways.items():
        try:
            result = way(query, key, value)
            torch.autograd.grad(result.sum(), (query, key, value))
        except (ImportError, RuntimeError, NotImplementedError, AttributeError) as error:
            found["ways"][name] = {"missing": str(error).splitlines()[0]}
            continue
        difference = (result.detach().float() - expected).abs().max().item()
        found["ways"][name] = {"largest_difference": difference}
        runs[name] = lambda way=way: torch.autograd.grad(way(query, key, value).sum(), (query, key, value))
    for name, seconds in seconds_in_turn(runs, device, rounds).items():
        found["ways"][name]["seconds"] = seconds
    return found


def alone(lengths: list[int], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`float[T, H, D]`: each document by itself."""
    documents = zip(*(each.split(lengths) for each in (query, key, value)), strict=True)
    return torch.cat([_causal(*(each[None] for each in document))[0] for document in documents])


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Of rows `[B, T, H, D]`."""
    rows = (each.transpose(1, 2) for each in (query, key, value))
    return scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2)


def padded(lengths: list[int]) -> Attention:
    def run(query, key, value):
        rows = (torch.nn.utils.rnn.pad_sequence(each.split(lengths), batch_first=True) for each in (query, key, value))
        result = _causal(*rows)
        return torch.cat([row[:length] for row, length in zip(result, lengths, strict=True)])

    return run


def masked(lengths: list[int], device: torch.device) -> Attention:
    document = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    mask = (document[:, None] == document).tril()

    def run(query, key, value):
        rows = (each[None].transpose(1, 2) for each in (query, key, value))
        return scaled_dot_product_attention(*rows, attn_mask=mask).transpose(1, 2)[0]

    return run


def varlen(lengths: list[int], device: torch.device) -> Attention:
    starts = _starts(lengths, device)

    def run(query, key, value):
        from torch.nn.attention.varlen import varlen_attn

        if "window_size" in inspect.signature(varlen_attn).parameters:
            causal: dict = {"window_size": (-1, 0)}
        else:
            causal = {"is_causal": True}
        return varlen_attn(query, key, value, starts, starts, max(lengths), max(lengths), **causal)

    return run


def flash(lengths: list[int], device: torch.device) -> Attention:
    starts = _starts(lengths, device)

    def run(query, key, value):
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(query, key, value, starts, starts, max(lengths), max(lengths), causal=True)

    return run


def _starts(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
