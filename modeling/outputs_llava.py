"""What the models return: the fields of transformers' own outputs, and `image_outputs`.

The cache has the name that the installed transformers gives it, `cache` since 5.24 and `past_key_values` before:
the classes inherit it, and nothing of ours speaks it out.
"""

from dataclasses import dataclass, fields

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import ModelOutput

# A constant, because no graph of torch.compile holds a call of `fields`.
_FIELDS = frozenset(field.name for field in fields(BaseModelOutputWithPast))


class _WithImageOutputs:
    """Both outputs: `image_outputs` becomes a tuple with the rest, and has its old name still."""

    def to_tuple(self) -> tuple:
        """As in transformers, in which nothing that is `None` has a place."""
        values = (self[name] for name in self.keys())  # type: ignore[attr-defined,index]
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in values)

    @property
    def image_hidden_states(self) -> torch.Tensor | None:
        """All image features one after the other, `float[features, D]`: the name of transformers before 5.24."""
        images = self.image_outputs  # type: ignore[attr-defined]
        return None if images is None else torch.cat(tuple(images.pooler_output))


@dataclass
class LlavaModelOutput(_WithImageOutputs, BaseModelOutputWithPast):
    """
    Of [`LlavaBaseModel`]: transformers' `BaseModelOutputWithPast`, and:

    Args:
        image_outputs (*optional*): what `get_image_features` returned; `None` if the batch has no images.
    """

    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class LlavaCausalLMOutput(_WithImageOutputs, CausalLMOutputWithPast):
    """
    Of [`LlavaForCausalLM`]: transformers' `CausalLMOutputWithPast`, and:

    Args:
        image_outputs (*optional*): what `get_image_features` returned; `None` if the batch has no images.
    """

    image_outputs: BaseModelOutputWithPooling | None = None


def of_language_model(outputs: ModelOutput) -> dict:
    """The fields of a language model's output that ours have too; a mixture of experts has more."""
    return {name: value for name, value in outputs.items() if name in _FIELDS}
