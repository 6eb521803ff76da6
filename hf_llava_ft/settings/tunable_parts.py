"""LLaVA-NeXT's words for what trains, and its own values of flags that are ours too.

Source: LLaVA-VL/LLaVA-NeXT df17966, `llava/train/train.py`. There `--mm_tunable_parts` goes before all older switches,
and so it does here. With LoRA the language model's own weights stay frozen.
"""

import re
from typing import Any

from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.original_table import SWITCHES_OF_NEXT

TOWER, PROJECTOR, LANGUAGE_MODEL = "mm_vision_tower", "mm_mlp_adapter", "mm_language_model"
RESAMPLER = "mm_vision_resampler"
_PARTS = (TOWER, PROJECTOR, LANGUAGE_MODEL, RESAMPLER)
# By the parts that train: the train type, and whether the projector stays as it is.
_WHOLE = {
    frozenset((PROJECTOR,)): ("projector", False),
    frozenset((PROJECTOR, LANGUAGE_MODEL)): ("freeze_vision", False),
    frozenset((LANGUAGE_MODEL,)): ("freeze_vision", True),
    frozenset((TOWER, PROJECTOR, LANGUAGE_MODEL)): ("full", False),
    frozenset((TOWER, LANGUAGE_MODEL)): ("full", True),
}
# What LLaVA-NeXT passes over beside --mm_tunable_parts.
_OVERRULED = ("tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "freeze_backbone", "unfreeze_mm_vision_tower")
_RATIOS = ("square", "pad", "anyres")
_VERSIONS = {"qwen_1_5": "qwen", "qwen_2": "qwen"}


def translate_next(values: dict[str, Any], sources: dict[str, str], notes: list[str]) -> None:
    """
    Puts our words into `values` for LLaVA-NeXT's; see `original_flags.translate`.

    Raises:
        UserError: for parts that no train type trains, or flags that contradict each other.
    """
    _translate_values(values, sources, notes)
    if not set(SWITCHES_OF_NEXT) & set(values):
        return
    said, is_lora = values.get("mm_tunable_parts"), bool(values.get("lora_enable"))
    if said is None:
        name = "unfreeze_mm_vision_tower"
        if not (shown := values.pop(name)):
            notes.append(f"--{name} False: without effect; the tower is frozen but with --train_type full.")
            return
        stage_1 = values.get("tune_mm_mlp_adapter")
        parts = {TOWER, PROJECTOR} if stage_1 else {TOWER, PROJECTOR, LANGUAGE_MODEL}
    else:
        name, shown = "mm_tunable_parts", values.pop("mm_tunable_parts")
        parts = _named(said, notes)
        for overruled in _OVERRULED:
            if overruled in values:
                notes.append(f"--{overruled} {values.pop(overruled)}: without effect; --{name} says what trains.")
    train_type, keeps_projector = _of_lora(name, shown, parts) if is_lora else _of_whole(name, shown, parts)
    if is_lora and values.get("bits", 16) < 16:
        train_type = "qlora"
    if values.get("train_type", train_type) != train_type:
        raise UserError(
            f"--train_type {values['train_type']} and --{name} {shown} contradict each other: leave one out."
        )
    for switch in ("lora_enable", "tune_mm_mlp_adapter"):
        values.pop(switch, None)
    values["train_type"], sources["train_type"] = train_type, name
    if keeps_projector:
        values["freeze_mm_mlp_adapter"], sources["freeze_mm_mlp_adapter"] = True, name
    frozen = " --freeze_mm_mlp_adapter True" if keeps_projector else ""
    own = "; the language model's own weights stay frozen" if is_lora else ""
    notes.append(f"--{name} {shown}: --train_type {train_type}{frozen}{own}.")


def _named(said: str, notes: list[str]) -> set[str]:
    parts = {part.strip() for part in said.split(",") if part.strip()}
    if unknown := sorted(parts - set(_PARTS)):
        raise UserError(f"--mm_tunable_parts {said}: {unknown[0]} is none of {', '.join(_PARTS)}.")
    if parts == {RESAMPLER} or not parts:
        raise UserError(
            f"--mm_tunable_parts {said}: there is no resampler between tower and projector, and nothing else to "
            f"train: name one of {', '.join(_PARTS[:3])}."
        )
    if RESAMPLER in parts:
        notes.append(f"--mm_tunable_parts: {RESAMPLER} is passed over; there is no resampler.")
    return parts - {RESAMPLER}


def _of_whole(name: str, shown: Any, parts: set[str]) -> tuple[str, bool]:
    if (found := _WHOLE.get(frozenset(parts))) is None:
        raise UserError(
            f"--{name} {shown}: no --train_type trains the tower and not the language model: use --train_type full "
            f"({TOWER},{PROJECTOR},{LANGUAGE_MODEL}), or projector ({PROJECTOR})."
        )
    return found


def _of_lora(name: str, shown: Any, parts: set[str]) -> tuple[str, bool]:
    if TOWER in parts:
        raise UserError(
            f"--{name} {shown} with --lora_enable True: the tower's own weights do not train beside LoRA: leave "
            f"{TOWER} out and give --lora_vision_tower True, which puts LoRA on the tower too."
        )
    if LANGUAGE_MODEL not in parts:
        raise UserError(
            f"--{name} {shown} with --lora_enable True: LoRA is on the language model, which is not named: add "
            f"{LANGUAGE_MODEL}, or leave --lora_enable out."
        )
    return "lora", PROJECTOR not in parts


def _translate_values(values: dict[str, Any], sources: dict[str, str], notes: list[str]) -> None:
    ratio, version = values.get("image_aspect_ratio"), values.get("version")
    if ratio is not None and (most := re.fullmatch(r"anyres_max_(\d+)", str(ratio))):
        values["image_aspect_ratio"], values["anyres_max"] = "anyres", int(most[1])
        sources["anyres_max"] = sources.get("image_aspect_ratio", "image_aspect_ratio")
        notes.append(f"--image_aspect_ratio {ratio}: anyres, for a model whose pictures have no more tiles.")
    elif ratio is not None and ratio not in _RATIOS:
        raise UserError(
            f"--image_aspect_ratio {ratio} is not known here: use {', '.join(_RATIOS)} or anyres_max_N, whichever the "
            f"model was trained with."
        )
    if version in _VERSIONS:
        values["version"] = _VERSIONS[version]
        notes.append(f"--version {version}: --version {_VERSIONS[version]}.")
