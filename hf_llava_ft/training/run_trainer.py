"""The Trainer of a run, with all that is shown while it works; and its training, which a signal may end."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import EarlyStoppingCallback, PrinterCallback

from hf_llava_ft.checkpoints.artifact import told_of_a_full_disk
from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.eval_prompts import EvalAnswers
from hf_llava_ft.training.progress import LiveProgress
from hf_llava_ft.training.resuming.interruption import EvaluationStopped, Interruption
from hf_llava_ft.training.resuming.missed_evaluation import MissedEvaluation
from hf_llava_ft.training.rows import TrainingRows
from hf_llava_ft.training.trainer import LlavaTrainer


def teller(console: Console) -> Callable[[str], None]:
    """What prints a sentence as it is: a path in it is neither coloured nor broken."""
    return partial(console.print, highlight=False, markup=False, soft_wrap=True)


def trainer_of_run(
    model: Any,
    args: LlavaTrainingArguments,
    rows: TrainingRows,
    collator: LlavaCollator,
    answers: EvalAnswers,
    console: Console,
) -> tuple[LlavaTrainer, Interruption]:
    """The Trainer with all that is shown while it works, and what a signal ends it by."""
    progress = LiveProgress(console)
    tell = teller(console)
    interruption = Interruption(tell)
    patience = args.early_stopping_patience
    args.disable_tqdm = True  # one bar, ours
    trainer = LlavaTrainer(
        model=model,
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.evaluated,
        processing_class=collator.processor,
        data_collator=collator,
        callbacks=[
            *(progress, interruption),
            *([answers] if answers.prompts else []),
            *([] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)]),
        ],
    )
    trainer.remove_callback(PrinterCallback)  # the bar shows the loss
    trainer.interruption = interruption
    trainer.add_callback(MissedEvaluation(trainer))  # when the others are ready for it
    progress.throughput = answers.throughput = trainer.throughput
    trainer.longest_batch.tell = tell
    answers.logs.find(trainer.callback_handler.callbacks)
    return trainer, interruption


def train_to_the_end(trainer: LlavaTrainer, checkpoint: str | None) -> float:
    """Trains, and returns the seconds that it took.

    Raises:
        TrainingInterrupted: if a signal ended it.
    """
    with told_of_a_full_disk(Path(str(trainer.args.output_dir))):
        try:
            output = trainer.train(resume_from_checkpoint=checkpoint)
        except EvaluationStopped:  # one before the first step
            trainer.stop_interrupted()
    return float(output.metrics["train_runtime"])
