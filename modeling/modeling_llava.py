"""`LlavaForCausalLM`: LLaVA with the module tree, names and logits of transformers' native classes, right and fast for
training. What differs from native:

* any projector of the family in `projector_llava.py`, and any checkpoint dialect (`checkpoint_mixin_llava.py`);
* LLaVA-1.6 too, whose pictures are several crops (`anyres_llava.py`); transformers has it as `llava_next`;
* the loss never counts an image placeholder or a padding position, whatever the labels say;
* `supervised_logits_only=True` computes head and loss at the supervised positions alone;
* a batch without images still puts tower and projector into the graph when they train, so that no rank of a
  distributed run waits for another, and their gradient is zero instead of `None`;
* an image token id outside the embedding is allowed, as original checkpoints have it.

Legend of the shapes: B rows, T positions (text and image), D text width, S supervised positions, V vocabulary.
"""

from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.utils import can_return_tuple

from .base_model_llava import LlavaBaseModel, LlavaPreTrainedModel, holds_positions
from .checkpoint_mixin_llava import LlavaCheckpointMixin
from .chunked_loss_llava import can_chunk, chunked_loss, rows_of_chunk
from .configuration_llava import LlavaConfig
from .outputs_llava import LlavaCausalLMOutput
from .projector_llava import LlavaMultiModalProjector

IGNORE_INDEX = -100


class LlavaForCausalLM(LlavaCheckpointMixin, LlavaPreTrainedModel, GenerationMixin):
    """LLaVA with a language model head; registered with `AutoModelForCausalLM` and `AutoModelForImageTextToText`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.model = LlavaBaseModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs):
        """See [`LlavaBaseModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values=pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        *,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        supervised_logits_only: bool = False,
        num_items_in_batch: int | torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs,
    ) -> LlavaCausalLMOutput:
        """
        Args (beyond those of [`LlavaBaseModel.forward`]):
            labels (`int64[B, T]`, *optional*): the ids to learn, -100 elsewhere. Image placeholders and padding are
                masked here whatever they hold.
            logits_to_keep (`int` or `int64[K]`): as in transformers; only without labels.
            supervised_logits_only (`bool`): with `labels`, compute `logits` `float[S, V]` only at the S positions that
                predict a supervised token, in row-major order. The loss is the same. In training, logits that would
                take much memory are computed a few rows at a time, and `logits` is None.
            num_items_in_batch (`int` or tensor, *optional*): divide the summed loss by it instead of taking the mean.
            shift_labels (`int64[B, T]`, *optional*): instead of `labels`, at each position what is to be learned
                there, as engines give it that share a row out among processes; nothing is masked or moved.
            kwargs: what [`LlavaBaseModel.forward`] takes beside these, such as `vision_features`.
        """
        # Not an argument by name: transformers' Trainer would take it for labels that every batch has to hold.
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        fields = dict(outputs)
        hidden_states = fields.pop("last_hidden_state")  # (B, T, D)
        loss = None
        if labels is None and shift_labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept, :])
        else:
            if shift_labels is not None:
                targets = shift_labels
            else:
                assert labels is not None
                targets = self.next_token_targets(labels, input_ids, attention_mask)
            if supervised_logits_only:
                # Asked for once: a device is waited for each time that it says how many there are.
                supervised = (targets != IGNORE_INDEX).flatten().nonzero().squeeze(-1)  # (S,)
                hidden_states = hidden_states.flatten(0, 1)[supervised.to(hidden_states.device)]  # (S, D)
                targets = targets.flatten()[supervised]

            def loss_of(logits, targets, num_items_in_batch):
                return self.loss_function(
                    logits=logits,
                    labels=None,
                    shift_labels=targets,
                    vocab_size=self.config.text_config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                )

            rows = None
            if supervised_logits_only and self.training and can_chunk(self.lm_head, hidden_states):
                rows = rows_of_chunk(len(targets), self.config.text_config.vocab_size)
            if rows is None:
                logits = self.lm_head(hidden_states)
                loss = loss_of(logits, targets, num_items_in_batch)
            else:
                logits = None
                loss = chunked_loss(self.lm_head, hidden_states, targets, loss_of, num_items_in_batch, rows)
        return LlavaCausalLMOutput(loss=loss, logits=logits, **fields)

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` takes only what its signature names
    def prepare_inputs_for_generation(self, input_ids, *args, is_first_iteration: bool | None = False, **kwargs):
        """As in transformers, which takes the first step of an assistant model for a later one and drops the pictures:
        the first step is that of an empty cache."""
        is_first = is_first_iteration or not holds_positions(kwargs)
        return super().prepare_inputs_for_generation(input_ids, *args, is_first_iteration=is_first, **kwargs)

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
