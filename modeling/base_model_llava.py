"""`LlavaBaseModel`: vision tower, projector and language model, and how a picture's features take the place of its
placeholders in the text.

It stands on `PreTrainedModel` alone, not on the native LLaVA, whose inside changes with nearly every release, while
code that travelled to the Hub with a checkpoint stays what it is. Two things may surprise: the cache goes through in
`**kwargs`, known by its type, because its name changed in transformers 5.24; and under `torch.compile` nothing is
checked that would have to be read from the data.

Legend of the shapes: B rows, T positions (text and image), N images of the batch, C crops of theirs in LLaVA-1.6, P
features per image, F their width in the tower, D text width.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .anyres_llava import merged_crops, num_crops
from .configuration_llava import LlavaConfig
from .outputs_llava import LlavaModelOutput, of_language_model
from .projector_llava import LlavaMultiModalProjector


class LlavaPreTrainedModel(PreTrainedModel):
    """What transformers wants to know of a LLaVA; as of its native one."""

    config_class = LlavaConfig
    config: Any  # a LlavaConfig; while it is being saved as llava-hf, the native one
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


# Not called `LlavaModel`: transformers 5 looks weight conversions up by class name first, and that name has one.
class LlavaBaseModel(LlavaPreTrainedModel):
    """Vision tower, projector and language model without a head; registered with `AutoModel`."""

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config, trust_remote_code=False)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config, trust_remote_code=False)
        if config.has_image_newline:
            width = config.text_config.hidden_size
            self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)  # as the original begins with
        self.post_init()

    # Named, where transformers would have to guess: an adapter, a resize and an offload ask for them.
    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def vision_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, Any]:
        """
        What the projector reads, `float[N or C, P, F]`, and the output of the tower that it is of.

        Args: as in [`get_image_features`].
        """
        chosen = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        wants_states = kwargs.pop("output_hidden_states", None) or self.config.vision_config.output_hidden_states
        outputs = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True, **kwargs)
        layers = [chosen] if isinstance(chosen, int) else chosen
        states = [outputs.hidden_states[layer] for layer in layers]
        if strategy == "default":
            states = [state[:, 1:] for state in states]
        if not wants_states:
            outputs.hidden_states = None  # or they would be held until the backward pass
        return torch.cat(states, dim=-1), outputs

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        picture_index: list[int] | None = None,
        **kwargs,
    ):
        """
        The output of the tower, whose `pooler_output` is a list of one tensor `float[features, D]` for each of N
        pictures.

        Args:
            pixel_values: `float[N, 3, H, W]`; or, in LLaVA-1.6, the crops of all pictures one after the other,
                `float[C, 3, H, W]`, or by picture, filled up with blank ones, `float[N, crops, 3, H, W]`.
            vision_feature_layer (*optional*): the hidden state, or those, that the projector reads; by default that of
                the configuration, as for:
            vision_feature_select_strategy (*optional*): `"default"` drops the first position, CLIP's class token;
                `"full"` keeps it.
            image_sizes (`int64[N, 2]`, *optional*): height and width of the pictures, for LLaVA-1.6.
            vision_features (`float[N or C, P, F]`, *optional*): instead of `pixel_values`, what the tower made of
                them.
            picture_index (`list[int]`, *optional*): which of the N pictures is meant, for each that `pooler_output` is
                to have: one that comes several times is computed once.
            kwargs: for the tower, such as `output_hidden_states`.

        Raises:
            ValueError: if pictures of the sizes given have another number of crops.
        """
        counts: list[int] | None = None
        if self.config.image_aspect_ratio == "anyres" and image_sizes is not None:
            image_sizes = image_sizes.cpu()  # read twice as numbers: a device is waited for once
            counts = num_crops(image_sizes, self.config)
            if pixel_values is not None and pixel_values.dim() == 5:
                pixel_values = torch.cat([crops[:count] for crops, count in zip(pixel_values, counts, strict=True)])
            name, given = (
                ("pixel_values", pixel_values) if vision_features is None else ("vision_features", vision_features)
            )
            if given is not None and len(given) != sum(counts):
                raise ValueError(
                    f"pictures of the sizes given in image_sizes have {sum(counts)} crops, and {name} holds "
                    f"{len(given)}: make both with the same processor."
                )
        if vision_features is not None:
            outputs: Any = BaseModelOutputWithPooling()
        else:
            assert pixel_values is not None
            vision_features, outputs = self.vision_features(
                pixel_values, vision_feature_layer, vision_feature_select_strategy, **kwargs
            )
        features = self.multi_modal_projector(vision_features)  # (N or C, P, D)
        if counts is None or image_sizes is None:
            pictures = list(features)
        else:
            newline = self.image_newline if self.config.has_image_newline else None
            pictures = merged_crops(features.split(counts), image_sizes, self.config, newline)
        outputs.pooler_output = pictures if picture_index is None else [pictures[place] for place in picture_index]
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        picture_index: list[int] | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs,
    ) -> LlavaModelOutput:
        """
        Args:
            input_ids (`int64[B, T]`): with `config.image_token_id` once per image feature, as the processor has it.
            pixel_values (`float[N, 3, H, W]`, *optional*): all images of the batch, in the order of the placeholders;
                in LLaVA-1.6 their crops, see `get_image_features`.
            image_sizes (`int64[N, 2]`, *optional*): height and width of the images, for LLaVA-1.6.
            vision_features, picture_index (*optional*): see `get_image_features`.
            attention_mask (`int64[B, T]`, *optional*): 1 where there is a token; padding may be left or right.
            inputs_embeds (`float[B, T, D]`, *optional*): instead of `input_ids`.
            mm_encoder_outputs (`dict`, *optional*): under `"image"` what `get_image_features` returned, instead of
                `pixel_values`.
            kwargs: for the language model, the cache among them.

        Raises:
            ValueError: if placeholders and image features differ in number, naming both, or `pixel_values` are whole
                numbers.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if sum(given is not None for given in (pixel_values, vision_features, image_outputs)) > 1:
            raise ValueError("pass either pixel_values or vision_features or the image outputs in mm_encoder_outputs")

        if input_ids is not None:
            inputs_embeds = self.get_input_embeddings()(self._embeddable_ids(input_ids))
        assert inputs_embeds is not None

        if pixel_values is not None or vision_features is not None:
            if pixel_values is not None and not pixel_values.is_floating_point():
                raise ValueError(
                    f"pixel_values are {pixel_values.dtype}, levels that nothing has normalised: pass them through "
                    "normalize_pixels first, or have the collator give floats."
                )
            wanted = ("output_hidden_states", "output_attentions")
            image_outputs = self.get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_sizes=image_sizes,
                vision_features=vision_features,
                picture_index=picture_index,
                return_dict=True,
                **{name: kwargs[name] for name in wanted if kwargs.get(name) is not None},
            )
        if image_outputs is not None:
            pictures = image_outputs.pooler_output  # N tensors (P, D)
            image_mask = self._image_mask(input_ids, inputs_embeds)
            inputs_embeds = self._merge(inputs_embeds, image_mask, torch.cat(tuple(pictures)), len(pictures))
        elif not holds_positions(kwargs):
            self._refuse_placeholders(input_ids)
            inputs_embeds = self._with_idle_vision(inputs_embeds)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        return LlavaModelOutput(**of_language_model(outputs), image_outputs=image_outputs)

    def _refuse_placeholders(self, input_ids) -> None:
        """Refuses placeholders for which there are no pictures."""
        if input_ids is None or torch.compiler.is_compiling():  # which cannot branch on what the ids are
            return
        num_placeholders = int((input_ids == self.config.image_token_id).sum())
        if num_placeholders:
            raise ValueError(
                f"the text holds {num_placeholders} image placeholders, but there are no pixel_values: "
                f"pass the images to the processor together with the text."
            )

    def _image_mask(self, input_ids, inputs_embeds) -> torch.Tensor:
        """`bool[B, T]`, true at the image placeholders."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(self._embeddable_ids(token))).all(-1)

    def _embeddable_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        # An original checkpoint has no embedding row for the image token. The row looked up instead is overwritten.
        if self.config.image_token_id < self.config.text_config.vocab_size:
            return input_ids
        return input_ids.masked_fill(input_ids == self.config.image_token_id, 0)

    @staticmethod
    def _merge(inputs_embeds, image_mask, image_features, num_images: int) -> torch.Tensor:
        """Puts `image_features` `float[N * P, D]` at the placeholders of `inputs_embeds` `float[B, T, D]`, in
        order."""
        if torch.compiler.is_compiling():  # the number of placeholders is data, on which no graph can branch
            return inputs_embeds.masked_scatter(image_mask[..., None], image_features.to(inputs_embeds))
        positions = image_mask.flatten().nonzero().squeeze(-1)  # (N * P,)
        if len(positions) != len(image_features):
            raise ValueError(
                f"Image features and image tokens do not match: the text holds {len(positions)} image placeholders, "
                f"but {num_images} images give {len(image_features)} features."
            )
        flat = inputs_embeds.reshape(-1, inputs_embeds.shape[-1])
        # The same result as `masked_scatter`, in a seventh of its time on CPU.
        merged = flat.index_copy(0, positions.to(flat.device), image_features.to(flat.device, flat.dtype))
        return merged.view_as(inputs_embeds)

    def _with_idle_vision(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Ties tower and projector into the graph of a batch without images where they train or are sharded."""
        parts = [*self.vision_tower.parameters(), *self.multi_modal_projector.parameters()]
        if self.config.has_image_newline:
            parts.append(self.image_newline)
        trains = torch.is_grad_enabled() and self.training and any(part.requires_grad for part in parts)
        # A part that is shared out has to be gathered by all processes at once. `full_tensor` is the mark of FSDP2,
        # `ds_id` that of ZeRO-3.
        is_sharded = any(hasattr(part, "full_tensor") or hasattr(part, "ds_id") for part in parts)
        if not trains and not is_sharded:
            return inputs_embeds
        vision = self.config.vision_config
        shape = (1, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size)
        blank = torch.zeros(shape, dtype=self.vision_tower.dtype, device=self.vision_tower.device)
        features = torch.cat(tuple(self.get_image_features(pixel_values=blank, return_dict=True).pooler_output), dim=0)
        # The sum of an empty slice is an exact zero, where `features.sum() * 0` would spread an overflow as NaN.
        if self.config.has_image_newline:
            features = torch.cat((features, self.image_newline[None].to(features)))
        return inputs_embeds + features[:0].sum().to(inputs_embeds.device, inputs_embeds.dtype)


def holds_positions(kwargs: dict[str, Any]) -> bool:
    """Whether there is a cache among `kwargs` that holds positions already: then the pictures are in it."""
    cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
    if cache is None:
        return False
    # A static cache counts on the device, and no graph can branch on that; only decoding is compiled.
    return torch.compiler.is_compiling() or bool(cache.get_seq_length() > 0)
