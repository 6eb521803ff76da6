"""`LlavaTrainer`: transformers' Trainer with what LLaVA needs and it lacks.

Learning rates of their own for projector and tower; batches by modality and length; head and loss at the supervised
positions only; checkpoints in the layout that the model is read from. The loss is the mean over the supervised tokens
of the whole optimiser step, over accumulation and ranks; the original's mean of the means of the micro-batches is
`loss_normalization="micro_batch"`.
"""

import logging
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.data.streaming import LlavaStream
from hf_llava_ft.data.streaming.loader import StreamPosition, refuse_grouping
from hf_llava_ft.errors import UserError
from hf_llava_ft.evaluation.token_losses import LossOverTokens, row_losses
from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.settings.defaults import training_with_defaults
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.evaluation import untouched_rng
from hf_llava_ft.training.fsdp import check_fsdp, share_out_by_layers
from hf_llava_ft.training.guards.finite import FiniteTraining
from hf_llava_ft.training.guards.longest_batch import LongestBatch
from hf_llava_ft.training.guards.moved_weights import MovedWeights
from hf_llava_ft.training.guards.out_of_memory import advice, advice_for_evaluation, told_of_out_of_memory
from hf_llava_ft.training.learning_rates import give_own_rates
from hf_llava_ft.training.precision.masters import (
    keeps_own_masters,
    remember_dtype,
    with_float32_masters,
    without_float16_on_cpu,
)
from hf_llava_ft.training.resuming.changed_settings import ChangedSettings, settings_of_groups
from hf_llava_ft.training.resuming.resume import checkpoint_to_resume
from hf_llava_ft.training.row_order import (
    counted_lengths,
    leave_ungrouped_what_has_no_lengths,
    num_rows,
)
from hf_llava_ft.training.speed.compiled import compile_layers, compiles
from hf_llava_ft.training.speed.packed_attention import (
    DocumentsApart,
    attention_of,
    packed_inputs,
    use_packed_attention,
    without_mask_the_same,
)
from hf_llava_ft.training.speed.padding_free import goes_without_padding
from hf_llava_ft.training.speed.tower_inputs import TowerInputs
from hf_llava_ft.training.throughput import Throughput
from hf_llava_ft.training.trainer_batches import BatchingTrainer
from hf_llava_ft.training.tuning import what_trains

logger = logging.getLogger(__name__)


