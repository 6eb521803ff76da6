"""The projector family of LLaVA: from the width of the vision tower to that of the language model.

`mlp2x_gelu` has the parameter names of transformers' own `LlavaMultiModalProjector` (`linear_1`, `linear_2`), so its
weights fit the native model as they are; the others go on counting.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_llava import LlavaConfig


class LlavaMultiModalProjector(nn.Module):
    """
    `config.projector_type` as a module: `linear_1 [act linear_2 [act ...]]`, or nothing at all for `identity`.

    Source: haotian-liu/LLaVA, `multimodal_projector/builder.py`; LLaVA-1.5 (arXiv 2310.03744), section 3.3.
    """

    def __init__(self, config: LlavaConfig):
        super().__init__()
        layers = config.vision_feature_layer
        num_feature_layers = 1 if isinstance(layers, int) else len(layers)
        width = config.vision_config.hidden_size * num_feature_layers
        self.num_layers = config.num_projector_layers
        self.act = ACT2FN[config.projector_hidden_act]
        for index in range(1, self.num_layers + 1):
            layer = nn.Linear(width, config.text_config.hidden_size, bias=config.multimodal_projector_bias)
            self.add_module(f"linear_{index}", layer)
            width = config.text_config.hidden_size

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """Projects features `float[N, P, C]` to `float[N, P, D]`."""
        hidden_states = image_features
        if self.num_layers:
            # In training it may be kept in higher precision than the tower.
            hidden_states = hidden_states.to(self.get_parameter("linear_1.weight").dtype)
        for index in range(1, self.num_layers + 1):
            if index > 1:
                hidden_states = self.act(hidden_states)
            hidden_states = self.get_submodule(f"linear_{index}")(hidden_states)
        return hidden_states
