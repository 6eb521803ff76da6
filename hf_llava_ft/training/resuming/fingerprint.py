"""What the course of a run follows from, so that a resumed run is the same run, or says what it is.

A course is plain data and lies in the seal of each checkpoint: the settings below, without a path of this machine, and
digests of the data, the base and the processor. A setting that is named nowhere here belongs to the course, so that
one that a new release brings is not forgotten.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.settings.arguments import DataArguments, ModelArguments, TuningArguments
from hf_llava_ft.settings.resolved import SECRET
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.summary import plain

# They may be changed on resume, and the rest of the run follows them (`changed_settings.py`).
TAKE_EFFECT = frozenset(
    ("learning_rate", "mm_projector_lr", "mm_vision_tower_lr", "num_train_epochs", "max_steps", "warmup_steps")
    + ("lr_scheduler_type", "lr_scheduler_kwargs", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    + ("max_grad_norm",)
)
# They leave the course as it is, or digests stand for them.
FREE = frozenset(
    # Where things are. The digests say whether they are the same.
    ("model_name_or_path", "revision", "data_path", "image_folder", "pretrain_mm_mlp_adapter", "output_dir")
    + ("allow_images_outside", "allow_image_urls", "resume_from_checkpoint", "resume_anyway", "overwrite_output_dir")
    + ("columns",)
    # What is shown, evaluated, saved and pushed.
    + ("preview", "eval_data_path", "eval_image_folder", "eval_prompts", "eval_max_new_tokens", "eval_strategy")
    + ("num_eval_answers", "eval_columns", "retention_probe")
    + ("eval_steps", "eval_delay", "per_device_eval_batch_size", "prediction_loss_only", "eval_on_start")
    + ("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics")
    + ("batch_eval_metrics", "bf16_full_eval", "fp16_full_eval", "do_train", "do_eval", "do_predict")
    + ("early_stopping_patience", "load_best_model_at_end", "metric_for_best_model", "greater_is_better")
    + ("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter")
    + ("include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name")
    + ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "logging_dir", "debug")
    + ("skip_memory_metrics", "include_tokens_per_second", "try_longest_batch", "save_only_model", "save_strategy")
    + ("save_steps", "save_on_each_node", "save_total_limit", "enable_jit_checkpoint", "push_to_hub", "hub_token")
    + ("hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision")
    + ("restore_callback_states_from_checkpoint", "ignore_data_skip")
    # How fast, and in how much memory. Of a stream, the number of workers is part of the order (data/streaming).
    + ("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers")
    + ("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order")
    + ("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing")
    + ("gradient_checkpointing_kwargs", "torch_empty_cache_steps", "auto_find_batch_size", "use_cache")
    + ("padding_free", "full_determinism", "remove_unused_columns", "label_names", "ddp_find_unused_parameters")
    + ("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "local_rank")
    # `engine` stands for them.
    + ("deepspeed", "fsdp", "fsdp_config")
)
# With --ignore_data_skip the epoch begins anew, in any order.
_ORDER = frozenset(
    ("seed", "data_seed", "streaming", "shuffle_buffer_size", "per_device_train_batch_size", "processes", "data")
    + (
        "gradient_accumulation_steps",
        "group_by_modality_length",
        "grouped_by",
        "sampler_order",
        *("packing", "max_tokens_per_batch"),
        "images",
        "dataloader_drop_last",
    )
)
_OF_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_bias", "lora_target_modules", "lora_vision_tower") + (
    *("use_dora", "use_rslora"),
)
_OF_A_NEW_LLAVA = ("vision_tower", "mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature") + (
    *("mm_use_im_start_end", "mm_patch_merge_type", "image_grid_pinpoints"),
)
COMPOSED_BASE = "composed"  # in place of a digest: what it is made of is among the settings
_READ_AT_EACH_END = 2**20
# What stands in a course beside settings, in words.
_IN_WORDS = {
    "data": "the data",
    "images": "the images",
    "base": "the model it started from",
    "processor": "the chat template or image processor",
    "processes": "the number of processes",
    "engine": "the engine",
    "grouped_by": "what rows are grouped by",
}


def settings_course(*arguments: Any) -> dict[str, Any]:
    """The settings of a course, of the objects that hold them; `LlavaTrainingArguments` among them."""
    course: dict[str, Any] = {}
    for part in arguments:
        for field in dataclasses.fields(part):
            if field.init and field.name not in FREE and not SECRET.search(field.name):
                course[field.name] = plain(getattr(part, field.name))
        if isinstance(part, TuningArguments) and not part.is_lora:
            course = {name: value for name, value in course.items() if name not in _OF_LORA}
        elif isinstance(part, TuningArguments) and part.lora_target_modules is not None:
            course["lora_target_modules"] = sorted(part.lora_target_modules)  # in any order the same
        if isinstance(part, LlavaTrainingArguments):
            course["data_seed"] = part.seed if part.data_seed is None else part.data_seed
            if not part.packing:
                course.pop("max_tokens_per_batch")
            course["grouped_by"] = part.grouped_by if part.group_by_modality_length else None
            course |= {"processes": part.world_size, "engine": _engine(part), "use_cpu": part.device.type == "cpu"}
    tower = course.get("vision_tower")
    if tower is not None and os.path.isdir(os.path.expanduser(tower)):
        course["vision_tower"] = Path(tower).name
    return course


def course_of(
    model_args: ModelArguments,
    data_args: DataArguments,
    tuning_args: TuningArguments,
    args: LlavaTrainingArguments,
    *,
    base: str,
    longest: int,
    processor: LlavaProcessor,
    data: dict[str, Any],
    images: dict[str, Any] | None,
) -> dict[str, Any]:
    """
    The whole course. What is not said is what it means, so that a default may be written out.

    Args:
        longest (`int`): the most tokens of a row.
        base (`str`): of [`base_digest`].
        processor (`LlavaProcessor`): of the run.
        data (`dict`): of `summary.data_facts`.
        images (`dict`, *optional*): number and digest of the images beside the data; None for a stream.
    """
    course = settings_course(model_args, data_args, tuning_args, args)
    if base != COMPOSED_BASE:
        # Of a LLaVA that is there they can only say what it is, which the digest does.
        course = {name: value for name, value in course.items() if name not in _OF_A_NEW_LLAVA}
    course |= {"model_max_length": longest, "picture_opening": processor.picture_opening}
    sources = [
        {"name": source["name"], "weight": source["weight"], "digest": source["fingerprint"][:12]}
        | ({"columns": source["columns"]} if "columns" in source else {})
        for source in data["sources"]
    ]
    said = [processor.chat_template, processor.tokenizer.chat_template, processor.image_processor.to_json_string()]
    return course | {"base": base, "processor": _digest(json.dumps(said)), "data": sources, "images": images}


def base_digest(name: str, commit: str | None) -> str:
    """Stands for the weights that a run starts from: by name and commit on the Hub; of a folder by configuration, and
    sizes, first and last bytes of the files of its weights, which are not read."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{commit}"
    digest = blake2b(digest_size=6)
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".bin") or file.name in ("config.json", "adapter_config.json"):
            size = file.stat().st_size
            digest.update(f"{file.name}\t{size}\n".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(_READ_AT_EACH_END))
                opened.seek(max(size - _READ_AT_EACH_END, 0))
                digest.update(opened.read(_READ_AT_EACH_END))
    return f"{folder.resolve().name}, digest {digest.hexdigest()}"


