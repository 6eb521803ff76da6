"""The rows that a run trains on, opened as its settings say."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_llava_ft.arguments import DataArguments, LlavaTrainingArguments
from hf_llava_ft.data.bad_rows import SKIPPED_FILE, SoundRows, sound_rows
from hf_llava_ft.data.formats import open_source
from hf_llava_ft.data.stream_loader import refuse_grouping
from hf_llava_ft.data.streaming import LlavaStream
from hf_llava_ft.evaluation import data_seed
from hf_llava_ft.train_summary import data_facts


def open_rows(data_args: DataArguments, args: LlavaTrainingArguments) -> SoundRows:
    """All rows, checked.

    Raises:
        UserError: see `sound_rows`.
    """
    return sound_rows(
        data_args.data_path,
        data_args.image_folder,
        on_bad_row=data_args.on_bad_row,
        allow_outside=data_args.allow_images_outside,
        allow_urls=data_args.allow_image_urls,
        seed=data_seed(args),
    )


def open_stream(data_args: DataArguments, args: LlavaTrainingArguments) -> LlavaStream:
    """The rows as they are read while training.

    Raises:
        UserError: if the settings need all rows at once, or a source can't be opened.
    """
    refuse_grouping(args)
    sources = open_source(
        data_args.data_path,
        data_args.image_folder,
        allow_outside=data_args.allow_images_outside,
        allow_urls=data_args.allow_image_urls,
    )
    return LlavaStream(
        sources,
        shuffle_buffer_size=data_args.shuffle_buffer_size,
        seed=data_seed(args),
        on_bad_row=data_args.on_bad_row,
        skipped_file=Path(str(args.output_dir), SKIPPED_FILE),
    )


def facts_of_rows(
    rows: SoundRows | LlavaStream, trained_on: Dataset | LlavaStream, evaluated: Dataset | None
) -> dict[str, Any]:
    """[`data_facts`], with how many rows are trained on, evaluated, left out and cut."""
    num_evaluated = {} if evaluated is None else {"rows_evaluated": len(evaluated)}
    if isinstance(rows, LlavaStream) or isinstance(trained_on, LlavaStream):
        return data_facts(rows.sources, None) | num_evaluated if isinstance(rows, LlavaStream) else {}
    left_out = {(problem.file, problem.row) for problem in rows.left_out}
    facts = data_facts([part.source for part in rows.parts], len(trained_on))
    return facts | num_evaluated | {"rows_left_out": len(left_out), "rows_cut": len(rows.cut)}
