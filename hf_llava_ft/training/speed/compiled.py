"""The layers of the language model compiled, each by itself, in training alone.

All layers have the same code, so that one of them is compiled and the others take its graphs. Each graph is of one
shape: `--compile` goes with packing, whose packs are filled up to the budget for it. Attention over the documents of a
pack stays outside of the graphs.

What may surprise: `forward` of a layer is replaced, not the layer, so that no name of a parameter changes, and
evaluation and answers, which have other shapes each time, run as before.
"""

import functools
from typing import Any

import torch
from transformers import AttentionInterface

from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.precision.quantization import is_quantized
from hf_llava_ft.training.speed.packed_attention import BY_DOCUMENT, attention_by_document, attention_of

BACKEND = "inductor"
# From so many steps on a minute of compiling may pay. Assumed, not measured.
FEWEST_STEPS_TO_PAY = 200


def why_not_compiled(model: LlavaForCausalLM, args: LlavaTrainingArguments) -> str | None:
    """Why the layers cannot be compiled, as the end of a sentence; None if they can."""
    if not args.packing:
        return "its batches have another shape each time: add --packing True"
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        return "ZeRO-3 hands out the weights of a layer while it runs, which no graph can hold"
    if args.fsdp:
        return "FSDP gathers the weights of a layer while it runs, which has not been tried with it"
    if is_quantized(model):
        return "the weights are in few bits, whose kernels of bitsandbytes break the graphs"
    if args.torch_compile:
        return "--torch_compile compiles the whole model: leave one out"
    if attention_of(model) != BY_DOCUMENT:
        return f"it has been tried with --attn_implementation sdpa alone, and this is {attention_of(model)}"
    if not isinstance(getattr(model.model.language_model, "layers", None), torch.nn.ModuleList):
        return f"{model.config.text_config.model_type} has no list of layers"
    return None


def compiles(model: Any, args: LlavaTrainingArguments) -> bool:
    """
    Whether `args.compile` asks for it: `auto` does on a GPU, in a run with packing, where nothing is in the way.

    Raises:
        UserError: if it is `true`, and something is.
    """
    is_auto = args.compile == "auto"
    if args.compile == "false" or (is_auto and args.device.type != "cuda"):
        return False
    if is_auto and 0 < args.max_steps < FEWEST_STEPS_TO_PAY:
        return False
    reason = why_not_compiled(model, args)
    if reason is not None and not is_auto:
        raise UserError(f"--compile true: this run cannot be compiled, since {reason}; or leave it out.")
    return reason is None


def compile_layers(model: LlavaForCausalLM) -> None:
    """Compiles, from the first batch in training on, what each layer of the language model computes."""
    # Each pack has other documents: a graph of them would be of one pack.
    AttentionInterface.register(BY_DOCUMENT, torch.compiler.disable(attention_by_document))
    for layer in model.model.language_model.layers:
        layer.forward = _compiled_in_training(layer)


def _compiled_in_training(layer: Any) -> Any:
    plain = layer.forward
    compiled = torch.compile(plain, backend=BACKEND, dynamic=False)

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        in_training = layer.training and torch.is_grad_enabled() and kwargs.get("documents") is not None
        return (compiled if in_training else plain)(*args, **kwargs)

    return forward
