"""How a new LLaVA is put together: the settings of `llava-ft compose`, for the command line and for Python."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Composition:
    """
    Args:
        version (`str`, *optional*): chat template; by default the tokenizer's own with its answers marked, or what
            suits it. Where ChatML is known and an own one rewrites earlier answers, as Qwen3's, `chatml`.
        projector_type (`str`): see `LlavaConfig`.
        vision_feature_layer (`int`): the tower's hidden state that the projector reads.
        vision_feature_select_strategy (`"default"` or `"full"`, *optional*): without the tower's class token or with
            it; by default without, where it has one.
        image_aspect_ratio (`"pad"` or `"square"`): how a picture is made square.
        image_start_end (`bool`): put `<im_start>` and `<im_end>` around each image.
        seed (`int`): of the new projector and the new embedding rows.
    """

    version: str | None = None
    projector_type: str = "mlp2x_gelu"
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str | None = None
    image_aspect_ratio: str = "pad"
    image_start_end: bool = False
    seed: int = 42
