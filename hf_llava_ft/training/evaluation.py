"""Evaluation while training: which rows it is of, and that nothing of it reaches the training itself."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from datasets import Dataset
from transformers import IntervalStrategy, TrainerState

from hf_llava_ft.checking.sound_rows import SoundRows, sound_rows
from hf_llava_ft.data.formats.column_choice import parse_choice
from hf_llava_ft.errors import UserError
from hf_llava_ft.evaluation.held_out import held_out_places, num_held_out
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.settings.arguments import DataArguments
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments


def check_evaluation(data_args: DataArguments, args: LlavaTrainingArguments) -> None:
    """
    Raises:
        UserError: if evaluations are asked for and there is nothing to evaluate.
    """
    if args.eval_strategy == IntervalStrategy.NO or data_args.has_eval_rows:
        return
    raise UserError(
        f"--eval_strategy {IntervalStrategy(args.eval_strategy).value} needs rows to evaluate: add --eval_split 0.05, "
        f"or --eval_data_path."
    )


def open_eval_rows(data_args: DataArguments, args: LlavaTrainingArguments) -> SoundRows | None:
    """
    The rows of `--eval_data_path`, checked like those that are trained on; None without it.

    Raises:
        UserError: see `sound_rows`.
    """
    if data_args.eval_data_path is None:
        return None
    columns = parse_choice(data_args.eval_columns or data_args.columns)
    return sound_rows(
        data_args.eval_data_path,
        data_args.eval_image_folder or data_args.image_folder,
        on_bad_row=data_args.on_bad_row,
        allow_outside=data_args.allow_images_outside,
        allow_urls=data_args.allow_image_urls,
        seed=data_seed(args),
        columns=columns._replace(is_inherited=data_args.eval_columns is None),
    )


def eval_rows_that_fit(rows: SoundRows, processor: LlavaProcessor, longest: int) -> tuple[Dataset, str | None]:
    """The rows as a dataset, and a sentence with the numbers of those left out or cut, if there are any."""
    dataset = rows.that_fit(processor, longest)
    if not rows.left_out and not rows.cut:
        return dataset, None
    left_out = len({(problem.file, problem.row) for problem in rows.left_out})
    return dataset, f"Of the rows to evaluate, left out: {left_out:,}, cut at {longest} tokens: {len(rows.cut):,}."


def held_out(rows: SoundRows, dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """
    Splits off rows to evaluate; both parts keep the order of the rows.

    Args:
        rows (`SoundRows`): what `dataset` was made from.
        share (`float`): of the rows that are evaluated, rounded, at least one.
        seed (`int`): the same one gives the same rows.

    Returns:
        The rows to train on, and those to evaluate.

    Raises:
        UserError: if no row would be left to train on, or a row is in the data more than once.
    """
    repeated = [part.source.where for part in rows.parts if part.source.weight > 1]
    if repeated:
        raise UserError(
            f"--eval_split cannot hold out rows of {repeated[0]}, which are repeated by its weight and would be "
            f"trained on as well: use --eval_data_path."
        )
    number = num_held_out(len(dataset), share)
    if number >= len(dataset):
        raise UserError(
            f"--eval_split {share:g} of {len(dataset)} rows leaves none to train on: give a smaller share."
        )
    chosen = held_out_places(len(dataset), number, seed)
    others = np.setdiff1d(np.arange(len(dataset)), chosen)
    return rows.part_of(dataset, others), rows.part_of(dataset, chosen)


def tell_of_early_stop(state: TrainerState, args: LlavaTrainingArguments, tell: Callable[[str], None]) -> None:
    """Says at which step a run ended early, and which checkpoint is its result."""
    if args.early_stopping_patience is None or state.global_step >= state.max_steps:
        return
    patience = args.early_stopping_patience
    worse = "1 evaluation was" if patience == 1 else f"{patience} evaluations in a row were"
    tell(
        f"Stopped after step {state.global_step} of {state.max_steps}: {worse} no better. The result is that of step "
        f"{state.best_global_step}, {args.metric_for_best_model} {state.best_metric:.4f}."
    )


def data_seed(args: LlavaTrainingArguments) -> int:
    """Of everything that is drawn from the rows."""
    return args.seed if args.data_seed is None else args.data_seed


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Leaves the random numbers of Python, NumPy and PyTorch, on all devices, as if the block had not run."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
