"""Opening a LLaVA, whatever kind of folder it is in. What a folder holds is decided by its files, never by its
name."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig
from transformers.utils import cached_file

from hf_llava_ft.embeddings import grow_embeddings
from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.configuration_llava import LlavaConfig
from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.registration import register

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A name that was looked into.

    Args:
        path (`str`): the folder or Hub id as the user gave it.
        base (`str`): where the whole model is: `path` itself, or what the adapter at `path` was trained on.
        revision (`str`, *optional*): of `base`.
        is_adapter (`bool`): whether `path` holds a PEFT adapter.
    """

    path: str
    base: str
    revision: str | None
    is_adapter: bool


def inspect_checkpoint(path: str, revision: str | None = None) -> Checkpoint:
    """
    Raises:
        UserError: if there is neither a model nor an adapter at `path`.
    """
    if adapter_file := _file(path, ADAPTER_CONFIG, revision):
        adapter = json.loads(Path(adapter_file).read_text(encoding="utf-8"))
        base = adapter.get("base_model_name_or_path")
        if not base:
            raise UserError(f"{path}: {ADAPTER_CONFIG} does not name the base model; pass it with --base.")
        return Checkpoint(path, base, adapter.get("revision"), is_adapter=True)
    if _file(path, "config.json", revision):
        return Checkpoint(path, path, revision, is_adapter=False)
    if Path(path).exists():
        raise UserError(f"{path} is not a model folder: it has neither config.json nor {ADAPTER_CONFIG}.")
    raise UserError(f"{path} is neither a folder nor a model on the Hub that can be reached from here.")


def _file(path: str, name: str, revision: str | None) -> str | None:
    try:
        return cached_file(
            path,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=True,
        )
    except (OSError, ValueError):  # not a folder, and no valid or no existing repository id
        return None


def load_config(path: str, revision: str | None = None) -> LlavaConfig:
    """The configuration at `path` in our form, whichever dialect it is written in."""
    register()
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
        if not isinstance(config, LlavaConfig):
            config = LlavaConfig.from_pretrained(path, revision=revision or "main")
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{path} is not a LLaVA this package can read: {_first_line(error)}") from error
    return config


def load_processor(path: str, revision: str | None = None) -> LlavaProcessor:
    """The processor at `path`; for an adapter folder without one, that of its base."""
    register()
    checkpoint = inspect_checkpoint(path, revision)
    if checkpoint.is_adapter and not _file(path, "processor_config.json", revision):
        path, revision = checkpoint.base, checkpoint.revision
    try:
        return LlavaProcessor.from_pretrained(path, revision=revision)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} has no processor this package can read: {_first_line(error)}") from error


def load_model(
    path: str,
    processor: LlavaProcessor | None = None,
    *,
    base: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str = "sdpa",
    **kwargs: Any,
) -> LlavaForCausalLM | PeftModel:
    """
    The model at `path`: a native or original checkpoint, or an adapter on its base.

    Args:
        processor (`LlavaProcessor`, *optional*): gives the model the id of `<image>`, and an embedding row for it.
        base (`str`, *optional*): instead of the base that an adapter names.
        kwargs: passed to `from_pretrained`: `device_map`, `quantization_config`, ...

    Raises:
        UserError: if there is no whole LLaVA at `path`, or `attn_implementation` is not installed.
    """
    checkpoint = inspect_checkpoint(path, revision)
    check_attention(attn_implementation)
    source = base or checkpoint.base
    config = load_config(source, checkpoint.revision)
    try:
        model = LlavaForCausalLM.from_pretrained(
            source,
            config=config,
            revision=checkpoint.revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            **kwargs,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the model at {source} cannot be loaded: {_first_line(error)}") from error
    if processor is not None:
        fit_to_processor(model, processor)
    if checkpoint.is_adapter:
        try:
            return PeftModel.from_pretrained(model, path, revision=revision)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"the adapter at {path} does not fit {source}: {_first_line(error)}") from error
    return model


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


def check_attention(attn_implementation: str) -> None:
    """
    Raises:
        UserError: if FlashAttention is asked for and not there, naming what to install.
    """
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    available = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if attn_implementation in available and not available[attn_implementation]():
        raise UserError(
            f"--attn_implementation {attn_implementation} needs the flash-attn package and an NVIDIA GPU: "
            f"pip install 'hf-llava-ft[flash-attn]' --no-build-isolation, or use --attn_implementation sdpa."
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
