"""The entry point of training: `llava-ft train`, `python -m hf_llava_ft.train`, `accelerate launch -m
hf_llava_ft.train`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import EarlyStoppingCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import CONFIG_NAME

from hf_llava_ft.arguments import DataArguments, LlavaTrainingArguments, ModelArguments, TuningArguments
from hf_llava_ft.artifact import check_writable, staged_files, told_of_a_full_disk
from hf_llava_ft.checkpoints import ADAPTER_CONFIG, check_attention, load_model, load_processor
from hf_llava_ft.data.bad_rows import SKIPPED_FILE, SoundRows, told_of_skipped
from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.data.streaming import LlavaStream, told_of_rows_left_out
from hf_llava_ft.data.token_limit import TokenLimit
from hf_llava_ft.errors import UserError, exit_on_user_error
from hf_llava_ft.eval_prompts import EvalAnswers, open_eval_prompts
from hf_llava_ft.evaluation import check_evaluation, data_seed, eval_rows_that_fit, held_out, open_eval_rows
from hf_llava_ft.interruption import Interruption, TrainingInterrupted
from hf_llava_ft.machine import is_first_process
from hf_llava_ft.parsing import parse_arguments as parse_arguments
from hf_llava_ft.parsing import resolve
from hf_llava_ft.preview import first_rows, print_preview
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.progress import LiveProgress
from hf_llava_ft.quantization import loading_in_few_bits
from hf_llava_ft.remote_code import carries_our_code, note_on_code
from hf_llava_ft.resume import checkpoint_to_resume
from hf_llava_ft.run_report import write_run_report
from hf_llava_ft.starting_point import starting_point
from hf_llava_ft.train_summary import settings_of, train_summary, write_summary
from hf_llava_ft.trainer import LlavaTrainer
from hf_llava_ft.training_rows import facts_of_rows, open_rows, open_stream
from hf_llava_ft.tuning import PROJECTOR, VISION_TOWER, TrainedPart, trained_parts, with_tuning


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
    console = console or Console(stderr=True, quiet=training_args.process_index != 0)
    output_dir = Path(str(training_args.output_dir))
    settings = settings_of(model_args, data_args, tuning_args, training_args)
    check_writable(output_dir)
    check_attention(model_args.attn_implementation)
    check_evaluation(data_args, training_args)
    checkpoint, passed_over = checkpoint_to_resume(training_args.resume_from_checkpoint, output_dir)
    for sentence in passed_over:
        console.print(sentence, highlight=False)
    # Before anything is initialised: LoRA's matrices and the order of the data follow from --seed alone.
    set_seed(training_args.seed)

    start = starting_point(model_args, tuning_args, training_args)
    processor = load_processor(start.name, start.revision)
    if model_args.version is not None:
        try:
            processor.use_chat_template(model_args.version)
        except ValueError as error:
            raise UserError(f"--version: {error}") from error
    if processor.stop_token_id is None and processor.stop_string is None:
        raise UserError(
            f"{model_args.model_name_or_path}: its chat template does not mark what ends an answer, so the "
            f"model would never learn to stop: choose one of ours, --version v1 for LLaVA-1.5."
        )
    if model_args.image_aspect_ratio is not None:
        _use_aspect_ratio(processor, model_args)
    rows = (open_stream if data_args.streaming else open_rows)(data_args, training_args)
    eval_rows = open_eval_rows(data_args, training_args)
    prompts = open_eval_prompts(data_args)
    model: Any = load_model(
        start.name,
        processor,
        revision=start.revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        **loading_in_few_bits(tuning_args, training_args),
    )
    start.put_projector_into(model)
    longest = data_args.model_max_length or model.config.text_config.max_position_embeddings
    skips = data_args.on_bad_row == "skip"
    dataset: Dataset | LlavaStream
    if isinstance(rows, LlavaStream):
        rows.row_check = TokenLimit(processor, longest, takes_longer=skips)
        if checkpoint is None and training_args.process_index == 0:
            (output_dir / SKIPPED_FILE).unlink(missing_ok=True)  # of a run before
        dataset = rows
    else:
        dataset = rows.that_fit(processor, longest)
        told = told_of_skipped(rows, longest, output_dir) if training_args.process_index == 0 else None
        if told is not None:
            console.print(told, highlight=False, soft_wrap=True)
    eval_dataset: Dataset | None = None
    if eval_rows is not None:
        eval_dataset, told = eval_rows_that_fit(eval_rows, processor, longest)
        if told is not None:
            console.print(told, highlight=False, soft_wrap=True)
    elif data_args.eval_split is not None and isinstance(rows, SoundRows) and isinstance(dataset, Dataset):
        dataset, eval_dataset = held_out(rows, dataset, data_args.eval_split, data_seed(training_args))
    if data_args.preview > 0:
        first = rows.first(data_args.preview) if isinstance(rows, SoundRows) else None
        shown = first or first_rows(rows.sources, data_args.preview)
        print_preview(console, processor, shown)

    set_seed(training_args.seed)
    model = with_tuning(model, tuning_args, start.name, start.revision)
    trained = trained_parts(model)
    progress = LiveProgress(console)
    interruption = Interruption(lambda sentence: console.print(sentence, highlight=False))
    answers = EvalAnswers(prompts, processor, data_args.eval_max_new_tokens, console)
    patience = training_args.early_stopping_patience
    training_args.disable_tqdm = True  # one bar, ours
    trainer = LlavaTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        data_collator=LlavaCollator(processor, uint8_pixels=True, max_length=longest if skips else None),
        callbacks=[
            *(progress, interruption),
            *([answers] if prompts else []),
            *([] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)]),
        ],
    )
    progress.throughput = trainer.throughput
    answers.find_tensorboard(trainer.callback_handler.callbacks)
    _without_printed_logs(trainer)
    data = facts_of_rows(rows, dataset, eval_dataset) if trainer.is_world_process_zero() else {}
    if trainer.is_world_process_zero():
        console.print(_table(trained, training_args))
    with told_of_a_full_disk(output_dir):
        output = trainer.train(resume_from_checkpoint=checkpoint)
    if interruption.signal_number is not None:
        raise TrainingInterrupted(trainer.state.global_step, output_dir, interruption.signal_number)
    is_adapter = isinstance(model, PeftModel)
    if not is_adapter:
        model.config.use_cache = True  # the Trainer has switched it off
    last = ADAPTER_CONFIG if is_adapter else CONFIG_NAME
    with told_of_a_full_disk(output_dir), staged_files(output_dir, last=last) as staged:
        trainer.save_model(str(staged))
    seconds = float(output.metrics["train_runtime"])
    seconds_training = seconds - trainer.throughput.paused_seconds
    if training_args.eval_strategy == IntervalStrategy.NO:  # once, and when nothing can be lost any more
        if eval_dataset is not None:
            trainer.evaluate()
        elif prompts:
            answers.on_evaluate(training_args, trainer.state, trainer.control, model=trainer.model)
    trainer.save_state()
    if isinstance(dataset, LlavaStream) and trainer.is_world_process_zero():
        told = told_of_rows_left_out(output_dir / SKIPPED_FILE)
        if told is not None:
            console.print(told, highlight=False, soft_wrap=True)
    if not is_adapter and trainer.is_world_process_zero():
        start.remove_composed()  # an adapter goes on needing it
    summary = train_summary(
        settings=settings,
        data=data,
        trained=trained,
        state=trainer.state,
        counts=trainer.throughput.total(training_args.device),
        seconds=seconds,
        seconds_training=seconds_training,
        args=training_args,
    )
    if trainer.is_world_process_zero():
        with told_of_a_full_disk(output_dir):
            write_summary(summary, output_dir)
            rates = [(p.part, p.num_trainable, p.num_total, learning_rate_of(p, training_args)) for p in trained]
            write_run_report(
                output_dir, summary, trainer.state.log_history, rates, answers.answers, answers.thumbnails()
            )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return TrainingResult(output_dir, losses, trained, seconds, summary)


def _use_aspect_ratio(processor: LlavaProcessor, model_args: ModelArguments) -> None:
    wanted, cuts_into_crops = model_args.image_aspect_ratio, processor.depends_on_image_size
    if cuts_into_crops != (wanted == "anyres"):
        kind = "LLaVA-1.6, which sees several crops of a picture" if cuts_into_crops else "LLaVA-1.5, which sees one"
        raise UserError(
            f"--image_aspect_ratio {wanted}: {model_args.model_name_or_path} is a {kind}; leave the flag out, or use "
            f"{'anyres' if cuts_into_crops else 'pad or square'}."
        )
    if not cuts_into_crops:
        processor.image_processor.do_pad = wanted == "pad"


def _without_printed_logs(trainer: LlavaTrainer) -> None:
    trainer.remove_callback(PrinterCallback)  # the bar shows the loss


def _table(trained: list[TrainedPart], args: LlavaTrainingArguments) -> Table:
    table = Table(title="What trains")
    table.add_column("part")
    for number in ("trainable", "of"):
        table.add_column(number, justify="right")
    table.add_column("dtype")
    table.add_column("learning rate", justify="right")
    for part in trained:
        rate = learning_rate_of(part, args)
        table.add_row(part.part, f"{part.num_trainable:,}", f"{part.num_total:,}", part.dtype, rate)
    return table


def learning_rate_of(part: TrainedPart, args: LlavaTrainingArguments) -> str:
    """Peak learning rate of a part as text; a dash for a frozen one."""
    if not part.num_trainable:
        return "-"
    own = {PROJECTOR: args.mm_projector_lr, VISION_TOWER: args.mm_vision_tower_lr}.get(part.part)
    return f"{args.learning_rate if own is None else own:g}"


def main(argv: Sequence[str] | None = None) -> None:
    """Parses `argv`, trains, and prints where the adapter is; exits with 2 on bad input. With `--dry_run`, prints the
    settings as JSON instead."""
    with exit_on_user_error():
        settings = resolve(sys.argv[1:] if argv is None else argv)
        if settings.dry_run:
            if is_first_process():
                print(settings.to_json())
            return
        if is_first_process():
            for note in settings.notes:
                print(note, file=sys.stderr)
        try:
            result = train(*settings.build())
        except TrainingInterrupted as interrupted:
            if PartialState().is_main_process:
                print(interrupted, file=sys.stderr)
            sys.exit(interrupted.exit_code)
        console = Console(stderr=True, quiet=not PartialState().is_main_process)
        console.print(
            f"The result is at {result.adapter_dir}. Ask it: llava-ft chat --model {result.adapter_dir}",
            highlight=False,
        )
        if carries_our_code(result.adapter_dir):
            console.print(note_on_code(result.adapter_dir), highlight=False)


if __name__ == "__main__":
    main()
