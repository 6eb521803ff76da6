"""Opening a LLaVA, whatever kind of folder it is in: its configuration, its processor, the model."""

from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import MODEL_MAPPING, AutoConfig, AutoModel

from hf_llava_ft.checkpoints.adapters import with_adapter
from hf_llava_ft.checkpoints.checked.folder import UNREADABLE, check_config, check_settings, reason_of
from hf_llava_ft.checkpoints.checked.kind import refuse_other_kinds
from hf_llava_ft.checkpoints.checked.read_as_written import (
    check_generation_config,
    is_in_few_bits,
    say_what_loading_rounds,
)
from hf_llava_ft.checkpoints.checked.template import check_rendering, check_templates
from hf_llava_ft.checkpoints.checked.weights import check_part_weights, check_weights, refuse_no_numbers
from hf_llava_ft.checkpoints.embeddings import grow_embeddings
from hf_llava_ft.checkpoints.files import find_file, has_file, hub_refusal, not_here, read_json
from hf_llava_ft.checkpoints.inspection import ADAPTER_CONFIG, Checkpoint, inspect_checkpoint
from hf_llava_ft.checkpoints.original_folders import (
    ADAPTER_FILES,
    NON_LORA_FILE,
    PROJECTOR_FILE,
    read_non_lora,
    read_projector,
    with_original_lora,
)
from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.configuration_llava import LlavaConfig
from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM
from hf_llava_ft.processing.picture_opening_llava import recorded_opening
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer
from hf_llava_ft.registration import register
from hf_llava_ft.settings.machine import check_attention


def load_config(path: str, revision: str | None = None, *, adapter: str | None = None) -> LlavaConfig:
    """
    The configuration at `path` in our form, whichever dialect it is written in.

    Args:
        adapter (`str`, *optional*): what was asked for, where `path` is its base, for messages.

    Raises:
        UserError: if it is that of no LLaVA, or cannot be read.
    """
    register()
    if read_json(path, "config.json", revision) is None and not Path(path).is_dir():
        raise UserError(not_here(path, revision))
    check_settings(path, revision)
    tower = (read_json(path, "config.json", revision) or {}).get("mm_vision_tower")
    if isinstance(tower, str):
        check_settings(tower)
    refuse_other_kinds(path, revision, adapter)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        if not isinstance(config, LlavaConfig):
            config = LlavaConfig.from_pretrained(path, revision=revision or "main")
        check_config(path, config)
    except UserError:
        raise
    except UNREADABLE as error:
        reason = hub_refusal(error, path, revision) or reason_of(error)
        raise UserError(f"{path} is not a LLaVA this package can read: {reason}") from error
    return config


def load_processor(
    path: str, revision: str | None = None, *, base: str | None = None, with_template: bool = True
) -> LlavaProcessor:
    """
    The processor at `path`; for an adapter or projector without one, made from its settings and its base.

    Args:
        base (`str`, *optional*): instead of the base that an adapter or a projector names.
        with_template (`bool`): whether its chat template has to work; no, where it is replaced.

    Raises:
        UserError: if there is none, or one that cannot be used.
    """
    register()
    checkpoint = inspect_checkpoint(path, revision, base)
    has_own = has_file(path, "processor_config.json", revision)
    for place in dict.fromkeys(((path, revision), (checkpoint.base, checkpoint.revision))):
        check_settings(*place)
        check_templates(*place)
    if checkpoint.kind in ("model", "adapter"):  # the others' base may be a bare language model
        refuse_other_kinds(checkpoint.base, checkpoint.revision, None if checkpoint.kind == "model" else path)
    processor = _processor(checkpoint, path, revision, has_own)
    if with_template:
        check_rendering(processor, path)
    return processor


def _processor(checkpoint: Checkpoint, path: str, revision: str | None, has_own: bool) -> LlavaProcessor:
    try:
        if checkpoint.kind in ("original_lora", "projector") and not has_own:
            config = load_config(path, revision)
            return LlavaProcessor.build(
                load_tokenizer(checkpoint.base, revision=checkpoint.revision),
                config.vision_config,
                image_aspect_ratio=config.image_aspect_ratio or "square",
                vision_feature_select_strategy=config.vision_feature_select_strategy,
                tower_name=config.vision_tower_name,
                image_start_end=config.uses_image_start_end,
                image_grid_pinpoints=config.image_grid_pinpoints,
                patch_merge_type=config.patch_merge_type,
                picture_opening=recorded_opening(config),
            )
        if checkpoint.kind == "adapter" and not has_own:
            path, revision = checkpoint.base, checkpoint.revision
        return LlavaProcessor.from_pretrained(path, revision=revision, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, UNREADABLE) and type(error) is not Exception:  # the second: tokenizers
            raise
        reason = hub_refusal(error, path, revision) or reason_of(error)
        if "backend tokenizer" in reason:  # and then lists kinds of files over several lines
            reason = "there is no tokenizer in it, or one that cannot be read."
        raise UserError(f"{path} has no processor this package can read: {reason}") from error


