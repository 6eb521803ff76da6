"""Whether a folder holds a LLaVA at all: anything else is said in a sentence before a library looks for its parts."""

from transformers import LlavaConfig as NativeLlavaConfig
from transformers import LlavaNextConfig as NativeLlavaNextConfig

from hf_llava_ft.checkpoints.files import read_json
from hf_llava_ft.checkpoints.inspection import is_language_model
from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.configuration_llava import LlavaConfig
from hf_llava_ft.modeling.original_config_llava import is_original

_TYPES = (LlavaConfig.model_type, NativeLlavaConfig.model_type, NativeLlavaNextConfig.model_type)


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
