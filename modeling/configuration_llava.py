"""`LlavaConfig`: transformers' native LLaVA configuration plus what the original LLaVA can express and it cannot.

One surprise: a flat configuration as haotian-liu/LLaVA writes it is translated to the nested form when it is read, so
the rest of the code knows one form only.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.models.llava.configuration_llava import LlavaConfig as NativeLlavaConfig

from .original_config_llava import is_original, nested_from_original, original_from_nested, refuse_anyres

# Fields that only our configuration has: they are dropped in a native `llava` export, where the image processor's
# `do_pad` carries the aspect ratio rule.
OWN_FIELDS = ("projector_type", "image_aspect_ratio", "vision_tower_name", "original_config")


@strict
class LlavaConfig(NativeLlavaConfig):
    r"""
    Configuration of [`LlavaForCausalLM`]. All fields of transformers' `LlavaConfig`, and:

    Args:
        projector_type (`str`, defaults to `"mlp2x_gelu"`):
            Architecture of the projector: `"linear"`, `"mlp{N}x_gelu"` (N linear layers with GELU between them) or
            `"identity"` (vision and text width must be equal). Source: haotian-liu/LLaVA,
            `multimodal_projector/builder.py`.
        image_aspect_ratio (`"square"` or `"pad"`, *optional*):
            How the image processor makes a picture square: by resizing and centre-cropping, or by padding with the
            mean colour first. The processor applies it (`do_pad`); it is kept here so that the original format can be
            written.
        vision_tower_name (`str`, *optional*):
            The original's `mm_vision_tower`: a folder or Hub id the tower's weights come from when the checkpoint does
            not hold them, as the released LLaVA-1.5 checkpoints do not.
        original_config (`dict`, *optional*):
            The flat configuration this one was read from; where there is one, the model is saved in that form again.

    Raises:
        ValueError: for an unknown projector type, an identity projector between different widths, or a flat
            configuration of a model this package does not support.
    """

    model_type = "llava_llama"

    projector_type: str = "mlp2x_gelu"
    image_aspect_ratio: Literal["square", "pad"] | None = None
    vision_tower_name: str | None = None
    original_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        num_layers = self.num_projector_layers
        if num_layers == 0 and self.vision_config.hidden_size != self.text_config.hidden_size:
            raise ValueError(
                f"projector_type 'identity' needs a vision tower and a language model of one width, but they have "
                f"{self.vision_config.hidden_size} and {self.text_config.hidden_size}: use 'linear' or 'mlp2x_gelu'."
            )

    @property
    def num_projector_layers(self) -> int:
        """Number of linear layers of the projector; 0 for `identity`."""
        if self.projector_type == "identity":
            return 0
        if self.projector_type == "linear":
            return 1
        if match := re.fullmatch(r"mlp([1-9]\d*)x_gelu", self.projector_type):
            return int(match.group(1))
        raise ValueError(
            f"unknown projector_type {self.projector_type!r}: use 'linear', 'identity' or e.g. 'mlp2x_gelu'."
        )

    @property
    def is_native(self) -> bool:
        """Whether transformers' own `LlavaForConditionalGeneration` can express this architecture."""
        return self.projector_type == "mlp2x_gelu" and self.projector_hidden_act == "gelu"

    @property
    def uses_image_start_end(self) -> bool:
        """Whether the original put `<im_start>` and `<im_end>` around an image (`mm_use_im_start_end`)."""
        return bool((self.original_config or {}).get("mm_use_im_start_end"))

    @property
    def default_checkpoint_format(self) -> str:
        """`"llava"` if the configuration was read from the original, else `"llava-hf"` if native, else `"nested"`."""
        if self.original_config is not None:
            return "llava"
        return "llava-hf" if self.is_native else "nested"

    def save_original(self, save_directory: str | os.PathLike) -> None:
        """Writes the config.json of haotian-liu/LLaVA; see `original_from_nested`."""
        text = json.dumps(original_from_nested(self), indent=2, sort_keys=True)
        Path(save_directory, "config.json").write_text(text + "\n", encoding="utf-8")

    def to_native(self) -> NativeLlavaConfig:
        """The same architecture as transformers' own `LlavaConfig` (`model_type: llava`)."""
        if not self.is_native:
            raise ValueError(f"native LLaVA has no projector of type {self.projector_type!r}; only 'mlp2x_gelu'.")
        fields = self.to_dict()
        for name in (*OWN_FIELDS, "model_type", "auto_map", "transformers_version"):
            fields.pop(name, None)
        return NativeLlavaConfig.from_dict(fields)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _as_nested(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        return super().from_dict(_as_nested(config_dict), **kwargs)


def _as_nested(config_dict: dict[str, Any]) -> dict[str, Any]:
    """`config_dict` in our nested form, whichever dialect it comes in; an already nested one comes back unchanged."""
    refuse_anyres(config_dict)
    if is_original(config_dict):
        return nested_from_original(config_dict, LlavaConfig.model_type)
    if config_dict.get("model_type", LlavaConfig.model_type) not in (
        LlavaConfig.model_type,
        NativeLlavaConfig.model_type,
    ):
        raise ValueError(f"a model of type {config_dict['model_type']!r} is not a LLaVA.")
    return {**config_dict, "model_type": LlavaConfig.model_type}
