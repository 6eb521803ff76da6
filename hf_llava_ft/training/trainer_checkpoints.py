"""Checkpoints and results of a training run: written whole, in the layout that the model is read from, and resumed by
the same run only.

Every override here mends something of transformers' Trainer, up to 5.24 where nothing else is said: it counts half a
checkpoint as one, writes a pickle of this machine's paths, loads none of the weights of a whole LLaVA on resuming
(their names are those of the native layout), and resumes whatever run the folder holds.
"""

import logging
import os
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerState

from hf_llava_ft.checkpoints.run_files import (
    PREFIX_CHECKPOINT_DIR,
    SAFE_WEIGHTS_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
)
from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM
from hf_llava_ft.modeling.weight_names_llava import name_in_memory
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.fsdp import whole_state_dict
from hf_llava_ft.training.guards.finite import FiniteTraining
from hf_llava_ft.training.precision.masters import dtype_of_result
from hf_llava_ft.training.precision.one_dtype import Rounded, in_one_dtype, name_dtype
from hf_llava_ft.training.resuming.fingerprint import refuse_another_course, settings_course
from hf_llava_ft.training.resuming.interruption import EvaluationStopped, Interruption, TrainingInterrupted
from hf_llava_ft.training.resuming.resume import Run, begin, remove_older, seal
from hf_llava_ft.training.trainer_push import PushingTrainer

logger = logging.getLogger(__name__)


class CheckpointingTrainer(PushingTrainer):
    """
    The part of [`LlavaTrainer`] that writes and resumes.

    Attributes:
        run (`Run`): whose checkpoints are written.
        course_before (`dict`, *optional*): the settings of the run before it was resumed.
        rounded (`Rounded`, *optional*): what writing the result in one dtype rounded.
        interruption (`Interruption`, *optional*): what a signal ends the run by.
    """

    args: LlavaTrainingArguments
    finite: FiniteTraining

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.run = Run(course=settings_course(self.args))
        self.course_before: dict[str, Any] | None = None
        self._in_one_dtype, self.rounded = True, cast("Rounded | None", None)  # see `_save`
        self.interruption: Interruption | None = None
        self._saved_at: int | None = None  # the step of the last checkpoint

    @property
    def _unwrapped_model(self) -> Any:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def resume_course_of(self, checkpoint: str) -> None:
        """Goes on as the run of `checkpoint`; a UserError if the settings are of another course."""
        before = Run.of(checkpoint)
        step = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)).global_step
        self._saved_at = step
        self.course_before = before.course
        if self.run.resumed_from == checkpoint:
            return  # compared by who knows more of the run
        note = refuse_another_course(checkpoint, before.course, self.run.course or {}, step, self.args)
        if note is not None:
            logger.warning(note)
        self.run = replace(before, course=self.run.course)

    def _run_epoch(self, *args, **kwargs) -> None:
        """As in transformers, which up to 5.24 trains a step too many where a run is resumed that had reached
        `max_steps`, or that an evaluation at its start ends."""
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """As in transformers, and the end of a run that a signal stops: there the Trainer would go on to evaluate,
        load the best checkpoint and, under `save_total_limit=1`, remove the last."""
        with suppress(EvaluationStopped):
            super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.interruption is not None and self.interruption.signal_number is not None:
            self.stop_interrupted()

    def stop_interrupted(self, missing: str | None = None) -> NoReturn:
        """
        Saves a checkpoint of this step, unless there is one, and ends the run.

        Args:
            missing (`str`, *optional*): what a run that has its result lacks.

        Raises:
            TrainingInterrupted: always.
        """
        assert self.interruption is not None and self.interruption.signal_number is not None
        if self.state.global_step not in (0, self._saved_at):
            self._save_checkpoint(self.model_wrapped, None)
        if missing is None:
            self.callback_handler.on_train_end(self.args, self.state, self.control)
        output_dir = str(self.args.output_dir)
        raise TrainingInterrupted(self.state.global_step, output_dir, self.interruption.signal_number, missing)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in transformers, and sealed when all processes have written their part; older ones go after that."""
        self.finite.see_weights(cast(nn.Module, self.model))
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        told = begin(folder, self.run) if self.args.should_save else None
        if told is not None:
            logger.warning(told)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._in_one_dtype = False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self._in_one_dtype = limit, True
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(folder, self.run)
            self.push_checkpoint(folder)
            remove_older(folder, self.run, limit, self.state.best_model_checkpoint)
        self._saved_at = self.state.global_step

    def save_model(self, output_dir: str | None = None, *args, **kwargs) -> None:
        """As in transformers, and the whole weights under FSDP too, however the state of the run is saved."""
        if self._in_one_dtype:  # not of a checkpoint, which was looked at before anything of it was written
            self.finite.see_weights(cast(nn.Module, self.model))
        with whole_state_dict(self.accelerator.state.fsdp_plugin) if self.is_fsdp_enabled else nullcontext():
            super().save_model(output_dir, *args, **kwargs)
        # A pickle of this run's paths, which nothing needs for resuming and nobody should have to load.
        if self.args.should_save:
            Path(output_dir or str(self.args.output_dir), TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            super()._save(output_dir, state_dict)  # joins what is gathered; the folder is another process's
            return
        model = self.accelerator.unwrap_model(self.model)
        if self._in_one_dtype and isinstance(model, LlavaForCausalLM):
            weights = model.state_dict() if state_dict is None else state_dict
            state_dict, self.rounded = in_one_dtype(weights, dtype_of_result(model))
        super()._save(output_dir, state_dict)
        if self._in_one_dtype and isinstance(model, LlavaForCausalLM):
            name_dtype(Path(output_dir or str(self.args.output_dir)), dtype_of_result(model))
        if isinstance(model, PeftModel):
            self.write_own_card(Path(output_dir or str(self.args.output_dir)))

    def _load_best_model(self) -> None:
        """A checkpoint of the whole model has the names of the native layout; transformers would load none of it."""
        if isinstance(self.model, PeftModel) or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._load_best_model()
        return self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """A checkpoint of the whole model has the names of the native layout: translated here, and loaded strictly."""
        model = self.model if model is None else model
        shards = sorted(Path(resume_from_checkpoint).glob(f"{Path(SAFE_WEIGHTS_NAME).stem}*.safetensors"))
        if not shards or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        missing = set(model.state_dict())
        for shard in shards:
            state_dict = {name_in_memory(name): tensor for name, tensor in load_file(os.fspath(shard)).items()}
            result = model.load_state_dict(state_dict, strict=False)
            if result.unexpected_keys:
                raise ValueError(
                    f"{shard} holds weights this model does not have, {result.unexpected_keys[0]} among them."
                )
            missing -= set(state_dict)
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        if missing - tied:
            raise ValueError(
                f"{resume_from_checkpoint} lacks weights of this model, {min(missing - tied)} among them."
            )
