"""The entry point of training: `llava-ft train`, `python -m hf_llava_ft.train`, `accelerate launch -m
hf_llava_ft.train`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import CONFIG_NAME

from hf_llava_ft.arguments import DataArguments, LlavaTrainingArguments, ModelArguments, TuningArguments
from hf_llava_ft.artifact import check_writable, staged_files
from hf_llava_ft.checkpoints import ADAPTER_CONFIG, check_attention, load_model, load_processor
from hf_llava_ft.data.builder import load_llava_json
from hf_llava_ft.errors import UserError, exit_on_user_error
from hf_llava_ft.presets import PRESETS, preset_flags
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.progress import LiveProgress
from hf_llava_ft.remote_code import carries_our_code, note_on_code
from hf_llava_ft.trainer import LlavaTrainer
from hf_llava_ft.tuning import PROJECTOR, TrainedPart, trained_parts, with_tuning


@dataclass(frozen=True)
class TrainingResult:
    """
    Args:
        adapter_dir (`Path`): the finished adapter or, when whole parts trained, the whole model; with processor.
        losses (`list[float]`): one per logged step.
        trained (`list[TrainedPart]`): what trained.
        seconds (`float`): of the training loop alone.
    """

    adapter_dir: Path
    losses: list[float]
    trained: list[TrainedPart]
    seconds: float


def parse_arguments(argv: Sequence[str]):
    """
    Raises:
        UserError: for an unknown flag.
    """
    classes: Any = (ModelArguments, DataArguments, TuningArguments, LlavaTrainingArguments)
    parser = HfArgumentParser(
        classes,
        prog="llava-ft train",
        description="Fine-tune a LLaVA on images with conversations. --preset NAME sets a recipe, which the flags "
        f"that follow may change: {', '.join(PRESETS)}.",
        allow_abbrev=False,
    )
    argv = _with_preset(list(argv))
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True)
    except ValueError as error:
        raise UserError(str(error).splitlines()[0]) from error
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}; llava-ft train --help lists them all.")
    return parsed


def _with_preset(argv: list[str]) -> list[str]:
    """`argv` with `--preset NAME` replaced by its flags, in front, so that the user's own flags win."""
    for index, argument in enumerate(argv):
        name, _, value = argument.partition("=")
        if name == "--preset":
            rest = argv[:index] + argv[index + (1 if value else 2) :]
            preset = value or (argv[index + 1] if index + 1 < len(argv) else "")
            return [*preset_flags(preset), *rest]
    return argv


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    tuning_args: TuningArguments,
    training_args: LlavaTrainingArguments,
    console: Console | None = None,
) -> TrainingResult:
    """Trains as told and leaves adapter or whole model at `training_args.output_dir`, checkpoints below it."""
    console = console or Console(stderr=True)
    output_dir = Path(str(training_args.output_dir))
    check_writable(output_dir)
    check_attention(model_args.attn_implementation)
    checkpoint = _checkpoint_to_resume(training_args)
    # Before anything is initialised: LoRA's matrices and the order of the data follow from --seed alone.
    set_seed(training_args.seed)

    processor = load_processor(model_args.model_name_or_path, model_args.revision)
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
    dataset = load_llava_json(data_args.data_path, data_args.image_folder)
    model: Any = load_model(
        model_args.model_name_or_path,
        processor,
        revision=model_args.revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
    )
    longest = data_args.model_max_length or model.config.text_config.max_position_embeddings
    check_lengths(dataset, processor, longest, data_args.data_path)

    set_seed(training_args.seed)
    model = with_tuning(model, tuning_args, model_args.model_name_or_path, model_args.revision)
    trained = trained_parts(model)
    progress = LiveProgress(console)
    training_args.disable_tqdm = True  # one bar, ours
    trainer = LlavaTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        processing_class=processor,
        callbacks=[progress],
    )
    _without_printed_logs(trainer)
    if trainer.is_world_process_zero():
        console.print(_table(trained, training_args))
    output = trainer.train(resume_from_checkpoint=checkpoint)
    is_adapter = isinstance(model, PeftModel)
    if not is_adapter:
        model.config.use_cache = True  # the Trainer has switched it off
    with staged_files(output_dir, last=ADAPTER_CONFIG if is_adapter else CONFIG_NAME) as staged:
        trainer.save_model(str(staged))
    trainer.save_state()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return TrainingResult(output_dir, losses, trained, seconds=float(output.metrics["train_runtime"]))


def check_lengths(dataset: Dataset, processor: LlavaProcessor, longest: int, data_path: str) -> None:
    """
    Raises:
        UserError: naming the first row that is longer than `longest` tokens: nothing is cut in silence.
    """
    for number, (row_id, messages) in enumerate(zip(dataset["id"], dataset["messages"], strict=True), start=1):
        try:
            length = processor.num_tokens(messages)
        except ValueError as error:
            raise UserError(f"{data_path}: row {number} (id {row_id!r}): {error}") from error
        if length > longest:
            raise UserError(
                f"{data_path}: row {number} (id {row_id!r}) has {length} tokens and the limit is {longest}: "
                f"shorten it, or raise --model_max_length up to what the language model takes."
            )


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


def _checkpoint_to_resume(args: LlavaTrainingArguments) -> str | None:
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() != "true":
        if not Path(wanted, "trainer_state.json").is_file():
            raise UserError(f"{wanted} is not a checkpoint to resume from: it has no trainer_state.json.")
        return str(wanted)
    output_dir = str(args.output_dir)
    last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if last is None:
        raise UserError(f"--resume_from_checkpoint: {args.output_dir} holds no checkpoint.")
    return last


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
    return f"{args.mm_projector_lr if part.part == PROJECTOR and args.mm_projector_lr else args.learning_rate:g}"


def main(argv: Sequence[str] | None = None) -> None:
    """Parses `argv`, trains, and prints where the adapter is; exits with 2 on bad input."""
    with exit_on_user_error():
        result = train(*parse_arguments(sys.argv[1:] if argv is None else argv))
        console = Console(stderr=True)
        console.print(
            f"The result is at {result.adapter_dir}. Ask it: llava-ft chat --model {result.adapter_dir}",
            highlight=False,
        )
        if carries_our_code(result.adapter_dir):
            console.print(note_on_code(result.adapter_dir), highlight=False)


if __name__ == "__main__":
    main()