def load_model(
    path: str,
    processor: LlavaProcessor | None = None,
    *,
    base: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str = "sdpa",
    allow_nan: bool = False,
    **kwargs: Any,
) -> LlavaForCausalLM | PeftModel:
    """
    The model at `path`: a native or original checkpoint, an adapter of either kind on its base, or the projector of
    stage 1 in its language model.

    Args:
        processor (`LlavaProcessor`, *optional*): gives the model the id of `<image>`, and an embedding row for it.
        base (`str`, *optional*): instead of the base that an adapter or a projector names.
        allow_nan (`bool`): take weights that are NaN or infinite.
        kwargs: passed to `from_pretrained`: `device_map`, `quantization_config`, ...

    Raises:
        UserError: if there is no whole LLaVA at `path`, or `attn_implementation` is not installed.
    """
    checkpoint = inspect_checkpoint(path, revision, base)
    check_attention(attn_implementation)
    folder = _folder(path, revision)
    if (
        checkpoint.kind == "adapter"
        and Path(path).is_dir()
        and not any((folder / name).is_file() for name in ADAPTER_FILES)
    ):
        raise UserError(
            f"{path} has an adapter_config.json and no {' or '.join(ADAPTER_FILES)} beside it: copy it there."
        )
    model = _load_whole(checkpoint, folder, revision, dtype=dtype, attn_implementation=attn_implementation, **kwargs)
    if not allow_nan:
        refuse_no_numbers(model, checkpoint.base)
    if processor is not None:
        fit_to_processor(model, processor)
    if checkpoint.is_adapter:
        try:
            if checkpoint.kind == "original_lora":
                return with_original_lora(model, folder)
            return with_adapter(model, path, revision)
        except UserError:
            raise
        except UNREADABLE as error:
            refusal = hub_refusal(error, path, revision)
            raise UserError(
                f"the adapter at {path} cannot be loaded: {refusal}"
                if refusal
                else f"the adapter at {path} does not fit {checkpoint.base}: {reason_of(error)}"
            ) from error
    return model


def _load_whole(checkpoint: Checkpoint, folder: Path, revision: str | None, **kwargs: Any) -> LlavaForCausalLM:
    """The model that an adapter is put on: the base, with what else a folder of the original, at `revision`, holds."""
    extra_weights, num_tokens = None, None
    if checkpoint.kind in ("original_lora", "projector"):
        # The settings of the part hold for the whole; its base may be a bare language model.
        config = load_config(checkpoint.path, revision)
        extra_weights = read_projector(folder) if checkpoint.kind == "projector" else read_non_lora(folder)
        num_tokens = config.text_config.vocab_size
        config.text_config.vocab_size = _vocab_size(checkpoint)
    else:
        adapter = checkpoint.path if checkpoint.is_adapter else None
        config = load_config(checkpoint.base, checkpoint.revision, adapter=adapter)
    check_weights(checkpoint.base, config, checkpoint.revision)
    if config.original_config and Path(config.vision_tower_name or "").is_dir():
        check_part_weights(str(config.vision_tower_name), config.vision_config, AutoModel)
    check_generation_config(checkpoint.base, checkpoint.revision)
    kwargs["attn_implementation"] = _supported_attention(config, kwargs["attn_implementation"])
    embeddings = {name: extra_weights.pop(name) for name in _EMBEDDINGS if extra_weights and name in extra_weights}
    try:
        model = LlavaForCausalLM.from_pretrained(
            checkpoint.base,
            config=config,
            revision=checkpoint.revision,
            extra_weights=extra_weights,
            trust_remote_code=False,
            **kwargs,
        )
        if num_tokens is not None:
            # Tokens that the original added: the mean of the others, as it began with, where the folder does not hold
            # what became of them. The original's own loader takes whatever is in memory, for all rows.
            grow_embeddings(model, num_tokens, multiple=None)
            model.load_state_dict(embeddings, strict=False)
    except UNREADABLE as error:
        reason = hub_refusal(error, checkpoint.base, checkpoint.revision) or reason_of(error)
        raise UserError(f"the model at {checkpoint.base} cannot be loaded: {reason}") from error
    if "quantization_config" not in kwargs and not is_in_few_bits(checkpoint.base, checkpoint.revision):
        say_what_loading_rounds(checkpoint.base, checkpoint.revision, model.dtype)
    return model


def _supported_attention(config: LlavaConfig, attn_implementation: str) -> str | dict[str, str]:
    """Eager for a language model that has no sdpa, as Gemma 2, whose scores are squashed, has none."""
    text_class: Any = MODEL_MAPPING[cast(Any, type(config.text_config))]
    if attn_implementation == "sdpa" and not text_class._supports_sdpa:
        return {"": "sdpa", "vision_config": "sdpa", "text_config": "eager"}
    return attn_implementation


_EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")


def _vocab_size(checkpoint: Checkpoint) -> int:
    """Rows of the embedding of the base, which may be a LLaVA of either dialect or a bare language model."""
    base = read_json(checkpoint.base, "config.json", checkpoint.revision)
    if base is None:
        raise UserError(f"the base of {checkpoint.path} is {checkpoint.base}, which holds no model: pass --base.")
    return int((base.get("text_config") or base)["vocab_size"])


def _folder(path: str, revision: str | None) -> Path:
    """The folder on this machine in which the files of `path` are, downloading what an adapter or projector needs."""
    if Path(path).is_dir():
        return Path(path)
    names = (*ADAPTER_FILES, NON_LORA_FILE, PROJECTOR_FILE, "config.json", ADAPTER_CONFIG)
    files = [find_file(path, name, revision) for name in names]
    return Path(next(file for file in files if file)).parent


def fit_to_processor(model: LlavaForCausalLM, processor: LlavaProcessor) -> None:
    """
    Gives the model the processor's image token, with an embedding row, so that a native export can embed it, and makes
    generation stop on the token that ends an answer under the chat template.
    """
    model.config.image_token_id = processor.image_token_id
    # All tokens that were added, not only the image: a padding token may come after it.
    grow_embeddings(model, max(len(processor.tokenizer), processor.image_token_id + 1))
    generation = model.generation_config
    before = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    stops = {*before, processor.tokenizer.eos_token_id, processor.stop_token_id} - {None}
    generation.eos_token_id = sorted(stops)
    generation.pad_token_id = processor.tokenizer.pad_token_id
