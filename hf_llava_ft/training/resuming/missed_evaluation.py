"""The evaluation that a signal left out or cut short, when the run goes on: what follows from it (the best checkpoint,
early stopping, a schedule that waits for a plateau) is what it would have been."""

from pathlib import Path
from typing import Any

from transformers import IntervalStrategy, TrainerCallback

from hf_llava_ft.checkpoints.run_files import PREFIX_CHECKPOINT_DIR


class MissedEvaluation(TrainerCallback):
    """Evaluates before the first step of a resumed run, if its checkpoint should hold an evaluation and does not."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if not _was_missed(args, state):
            return
        trial, ignore_keys = None, None
        metrics = self.trainer._evaluate(trial, ignore_keys)
        if self.trainer._determine_best_metric(metrics=metrics, trial=trial):
            # The Trainer looks for it when it saves the next one, which may be never.
            state.best_model_checkpoint = str(Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"))


def _was_missed(args: Any, state: Any) -> bool:
    step = state.global_step
    if step == 0 or any(entry.get("step") == step and "eval_loss" in entry for entry in state.log_history):
        return False
    if args.eval_strategy == IntervalStrategy.STEPS:
        return step >= args.eval_delay and (step % state.eval_steps == 0 or step >= state.max_steps)
    is_whole_epoch = state.epoch is not None and float(state.epoch).is_integer()
    return args.eval_strategy == IntervalStrategy.EPOCH and is_whole_epoch and state.epoch >= args.eval_delay
