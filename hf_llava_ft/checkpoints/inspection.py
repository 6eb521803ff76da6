"""What a folder or repository holds: decided by its files, never by its name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import is_offline_mode

from hf_llava_ft.checkpoints.files import has_file, not_here, read_json
from hf_llava_ft.checkpoints.original_folders import NON_LORA_FILE, PROJECTOR_FILE
from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.original_config_llava import is_original

ADAPTER_CONFIG = "adapter_config.json"

# What a folder can hold: a whole model; a PEFT adapter; a LoRA folder or a stage-1 projector of the original LLaVA.
Kind = Literal["model", "adapter", "original_lora", "projector"]
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Checkpoint:
    """A name that was looked into.

    Args:
        path (`str`): the folder or Hub id as the user gave it.
        base (`str`): where the whole model is: `path` itself, or what an adapter or projector there was trained on.
        revision (`str`, *optional*): of `base`.
        kind (`Kind`): what `path` holds.
    """

    path: str
    base: str
    revision: str | None
    kind: Kind

    @property
    def is_adapter(self) -> bool:
        return self.kind in ("adapter", "original_lora")


def inspect_checkpoint(path: str, revision: str | None = None, base: str | None = None) -> Checkpoint:
    """
    Args:
        revision (`str`, *optional*): branch, tag or commit of `path` on the Hub.
        base (`str`, *optional*): instead of the base that an adapter or a projector names.

    Raises:
        UserError: if there is neither a model nor a part of one at `path`, or a part does not name its base.
    """
    found = {name: read_json(path, name, revision) for name in (ADAPTER_CONFIG, "config.json")}
    adapter, config = found[ADAPTER_CONFIG], found["config.json"]
    if adapter is not None:
        original = has_file(path, NON_LORA_FILE, revision) or (config is not None and is_original(config))
        own_base = adapter.get("base_model_name_or_path")
        named = base or own_base
        if not named:
            raise UserError(f"{path}: {ADAPTER_CONFIG} does not name the base model; pass it with --base.")
        if not isinstance(named, str):
            raise UserError(
                f"{path}: base_model_name_or_path in {ADAPTER_CONFIG} is {named!r:.60}, and has to be a text; pass "
                f"the base with --base."
            )
        base_revision = adapter.get("revision") if named == own_base else None
        return Checkpoint(path, named, base_revision, "original_lora" if original else "adapter")
    if config is not None:
        has_weights = any(has_file(path, name, revision) for name in _WEIGHTS)
        if not has_weights and has_file(path, PROJECTOR_FILE, revision):
            named = base or config.get("_name_or_path")
            if not named:
                raise UserError(f"{path} is a projector and does not name the model it was trained on: pass --base.")
            return Checkpoint(path, named, None, "projector")
        return Checkpoint(path, path, revision, "model")
    if Path(path).exists():
        raise UserError(f"{path} is not a model folder: it has neither config.json nor {ADAPTER_CONFIG}.")
    if is_offline_mode():
        raise UserError(not_here(path, revision))
    raise UserError(f"{path} is a repository without a model: it has neither config.json nor {ADAPTER_CONFIG}.")


def is_language_model(path: str, revision: str | None = None) -> bool:
    """Whether there is a model at `path` that is no LLaVA, nor a part of one: what a tower can be put in front of."""
    config = read_json(path, "config.json", revision)
    if config is None or is_original(config) or "text_config" in config or has_file(path, ADAPTER_CONFIG, revision):
        return False
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in config.get("architectures") or ())
