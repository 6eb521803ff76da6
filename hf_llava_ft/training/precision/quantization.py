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
    """Freezes the model and keeps norms, embeddings, projector and head in float32, as PEFT does; the frozen tower
    stays as it is, because nothing of it is computed in few bits."""
    for module in model.modules():
        # On a CPU with AVX512-BF16, bitsandbytes (0.50) packs 4-bit weights anew at the first forward in evaluation.
        # What is packed so has no backward: after any evaluation nothing below the last layer would learn from it.
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False
    tower = model.model.vision_tower
    tower_dtype = tower.dtype
    # The Trainer switches checkpointing on.
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    tower.to(tower_dtype)