def refuse_another_course(
    checkpoint: str, was: dict[str, Any] | None, now: dict[str, Any], step: int, args: LlavaTrainingArguments
) -> str | None:
    """
    Compares the course of a checkpoint with that of the run that is to go on from it.

    Args:
        checkpoint (`str`): for messages.
        was (`dict`, *optional*): None if the checkpoint does not know it.
        now (`dict`): of [`course_of`] or [`settings_course`]; what only one of the two has is not compared.
        step (`int`): the checkpoint's.
        args (`LlavaTrainingArguments`): those of the run that is to go on.

    Returns:
        A note on what is not as it was and will take effect, or could not be compared; None if all is as it was.

    Raises:
        UserError: if the run would be another one, and `resume_anyway` was not given.
    """
    if was is None:
        return (
            f"{checkpoint} does not say what its run was: whether data and settings are the same was not compared. "
            "The next checkpoint will know."
        )
    was = {"packing": False, **was}  # which there was not before it was a setting
    changes = changes_between(was, now, begins_epoch_anew=args.ignore_data_skip)
    if 0 < args.max_steps < step:
        changes["max_steps"] = f"--max_steps {args.max_steps} is behind the checkpoint's step {step}"
    refused = [told for name, told in changes.items() if name not in TAKE_EFFECT or _cannot(name, was, now)]
    if 0 < args.max_steps < step:
        refused.append(changes.pop("max_steps"))
    taken = [told for name, told in changes.items() if told not in refused]
    if refused and not args.resume_anyway:
        raise UserError(
            f"{checkpoint} is of a run that was another: {'; '.join(refused)}. Set it back, begin a new run in "
            "another --output_dir, or go on all the same with --resume_anyway."
        )
    if refused or taken:
        return f"From step {step} on this is not the run that it was: {'; '.join(refused + taken)}."
    return None