class LlavaTrainer(BatchingTrainer):
    """
    As `transformers.Trainer`; `processing_class` is the [`LlavaProcessor`], from which the collator is made when none
    is given.

        data = load_data("data.json", "images")
        trainer = LlavaTrainer(model, args, train_dataset=data, processing_class=processor)
        trainer.train()
    """

    args: LlavaTrainingArguments

    def __init__(self, model=None, args: LlavaTrainingArguments | None = None, data_collator=None, **kwargs):
        processor = self._processor = kwargs.get("processing_class")
        if data_collator is None and isinstance(processor, LlavaProcessor):
            data_collator = LlavaCollator(processor, uint8_pixels=True)
        self.longest_batch = LongestBatch(self)
        self.finite = FiniteTraining(self)
        # First, so that what they refuse is said before a progress bar is up.
        own = [
            StreamPosition(),
            DocumentsApart(self),
            self.longest_batch,
            self.finite,
            MovedWeights(),
            ChangedSettings(self),
        ]
        kwargs["callbacks"] = [*own, *(kwargs.get("callbacks") or [])]
        args = args or LlavaTrainingArguments()
        leave_ungrouped_what_has_no_lengths(args, kwargs.get("train_dataset"))
        if isinstance(model, LlavaForCausalLM) and all(each.requires_grad for each in model.parameters()):
            # Of a model that was tuned, be it as a whole, the tower's last layers are frozen.
            logger.warning(
                "All weights of the model will be trained, its vision tower among them: "
                "hf_llava_ft.with_tuning(model, TuningArguments()) chooses, by default LoRA and the projector."
            )
        if model is not None and args.unsaid:
            rows, cut_at = kwargs.get("train_dataset"), getattr(data_collator, "max_length", None)
            counted = counted_lengths(rows, processor, cut_at) if args.packing else None
            lengths = None if counted is None else counted.tolist()
            args = training_with_defaults(args, what_trains(model), num_rows(rows), lengths=lengths)
        if model is not None:
            model = _with_masters(model, args)
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        self.tower_inputs = TowerInputs(self, self.data_collator)
        self.data_collator = self.tower_inputs.collator
        if isinstance(self.train_dataset, LlavaStream):
            refuse_grouping(self.args)
        self._prepare_attention(self._unwrapped_model)
        self.is_compiled = compiles(self._unwrapped_model, self.args)
        if self.is_compiled:
            compile_layers(self._unwrapped_model)
        if isinstance(processor, LlavaProcessor):
            self._give_loss_to(self._unwrapped_model)
            self.label_smoother = None  # transformers' own, which would not move the labels
        elif self.args.label_smoothing_factor:
            raise UserError("label_smoothing_factor needs a LlavaProcessor as processing_class, by which labels move.")
        if self.args.loss_normalization == "micro_batch":
            # The Trainer then counts no tokens: the model gives the mean, which is divided by the accumulation steps.
            # In transformers 5.17 as in 5.23.
            self.model_accepts_loss_kwargs = False
        check_fsdp(self.args, is_running=self.is_fsdp_enabled)
        if self.is_fsdp_enabled:
            share_out_by_layers(self.accelerator.state.fsdp_plugin, self.model)  # type: ignore[arg-type]
        self.told_of_groups: list[dict[str, Any]] | None = None
        self.throughput = Throughput()
        # Behind a row's end nothing is learned, and no position looks ahead: the mask of padding on the right changes
        # nothing, and attention is faster without. The collator's labels say the same, so that it is not read.
        pads_right = isinstance(self.data_collator, LlavaCollator) and self.data_collator.padding_side == "right"
        self._needs_no_mask = pads_right and without_mask_the_same(self._unwrapped_model)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As in transformers, which makes a model of `model_init` for each trial: prepared as one that is given."""
        model = _with_masters(super().call_model_init(trial), self.args)
        unwrapped = model.get_base_model() if isinstance(model, PeftModel) else model
        self._give_loss_to(unwrapped)
        self._prepare_attention(unwrapped)
        return model

    def _prepare_attention(self, model: Any) -> None:
        if self.args.packing:
            use_packed_attention(model)
        if hasattr(self, "data_collator"):  # transformers makes the first model of `model_init` before it
            own_loss = self.compute_loss_func is not None or type(self).compute_loss is not LlavaTrainer.compute_loss
            self.is_padding_free = goes_without_padding(model, self.data_collator, self.args, own_loss=own_loss)

    def _give_loss_to(self, model: Any) -> None:
        processor = self._processor
        if isinstance(processor, LlavaProcessor):
            model.loss_function = LossOverTokens(
                num_tokens=max(processor.tokenizer.get_vocab().values()) + 1,
                image_token_id=processor.image_token_id,
                label_smoothing=self.args.label_smoothing_factor,
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in transformers, but that a checkpoint of another course is refused. Too little memory is a `UserError`
        that says what to change."""
        checkpoint, _ = checkpoint_to_resume(resume_from_checkpoint, str(self.args.output_dir))
        if checkpoint is not None:
            self.resume_course_of(checkpoint)
        self.throughput.start()
        with told_of_out_of_memory(self._what_did_not_fit):
            return super().train(checkpoint, *args, **kwargs)

    def _what_did_not_fit(self) -> str:
        trying = self.longest_batch.trying
        doing = f"step {self.state.global_step + 1}" if trying is None else f"{trying}, tried before the first step"
        return f"{doing}. {advice(self.model, self.args)}"

    def get_batch_samples(self, *args, **kwargs):
        """As in transformers; what is in the batches is counted in `throughput`."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            self.throughput.count(batch)
        return batches, num_items

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """As in transformers; the loss is handed to `finite`."""
        loss = super().training_step(*args, **kwargs)
        self.finite.see_loss(loss)
        return loss

    def _get_grad_norm(self, *args, **kwargs):
        """As in transformers; NotFinite where it, or a loss of this step, is NaN or infinite."""
        norm = super()._get_grad_norm(*args, **kwargs)
        self.finite.see_gradients(norm)
        return norm

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As in transformers, and pictures become what the model takes, see [`TowerInputs`]; so do rows that stand one
        behind the other, whoever computes a loss of them."""
        prepare = super()._prepare_inputs
        inputs = self.tower_inputs.prepared(prepare(inputs), prepare)
        return packed_inputs(inputs, attention_of(self._unwrapped_model)) if "document_lengths" in inputs else inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training and not return_outputs and self.compute_loss_func is None:
            inputs = {**inputs, "supervised_logits_only": True}
            if self._needs_no_mask and "position_ids" not in inputs:  # which are of rows one behind the other
                inputs.pop("attention_mask", None)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if is_new:
            give_own_rates(optimizer, cast(nn.Module, self.model) if model is None else model, self.args)
            self.told_of_groups = settings_of_groups(optimizer)
        return optimizer

    # ------------------------------------------------------------------ what mends transformers

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As in transformers, but that the training after it is what it would have been without: up to 5.24, an
        evaluation draws random numbers from the generator of the training. Too little memory is a `UserError`."""
        what = f"the evaluation after step {self.state.global_step}. {advice_for_evaluation(self.args)}"
        with self.throughput.paused(), untouched_rng(), told_of_out_of_memory(lambda: what):
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        """
        As in transformers, but that the loss is the mean over the supervised tokens of all rows.

        transformers, up to 5.24, takes the mean of the means of the batches, in which a token of a batch of few counts
        for more, and which changes with the size of the batches.
        """
        self._eval_sums = torch.zeros(2, dtype=torch.float64)
        kwargs["metric_key_prefix"] = metric_key_prefix
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        total, num_tokens = self._eval_sums.tolist()
        if num_tokens and output.metrics is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = total / num_tokens
        self.finite.see_metrics(output.metrics, f"{metric_key_prefix}_loss")
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        unwrapped = self._unwrapped_model
        is_ours = isinstance(unwrapped, LlavaForCausalLM) and isinstance(unwrapped.loss_function, LossOverTokens)
        if not prediction_loss_only or not is_ours or self.compute_loss_func or inputs.get("labels") is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        targets = unwrapped.next_token_targets(inputs["labels"], inputs["input_ids"], inputs.get("attention_mask"))
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs, supervised_logits_only=True).logits
        loss = unwrapped.loss_function
        sums = row_losses(loss.over_tokens(logits), targets, loss.of_each)
        # Of all processes, without the rows that accelerate repeats to give each process as many.
        self._eval_sums += self.accelerator.gather_for_metrics(sums).to("cpu", torch.float64).sum(0)
        total, num_tokens = sums.sum(0)
        return total / num_tokens.clamp(min=1), None, None


def _with_masters(model: Any, args: LlavaTrainingArguments) -> Any:
    remember_dtype(model.get_base_model() if isinstance(model, PeftModel) else model)
    if not keeps_own_masters(args):
        without_float16_on_cpu(with_float32_masters(model), args)
    return model
