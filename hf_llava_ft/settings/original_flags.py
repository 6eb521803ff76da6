"""The flags of the original LLaVA's train.py, and of LLaVA-NeXT's, translated to those of `llava-ft train`.

A flag that means the same here and there is an argument of ours (`arguments.py`) and needs no translation. The others
(`original_table.py`) have a new name, decide together which parameters train, or have no meaning here: those are
dropped with a note where that changes nothing, and refused where it would.

The original's defaults are part of what a command line means. So a command line with its flags, without `--train_type`
and `--preset`, gets them.
"""

from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool

from hf_llava_ft.errors import UserError
from hf_llava_ft.library_differences import checkpointing_flags
from hf_llava_ft.settings.original_table import FLAGS, SWITCHES, SWITCHES_OF_NEXT, NoMeaning
from hf_llava_ft.settings.tunable_parts import translate_next

# What the original does where ours differs, when nothing is said. Its default template is called v0 and trains v1.
ORIGINAL_DEFAULTS: dict[str, Any] = {
    "train_type": "freeze_vision",
    "version": "v1",
    "image_aspect_ratio": "square",
    "picture_opening": "original",
    "mm_projector_type": "linear",
    "mm_vision_select_layer": -1,
    "mm_vision_select_feature": "patch",
    "model_max_length": 512,
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "learning_rate": 5e-5,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.0,
    "logging_steps": 500.0,
    "optim": "adamw_torch",
    "loss_normalization": "micro_batch",
    "sampler_order": "original",
    "group_by_modality_length": False,
    "resume_from_checkpoint": "auto",  # from the last checkpoint in the output folder, where there is one
}
# They describe a new LLaVA; one that is given may differ.
OF_A_NEW_LLAVA = frozenset(("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature"))

# `--train_type use_lora` of yjin07/train-llava, `utils/model.py`; what that leaves to PEFT and transformers, their
# defaults. Its LoRA also falls on layers of CLIP that are called alike; ours keeps to the language model.
USE_LORA_DEFAULTS: dict[str, Any] = {
    "lora_r": 32,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "dtype": "bfloat16",
    "learning_rate": 5e-5,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.0,
    "logging_steps": 500.0,
    "group_by_modality_length": False,
}


@dataclass(frozen=True)
class Translation:
    """
    Args:
        values (`dict`): by our names.
        sources (`dict[str, str]`): the original's flag that a value comes from, by our names; the rest were ours.
        notes (`list[str]`): one line for each flag that is called otherwise here, or does nothing.
    """

    values: dict[str, Any]
    sources: dict[str, str]
    notes: list[str]


def add_original_flags(parser: ArgumentParser, known: set[str]) -> None:
    """Teaches `parser` the flags that are not among the `known`, as strings, numbers and truth values."""
    group = parser.add_argument_group("flags of the original LLaVA", "Translated, or named in an error.")
    kinds = {name: flag.kind for name, flag in FLAGS.items()} | dict.fromkeys(SWITCHES, bool) | SWITCHES_OF_NEXT
    for name, kind in kinds.items():
        if name in known:
            continue  # an older transformers that still has it
        if kind is bool:
            group.add_argument(f"--{name}", type=string_to_bool, nargs="?", const=True)
        else:
            group.add_argument(f"--{name}", type=kind)


def translate(given: dict[str, Any]) -> Translation:
    """
    Args:
        given (`dict`): values by the names they were given under, of one command line or one recipe.

    Raises:
        UserError: for a flag that would change something and has no meaning here, or flags that contradict each other.
    """
    values, sources, notes = dict(given), {}, []
    for name, flag in FLAGS.items():
        if name not in given or name in _fields_of_transformers():
            continue
        value = values.pop(name)
        shown = "(hidden)" if name.endswith("token") else value
        if isinstance(flag, NoMeaning):
            if flag.harmless is not None and value not in flag.harmless:
                raise UserError(f"--{name} {value} has no meaning here, because {flag.why}: {flag.instead}.")
            notes.append(f"--{name} {value}: without effect; {flag.why}.")
        elif name == "warmup_ratio" and not 0 <= value < 1:
            raise UserError(f"--warmup_ratio {value} is not a share of the steps: give a number from 0 to below 1.")
        elif name == "warmup_ratio" and values.get("warmup_steps"):
            notes.append(f"--warmup_ratio {value}: without effect; --warmup_steps overrides it.")
        elif given.get(flag.name, value) != value:
            raise UserError(f"--{name} is called --{flag.name} now, which says something else: leave one of them out.")
        else:
            values[flag.name], sources[flag.name] = value, name
            share = ", where a number below 1 is the share of all steps" if name == "warmup_ratio" else ""
            notes.append(f"--{name} {shown}: now --{flag.name} {shown}{share}.")
    translate_next(values, sources, notes)
    _translate_switches(values, sources, notes)
    old, new = "gradient_checkpointing", checkpointing_flags()[0]
    if old in given and new != old:
        # transformers still takes the old name, and warns.
        values.setdefault(new, given[old])
        sources[new] = old
        notes.append(f"--{old} {given[old]}: now --{new} too.")
    return Translation(values, sources, notes)


def _translate_switches(values: dict[str, Any], sources: dict[str, str], notes: list[str]) -> None:
    """`lora_enable` and `tune_mm_mlp_adapter` become `train_type`."""
    switches = {name: values.pop(name) for name in SWITCHES if name in values}
    if not switches:
        return
    chosen = [name for name, value in switches.items() if value]
    if len(chosen) > 1:
        raise UserError("--lora_enable and --tune_mm_mlp_adapter name two kinds of training: choose one of them.")
    allowed = {"lora_enable": ("lora", "qlora"), "tune_mm_mlp_adapter": ("projector",)}
    if asked := values.get("train_type"):
        agrees = asked in allowed[chosen[0]] if chosen else not any(asked in allowed[name] for name in switches)
        if not agrees:
            name = chosen[0] if chosen else next(name for name in switches if asked in allowed[name])
            raise UserError(
                f"--train_type {asked} and --{name} {switches[name]} contradict each other: leave one out."
            )
        return
    name = chosen[0] if chosen else next(iter(switches))
    kind = allowed[name][0] if chosen else ORIGINAL_DEFAULTS["train_type"]
    if chosen == ["lora_enable"] and values.get("bits", 16) < 16:
        kind = "qlora"
    values["train_type"], sources["train_type"] = kind, name
    notes.append(f"--{name} {switches[name]}: --train_type {kind}.")
    if chosen and values.pop("freeze_backbone", False):
        notes.append(f"--freeze_backbone True: without effect; --train_type {kind} does so anyway.")


def next_defaults() -> dict[str, Any]:
    """Where LLaVA-NeXT's differ from `ORIGINAL_DEFAULTS`. Its attention is FlashAttention, which computes the same."""
    return {"model_max_length": 4096, checkpointing_flags()[0]: True}


def original_dtype(values: dict[str, Any]) -> str:
    """The dtype in which the original holds the weights: that of the computation for LoRA and for all that bf16 runs.

    One exception: the whole language model in bf16 without DeepSpeed, whose float32 copy of the weights would be
    missing. Steps of 2e-5 vanish in the rounding of bfloat16, so the weights are float32 then, and computed in bf16.
    """
    is_lora = values["train_type"] in ("lora", "qlora")
    if values.get("bf16"):
        keeps_copy = is_lora or values["train_type"] == "projector" or values.get("deepspeed")
        return "bfloat16" if keeps_copy else "float32"
    return "float16" if values.get("fp16") and is_lora else "float32"


def _fields_of_transformers() -> set[str]:
    return set(TrainingArguments.__dataclass_fields__)
