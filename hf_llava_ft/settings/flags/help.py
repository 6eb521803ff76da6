"""`llava-ft train --help`: the flags that a run is told with, by what they are about; `--help-all`: the others too."""

import os
import shutil
import textwrap
from argparse import ArgumentParser, HelpFormatter
from collections.abc import Iterable
from typing import Any

from hf_llava_ft.settings.flags.known import OF_THE_PARSER, Flag, flags_of_transformers, own_flags
from hf_llava_ft.settings.original_table import FLAGS, SWITCHES, SWITCHES_OF_NEXT
from hf_llava_ft.settings.presets import PRESETS

USAGE = "llava-ft train [RECIPE.yaml] [--preset NAME] [--FLAG VALUE ...]"
DESCRIPTION = (
    "Fine-tune a LLaVA on images with conversations. RECIPE.yaml holds flags by name; those of the command line go "
    f"before it. --preset is one of {', '.join(PRESETS)}."
)
# Shorter than the words that the flag is declared with, or than transformers' own.
_SHORT = {
    "model_name_or_path": "LLaVA, original or llava-hf, folder or Hub id; or a language model, with --vision_tower.",
    "picture_opening": "Pictures turned as their EXIF data say, or as they lie; default: as the model was trained.",
    "dtype": "dtype of what is frozen, and of the result; auto: as the model is saved. [auto]",
    "image_folder": "Folder that image paths are relative to; default: the current one.",
    "on_bad_row": "A row that can't be trained on: end before training, or leave it out and list it. [raise]",
    "preview": "Print this many rows first, with what is learned marked.",
    "allow_images_outside": "Also images outside the folder: absolute paths, '..', links.",
    "streaming": "Read rows from their files during training, unchecked.",
    "shuffle_buffer_size": "With streaming: rows that each worker draws from. [1000]",
    "lora_bias": "Which biases train with LoRA. [none]",
    "lora_target_modules": "Layers to put LoRA on, q_proj v_proj ...; default: all linear ones.",
    "use_dora": "DoRA (arXiv 2402.09353).",
    "use_rslora": "rsLoRA: scale by alpha / sqrt(r) (arXiv 2312.03732).",
    "bits": "Of qlora: bits of the language model's weights. [4]",
    "double_quant": "Of 4 bits: quantise the scales too. [True]",
    "quant_type": "Of 4 bits. [nf4]",
    "freeze_backbone": "Of the language model only the head trains.",
    "freeze_mm_mlp_adapter": "Freeze the projector.",
    "try_longest_batch": "Try the longest rows before the first step: auto (on a GPU), true, false.",
    "loss_normalization": "Mean over a step's learned tokens, or the original's mean of means. [tokens]",
    "sampler_order": "The rows in the original LLaVA's order. [default]",
    "overwrite_output_dir": "Begin anew where there is another run, which is moved aside.",
    "resume_anyway": "Resume although data or settings have changed.",
    "eval_split": "Share of the rows to hold out, such as 0.05.",
    "eval_data_path": "Or other rows to evaluate on.",
    "eval_prompts": "JSON or JSONL of questions to answer at each evaluation.",
    "early_stopping_patience": "End after so many evaluations without improvement.",
    "vision_tower": "CLIP or SigLIP model. Of a LLaVA that is there, this and the next seven may only repeat what it "
    "is, but for pretrain_mm_mlp_adapter.",
    "mm_vision_select_layer": "The tower's hidden state that is read; default: -2.",
    "mm_vision_select_feature": "Without the tower's class token or with it; default: patch.",
    "image_grid_pinpoints": "LLaVA-1.6: sizes that pictures are fitted into, '[(336, 672), ...]', '(1x1),...,(2x2)'.",
    "output_dir": "Where the result goes, with checkpoints below it.",
    "max_steps": "Number of steps, instead of epochs.",
    "optim": "adamw_torch_fused, adamw_8bit, adafactor, ... [adamw_torch_fused]",
    "weight_decay": "Of AdamW.",
    "max_grad_norm": "A longer gradient is shortened to this. [1]",
    "fp16": "Compute in float16, on a GPU without bfloat16.",
    "seed": "Of all that is drawn by chance. [42]",
    "dataloader_num_workers": "Processes that open pictures meanwhile.",
    "neftune_noise_alpha": "Noise on the embeddings, 5 say (arXiv 2310.05914).",
    "torch_compile": "Compile the whole model instead.",
    "save_strategy": "When to save a checkpoint: no, steps or epoch. [steps]",
    "save_steps": "Steps between two; below 1 their share of all. [500]",
    "save_total_limit": "How many checkpoints are kept.",
    "resume_from_checkpoint": "True: go on from the last checkpoint; auto: if there is one; or its folder.",
    "report_to": "wandb, tensorboard, trackio, ...",
    "run_name": "What the run is called there.",
    "push_to_hub": "Push the result to the Hub.",
    "hub_model_id": "Where to: USER/NAME.",
    "hub_private_repo": "Make it private.",
    "eval_strategy": "When to evaluate: no (once, at the end), steps or epoch. [no]",
    "eval_steps": "Steps between two evaluations.",
    "per_device_eval_batch_size": "Rows on a device at once in evaluation. [8]",
    "deepspeed": "DeepSpeed's settings, such as examples/deepspeed/zero2.json.",
    "fsdp": "Shard the model with PyTorch's FSDP (examples/accelerate).",
    "use_cpu": "Train on the CPU although there is a GPU.",
}
# Every flag of our own stands in exactly one of them.
GROUPS: dict[str, tuple[str, ...]] = {
    "the model": (
        *("model_name_or_path", "revision", "version", "image_aspect_ratio", "picture_opening"),
        *("attn_implementation", "dtype", "allow_nan"),
    ),
    "the data": (
        *("data_path", "columns", "image_folder", "model_max_length", "on_bad_row", "preview"),
        *("allow_images_outside", "allow_image_urls", "streaming", "shuffle_buffer_size"),
    ),
    "what trains": (
        *("train_type", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_bias"),
        *("lora_vision_tower", "use_dora", "use_rslora", "bits", "double_quant", "quant_type"),
        *("freeze_backbone", "freeze_mm_mlp_adapter"),
    ),
    "how it is optimised": (
        *("learning_rate", "mm_projector_lr", "mm_vision_tower_lr", "lr_scheduler_type", "warmup_steps"),
        *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *(
            "group_by_modality_length",
            "packing",
            "max_tokens_per_batch",
            "padding_free",
            "gradient_checkpointing",
            "try_longest_batch",
            "bf16",
            "fp16",
            "optim",
        ),
        *("weight_decay", "max_grad_norm", "neftune_noise_alpha", "loss_normalization", "sampler_order"),
        *("compile", "torch_compile", "dataloader_num_workers", "seed"),
    ),
    "what is saved and shown": (
        *("output_dir", "overwrite_output_dir", "save_strategy", "save_steps", "save_total_limit"),
        *("resume_from_checkpoint", "resume_anyway", "logging_steps", "report_to", "run_name"),
        *("push_to_hub", "hub_model_id", "hub_private_repo"),
    ),
    "evaluation": (
        *("eval_split", "eval_data_path", "eval_columns", "eval_image_folder", "eval_strategy", "eval_steps"),
        *("per_device_eval_batch_size", "eval_prompts", "num_eval_answers", "eval_max_new_tokens"),
        "retention_probe",
        "early_stopping_patience",
    ),
    "several devices": ("deepspeed", "fsdp", "use_cpu"),
    "a new LLaVA, of a language model and a tower": (
        *("vision_tower", "pretrain_mm_mlp_adapter", "mm_projector_type", "mm_vision_select_layer"),
        *("mm_vision_select_feature", "mm_use_im_start_end", "mm_patch_merge_type", "image_grid_pinpoints"),
    ),
}
# Nobody is to set them.
NOT_SHOWN = ("remove_unused_columns", "logging_nan_inf_filter", "anyres_max")
_VALUES = {"int": "N", "float": "X", "list[str]": "NAME ..."}


def help_text(with_all: bool = False) -> str:
    """
    What `--help` prints, in the width of the terminal.

    Args:
        with_all (`bool`): also transformers' other flags, and the original's.
    """
    width = max(60, min(100, shutil.get_terminal_size().columns))
    parser = ArgumentParser(
        prog="llava-ft train",
        usage=USAGE,
        description=DESCRIPTION,
        add_help=False,
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=30, width=width),
    )
    own, theirs = own_flags(), flags_of_transformers()
    begin = parser.add_argument_group("to begin with")
    begin.add_argument("--help", action="store_true", help="This page.")
    begin.add_argument("--help-all", action="store_true", help="Also transformers' other flags, and the original's.")
    for name, text in OF_THE_PARSER.items():
        _add(begin, Flag(name, "bool" if name == "dry_run" else "str", text))
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            if (flag := own.get(name, theirs.get(name))) is not None:
                _add(group, flag)
    shown = {*NOT_SHOWN, *(name for names in GROUPS.values() for name in names)}
    if with_all:
        group = parser.add_argument_group("transformers' other flags (docs/training.md says what each does here)")
        for flag in theirs.values():
            if flag.name not in shown:
                _add(group, flag)
    return f"{parser.format_help()}\n{_paragraphs(width, with_all)}"


