"""What only the first process does, and all hear of."""

from collections.abc import Callable
from typing import Any

import torch.distributed

from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments


def in_first_process(args: LlavaTrainingArguments, action: Callable[[], Any]) -> Any:
    """
    What `action` returns in the first process, in all of them.

    Raises:
        UserError: in all of them, if it did in the first; else the others would wait for it.
    """
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    result: list[Any] = [None, None]
    if args.process_index == 0 or not joined:
        try:
            result[0] = action() if args.process_index == 0 else None
        except UserError as error:
            result[1] = error.sentence
    if joined:
        torch.distributed.broadcast_object_list(result, src=0, device=args.device if _needs_device() else None)
    if result[1] is not None:
        raise UserError(result[1])
    return result[0]


def _needs_device() -> bool:
    return torch.distributed.get_backend() == "nccl"
