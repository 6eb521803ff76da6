"""Settings of transformers that would not do here what they say, or train something else without a word.

Each is refused with what to do instead. What all the others do is in the table of docs/training.md; the trials are in
tests/hf_llava_ft/settings/test_trainer_settings.py.
"""

import json
from typing import Any

import torch
from transformers import get_scheduler

from hf_llava_ft.errors import UserError

# By name: what it may be, and the sentence about anything else.
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "remove_unused_columns": (
        (False,),
        "must stay False: the collator needs the messages and the images",
    ),
    "label_names": (
        (None, ["labels"]),
        "names columns of other models: what is learned here is always in labels, so leave it out",
    ),
    "train_sampling_strategy": (
        ("random", "sequential"),
        "needs a column of lengths, which rows with pictures have none of: use --group_by_modality_length True",
    ),
    "length_column_name": (
        ("length",),
        "is of train_sampling_strategy group_by_length alone: leave it out, and use --group_by_modality_length True",
    ),
    "auto_find_batch_size": (
        (False,),
        "would go on with fewer rows a step than was said: leave it out; a run that does not fit says in its first "
        "minute which --per_device_train_batch_size and --gradient_accumulation_steps do",
    ),
    "bf16_full_eval": (
        (False,),
        "rounds the weights themselves and leaves them so for the training after it: use --bf16 True, which also "
        "evaluates in bfloat16",
    ),
    "fp16_full_eval": (
        (False,),
        "rounds the weights themselves and leaves them so for the training after it: use --bf16 True or --fp16 True, "
        "which evaluate so too",
    ),
    "use_cache": ((False,), "keeps keys and values that training never reads: leave it out"),
    "use_liger_kernel": (
        (False,),
        "replaces parts of transformers' own model classes, and with them the loss, which is another one here: leave "
        "it out",
    ),
    "liger_kernel_config": ((None,), "is of use_liger_kernel, which is refused here: leave it out"),
    "parallelism_config": (
        (None,),
        "shares rows out among processes in a way that our batches do not know: use --deepspeed or --fsdp",
    ),
    "dataloader_in_order": (
        (True,),
        "lets chance say which batch comes first, so that no two runs are alike: leave it out",
    ),
    "enable_jit_checkpoint": (
        (False,),
        "is a second answer to the signal at which a checkpoint is saved here anyway: leave it out",
    ),
}
# Optimizers that step within the backward pass: gradients are then neither summed over micro-batches nor clipped.
_STEP_IN_BACKWARD: tuple[str, ...] = ("lomo", "adalomo", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise")
_STEP_IN_BACKWARD += ("galore_adafactor_layerwise", "apollo_adamw_layerwise")
# Of accelerate's own settings: with either, one process takes rows that the samplers have dealt to all.
_DEALS_ROWS_ITSELF = ("split_batches", "dispatch_batches")


def check_not_refused(args: Any) -> None:
    """
    Args:
        args (`LlavaTrainingArguments`): after transformers has looked at them.

    Raises:
        UserError: at the first setting that would not do here what it says.
    """
    for name, (allowed, sentence) in _ONLY.items():
        value = getattr(args, name, None)
        plain = getattr(value, "value", value)
        if plain not in allowed:
            raise UserError(f"{name} {plain} {sentence}.")
    if args.logging_nan_inf_filter and not args.fp16:
        raise UserError(
            "logging_nan_inf_filter True hides a loss that is not finite, which ends a run here: leave it out."
        )
    if (optim := args.optim.value) in _STEP_IN_BACKWARD:
        raise UserError(
            f"optim {optim} steps within the backward pass, where gradients are neither gathered over micro-batches "
            f"nor clipped or looked at: use adamw_torch, or adafactor where memory is short."
        )
    for name in _DEALS_ROWS_ITSELF:
        if getattr(args.accelerator_config, name, None):
            raise UserError(
                f"accelerator_config {name} deals the rows of a batch again, as our samplers have done: leave it out."
            )
    if _strategy(args) == "sequential" and (args.group_by_modality_length or args.sampler_order == "original"):
        other = "group_by_modality_length" if args.group_by_modality_length else "sampler_order original"
        raise UserError(f"train_sampling_strategy sequential and {other} are two orders of the rows: leave one out.")
    _check_packing(args)
    _check_scheduler(args)


def _check_packing(args: Any) -> None:
    if not args.packing:
        if args.max_tokens_per_batch is not None:
            raise UserError(f"max_tokens_per_batch {args.max_tokens_per_batch} is of packing alone: add packing True.")
        return
    if args.per_device_train_batch_size != 1:
        raise UserError(
            f"packing and per_device_train_batch_size {args.per_device_train_batch_size}: with packing a pack is the "
            "batch of a device, and max_tokens_per_batch says its size; leave per_device_train_batch_size out."
        )
    if args.group_by_modality_length or args.sampler_order != "default" or _strategy(args) != "random":
        raise UserError(
            "packing has an order of its own: leave out group_by_modality_length, sampler_order and "
            "train_sampling_strategy, or packing."
        )
    if args.loss_normalization != "tokens":
        raise UserError(
            "packing and loss_normalization micro_batch: the weight of a token would depend on what is packed beside "
            "it; leave one out."
        )
    if args.n_gpu > 1:
        raise UserError(
            f"packing needs a process for each of the {args.n_gpu} GPUs: start with accelerate launch, or show one "
            "alone with CUDA_VISIBLE_DEVICES=0."
        )


def _strategy(args: Any) -> Any:
    return getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy)


def _check_scheduler(args: Any) -> None:
    """A schedule that lacks its own settings is said now, and not after the model is loaded."""
    kind, options = args.lr_scheduler_type.value, args.lr_scheduler_kwargs or {}
    try:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate or 1e-3)
        get_scheduler(kind, optimizer, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=options)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"lr_scheduler_type {kind} with lr_scheduler_kwargs {json.dumps(options, default=str)} cannot be made: "
            f"{str(error).strip().splitlines()[0]}."
        ) from error
