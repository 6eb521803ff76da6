"""How a run ends: its result is saved, evaluated once and described; or it ends early, with an exit code."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from transformers import CONFIG_NAME, IntervalStrategy

from hf_llava_ft.checkpoints.artifact import told_of_a_full_disk
from hf_llava_ft.checkpoints.inspection import ADAPTER_CONFIG
from hf_llava_ft.checkpoints.remote_code import carries_our_code, note_on_code
from hf_llava_ft.checkpoints.training_facts import training_facts
from hf_llava_ft.errors import EXIT_CODE_FAILURE
from hf_llava_ft.reports.last_lines import last_lines
from hf_llava_ft.reports.run_report import PLOT_FILE, write_run_report
from hf_llava_ft.training.eval_prompts import EvalAnswers
from hf_llava_ft.training.first_process import staged_in_first_process
from hf_llava_ft.training.guards.finite import NotFinite
from hf_llava_ft.training.guards.moved_weights import WrongWeightsMoved
from hf_llava_ft.training.resuming.interruption import EvaluationStopped, TrainingInterrupted
from hf_llava_ft.training.summary import write_summary
from hf_llava_ft.training.trainer import LlavaTrainer


def save_result(trainer: LlavaTrainer, tell: Callable[[str], None]) -> None:
    """Leaves adapter or whole model in the output folder, with processor, whole or not at all."""
    output_dir, is_adapter = Path(str(trainer.args.output_dir)), isinstance(trainer.model, PeftModel)
    if not is_adapter:
        trainer.model.config.use_cache = True  # type: ignore[union-attr]  # the Trainer has switched it off
    last = ADAPTER_CONFIG if is_adapter else CONFIG_NAME
    staging = staged_in_first_process(trainer.args, output_dir, last)
    with told_of_a_full_disk(output_dir), staging as staged:
        trainer.save_model(str(staged), _internal_call=True)  # pushed when all that its card tells is there
    if trainer.rounded is not None:
        tell(f"Note: {trainer.rounded}")


def evaluate_once(trainer: LlavaTrainer, answers: EvalAnswers) -> None:
    """At the end of a run that was told of no other time for it.

    Raises:
        TrainingInterrupted: if a signal has come before its end.
    """
    has_rows = trainer.eval_dataset is not None
    if trainer.args.eval_strategy != IntervalStrategy.NO or not (has_rows or answers.prompts):
        return
    try:
        if trainer.interruption is not None and trainer.interruption.is_over(trainer.args):
            raise EvaluationStopped
        if has_rows:
            trainer.evaluate()
        else:
            answers.on_evaluate(trainer.args, trainer.state, trainer.control, model=trainer.model)
    except EvaluationStopped:
        trainer.stop_interrupted(missing="its evaluation")


def write_facts(summary: dict[str, Any], trainer: LlavaTrainer, answers: EvalAnswers) -> None:
    """`train_summary.json`, `report.html`, `loss.png`, and the card of an adapter."""
    output_dir = Path(str(trainer.args.output_dir))
    trained = [(p["part"], p["num_trainable"], p["num_total"], p["learning_rate"]) for p in summary["trained"]]
    with told_of_a_full_disk(output_dir):
        write_summary(summary, output_dir)
        write_run_report(
            output_dir, summary, trainer.state.log_history, trained, answers.answers, answers.thumbnails()
        )
        if isinstance(trainer.model, PeftModel):
            plot = PLOT_FILE if summary["loss"] else None
            trainer.write_own_card(output_dir, training_facts(output_dir), plot)


def lines_of_result(trainer: LlavaTrainer, answers: EvalAnswers, *, are_held_out: bool) -> list[str]:
    """What the command says in the end; see `last_lines`."""
    output_dir = Path(str(trainer.args.output_dir))
    lines = last_lines(
        output_dir,
        answers.answers,
        is_adapter=isinstance(trainer.model, PeftModel),
        are_held_out=are_held_out,
        picture=answers.a_picture,
    )
    if trainer.is_world_process_zero() and carries_our_code(output_dir):
        lines.append(note_on_code(output_dir))
    return lines


@contextmanager
def exit_on_early_end() -> Iterator[None]:
    """Turns what ends training before its last step into a sentence on stderr, of one process, and an exit code."""
    try:
        yield
    except (WrongWeightsMoved, NotFinite) as error:
        sentence, exit_code = f"error: {error}", EXIT_CODE_FAILURE
    except TrainingInterrupted as interrupted:
        sentence, exit_code = str(interrupted), interrupted.exit_code
    else:
        return
    if PartialState().is_main_process:
        print(sentence, file=sys.stderr)
    sys.exit(exit_code)
