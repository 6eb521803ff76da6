"""What to change when a run does not fit into memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel

from hf_llava_ft.errors import UserError
from hf_llava_ft.library_differences import checkpointing_flags
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.precision.quantization import is_quantized

# As CUDA, its libraries and PyTorch's allocator for the CPU say it, where they raise no exception of its own.
_SIGNS = (
    *("out of memory", "DefaultCPUAllocator: not enough memory", "DefaultCPUAllocator: can't allocate memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that there was no memory left, on a device or off it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def told_of_out_of_memory(sentence: Callable[[], str]) -> Iterator[None]:
    """
    Turns a lack of memory inside the block into a `UserError`.

    Args:
        sentence: says for what there was none, and what to change.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"there is not enough memory for {sentence()}") from error


def advice_for_evaluation(args: LlavaTrainingArguments) -> str:
    """What an evaluation can change to need less memory."""
    size = args.per_device_eval_batch_size
    fewer = f"--per_device_eval_batch_size {max(1, size // 2)} instead of {size}, " if size > 1 else ""
    return f"What helps: {fewer}shorter rows to evaluate, or a lower --eval_max_new_tokens where prompts are answered."


def advice(model: Any, args: LlavaTrainingArguments) -> str:
    """What a run of these settings can change to need less memory, what costs least first."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    checkpointing = any(getattr(args, name) for name in checkpointing_flags())
    is_lora, zero_stage = isinstance(model, PeftModel), args.deepspeed_plugin and args.deepspeed_plugin.zero_stage
    changes = []
    if args.per_device_train_batch_size > 1:
        fewer = max(n for n in range(1, args.per_device_train_batch_size // 2 + 1) if rows % n == 0)
        changes.append(
            f"--per_device_train_batch_size {fewer} --gradient_accumulation_steps {rows // fewer}, as many rows a step"
        )
    if args.packing and args.max_tokens_per_batch is not None:
        half, twice = -(-args.max_tokens_per_batch // 2), 2 * args.gradient_accumulation_steps
        changes.append(
            f"--max_tokens_per_batch {half} --gradient_accumulation_steps {twice}, about as many rows a step"
        )
    if not checkpointing:
        changes.append("--gradient_checkpointing True, which computes activations twice")
    if not (args.bf16 or args.fp16) and args.device.type != "cpu":
        changes.append("--bf16 True, and --dtype bfloat16 with LoRA")
    if is_lora and not is_quantized(model) and not args.deepspeed:
        changes.append("--train_type qlora, which holds the language model in 4 bits")
    if not is_lora and any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters()):
        changes.append("--train_type lora, which needs no gradients and optimizer states of the whole model")
    if args.world_size > 1 and not args.fsdp and zero_stage != 3 and not is_quantized(model):
        changes.append("--deepspeed examples/deepspeed/zero3.json, which divides the weights among the processes")
    if zero_stage == 3:
        changes.append(
            "--deepspeed examples/deepspeed/zero3_offload.json, which keeps weights and optimizer in main memory"
        )
    changes.append("a lower --model_max_length, or shorter rows")
    numbered = "; ".join(f"({number}) {change}" for number, change in enumerate(changes, 1))
    return (
        f"What helps, what costs least first: {numbered}. llava-ft estimate with the same flags says what each saves."
    )
