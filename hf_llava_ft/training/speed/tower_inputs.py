"""What becomes of a batch's pictures between the collator and the model: floats are made of uint8, and a frozen tower
sees each picture of a batch once, or, with `--cache_vision_features`, once for all runs.

A tower that trains, or has dropout, sees a picture as often as it stands in the batch: its gradients, or its random
numbers, are of each place.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.processing.uint8_pixels_llava import can_hand_over_uint8, normalize_pixels
from hf_llava_ft.training.speed.feature_cache import FeatureCache


class TowerInputs:
    """
    Args:
        trainer (`LlavaTrainer`): of the run, with its model and accelerator.
        collator: that it was given or has made.

    Attributes:
        collator: the same, asked for each picture once where that is right.
        cache (`FeatureCache`, *optional*): what is kept of a frozen tower.

    Raises:
        UserError: if features are to be kept that cannot be.
    """

    def __init__(self, trainer: Any, collator: Any):
        model, args = trainer._unwrapped_model, trainer.args
        self._processor = trainer.processing_class
        self.cache: FeatureCache | None = None
        self.collator = collator
        sees_all_once = (
            type(collator) is LlavaCollator
            and isinstance(model, LlavaForCausalLM)
            and gives_the_same_always(model.model.vision_tower)
            and args.n_gpu < 2  # where transformers divides a batch, and each part needs its own
        )
        if args.cache_vision_features is not None:
            if not sees_all_once or trainer.model_init is not None:
                raise UserError(
                    "cache_vision_features needs one LlavaForCausalLM whose vision tower is frozen and has no "
                    "dropout, a LlavaCollator, and a process for each GPU: leave it out."
                )
            self.cache = FeatureCache(trainer, collator.processor)
        if sees_all_once:
            features = None if self.cache is None else self.cache.features
            self.collator = replace(collator, distinct_pictures=True, features=features)

    def prepared(self, inputs: dict[str, Any], prepare: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """
        What the model takes.

        Args:
            inputs: a batch on the device of the model.
            prepare: the Trainer's own preparation, after which floats are what DeepSpeed computes in.
        """
        pixels = inputs.get("pixel_values")
        if pixels is not None and pixels.dtype == torch.uint8 and isinstance(self._processor, LlavaProcessor):
            if can_hand_over_uint8(self._processor.image_processor):
                pixels = normalize_pixels(self._processor.image_processor, pixels)
                inputs = prepare({**inputs, "pixel_values": pixels})
        return inputs if self.cache is None else self.cache.completed(inputs)


def gives_the_same_always(tower: nn.Module) -> bool:
    """Whether a picture's features are the same in every step: nothing of the tower trains or is drawn by chance."""
    config: Any = getattr(tower, "config", None)
    chance = [value for name, value in vars(config).items() if "dropout" in name or "drop_path" in name]
    chance += [module.p for module in tower.modules() if isinstance(module, nn.Dropout)]
    return not any(chance) and not any(parameter.requires_grad for parameter in tower.parameters())
