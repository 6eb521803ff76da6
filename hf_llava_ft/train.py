"""The entry point of training: `llava-ft train`, `python -m hf_llava_ft.train`, `accelerate launch -m
hf_llava_ft.train`."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from rich.console import Console
from transformers import set_seed

from hf_llava_ft.checking.preview import print_preview
from hf_llava_ft.checkpoints.adapters import check_resumed_adapter
from hf_llava_ft.checkpoints.checked.resume_state import check_resume_state
from hf_llava_ft.checkpoints.opening import load_config
from hf_llava_ft.checkpoints.starting.starting_point import (
    StartingPoint,
    check_starting_point,
    settled_tuning,
    starting_point,
)
from hf_llava_ft.checkpoints.starting.training_processor import processor_for_training
from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.errors import exit_on_user_error
from hf_llava_ft.estimate.checkpointing import choose_checkpointing, set_checkpointing
from hf_llava_ft.noise import hide_noise
from hf_llava_ft.settings.arguments import DataArguments, ModelArguments, TuningArguments
from hf_llava_ft.settings.defaults import settled_arguments
from hf_llava_ft.settings.machine import check_attention, has_bf16_gpu, is_first_process
from hf_llava_ft.settings.parsing import parse_arguments as parse_arguments
from hf_llava_ft.settings.parsing import resolve
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.termination import exit_on_sigterm
from hf_llava_ft.training.ending import evaluate_once, exit_on_early_end, lines_of_result, save_result, write_facts
from hf_llava_ft.training.eval_prompts import EvalAnswers, held_out_prompts, open_eval_prompts
from hf_llava_ft.training.evaluation import check_evaluation, tell_of_early_stop
from hf_llava_ft.training.first_process import in_first_process
from hf_llava_ft.training.guards.out_of_memory import advice, told_of_out_of_memory
from hf_llava_ft.training.precision.masters import keeps_own_masters, said_precision
from hf_llava_ft.training.precision.quantization import loading_in_few_bits
from hf_llava_ft.training.resuming.fingerprint import COMPOSED_BASE, base_digest, course_of
from hf_llava_ft.training.resuming.resume import Run, checkpoint_to_resume, opening_to_resume
from hf_llava_ft.training.resuming.run_folder import compared_with_before, one_run_at_a_time, open_run_folder
from hf_llava_ft.training.retention import RetentionProbe, check_retention
from hf_llava_ft.training.row_order import keep_order
from hf_llava_ft.training.rows import open_all_rows, tell_of_rows_left_out, with_counted_rows
from hf_llava_ft.training.run_trainer import teller, train_to_the_end, trainer_of_run
from hf_llava_ft.training.speed.feature_cache import check_feature_cache
from hf_llava_ft.training.summary import described, settings_of, train_summary
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
        last_lines (`list[str]`): what the command says in the end: answers before and after, and what to do next.
    """

    adapter_dir: Path
    losses: list[float]
    trained: list[TrainedPart]
    seconds: float
    summary: dict[str, Any]
    last_lines: list[str]


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
    tell = teller(console)

    # What is asked for, and whether it can be done here.
    tuning_args = settled_tuning(model_args, tuning_args)
    check_feature_cache(data_args, tuning_args, training_args)
    run = _checked_first(model_args, data_args, training_args, tell)
    # Before anything is initialised: LoRA's matrices and the order of the data follow from --seed alone.
    set_seed(training_args.seed)

    # The model that it starts from, still on disk, its processor, and all rows.
    start = starting_point(model_args, tuning_args, training_args)
    # What nobody said is no wish that could contradict a run that goes on.
    was_said = run.resumed_from is None or "picture_opening" not in model_args.assumed
    opening = model_args.picture_opening if was_said else None
    processor = processor_for_training(
        start.adapter or start.name,
        start.adapter_revision if start.adapter else start.revision,
        model_args.version,
        image_aspect_ratio=model_args.image_aspect_ratio,
        picture_opening=opening_to_resume(opening, run.resumed_from),
    )
    opened = open_all_rows(data_args, training_args, run.started)
    if run.resumed_from is not None:
        keep_order(training_args, run.course)
    # What nobody said follows from what trains and from the rows; a run that goes on keeps its own.
    longest = data_args.model_max_length or _longest_of(start)
    lengths = opened.lengths(processor, longest) if training_args.packing else None
    tuning_args, training_args, chosen = settled_arguments(
        model_args, tuning_args, training_args, opened.num_rows, run.course, lengths
    )
    if chosen is not None:
        tell(chosen)

    # A run that goes on is the run that it was.
    as_they_were, data = opened.as_they_were(), in_first_process(training_args, opened.facts)
    course = course_of(
        *(model_args, data_args, tuning_args, training_args),
        base=base_digest(start.name, start.commit) if start.composed is None else COMPOSED_BASE,
        longest=longest,
        processor=processor,
        data=data,
        images=None if as_they_were is None else as_they_were.facts,
    )
    run = compared_with_before(run, course, training_args, tell)

    # The model, and the rows that it takes.
    prompts = open_eval_prompts(data_args)
    model = start.load(processor, model_args, **loading_in_few_bits(tuning_args, training_args))
    loaded = (model.config, model.dtype, model.device)
    rows = opened.that_fit(processor, longest, is_new=run.resumed_from is None, tell=tell)
    prompts = prompts or held_out_prompts(rows.evaluated, data_args.num_eval_answers)
    if data_args.preview > 0:
        print_preview(console, processor, rows.first(data_args.preview))

    # What of the model trains.
    set_seed(training_args.seed)
    # An adapter names the commit of its base, so that it loads on the same weights when main has moved on.
    commit = start.commit or start.revision
    adapter = None if start.adapter is None else (start.adapter, start.adapter_revision)
    float32_masters = not keeps_own_masters(training_args)
    model = with_tuning(model, tuning_args, start.name, commit, adapter, float32_masters=float32_masters)
    if run.resumed_from is not None and isinstance(model, PeftModel):
        check_resumed_adapter(model, run.resumed_from)
    trained = trained_parts(model)

    # Whether activations fit into memory, or are computed twice.
    cut_at = longest if data_args.on_bad_row == "skip" else None
    if training_args.checkpointing_is_auto:
        config, dtype, loaded_on = loaded
        of_run = (config, tuning_args, training_args, rows.train, processor, longest, dtype, loaded_on, cut_at)
        choice = in_first_process(training_args, lambda: choose_checkpointing(*of_run))
        set_checkpointing(training_args, choice.checkpointing)
        if choice.told is not None:
            tell(choice.told)

    settings = settings_of(model_args, data_args, tuning_args, training_args)

    # The Trainer.
    answers = EvalAnswers(prompts, processor, data_args.eval_max_new_tokens, console)
    collator = LlavaCollator(
        processor,
        uint8_pixels=True,
        max_length=cut_at,
        as_they_were=as_they_were,
    )
    with told_of_out_of_memory(lambda: f"the model alone. {advice(model, training_args)}"):
        trainer, interruption = trainer_of_run(model, training_args, rows, collator, answers, console)
    trainer.run = run
    if trainer.is_world_process_zero():
        data = rows.facts(data)
        parts = described(trained, training_args)
        trainer.known = {"settings": settings, "base": start.facts(model_args), "data": data, "trained": parts}
    else:
        data = {}
    console.print(table_of_parts(trained, training_args))
    tell(said_precision(model, training_args))
    if trainer.is_world_process_zero() and (padding := trainer.told_of_padding()) is not None:
        tell(padding)
    if trainer.tower_inputs.cache is not None:
        tell(trainer.tower_inputs.cache.told)

    probe = None
    if data_args.retention_probe and trainer.is_world_process_zero():
        probe = RetentionProbe(trainer.model, processor, Path(str(training_args.output_dir)))
        probe.ask_before(goes_on=run.resumed_from is not None)

    # It trains; and what comes of it is saved, evaluated, described, pushed.
    with interruption:
        seconds = train_to_the_end(trainer, run.resumed_from)
        seconds_training = seconds - trainer.throughput.paused_seconds
        save_result(trainer, tell)
        evaluate_once(trainer, answers)  # when nothing can be lost any more
        if probe is not None:
            tell(probe.told_after())
        trainer.save_state()
        tell_of_early_stop(trainer.state, training_args, tell)
        if trainer.is_world_process_zero():
            tell_of_rows_left_out(rows, Path(str(training_args.output_dir)), tell)
            if not isinstance(model, PeftModel):
                start.remove_composed()  # an adapter goes on needing it
        summary = train_summary(
            settings=settings,
            base=start.facts(model_args),
            data=data,
            trained=trained,
            state=trainer.state,
            counts=trainer.throughput.total(training_args.device),
            seconds=seconds,
            seconds_training=seconds_training,
            args=training_args,
        )
        if trainer.is_world_process_zero():
            write_facts(summary, trainer, answers)
        if training_args.push_to_hub and interruption.is_over(training_args):
            trainer.stop_interrupted(missing="its push to the Hub")
    if training_args.push_to_hub:
        trainer.push_output_folder()
        tell(f"Pushed: {trainer.hub_model_id}")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    lines = lines_of_result(trainer, answers, are_held_out=data_args.eval_prompts is None)
    return TrainingResult(Path(str(training_args.output_dir)), losses, trained, seconds, summary, lines)


