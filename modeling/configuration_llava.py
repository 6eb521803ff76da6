"""`LlavaConfig`: transformers' native LLaVA configuration plus what the original LLaVA can express and it cannot.

Two surprises. A flat configuration as haotian-liu/LLaVA writes it (`model_type: llava_llama`, language model fields at
the top level, the tower named by `mm_vision_tower`) is translated to the nested form when it is read, so the rest of
the code knows one form only. And the nested form is what is saved: as native `llava` whenever `is_native` says that
nothing is lost.
"""

import re
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.models.llava.configuration_llava import LlavaConfig as NativeLlavaConfig

# Fields that only our configuration has: they are dropped in a native `llava` export, where the image processor's
# `do_pad` carries the aspect ratio rule.
OWN_FIELDS = ("projector_type", "image_aspect_ratio", "vision_tower_name")

# Fields of the original's flat configuration that speak of LLaVA; all the others belong to the language model.
_ORIGINAL_LLAVA_FIELDS = re.compile(
    r"^(mm_|tune_mm_|freeze_mm_|use_mm_|image_|tokenizer_|unfreeze_mm_|s2|model_type$|architectures$|auto_map$|_name_or_path$)"
)
# The original's model types, and the language model each of them holds.
ORIGINAL_TEXT_MODEL_TYPES = {
    "llava_llama": "llama",
    "llava": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}


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

    Raises:
        ValueError: for an unknown projector type, an identity projector between different widths, or a flat
            configuration of a model this package does not support.
    """

    model_type = "llava_llama"

    projector_type: str = "mlp2x_gelu"
    image_aspect_ratio: Literal["square", "pad"] | None = None
    vision_tower_name: str | None = None

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
    if "mm_vision_tower" in config_dict and "text_config" not in config_dict:
        return nested_from_original(config_dict)
    if config_dict.get("model_type", LlavaConfig.model_type) not in (
        LlavaConfig.model_type,
        NativeLlavaConfig.model_type,
    ):
        raise ValueError(f"a model of type {config_dict['model_type']!r} is not a LLaVA.")
    return {**config_dict, "model_type": LlavaConfig.model_type}


def nested_from_original(flat: dict[str, Any]) -> dict[str, Any]:
    """
    Translates a configuration of haotian-liu/LLaVA to the nested form.

    The tower's own configuration is not in the file: it is read from `mm_vision_tower`, a folder or a Hub id.

    Raises:
        ValueError: if the language model is not one of `ORIGINAL_TEXT_MODEL_TYPES`, or the tower cannot be found.
    """
    model_type = flat.get("model_type")
    if model_type not in ORIGINAL_TEXT_MODEL_TYPES:
        raise ValueError(
            f"model_type {model_type!r} is not a LLaVA this package reads; it reads "
            f"{', '.join(ORIGINAL_TEXT_MODEL_TYPES)}."
        )
    tower_name = str(flat["mm_vision_tower"])
    try:
        tower_config = AutoConfig.from_pretrained(tower_name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the vision tower {tower_name!r} that config.json names in mm_vision_tower was not found; make it "
            f"reachable from the current folder or set mm_vision_tower to its folder or Hub id."
        ) from error
    vision_config = getattr(tower_config, "vision_config", tower_config)
    vision_config._name_or_path = ""  # a local path of this machine has no place in a saved file
    select_feature = flat.get("mm_vision_select_feature", "patch")

    text_config = {name: value for name, value in flat.items() if not _ORIGINAL_LLAVA_FIELDS.match(name)}
    text_config["model_type"] = ORIGINAL_TEXT_MODEL_TYPES[model_type]
    has_class_token = vision_config.model_type == "clip_vision_model"
    num_patches = (vision_config.image_size // vision_config.patch_size) ** 2
    nested = {
        "model_type": LlavaConfig.model_type,
        "text_config": text_config,
        "vision_config": vision_config.to_dict(),
        "projector_type": flat.get("mm_projector_type") or "linear",
        "vision_feature_layer": flat.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default" if select_feature == "patch" and has_class_token else "full",
        "image_aspect_ratio": "pad" if flat.get("image_aspect_ratio") == "pad" else "square",
        "vision_tower_name": tower_name,
        "image_seq_length": num_patches + (1 if has_class_token and select_feature == "cls_patch" else 0),
        # The original marks an image by -200, an id no tokenizer has. Here it is the first id after the embedding,
        # which is also the one a tokenizer without spare tokens gives `<image>`; the model never looks it up.
        "image_token_index": flat["vocab_size"],
        "tie_word_embeddings": flat.get("tie_word_embeddings", False),
    }
    for name in ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"):
        if flat.get(name) is not None:
            nested[name] = flat[name]
    return nested
