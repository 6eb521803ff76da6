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
from transformers.models.llava_next.configuration_llava_next import LlavaNextConfig as NativeLlavaNextConfig

from .original_config_llava import is_original, nested_from_original, original_from_nested

# Fields that only our configuration has: they are dropped in a native export, where the image processor's kind and
# its `do_pad` carry the aspect ratio rule.
OWN_FIELDS = ("projector_type", "image_aspect_ratio", "patch_merge_type", "vision_tower_name", "original_config")


@strict
class LlavaConfig(NativeLlavaConfig):
    r"""
    Configuration of [`LlavaForCausalLM`]. All fields of transformers' `LlavaConfig`, and:

    Args:
        projector_type (`str`, defaults to `"mlp2x_gelu"`):
            Architecture of the projector: `"linear"`, `"mlp{N}x_gelu"` (N linear layers with GELU between them) or
            `"identity"` (vision and text width must be equal). Source: haotian-liu/LLaVA,
            `multimodal_projector/builder.py`.
        image_aspect_ratio (`"square"`, `"pad"` or `"anyres"`, *optional*):
            How the image processor makes squares of a picture: by resizing and centre-cropping; by padding with the
            mean colour first; or, in LLaVA-1.6, as several crops. The processor applies it; it is kept here for the
            model of LLaVA-1.6, and so that the original format can be written.
        patch_merge_type (`"flat"`, `"spatial"` or `"spatial_unpad"`, defaults to `"flat"`):
            The original's `mm_patch_merge_type`: how the features of the crops become one sequence. `flat`: crop by
            crop; `spatial`: the whole picture, then the tiles put together and read row by row; `spatial_unpad`: the
            same without what was padding, with the learned `image_newline` at the end of each row.
        image_grid_pinpoints (`list[list[int]]`, *optional*):
            The sizes `[height, width]` into the best of which a picture is fitted for `anyres`. The original has them
            as `[width, height]`; where two fit equally well, the first wins in both.
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
    image_aspect_ratio: Literal["square", "pad", "anyres"] | None = None
    patch_merge_type: Literal["flat", "spatial", "spatial_unpad"] = "flat"
    image_grid_pinpoints: list[Any] | None = None
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
        if self.image_aspect_ratio == "anyres":
            self._check_anyres()

    def _check_anyres(self) -> None:
        edge = self.vision_config.image_size
        pinpoints = self.image_grid_pinpoints or []
        if not pinpoints or any(side % edge or side < edge for size in pinpoints for side in size):
            raise ValueError(
                f"image_aspect_ratio 'anyres' needs image_grid_pinpoints whose sides are multiples of the tower's "
                f"{edge} pixels, not {self.image_grid_pinpoints}."
            )
        has_class_token = self.vision_config.model_type == "clip_vision_model"
        if self.patch_merge_type != "flat" and has_class_token and self.vision_feature_select_strategy == "full":
            raise ValueError(
                f"patch_merge_type {self.patch_merge_type!r} lays the patches out as a picture, in which the tower's "
                f"class token has no place: use vision_feature_select_strategy 'default', or patch_merge_type 'flat'."
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
    def has_image_newline(self) -> bool:
        """Whether the model has a vector that ends each row of features."""
        return self.patch_merge_type == "spatial_unpad"

    @property
    def native_model_type(self) -> Literal["llava", "llava_next"] | None:
        """The architecture of transformers' own that this is; `None` where none can express it."""
        if self.projector_type != "mlp2x_gelu" or self.projector_hidden_act != "gelu":
            return None
        if self.image_aspect_ratio == "anyres":
            return "llava_next" if self.patch_merge_type == "spatial_unpad" else None
        return None if self.has_image_newline else "llava"

    @property
    def is_native(self) -> bool:
        """Whether a class of transformers' own can express this architecture."""
        return self.native_model_type is not None

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

    def to_native(self) -> NativeLlavaConfig | NativeLlavaNextConfig:
        """The same architecture as a configuration of transformers' own (`model_type` `llava` or `llava_next`)."""
        if not self.is_native:
            raise ValueError(
                f"native LLaVA has no projector of type {self.projector_type!r}; only 'mlp2x_gelu'."
                if self.projector_type != "mlp2x_gelu" or self.projector_hidden_act != "gelu"
                else f"native LLaVA has no patch_merge_type {self.patch_merge_type!r} with image_aspect_ratio "
                f"{self.image_aspect_ratio!r}; only 'spatial_unpad' with 'anyres'."
            )
        fields = self.to_dict()
        for name in (*OWN_FIELDS, "model_type", "auto_map", "transformers_version"):
            fields.pop(name, None)
        if self.native_model_type == "llava_next":
            return NativeLlavaNextConfig.from_dict(fields)
        fields.pop("image_grid_pinpoints")
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
    if is_original(config_dict):
        return nested_from_original(config_dict, LlavaConfig.model_type)
    kind = config_dict.get("model_type", LlavaConfig.model_type)
    if kind == NativeLlavaNextConfig.model_type:
        pinpoints = config_dict.get("image_grid_pinpoints") or NativeLlavaNextConfig().image_grid_pinpoints
        config_dict = {
            **config_dict,
            "image_aspect_ratio": "anyres",
            "patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": pinpoints,
        }
    elif kind not in (LlavaConfig.model_type, NativeLlavaConfig.model_type):
        raise ValueError(f"a model of type {kind!r} is not a LLaVA.")
    return {**config_dict, "model_type": LlavaConfig.model_type}
