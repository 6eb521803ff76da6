"""What only the first process does, and all hear of."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed

from hf_llava_ft.checkpoints.artifact import staged_files, staged_name
from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments


def in_first_process(args: LlavaTrainingArguments, action: Callable[[], Any]) -> Any:
    """
    What `action` returns in the first process, in all of them.

    Raises:
        UserError: in all of them, if it did in the first; else the others would wait for it.
    """
    joined = _are_joined()
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


@contextmanager
def staged_in_first_process(args: LlavaTrainingArguments, folder: str | Path, last: str) -> Iterator[Path]:
    """
    [`staged_files`] of the process that saves; all processes get the same folder to write into, and what all wrote is
    moved up. A folder each would be taken by the next for one that a killed command had left.
    """
    name = in_first_process(args, staged_name)
    if args.should_save:
        with staged_files(folder, last, name) as staged:
            _wait_for_all()
            yield staged
            _wait_for_all()
    else:
        _wait_for_all()
        yield Path(folder, name)
        _wait_for_all()


def _are_joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _wait_for_all() -> None:
    if _are_joined():
        torch.distributed.barrier()


def _needs_device() -> bool:
    return torch.distributed.get_backend() == "nccl"
