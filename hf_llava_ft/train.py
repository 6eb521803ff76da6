"""The entry point of training: `llava-ft train`, `python -m hf_llava_ft.train`, `accelerate launch -m
hf_llava_ft.train`."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from rich.console import Console
from transformers import CONFIG_NAME, EarlyStoppingCallback, IntervalStrategy, PrinterCallback, set_seed

from hf_llava_ft.checking.preview import print_preview
from hf_llava_ft.checkpoints.adapters import check_resumed_adapter
from hf_llava_ft.checkpoints.artifact import staged_files, told_of_a_full_disk
from hf_llava_ft.checkpoints.checked.resume_state import check_resume_state
from hf_llava_ft.checkpoints.opening import ADAPTER_CONFIG, load_model
from hf_llava_ft.checkpoints.remote_code import carries_our_code, note_on_code
from hf_llava_ft.checkpoints.starting_point import (
    StartingPoint,
    check_starting_point,
    settled_tuning,
    starting_point,
)
from hf_llava_ft.checkpoints.training_facts import base_facts, hub_commit
from hf_llava_ft.checkpoints.training_processor import processor_for_training
from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.errors import exit_on_user_error
from hf_llava_ft.noise import hide_noise
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.reports.run_report import write_run_report
from hf_llava_ft.settings.arguments import DataArguments, LlavaTrainingArguments, ModelArguments, TuningArguments
from hf_llava_ft.settings.machine import check_attention, has_bf16_gpu, is_first_process
from hf_llava_ft.settings.parsing import parse_arguments as parse_arguments
from hf_llava_ft.settings.parsing import resolve
from hf_llava_ft.termination import exit_on_sigterm
from hf_llava_ft.training.eval_prompts import EvalAnswers, open_eval_prompts
from hf_llava_ft.training.evaluation import check_evaluation, tell_of_early_stop
from hf_llava_ft.training.finite import NotFinite
from hf_llava_ft.training.first_process import in_first_process
from hf_llava_ft.training.masters import said_precision
from hf_llava_ft.training.moved_weights import WrongWeightsMoved
from hf_llava_ft.training.out_of_memory import advice, told_of_out_of_memory
from hf_llava_ft.training.progress import LiveProgress
from hf_llava_ft.training.quantization import loading_in_few_bits
from hf_llava_ft.training.resuming.fingerprint import base_digest, course_of
from hf_llava_ft.training.resuming.interruption import EvaluationStopped, Interruption, TrainingInterrupted
from hf_llava_ft.training.resuming.missed_evaluation import MissedEvaluation
from hf_llava_ft.training.resuming.resume import Run, checkpoint_to_resume, opening_to_resume
from hf_llava_ft.training.resuming.run_folder import compared_with_before, one_run_at_a_time, open_run_folder
from hf_llava_ft.training.rows import TrainingRows, open_all_rows, tell_of_rows_left_out
from hf_llava_ft.training.summary import settings_of, train_summary, write_summary
from hf_llava_ft.training.trainer import LlavaTrainer
from hf_llava_ft.training.tuning import TrainedPart, table_of_parts, trained_parts, with_tuning


@dataclass(frozen=True)
class TrainingResult:
    """
    Args:
        adapter_dir (`Path`): the finished adapter or, when whole parts trained, the whole model; with processor.
        losses (`list[float]`): one per logged step.
        trained (`list[TrainedPart]`): what trained.
        seconds (`float`): of the training loop alone.
        summary (`dict`): the content of `train_summary.json`.
    """

    adapter_dir: Path
    losses: list[float]
    trained: list[TrainedPart]
    seconds: float
    summary: dict[str, Any]


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    tuning_args: TuningArguments,
    training_args: LlavaTrainingArguments,
    console: Console | None = None,
) -> TrainingResult:
    """Trains as told and leaves adapter or whole model at `training_args.output_dir`, checkpoints below it."""
    with one_run_at_a_time(training_args):
        return _train(model_args, data_args, tuning_args, training_args, console)


def _train(
    model_args: ModelArguments,
    data_args: DataArguments,
    tuning_args: TuningArguments,
    training_args: LlavaTrainingArguments,
    console: Console | None,
) -> TrainingResult:
    console = console or Console(stderr=True, quiet=training_args.process_index != 0)
    tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    tuning_args = settled_tuning(model_args, tuning_args)
    settings = settings_of(model_args, data_args, tuning_args, training_args)
    run = _checked_first(model_args, data_args, training_args, tell)
    # Before anything is initialised: LoRA's matrices and the order of the data follow from --seed alone.
    set_seed(training_args.seed)

    start = starting_point(model_args, tuning_args, training_args)
    processor = processor_for_training(
        start.adapter or start.name,
        start.adapter_revision if start.adapter else start.revision,
        model_args.version,
        image_aspect_ratio=model_args.image_aspect_ratio,
        picture_opening=opening_to_resume(model_args.picture_opening, run.resumed_from),
    )
    opened = open_all_rows(data_args, training_args, run.started)
    as_they_were, data = opened.as_they_were(), in_first_process(training_args, opened.facts)
    course = course_of(
        *(model_args, data_args, tuning_args, training_args),
        base=base_digest(start.name, hub_commit(start.name, start.revision)) if start.composed is None else "composed",
        processor=processor,
        data=data,
        images=None if as_they_were is None else as_they_were.facts,
    )
    run = compared_with_before(run, course, training_args, tell)
    prompts = open_eval_prompts(data_args)
    model = _loaded_model(start, processor, model_args, tuning_args, training_args)
    longest = data_args.model_max_length or model.config.text_config.max_position_embeddings
    rows = opened.that_fit(processor, longest, is_new=run.resumed_from is None, tell=tell)
    if data_args.preview > 0:
        print_preview(console, processor, rows.first(data_args.preview))

    set_seed(training_args.seed)
    # An adapter names the commit of its base, so that it loads on the same weights when main has moved on.
    commit = hub_commit(start.name, start.revision) or start.revision
    adapter = None if start.adapter is None else (start.adapter, start.adapter_revision)
    float32_masters = training_args.deepspeed_plugin is None
    model = with_tuning(model, tuning_args, start.name, commit, adapter, float32_masters=float32_masters)
    if run.resumed_from is not None and isinstance(model, PeftModel):
        check_resumed_adapter(model, run.resumed_from)
    trained = trained_parts(model)
    answers = EvalAnswers(prompts, processor, data_args.eval_max_new_tokens, console)
    collator = LlavaCollator(
        processor,
        uint8_pixels=True,
        max_length=longest if data_args.on_bad_row == "skip" else None,
        as_they_were=as_they_were,
    )
    with told_of_out_of_memory(lambda: f"the model alone. {advice(model, training_args)}"):
        trainer, interruption = _trainer(model, training_args, rows, collator, answers, console)
    trainer.run = run
    data = rows.facts(data) if trainer.is_world_process_zero() else {}
    console.print(table_of_parts(trained, training_args))
    tell(said_precision(model, training_args))

    with interruption:
        seconds = _run(trainer, run.resumed_from)
        seconds_training = seconds - trainer.throughput.paused_seconds
        _save(trainer, tell)
        _evaluate_once(trainer, answers)  # when nothing can be lost any more
        trainer.save_state()
        tell_of_early_stop(trainer.state, training_args, tell)
        if trainer.is_world_process_zero():
            tell_of_rows_left_out(rows, Path(str(training_args.output_dir)), tell)
            if not isinstance(model, PeftModel):
                start.remove_composed()  # an adapter goes on needing it
        summary = train_summary(
            settings=settings,
            base=_base_facts(start, model_args),
            data=data,
            trained=trained,
            state=trainer.state,
            counts=trainer.throughput.total(training_args.device),
            seconds=seconds,
            seconds_training=seconds_training,
            args=training_args,
        )
        if trainer.is_world_process_zero():
            _write_facts(summary, trainer, answers)
        if training_args.push_to_hub and interruption.is_over(training_args):
            trainer.stop_interrupted(missing="its push to the Hub")
    if training_args.push_to_hub:
        trainer.push_output_folder()
        tell(f"Pushed: {trainer.hub_model_id}")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return TrainingResult(Path(str(training_args.output_dir)), losses, trained, seconds, summary)


def _checked_first(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: LlavaTrainingArguments,
    tell: Callable[[str], None],
) -> Run:
    """What can be refused before anything is opened; returns the run, with the checkpoint that it goes on from."""
    output_dir = Path(str(args.output_dir))
    check_attention(model_args.attn_implementation)
    check_evaluation(data_args, args)
    checkpoint, passed_over = checkpoint_to_resume(args.resume_from_checkpoint, output_dir)
    for sentence in passed_over:
        tell(sentence)
    if checkpoint is not None:
        check_resume_state(checkpoint)
    return open_run_folder(args, checkpoint, tell, model_args.model_name_or_path)


def _loaded_model(
    start: StartingPoint,
    processor: LlavaProcessor,
    model_args: ModelArguments,
    tuning_args: TuningArguments,
    args: LlavaTrainingArguments,
) -> Any:
    model = load_model(
        start.name,
        processor,
        revision=start.revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        allow_nan=model_args.allow_nan,
        **loading_in_few_bits(tuning_args, args),
    )
    start.put_projector_into(model)
    return model


def _trainer(
    model: Any,
    args: LlavaTrainingArguments,
    rows: TrainingRows,
    collator: LlavaCollator,
    answers: EvalAnswers,
    console: Console,
) -> tuple[LlavaTrainer, Interruption]:
    """The Trainer with all that is shown while it works, and what a signal ends it by."""
    progress = LiveProgress(console)
    tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)
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
    answers.find_tensorboard(trainer.callback_handler.callbacks)
    return trainer, interruption


def _run(trainer: LlavaTrainer, checkpoint: str | None) -> float:
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


def _save(trainer: LlavaTrainer, tell: Callable[[str], None]) -> None:
    output_dir, is_adapter = Path(str(trainer.args.output_dir)), isinstance(trainer.model, PeftModel)
    if not is_adapter:
        trainer.model.config.use_cache = True  # type: ignore[union-attr]  # the Trainer has switched it off
    last = ADAPTER_CONFIG if is_adapter else CONFIG_NAME
    with told_of_a_full_disk(output_dir), staged_files(output_dir, last=last) as staged:
        trainer.save_model(str(staged), _internal_call=True)  # pushed when all that its card tells is there
    if trainer.rounded is not None:
        tell(f"Note: {trainer.rounded}")


def _evaluate_once(trainer: LlavaTrainer, answers: EvalAnswers) -> None:
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


def _base_facts(start: StartingPoint, model_args: ModelArguments) -> list[dict[str, str]]:
    """Name and commit of the models on the Hub that training started from."""
    if start.composed is None:
        return base_facts([start.name], start.revision)
    return base_facts([model_args.model_name_or_path, str(model_args.vision_tower)], model_args.revision)


def _write_facts(summary: dict[str, Any], trainer: LlavaTrainer, answers: EvalAnswers) -> None:
    output_dir = Path(str(trainer.args.output_dir))
    trained = [(p["part"], p["num_trainable"], p["num_total"], p["learning_rate"]) for p in summary["trained"]]
    with told_of_a_full_disk(output_dir):
        write_summary(summary, output_dir)
        write_run_report(
            output_dir, summary, trainer.state.log_history, trained, answers.answers, answers.thumbnails()
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Parses `argv`, trains, and prints where the adapter is; exits with 2 on bad input. With `--dry_run`, prints the
    settings as JSON instead."""
    hide_noise()
    exit_on_sigterm()
    with exit_on_user_error():
        settings = resolve(sys.argv[1:] if argv is None else argv).with_chosen_precision(has_bf16_gpu())
        if settings.dry_run:
            if is_first_process():
                print(settings.to_json(check_starting_point))
            return
        if is_first_process():
            for note in settings.notes:
                print(note, file=sys.stderr)
        try:
            result = train(*settings.build())
        except (WrongWeightsMoved, NotFinite) as error:
            if PartialState().is_main_process:
                print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except TrainingInterrupted as interrupted:
            if PartialState().is_main_process:
                print(interrupted, file=sys.stderr)
            sys.exit(interrupted.exit_code)
        console = Console(stderr=True, quiet=not PartialState().is_main_process)
        console.print(
            f"The result is at {result.adapter_dir}. Ask it: llava-ft chat --model {quote(str(result.adapter_dir))}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        if carries_our_code(result.adapter_dir):
            console.print(note_on_code(result.adapter_dir), highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
