"""Registers our classes with transformers' Auto classes. Where transformers has a class of its own for a folder, that
one stays; it has none for LLaVA under `AutoModelForCausalLM`, which gives ours for every kind of folder."""

from functools import cache

from hf_llava_ft.releases import warn_of_newer


@cache
def register() -> None:
    """Registers configuration, models, processor and weight names; calling it again does nothing. Warns first, so also
    where an import fails, if a library is newer than we know."""
    warn_of_newer()
    from transformers import (
        CONFIG_MAPPING,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
    )
    from transformers import LlavaConfig as NativeLlavaConfig
    from transformers import LlavaNextConfig as NativeLlavaNextConfig
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping

    from hf_llava_ft.library_differences import open_as_causal_lm
    from hf_llava_ft.modeling.configuration_llava import LlavaConfig
    from hf_llava_ft.modeling.modeling_llava import LlavaBaseModel, LlavaForCausalLM
    from hf_llava_ft.modeling.original_config_llava import TEXT_MODEL_TYPES
    from hf_llava_ft.modeling.weight_names_llava import reading_conversions
    from hf_llava_ft.processing.processing_llava import LlavaProcessor

    for model_type in (*TEXT_MODEL_TYPES, "llava_mpt"):  # the last one for its sentence of refusal
        if model_type != "llava":  # native: an original of that name opens through LlavaConfig and load_model
            # Not through AutoConfig.register, which takes one model type per class.
            CONFIG_MAPPING.register(model_type, LlavaConfig, exist_ok=True)
    # exist_ok: the Auto mappings also compare class names, and transformers has a `LlavaConfig` of its own.
    AutoModel.register(LlavaConfig, LlavaBaseModel, exist_ok=True)
    AutoModelForCausalLM.register(LlavaConfig, LlavaForCausalLM, exist_ok=True)
    for native_config in (NativeLlavaConfig, NativeLlavaNextConfig):
        open_as_causal_lm(native_config, LlavaForCausalLM)
    AutoModelForImageTextToText.register(LlavaConfig, LlavaForCausalLM, exist_ok=True)
    AutoProcessor.register(LlavaConfig, LlavaProcessor, exist_ok=True)
    register_checkpoint_conversion_mapping(LlavaConfig.model_type, [*reading_conversions()], overwrite=True)
