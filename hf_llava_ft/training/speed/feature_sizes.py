"""What room the kept features of a picture take: for the cache, and for an estimate, which opens no data."""

import torch

from hf_llava_ft.modeling.configuration_llava import LlavaConfig

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def bytes_of_a_crop(config: LlavaConfig, dtype: torch.dtype) -> int:
    """What the features of one square take on disk: positions x width x bytes of an element."""
    vision, layers = config.vision_config, config.vision_feature_layer
    positions = (vision.image_size // vision.patch_size) ** 2
    positions += vision.model_type == "clip_vision_model" and config.vision_feature_select_strategy == "full"
    return positions * vision.hidden_size * (1 if isinstance(layers, int) else len(layers)) * dtype.itemsize


def stored_dtype(config: LlavaConfig, dtype: torch.dtype, autocast: str | None) -> torch.dtype:
    """In which features are kept, of a tower of `dtype`: as the projector reads them.

    Args:
        autocast (`str`, *optional*): accelerate's word for what is computed in; bf16, fp16.
    """
    # Only what is multiplied first is rounded first.
    return _AUTOCAST.get(str(autocast), dtype) if config.num_projector_layers else dtype
