"""QLoRA's quantised language model (arXiv 2305.14314): 4 or 8 bits through bitsandbytes."""

from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_llava_ft.checkpoints.few_bits import few_bits_config
from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.fsdp import uses_fsdp


def quantization_config(arguments: TuningArguments, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """
    How `arguments` have the model loaded; `None` for weights as they are.

    Args:
        compute_dtype (`torch.dtype`): what 4-bit weights are multiplied in.

    Raises:
        UserError: if bitsandbytes is not installed.
    """
    if arguments.bits == 16:
        return None
    return few_bits_config(
        arguments.bits, compute_dtype, double_quant=arguments.double_quant, quant_type=arguments.quant_type
    )


def loading_in_few_bits(arguments: TuningArguments, training_args: LlavaTrainingArguments) -> dict[str, Any]:
    """
    What `load_model` has to be told for it; nothing for weights as they are.

    Raises:
        UserError: if bitsandbytes is not installed, or the engine cannot share out weights of so many bits.
    """
    if arguments.bits == 8 and uses_fsdp(training_args):
        raise UserError(
            "--bits 8 does not go with FSDP, which loses what belongs to bitsandbytes' 8-bit weights: use --bits 4, "
            "or --deepspeed examples/deepspeed/zero3.json in its place."
        )
    compute_dtype = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32
    config = quantization_config(arguments, compute_dtype)
    if config is None:
        return {}
    # Under ZeRO-3 transformers refuses one, and bitsandbytes takes the process's own GPU by itself.
    needs_none = training_args.device.type == "cpu" or is_deepspeed_zero3_enabled()
    device_map = None if needs_none else {"": training_args.device}
    return {"quantization_config": config, "device_map": device_map}


def is_quantized(model: nn.Module) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def prepare_quantized(model: Any) -> None:
    """
    Freezes the model and keeps norms, embeddings, projector and head in float32, as PEFT does; the frozen tower stays
    as it is, because nothing of it is computed in few bits.

    Raises:
        UserError: if the model has answered on a CPU, after which its four bits are laid out for answering alone.
    """
    _keep_trainable_layout(model)
    tower = model.model.vision_tower
    tower_dtype = tower.dtype
    # The Trainer switches checkpointing on.
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    tower.to(tower_dtype)


def _keep_trainable_layout(model: Any) -> None:
    """
    On a CPU with AVX512-BF16, bitsandbytes (0.50) lays 4-bit weights out anew at the first forward pass in evaluation,
    for an operation that has no gradient. What then trains before such a layer learns nothing from what is behind it,
    with a warning at most. So a model that trains is evaluated in the layout that it trains in.
    """
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            raise UserError(
                "the model has answered on this CPU, and bitsandbytes has laid its 4-bit weights out for that alone: "
                "load it anew to train it."
            )
        module.support_avx512bf16_for_cpu = False
