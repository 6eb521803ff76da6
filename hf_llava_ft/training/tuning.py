"""What trains: LoRA on the language model and the whole projector, in one PEFT adapter; or whole parts of the model.

The adapter is self-contained (the projector is in `modules_to_save`), and its names are those of the native module
tree, so that PEFT alone loads it, onto our model or onto transformers' own.

A part of the tower behind the hidden state that the projector reads never gets a gradient, CLIP's last layer among
them. It stays frozen in every mode, so that what is said to train is what moves.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.table import Table
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_llava_ft.checkpoints.adapters import with_adapter
from hf_llava_ft.checkpoints.files import name_for_anywhere
from hf_llava_ft.checkpoints.training_facts import hub_commit
from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM
from hf_llava_ft.modeling.part_names_llava import (
    LANGUAGE_MODEL,
    LM_HEAD,
    OTHER,
    PARTS,
    PROJECTOR,
    VISION_TOWER,
    part_of,
)
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.defaults import tuning_with_defaults
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.fused_lora import fuse_lora
from hf_llava_ft.training.learning_rates import own_rates
from hf_llava_ft.training.precision.masters import remember_dtype, with_float32_masters
from hf_llava_ft.training.precision.quantization import is_quantized, prepare_quantized


def lora_target_pattern(model: LlavaForCausalLM, names: list[str] | None = None, *, vision_tower: bool = False) -> str:
    """
    A regular expression that matches linear layers of the language model, by default all, and with `vision_tower`
    those of the tower that a gradient reaches; nothing of projector and head.

    Bare names such as `q_proj` would also match CLIP. Source of the default: haotian-liu/LLaVA,
    `find_all_linear_names`.

    Args:
        names (`list[str]`, *optional*): of layers of the language model, such as `q_proj`.

    Raises:
        UserError: if the language model has no layer of one of the `names`.
    """
    known = {name.rsplit(".", 1)[-1] for name in _linear_layers(model, LANGUAGE_MODEL)}
    for name in names or ():
        if name not in known:
            what = f"the language model has no linear layer of that name; it has {', '.join(sorted(known))}"
            raise UserError(f"--lora_target_modules {name}: {what}.")
    pattern = rf"model\.{LANGUAGE_MODEL}\..*\.({_any_of(names or known)})"
    if not vision_tower:
        return pattern
    idle = tuple(f"{name}." for name in idle_tower_modules(model))
    layers, leaves = set(), set()
    for name in _linear_layers(model, VISION_TOWER):
        in_layer = re.search(r"\.layers\.(\d+)\.(?:.*\.)?(\w+)$", name)
        if in_layer and not name.startswith(idle):
            layers.add(in_layer[1])
            leaves.add(in_layer[2])
    return rf"(?:{pattern}|model\.{VISION_TOWER}\..*\.layers\.({_any_of(layers)})\..*\.({_any_of(leaves)}))"


def _linear_layers(model: LlavaForCausalLM, part: str) -> list[str]:
    """Full names of the linear layers of a part."""
    modules = model.get_submodule(f"model.{part}").named_modules(prefix=f"model.{part}")
    return [name for name, module in modules if isinstance(module, nn.Linear)]


def _any_of(words: Iterable[str]) -> str:
    return "|".join(sorted(map(re.escape, words)))


def with_lora(
    model: LlavaForCausalLM,
    arguments: TuningArguments,
    base: str,
    revision: str | None = None,
    adapter: tuple[str, str | None] | None = None,
) -> PeftModel:
    """
    Wraps `model`, which may be quantised, for LoRA training.

    Args:
        base (`str`): the folder or Hub id the adapter will name as its base, a folder by its absolute path.
        adapter (*optional*): name and revision of one that is trained further, instead of a new one.
    """
    base, arguments = name_for_anywhere(base), tuning_with_defaults(arguments)
    if is_quantized(model):
        prepare_quantized(model)
    model.config.use_cache = False
    model.config.text_config.use_cache = False
    if adapter is not None:
        peft_model = with_adapter(
            model, adapter[0], adapter[1], is_trainable=True, lora_dropout=arguments.lora_dropout
        )
        peft_model.peft_config["default"].revision = revision
    else:
        peft_model = get_peft_model(model, _new_lora(model, arguments, revision))
    peft_model.peft_config["default"].base_model_name_or_path = base  # get_peft_model takes it from the loaded model
    with_float32_masters(peft_model)
    fuse_lora(peft_model, shared=not is_deepspeed_zero3_enabled())
    _only_biases_of_the_language_model(peft_model, arguments)
    return peft_model


def _new_lora(model: LlavaForCausalLM, arguments: TuningArguments, revision: str | None) -> LoraConfig:
    assert arguments.lora_r is not None and arguments.lora_alpha is not None  # of `tuning_with_defaults`
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        bias=arguments.lora_bias,
        use_dora=arguments.use_dora,
        use_rslora=arguments.use_rslora,
        target_modules=lora_target_pattern(
            model, arguments.lora_target_modules, vision_tower=arguments.lora_vision_tower
        ),
        modules_to_save=[PROJECTOR],
        task_type="CAUSAL_LM",
        revision=revision,
    )


def _only_biases_of_the_language_model(model: PeftModel, arguments: TuningArguments) -> None:
    """PEFT's `bias="all"` would train the tower's, and those of its untouched copy of the projector."""
    if arguments.lora_bias != "all":
        return
    for name, parameter in model.named_parameters():
        untouched = part_of(name) == VISION_TOWER or ".original_module." in name
        if untouched and "lora_" not in name:
            parameter.requires_grad_(False)


# The original's words for these: `tune_mm_mlp_adapter` (stage 1), neither that nor `lora_enable` (stage 2). It never
# trains the tower.
WHOLE_PARTS = {
    "projector": (PROJECTOR,),
    "freeze_vision": (PROJECTOR, LANGUAGE_MODEL, LM_HEAD, OTHER),
    "full": (*PARTS, OTHER),
}
# Of the original's `freeze_backbone`: all that its language model holds but the head, and a head tied to it with it.
FROZEN_BACKBONE: tuple[str, ...] = (LANGUAGE_MODEL, OTHER)


def with_tuning(
    model: LlavaForCausalLM,
    arguments: TuningArguments | None = None,
    base: str | None = None,
    revision: str | None = None,
    adapter: tuple[str, str | None] | None = None,
    *,
    float32_masters: bool = True,
    num_rows: int | None = None,
) -> LlavaForCausalLM | PeftModel:
    """
    `model` with exactly those weights trainable that `arguments` name, in float32; for LoRA see [`with_lora`].

        model = with_tuning(load_model(name, processor), TuningArguments(train_type="lora", lora_r=16))

    LoRA's first weights are drawn here: `transformers.set_seed` before it makes them those of a seed.

    Args:
        arguments (`TuningArguments`, *optional*): by default LoRA on the language model, and the projector.
        base (`str`, *optional*): what an adapter will name as its base; by default where `model` was loaded from.
        revision (`str`, *optional*): of `base`: the one that `load_model` was given; without one, the commit of its
            main branch that is in the cache.
        adapter (*optional*): name and revision of one that is trained further, instead of a new one.
        num_rows (`int`, *optional*): that are trained on, by which LoRA's rank is chosen where `arguments` have none.
        float32_masters (`bool`): false where an engine keeps float32 copies of its own of a whole model.
    """
    arguments = tuning_with_defaults(arguments or TuningArguments(), num_rows)
    if base is None:
        base = str(model.name_or_path)
        revision = revision or hub_commit(base, None)
    if arguments.is_lora:
        tuned: LlavaForCausalLM | PeftModel = with_lora(model, arguments, base, revision, adapter)
    else:
        tuned = with_whole_parts(model, WHOLE_PARTS[arguments.train_type])
    frozen = FROZEN_BACKBONE if arguments.freeze_backbone else ()
    frozen += (PROJECTOR,) if arguments.freeze_mm_mlp_adapter else ()
    for name, parameter in tuned.named_parameters():
        if part_of(name) in frozen:
            parameter.requires_grad_(False)
    remember_dtype(model)
    return with_float32_masters(tuned) if float32_masters else tuned


def with_whole_parts(model: LlavaForCausalLM, parts: tuple[str, ...]) -> LlavaForCausalLM:
    """Freezes what is not in `parts`, and of the tower what the projector never sees."""
    idle = idle_tower_modules(model)
    # Tied embeddings are one parameter, which trains if either of its two names does.
    trained = {
        parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if part_of(name) in parts and not any(name.startswith(f"{module}.") for module in idle)
    }
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)
    return model


def idle_tower_modules(model: LlavaForCausalLM) -> list[str]:
    """Names of the tower's modules that no image feature depends on: the layers behind the last hidden state that the
    projector reads, the normalisation behind all layers, and SigLIP's pooling head."""
    config = model.config
    num_layers = config.vision_config.num_hidden_layers
    chosen = config.vision_feature_layer
    # Hidden state 0 is the embedding, hidden state k what layer k - 1 gives.
    last = max(k if k >= 0 else num_layers + 1 + k for k in (chosen if isinstance(chosen, list) else [chosen]))
    names = [name for name, _ in model.get_submodule(f"model.{VISION_TOWER}").named_modules()]
    layers = {name: re.fullmatch(r"(?:vision_model\.)?encoder\.layers\.(\d+)", name) for name in names}
    idle = [name for name, layer in layers.items() if layer and int(layer[1]) >= last]
    idle += [name for name in names if name.removeprefix("vision_model.") in ("post_layernorm", "head")]
    return [f"model.{VISION_TOWER}.{name}" for name in idle]