def changes_between(was: dict[str, Any], now: dict[str, Any], begins_epoch_anew: bool = False) -> dict[str, str]:
    """What differs, each in words: from what to what."""
    changes = {}
    for name in now:
        if name not in was or was[name] == now[name] or (begins_epoch_anew and name in _ORDER):
            continue
        told = _told(name, was[name], now[name])
        if told is not None:
            changes[name] = told
    if "processor" in was and "processor" not in changes:
        # Said in other words, but the same.
        for name in ("version", "image_aspect_ratio"):
            changes.pop(name, None)
    elif "version" in changes or "image_aspect_ratio" in changes:
        changes.pop("processor")
    if {"sampler_order", "group_by_modality_length"} & set(changes):
        changes.pop("grouped_by", None)  # which follows from them
    if was.get("max_steps", -1) > 0 and now.get("max_steps", -1) > 0:
        changes.pop("num_train_epochs", None)  # the steps decide, before and after
    return changes


def _cannot(name: str, was: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a setting that may change cannot change so."""
    if now.get("engine") not in (None, "none") and name not in ("max_steps", "num_train_epochs", "max_grad_norm"):
        return True  # DeepSpeed and FSDP bring them back with their state
    if name in ("mm_projector_lr", "mm_vision_tower_lr"):
        return (was[name] is None) != (now[name] is None)  # the optimiser has other groups
    return "reduce_lr_on_plateau" in (was.get("lr_scheduler_type"), now.get("lr_scheduler_type")) and name in (
        *("learning_rate", "mm_projector_lr", "mm_vision_tower_lr", "lr_scheduler_type", "lr_scheduler_kwargs"),
    )


def _told(name: str, was: Any, now: Any) -> str | None:
    if name == "data":
        if len(was) != len(now):
            return f"the data was {_named(was)} and is {_named(now)}"
        told = []
        for old, new in zip(was, now, strict=True):
            label = new["name"] if old["name"] == new["name"] else f"{old['name']}, now {new['name']},"
            told += [
                f"the {what} of {label} was {old[key]} and is {new[key]}"
                for what, key in (("content", "digest"), ("weight", "weight"))
                if old[key] != new[key]
            ]
        return "; ".join(told) or None
    if name == "images":
        if was is None or now is None:
            return None  # of a stream, which `streaming` tells
        words = [f"{each['number']:,} of digest {each['digest']}" for each in (was, now)]
        return f"the images (sizes and times) were {words[0]} and are {words[1]}"
    label = _IN_WORDS.get(name, f"--{name}")
    return f"{label} was {_shown(was)} and is {_shown(now)}"


def _named(sources: Iterable[dict[str, Any]]) -> str:
    return ", ".join(str(source["name"]) for source in sources)


def _shown(value: Any) -> str:
    return "not given" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _engine(args: LlavaTrainingArguments) -> str:
    if args.deepspeed_plugin is not None:
        return f"DeepSpeed ZeRO-{args.deepspeed_plugin.zero_stage}"
    is_fsdp = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return "FSDP" if is_fsdp else "none"


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=6).hexdigest()
