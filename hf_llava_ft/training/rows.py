"""The rows that a run trains on and those that it is evaluated on, opened as its settings say."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_llava_ft.checking.preview import first_rows
from hf_llava_ft.checking.sound_rows import SoundRows, sound_rows, told_of_skipped
from hf_llava_ft.data.formats import Source, open_source
from hf_llava_ft.data.formats.column_choice import SaidOfColumns
from hf_llava_ft.data.formats.source import refuse_preferences
from hf_llava_ft.data.skipped_rows import SKIPPED_FILE, told_of_rows_left_out
from hf_llava_ft.data.streaming import LlavaStream
from hf_llava_ft.data.streaming.loader import refuse_grouping
from hf_llava_ft.data.token_limit import TokenLimit
from hf_llava_ft.data.unchanged import RowsAsTheyWere
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.settings.arguments import DataArguments
from hf_llava_ft.settings.by_what_trains import put_by_rows
from hf_llava_ft.settings.resolved import Settings
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.evaluation import data_seed, eval_rows_that_fit, held_out, open_eval_rows
from hf_llava_ft.training.summary import data_facts, row_counts

_MAX_BYTES_AT_A_GLANCE = 64 * 2**20


@dataclass(frozen=True)
class TrainingRows:
    """
    Args:
        opened (`SoundRows` or `LlavaStream`): where the rows come from.
        train (`Dataset` or `LlavaStream`): those that are trained on.
        evaluated (`Dataset`, *optional*): those that are evaluated.
    """

    opened: SoundRows | LlavaStream
    train: Dataset | LlavaStream
    evaluated: Dataset | None

    def first(self, number: int) -> Any:
        """(place, row) of the first rows, as `print_preview` takes them."""
        if isinstance(self.opened, SoundRows):
            return self.opened.first(number)
        return first_rows(self.opened.sources, number)

    def facts(self, of_files: dict[str, Any]) -> dict[str, Any]:
        """[`data_facts`], with how many rows are evaluated, left out and cut.

        Args:
            of_files (`dict`): of [`OpenedRows.facts`].
        """
        evaluated = {} if self.evaluated is None else {"rows_evaluated": len(self.evaluated)}
        if isinstance(self.opened, LlavaStream) or isinstance(self.train, LlavaStream):
            return of_files | evaluated
        left_out = {(problem.file, problem.row) for problem in self.opened.left_out}
        return (
            of_files
            | row_counts(self.train)
            | evaluated
            | {"rows_left_out": len(left_out), "rows_cut": len(self.opened.cut)}
        )


@dataclass(frozen=True)
class OpenedRows:
    """
    All rows of a run, opened and not yet held against a model.

    Args:
        rows (`SoundRows` or `LlavaStream`): to train on.
        eval_rows (`SoundRows`, *optional*): to evaluate.
        data_args, args: the settings that they were opened by.
    """

    rows: SoundRows | LlavaStream
    eval_rows: SoundRows | None
    data_args: DataArguments
    args: LlavaTrainingArguments

    @property
    def _sources(self) -> list[Source]:
        rows = self.rows
        return rows.sources if isinstance(rows, LlavaStream) else [part.source for part in rows.parts]

    @property
    def num_rows(self) -> int:
        """Rows that an epoch trains on, unless some turn out too long; those that are held out are not among them."""
        if isinstance(self.rows, LlavaStream):
            return self.rows.num_rows
        number = sum(max(1, int(part.source.weight * len(part.dataset) + 0.5)) for part in self.rows.parts)
        share = self.data_args.eval_split
        return number if share is None else number - max(1, round(share * number))

    def lengths(self, processor: LlavaProcessor, longest: int) -> list[int] | None:
        """About how many tokens the rows have that are trained on; None of a stream."""
        if isinstance(self.rows, LlavaStream):
            return None
        return self.rows.lengths(processor, longest)

    def facts(self) -> dict[str, Any]:
        """[`data_facts`] of the files, in which no row is counted."""
        return data_facts(self._sources)

    def as_they_were(self) -> RowsAsTheyWere | None:
        """The files as they are now, data and images; None for a stream, which sees to that itself."""
        if isinstance(self.rows, LlavaStream):
            return None
        files = [file for source in self._sources for file in source.container.files]
        where = ", ".join(source.where for source in self._sources)
        return RowsAsTheyWere(where, files, [part.dataset for part in self.rows.parts])

    def that_fit(
        self, processor: LlavaProcessor, longest: int, is_new: bool, tell: Callable[[str], None]
    ) -> TrainingRows:
        """
        The rows that the model takes, and of them those that are held out for evaluation.

        Args:
            processor (`LlavaProcessor`): of the model.
            longest (`int`): tokens that a row may have.
            is_new (`bool`): the run begins here, and does not go on from a checkpoint.
            tell: prints a sentence on rows that are left out or cut.

        Raises:
            UserError: see `SoundRows.that_fit` and `held_out`.
        """
        output_dir, speaks = Path(str(self.args.output_dir)), self.args.process_index == 0
        for source in self._sources if speaks else []:
            if source.dialect.columns is not None:
                tell(f"{source.where}: {source.dialect.columns.told()}.")
        train: Dataset | LlavaStream
        if isinstance(self.rows, LlavaStream):
            takes_longer = self.data_args.on_bad_row == "skip"
            self.rows.picture_opening = processor.picture_opening
            self.rows.row_check = TokenLimit(processor, longest, takes_longer=takes_longer)
            if is_new and speaks:
                (output_dir / SKIPPED_FILE).unlink(missing_ok=True)  # of a run before
            train = self.rows
        else:
            train = self.rows.that_fit(processor, longest)
            told = told_of_skipped(self.rows, longest, output_dir) if speaks else None
            if told is not None:
                tell(told)
        evaluated = None
        if self.eval_rows is not None:
            evaluated, told = eval_rows_that_fit(self.eval_rows, processor, longest)
            if told is not None:
                tell(told)
        elif self.data_args.eval_split is not None and isinstance(self.rows, SoundRows) and isinstance(train, Dataset):
            train, evaluated = held_out(self.rows, train, self.data_args.eval_split, data_seed(self.args))
        return TrainingRows(self.rows, train, evaluated)


def open_all_rows(data_args: DataArguments, args: LlavaTrainingArguments, started: int | None = None) -> OpenedRows:
    """
    Opens what is to be trained on and evaluated; all of it is checked, but for rows that are streamed.

    Args:
        started (`int`, *optional*): see `since` of `LlavaStream`.

    Raises:
        UserError: see `sound_rows`; or if the settings need all rows at once and they are streamed.
    """
    rows = _open_stream(data_args, args, started) if data_args.streaming else _open_rows(data_args, args)
    return OpenedRows(rows, open_eval_rows(data_args, args), data_args, args)


def with_counted_rows(settings: Settings) -> Settings:
    """For a dry run: with what follows from the number of rows, where they are quickly counted."""
    values = {name: settings.by_name[name].value for name in ("data_path", "image_folder", "columns", "eval_split")}
    number = _rows_at_a_glance(**values) if isinstance(values["data_path"], str) else None
    if not number:
        return settings
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    return replace(settings, by_name=put_by_rows(settings.by_name, number, devices))


def _rows_at_a_glance(
    data_path: str, image_folder: str, columns: SaidOfColumns = None, eval_split: float | None = None
) -> int | None:
    """How many rows a file or folder here would be trained on, unchecked; None where counting them takes long."""
    if not os.path.exists(data_path):
        return None
    try:
        sources = open_source(data_path, image_folder, allow_outside=True, columns=columns)
        files = [file for source in sources for file in source.container.files]
        if sum(os.path.getsize(file) for file in files) > _MAX_BYTES_AT_A_GLANCE:
            return None
        number = sum(sum(1 for _ in source.iter_raw()) for source in sources)
    except (UserError, OSError):
        return None  # of which a run will speak
    return number if eval_split is None else number - max(1, round(eval_split * number))


def tell_of_rows_left_out(rows: TrainingRows, output_dir: Path, tell: Callable[[str], None]) -> None:
    """Says how many rows a stream left out while it was trained on; of rows in memory it was said before."""
    told = told_of_rows_left_out(output_dir / SKIPPED_FILE) if isinstance(rows.opened, LlavaStream) else None
    if told is not None:
        tell(told)


def _open_rows(data_args: DataArguments, args: LlavaTrainingArguments) -> SoundRows:
    return sound_rows(
        data_args.data_path,
        data_args.image_folder,
        on_bad_row=data_args.on_bad_row,
        allow_outside=data_args.allow_images_outside,
        allow_urls=data_args.allow_image_urls,
        seed=data_seed(args),
        columns=data_args.columns,
    )


def _open_stream(data_args: DataArguments, args: LlavaTrainingArguments, started: int | None) -> LlavaStream:
    refuse_grouping(args)
    sources = open_source(
        data_args.data_path,
        data_args.image_folder,
        allow_outside=data_args.allow_images_outside,
        allow_urls=data_args.allow_image_urls,
        columns=data_args.columns,
    )
    refuse_preferences(sources)
    return LlavaStream(
        sources,
        shuffle_buffer_size=data_args.shuffle_buffer_size,
        seed=data_seed(args),
        on_bad_row=data_args.on_bad_row,
        skipped_file=Path(str(args.output_dir), SKIPPED_FILE),
        since=started,
    )
