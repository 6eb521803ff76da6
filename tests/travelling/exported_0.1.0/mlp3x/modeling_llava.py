"""`LlavaForCausalLM`: transformers' native LLaVA, made right and fast for training.

It inherits generation, attention dispatch, checkpointing and parallel plans, and with `mlp2x_gelu` it has the native
module tree and the native logits. What differs:

* any projector of the family in `projector_llava.py`, and any checkpoint dialect (`checkpoint_mixin_llava.py`);
* LLaVA-1.6 too, whose pictures are several crops (`anyres_llava.py`); transformers has it as `llava_next`;
* the loss never counts an image placeholder or a padding position, whatever the labels say;
* `supervised_logits_only=True` computes head and loss at the supervised positions alone;
* a batch without images still puts tower and projector into the graph when they train, so that no rank of a
  distributed run waits for another, and their gradient is zero instead of `None`;
* an image token id outside the embedding is allowed, as original checkpoints have it.

Legend of the shapes: B rows, T positions (text and image), N images of the batch, C crops of theirs in LLaVA-1.6, P
features per image, D text width.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaForConditionalGeneration,
    LlavaModelOutputWithPast,
    LlavaPreTrainedModel,
)
from transformers.models.llava.modeling_llava import LlavaModel as NativeLlavaModel

from .anyres_llava import merged_crops, num_crops
from .checkpoint_mixin_llava import LlavaCheckpointMixin
from .configuration_llava import LlavaConfig
from .projector_llava import LlavaMultiModalProjector

IGNORE_INDEX = -100


# Not called `LlavaModel`: transformers 5 looks weight conversions up by class name first, and that name has one.
class LlavaBaseModel(NativeLlavaModel):
    """Vision tower, projector and language model without a head; registered with `AutoModel`."""

    config_class = LlavaConfig
    config: LlavaConfig

    def __init__(self, config: LlavaConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)  # type: ignore[assignment]
        self.language_model = AutoModel.from_config(config.text_config)
        if config.has_image_newline:
            width = config.text_config.hidden_size
            self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)  # as the original begins with
        self.post_init()

    def get_image_features(self, pixel_values, image_sizes=None, **kwargs):
        """
        As in transformers; in LLaVA-1.6, with `image_sizes` `int64[N, 2]`, `pooler_output` holds one tensor
        `float[features, D]` for each of N pictures.

        Args:
            pixel_values: `float[N, 3, H, W]`; or, in LLaVA-1.6, the crops of all pictures one after the other,
                `float[C, 3, H, W]`, or by picture, filled up with blank ones, `float[N, crops, 3, H, W]`.
        """
        if self.config.image_aspect_ratio != "anyres" or image_sizes is None:
            return super().get_image_features(pixel_values=pixel_values, **kwargs)
        counts = num_crops(image_sizes, self.config)
        if pixel_values.dim() == 5:
            pixel_values = torch.cat([crops[:count] for crops, count in zip(pixel_values, counts, strict=True)])
        if len(pixel_values) != sum(counts):
            raise ValueError(
                f"pictures of the sizes given in image_sizes have {sum(counts)} crops, and pixel_values holds "
                f"{len(pixel_values)}: make both with the same processor."
            )
        outputs = super().get_image_features(pixel_values=pixel_values, **kwargs)
        by_image = torch.stack(tuple(outputs.pooler_output)).split(counts)  # each (crops, P, D)
        newline = self.image_newline if self.config.has_image_newline else None
        outputs.pooler_output = merged_crops(by_image, image_sizes, self.config, newline)
        return outputs

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs,
    ) -> LlavaModelOutputWithPast:
        """
        Args:
            input_ids (`int64[B, T]`): with `config.image_token_id` once per image feature, as the processor has it.
            pixel_values (`float[N, 3, H, W]`, *optional*): all images of the batch, in the order of the placeholders;
                in LLaVA-1.6 their crops, see `get_image_features`.
            image_sizes (`int64[N, 2]`, *optional*): height and width of the images, for LLaVA-1.6.
            attention_mask (`int64[B, T]`, *optional*): 1 where there is a token; padding may be left or right.
            inputs_embeds (`float[B, T, D]`, *optional*): instead of `input_ids`.

        Raises:
            ValueError: if placeholders and image features differ in number, naming both, or `pixel_values` are whole
                numbers.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")

        if input_ids is not None:
            inputs_embeds = self.get_input_embeddings()(self._embeddable_ids(input_ids))
        assert inputs_embeds is not None

        image_features = None
        if pixel_values is not None:
            if not pixel_values.is_floating_point():
                raise ValueError(
                    f"pixel_values are {pixel_values.dtype}, levels that nothing has normalised: pass them through "
                    "normalize_pixels first, or have the collator give floats."
                )
            outputs = self.get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_sizes=image_sizes,
                return_dict=True,
            )
            image_features = torch.cat(tuple(outputs.pooler_output), dim=0)  # (N * P, D)
            image_mask = self._image_mask(input_ids, inputs_embeds)
            num_images = len(pixel_values) if image_sizes is None else len(image_sizes)
            inputs_embeds = self._merge(inputs_embeds, image_mask, image_features, num_images=num_images)
        elif past_key_values is None or past_key_values.get_seq_length() == 0:
            num_placeholders = 0 if input_ids is None else int((input_ids == self.config.image_token_id).sum())
            if num_placeholders:
                raise ValueError(
                    f"the text holds {num_placeholders} image placeholders, but there are no pixel_values: "
                    f"pass the images to the processor together with the text."
                )
            inputs_embeds = self._with_idle_vision(inputs_embeds)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return LlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
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
        positions = image_mask.flatten().nonzero().squeeze(-1)  # (N * P,)
        if len(positions) != len(image_features):
            raise ValueError(
                f"the text holds {len(positions)} image placeholders, but {num_images} images give "
                f"{len(image_features)} features: the numbers must be equal."
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
        # A part that is shared out has to be gathered by all processes at once: `full_tensor` is FSDP2's.
        is_sharded = is_deepspeed_zero3_enabled() or any(hasattr(part, "full_tensor") for part in parts)
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


class LlavaForCausalLM(LlavaCheckpointMixin, LlavaForConditionalGeneration):
    """LLaVA with a language model head; registered with `AutoModelForCausalLM` and `AutoModelForImageTextToText`."""

    config_class = LlavaConfig
    config: Any  # a LlavaConfig; while it is being saved as llava-hf, the native one

    def __init__(self, config: LlavaConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.model = LlavaBaseModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        supervised_logits_only: bool = False,
        **kwargs,
    ) -> LlavaCausalLMOutputWithPast:
        """
        Args (beyond those of [`LlavaBaseModel.forward`]):
            labels (`int64[B, T]`, *optional*): the ids to learn, -100 elsewhere. Image placeholders and padding are
                masked here whatever they hold.
            logits_to_keep (`int` or `int64[K]`): as in transformers; only without labels.
            supervised_logits_only (`bool`): with `labels`, compute `logits` `float[S, V]` only at the S positions that
                predict a supervised token, in row-major order. The loss is the same.
            num_items_in_batch (`int` or tensor, *optional*): divide the summed loss by it instead of taking the mean.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            **{name: value for name, value in kwargs.items() if name != "num_items_in_batch"},
        )
        hidden_states = outputs.last_hidden_state  # (B, T, D)
        loss = None
        if labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept, :])
        else:
            targets = self.next_token_targets(labels, input_ids, attention_mask)
            if supervised_logits_only:
                supervised = targets != IGNORE_INDEX
                hidden_states = hidden_states[supervised.to(hidden_states.device)]  # (S, D)
                targets = targets[supervised]
            logits = self.lm_head(hidden_states)
            loss = self.loss_function(
                logits=logits,
                labels=None,
                shift_labels=targets,
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
            )
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def enable_input_require_grads(self):
        """As in transformers; but a frozen tower gets no gradient, for which checkpointing would compute it again."""
        super().enable_input_require_grads()
        tower = self.model.vision_tower

        def cut_off_if_frozen(module, inputs, output):
            needed = inputs[0].requires_grad or any(parameter.requires_grad for parameter in tower.parameters())
            return None if needed else output.detach()

        self._require_grads_hooks.append(tower.get_input_embeddings().register_forward_hook(cut_off_if_frozen))

    def next_token_targets(self, labels: torch.Tensor, input_ids, attention_mask) -> torch.Tensor:
        """`int64[B, T]`: at each position the label of the next one, or -100."""
        if input_ids is not None:
            labels = labels.masked_fill(input_ids.to(labels.device) == self.config.image_token_id, IGNORE_INDEX)
        if attention_mask is not None and attention_mask.shape == labels.shape:
            labels = labels.masked_fill(attention_mask.to(labels.device) == 0, IGNORE_INDEX)
        return nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:].contiguous()


__all__ = ["LlavaBaseModel", "LlavaForCausalLM", "LlavaMultiModalProjector"]