def tell_last_lines(result: TrainingResult, console: Console | None = None) -> None:
    """Prints them, in one process."""
    tell = teller(console or Console(stderr=True, quiet=not PartialState().is_main_process))
    for line in result.last_lines:
        tell(line)


def _longest_of(start: StartingPoint) -> int:
    """The most tokens that the language model takes."""
    return int(load_config(start.name, start.revision).text_config.max_position_embeddings)


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
    if data_args.retention_probe:
        check_retention(args)
    checkpoint, passed_over = checkpoint_to_resume(args.resume_from_checkpoint, output_dir)
    for sentence in passed_over:
        tell(sentence)
    if checkpoint is not None:
        check_resume_state(checkpoint)
    return open_run_folder(args, checkpoint, tell, model_args.model_name_or_path)


def _checked_model(model_args: ModelArguments, tuning_args: TuningArguments) -> TuningArguments:
    check_starting_point(model_args, tuning_args)
    return settled_tuning(model_args, tuning_args)


def main(argv: Sequence[str] | None = None) -> None:
    """Parses `argv`, trains, and prints where the adapter is; exits with 2 on bad input. With `--dry_run`, prints the
    settings as JSON instead."""
    hide_noise()
    exit_on_sigterm()
    with exit_on_user_error():
        settings = resolve(sys.argv[1:] if argv is None else argv).with_chosen_precision(has_bf16_gpu())
        if settings.dry_run:
            if is_first_process():
                print(with_counted_rows(settings).to_json(_checked_model))
            return
        if is_first_process():
            for note in settings.notes:
                print(note, file=sys.stderr)
        with exit_on_early_end():
            result = train(*settings.build())
        tell_last_lines(result)


if __name__ == "__main__":
    main()
