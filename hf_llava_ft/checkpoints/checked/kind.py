"""Whether a folder holds a LLaVA at all: anything else is said in a sentence before a library looks for its parts."""

from transformers import LlavaConfig as NativeLlavaConfig
from transformers import LlavaNextConfig as NativeLlavaNextConfig

from hf_llava_ft.checkpoints.files import has_file, read_json
from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.configuration_llava import LlavaConfig
from hf_llava_ft.modeling.original_config_llava import is_original

_TYPES = (LlavaConfig.model_type, NativeLlavaConfig.model_type, NativeLlavaNextConfig.model_type)


def is_language_model(path: str, revision: str | None = None) -> bool:
    """Whether there is a model at `path` that is no LLaVA, nor a part of one: what a tower can be put in front of."""
    config = read_json(path, "config.json", revision)
    if config is None or is_original(config) or "text_config" in config:
        return False
    if has_file(path, "adapter_config.json", revision):
        return False
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in config.get("architectures") or ())


def refuse_other_kinds(path: str, revision: str | None = None, adapter: str | None = None) -> None:
    """
    Args:
        adapter (`str`, *optional*): what was asked for, where `path` is its base.

    Raises:
        UserError: if config.json at `path` is there and that of something else than a LLaVA.
    """
    config = read_json(path, "config.json", revision)
    kind = None if config is None else config.get("model_type")
    if config is None or kind is None or kind in _TYPES or is_original(config):
        return  # what else may be wrong with a LLaVA is found where it is read
    base = f"the base of {adapter}, " if adapter else ""
    if is_language_model(path, revision):
        put_in_front = f"llava-ft compose --vision TOWER --language {path} --output_dir NEW makes one of it"
        what_to_do = "give an adapter of a LLaVA" if adapter else put_in_front
        raise UserError(
            f"{base}{path} is not a LLaVA: it is a language model ({kind}), which sees no pictures: {what_to_do}."
        )
    raise UserError(
        f"{base}{path} is not a LLaVA: it is a model of type {kind!r}; this package takes LLaVA-1.5 and 1.6, such as "
        f"llava-hf/llava-1.5-7b-hf."
    )
