"""The heaviest batches of a run, tried before its first step: memory that will not do is known in the first minute.

A run otherwise finds its longest rows when chance has it, hours later. The trial is forward and backward pass of a
real step, beside room for the states that the optimizer has from its first step on. It leaves no trace: gradients are
dropped, the optimizer takes no step, and the random numbers go on as if it had not been.

What may surprise: rows that are streamed are not known beforehand, and DeepSpeed keeps gradients of its own that
cannot be dropped; there nothing is tried.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from hf_llava_ft.data.lengths import token_counts
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.training.evaluation import untouched_rng
from hf_llava_ft.training.speed.packed_loader import heaviest_packs

logger = logging.getLogger(__name__)


def heaviest_batches(
    dataset: Dataset, processor: LlavaProcessor, batch_size: int, max_length: int | None = None
) -> list[tuple[list[int], int]]:
    """
    The batch of the longest rows and, where it is another, that of the rows with most images: the first is the worst
    for the language model, the second for a tower that trains.

    Args:
        dataset (`Dataset`): with the columns `messages`, `images` and `num_images`.
        batch_size (`int`): rows of a batch.
        max_length (`int`, *optional*): where longer rows are cut.

    Returns:
        Of each batch the indices of its rows, and the tokens of the longest of them.
    """
    lengths = token_counts(dataset, processor).num_tokens
    if max_length is not None:
        lengths = np.minimum(lengths, max_length)
    images = dataset.select_columns(["num_images"]).with_format("numpy")[:]["num_images"]
    orders = (np.lexsort((images, lengths)), np.lexsort((lengths, images)))
    batches = [order[::-1][:batch_size] for order in orders]
    if images[batches[1]].sum() == images[batches[0]].sum():
        batches.pop()
    return [(batch.tolist(), int(lengths[batch].max())) for batch in batches]


class LongestBatch(TrainerCallback):
    """
    Tries the heaviest batches before the first step, where `args.try_longest_batch` wants it.

    Args:
        trainer (`LlavaTrainer`): whose batches they are.

    Attributes:
        tell: is called with a sentence when they fit.
        trying (`str`, *optional*): what is tried at the moment, in words.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.tell: Callable[[str], None] = logger.info
        self.trying: str | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        dataset, processor = trainer.train_dataset, trainer.processing_class
        wanted = args.try_longest_batch
        if wanted == "false" or (wanted == "auto" and args.device.type != "cuda") or trainer.is_deepspeed_enabled:
            return
        if not isinstance(dataset, Dataset) or not isinstance(processor, LlavaProcessor):
            return
        if not {"messages", "images", "num_images"} <= set(dataset.column_names):  # rows of another collator
            return
        with trainer.throughput.paused(), untouched_rng():
            max_length = getattr(trainer.data_collator, "max_length", None)
            if args.packing:
                batches = heaviest_packs(dataset, trainer.pack_sampler())
            else:
                batches = heaviest_batches(dataset, processor, trainer._train_batch_size, max_length)
            states = _room_for_states(trainer.optimizer, args.optim)
            kinds, up_to = ("the batch of the longest rows", "the batch of the most images"), "up to "
            if args.packing:
                kinds, up_to = ("the fullest pack", "the pack of the most images"), ""
            for kind, (indices, num_tokens) in zip(kinds, batches, strict=False):
                self.trying = f"{kind} (rows: {len(indices)}, {up_to}{num_tokens:,} tokens)"
                self._try(dataset.select(indices), args)
            del states
        fits = f"rows: {len(batches[0][0])}, {up_to}{batches[0][1]:,} tokens"
        self.tell(f"{kinds[0].capitalize()} fits ({fits}){_at_most(args.device)}.")
        self.trying = None

    def _try(self, rows: Dataset, args: Any) -> None:
        trainer, model = self.trainer, self.trainer.model_wrapped
        inputs = trainer.train_collator()([list(rows)] if args.packing else list(rows))
        # Not `trainer`'s own, which counts what it is given as trained.
        _, num_items = Trainer.get_batch_samples(trainer, iter([inputs]), 1, args.device)
        trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
        # DDP learns in its first reduction how gradients come; that is left to the first step.
        is_ddp = isinstance(model, DistributedDataParallel)
        # From the second micro-batch of a step on, the gradients of the first are there as well.
        for _ in range(2 if args.gradient_accumulation_steps > 1 else 1):
            with model.no_sync() if is_ddp else nullcontext():
                trainer.training_step(model, inputs, num_items)
        model.zero_grad()


def _room_for_states(optimizer: Any, name: Any) -> list[torch.Tensor]:
    """As much memory as the states take that Adam makes in its first step; nothing where they are there already, and
    with optimizers that are not known here."""
    name = str(getattr(name, "value", name))
    if optimizer.state or not name.startswith("adamw"):
        return []
    weights = [each for group in optimizer.param_groups for each in group["params"] if each.requires_grad]
    held = [each.to_local() if hasattr(each, "to_local") else each for each in weights]
    dtype = torch.uint8 if "8bit" in name or "4bit" in name else None
    return [torch.empty_like(each, dtype=dtype) for each in held for _ in range(2)]


def _at_most(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    total = torch.cuda.get_device_properties(device).total_memory
    return f": {torch.cuda.max_memory_allocated(device) / 2**30:.1f} of {total / 2**30:.1f} GiB at most"