@dataclass(frozen=True)
class TrainedPart:
    """One line of the table printed before the first step; numbers are counts of parameters."""

    part: str
    num_trainable: int
    num_total: int
    dtype: str


def trained_parts(model: nn.Module) -> list[TrainedPart]:
    """What trains, part by part, in the order of `PARTS`."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    dtypes: dict[str, set[torch.dtype]] = defaultdict(set)
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue  # PEFT's untouched copy of what is in modules_to_save
        part = part_of(name)
        size = _num_weights(parameter)
        counts[part][0] += size * parameter.requires_grad
        counts[part][1] += size
        dtypes[part].add(parameter.dtype)
    return [
        TrainedPart(
            part,
            counts[part][0],
            counts[part][1],
            dtype=", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes[part])),
        )
        for part in (*PARTS, OTHER)
        if part in counts
    ]


def what_trains(model: nn.Module) -> str:
    """The `train_type` that a model was set up for, by what of it trains."""
    if isinstance(model, PeftModel):
        return "qlora" if is_quantized(model.get_base_model()) else "lora"
    trained = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    if VISION_TOWER in trained:
        return "full"
    return "projector" if trained == {PROJECTOR} else "freeze_vision"


def learning_rate_of(part: TrainedPart, args: LlavaTrainingArguments) -> str:
    """Peak learning rate of a part as text; a dash for a frozen one."""
    if not part.num_trainable:
        return "-"
    own = own_rates(args).get(part.part)
    return f"{args.learning_rate if own is None else own:g}"


def table_of_parts(parts: list[TrainedPart], args: LlavaTrainingArguments) -> Table:
    """What trains, as it is printed before the first step."""
    table = Table(title="What trains")
    table.add_column("part")
    for number in ("trainable", "of"):
        table.add_column(number, justify="right")
    table.add_column("dtype")
    table.add_column("learning rate", justify="right")
    for part in parts:
        rate = learning_rate_of(part, args)
        table.add_row(part.part, f"{part.num_trainable:,}", f"{part.num_total:,}", part.dtype, rate)
    return table


def _num_weights(parameter: torch.Tensor) -> int:
    """Number of weights, of which bitsandbytes packs two 4-bit ones into an element."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