def _add(group: Any, flag: Flag) -> None:
    text = _SHORT.get(flag.name)
    if text is None:
        text = flag.help if flag.name in own_flags() else f"{flag.help.partition('. ')[0].rstrip('.')}."
        is_told = "default" in text.lower() or flag.name in OF_THE_PARSER
        text += "" if is_told or flag.default in (None, "", False) else f" [{flag.default}]"
        text = text.removeprefix(".").lstrip()  # of a help that transformers puts together
    values = flag.kind.removesuffix(" | None").removeprefix("Optional[")
    if flag.choices:
        shown = "|".join(flag.choices) if len(flag.choices) < 5 else "NAME"
    else:
        shown = _VALUES.get(values.rstrip("]") if "[" not in values else values, "TEXT")
    text = text.replace("%", "%%")
    if values == "bool" and not flag.default:
        group.add_argument(f"--{flag.name}", action="store_true", help=text)
    else:
        group.add_argument(f"--{flag.name}", metavar="BOOL" if values == "bool" else shown, help=text)


def _paragraphs(width: int, with_all: bool) -> str:
    names: Iterable[str] = (*SWITCHES, "mm_tunable_parts", "evaluation_strategy")
    if with_all:
        names = sorted({*FLAGS, *SWITCHES, *SWITCHES_OF_NEXT})
    listed = ", ".join(f"--{name}" for name in names)
    last = (
        f"The command lines of the original LLaVA and of LLaVA-NeXT are understood too ({listed}"
        f"{'' if with_all else ', ...'}): docs/training.md. Which settings for which data: docs/settings.md."
    )
    return textwrap.fill(last, width) + os.linesep


def wants_help(words: Iterable[str]) -> str | None:
    """The page that `words` ask for."""
    words = {*words}
    if words & {"--help-all", "--help_all"}:
        return help_text(with_all=True)
    return help_text() if words & {"-h", "--help"} else None
