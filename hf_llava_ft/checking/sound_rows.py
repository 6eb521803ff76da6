"""What training does with rows that it can't be trained on: `--on_bad_row raise` or `skip`.

    rows = sound_rows("a.json:0.3,b.parquet", "images", on_bad_row="skip")
    dataset = rows.that_fit(processor, longest=2048)     # datasets.Dataset
    rows.left_out, rows.cut                              # rows that are left out or cut, and why

`raise` stops at the first of them with an error. `skip` leaves them out and lists them all. A row that is only
too long is cut at the limit as in the original, unless the cut would go through an image or leave nothing to learn.

What may surprise: a dataset is first loaded as if all rows were good. Only if that fails, all of it is checked for bad
rows, and a cache is built without them.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

from hf_llava_ft.checking.images import stored_sizes
from hf_llava_ft.checking.kept_checks import known_counts
from hf_llava_ft.checking.known_problems import problems_of
from hf_llava_ft.data.formats.column_choice import SaidOfColumns
from hf_llava_ft.data.formats.containers import Container
from hf_llava_ft.data.formats.dataset import load_source
from hf_llava_ft.data.formats.mixture import draw_rows
from hf_llava_ft.data.formats.source import Source, open_source, refuse_preferences
from hf_llava_ft.data.lengths import TokenCounts, share_counts, token_counts
from hf_llava_ft.data.problems import CHANGE, NOTHING_TO_LEARN, Problem, over_length
from hf_llava_ft.data.schema import row_place
from hf_llava_ft.data.skipped_rows import SKIPPED_FILE, skipped_line, write_whole
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.processing_llava import LlavaProcessor

_NO_ROW = "no row can be trained on; llava-ft check says why."

OnBadRow = Literal["raise", "skip"]


class WithoutRows(Container):
    """A container without some of its rows; the others keep their numbers."""

    def __init__(self, container: Container, left_out: list[int]):
        self._container, self._left_out = container, frozenset(left_out)
        digest = blake2b(repr(sorted(left_out)).encode(), digest_size=8).hexdigest()
        # A cache is known by this name.
        self.name = f"{container.name} without {len(left_out)} rows ({digest})"
        self.where, self.files, self.image_folder = container.where, container.files, container.image_folder

    def iter_raw(self) -> Iterator[tuple[int, Any]]:
        for number, raw in self._container.iter_raw():
            if number not in self._left_out:
                yield number, raw


@dataclass
class _Part:
    """One source's dataset, and for each of its rows the number in the file, `int64[N]`."""

    source: Source
    dataset: datasets.Dataset
    numbers: np.ndarray

    def place(self, index: int) -> tuple[str, str | None]:
        """A row as messages name it, and its id."""
        number, row_id = int(self.numbers[index]), self.dataset[index]["id"]
        given = None if row_id == str(number) else row_id
        return row_place(self.source.where, number, given), given

    def problem(self, index: int, kind: str, what: str, todo: str) -> Problem:
        place, row_id = self.place(index)
        return Problem(self.source.where, int(self.numbers[index]), row_id, kind, what, todo, place)


@dataclass
class SoundRows:
    """
    Rows that can be read, with images that can be decoded. Made by [`sound_rows`].

    Args:
        root (`Path`): of the cache.
        left_out (`list[Problem]`): rows that are not trained.
        cut (`list[Problem]`): rows that are trained up to the limit of their length.
    """

    parts: list[_Part]
    on_bad_row: OnBadRow
    seed: int
    root: Path
    left_out: list[Problem] = field(default_factory=list)
    cut: list[Problem] = field(default_factory=list)
    _places: list[tuple[_Part, np.ndarray]] = field(default_factory=list)
    _counted: tuple[LlavaProcessor, TokenCounts] | None = None

    def that_fit(self, processor: LlavaProcessor, longest: int) -> datasets.Dataset:
        """
        The rows that a model can be trained on, drawn by their weights, sets in the order they were given.

        Args:
            processor (`LlavaProcessor`): as it will encode them.
            longest (`int`): tokens that a row may have, images included.

        Raises:
            UserError: under `raise`, at the first row that can't be encoded, has nothing to learn or is too long;
                under `skip`, if no row is left.
        """
        kept, tokens = [], []
        for position, part in enumerate(self.parts):
            rows, counts = self._rows_that_fit(part, processor, longest)
            if not len(rows):
                continue
            if part.source.weight != 1:
                rows = rows[draw_rows(len(rows), part.source.weight, self.seed, position)]
            self._places.append((part, rows))
            tokens.append([counts.num_tokens[rows], counts.num_supervised[rows]])
            is_all = len(rows) == len(part.dataset) and (np.diff(rows) == 1).all()
            kept.append(part.dataset if is_all else part.dataset.select(rows))
        if not kept:
            raise UserError(f"{self.parts[0].source.where}: {_NO_ROW}")
        dataset = kept[0] if len(kept) == 1 else datasets.concatenate_datasets(kept)
        self._counted = processor, TokenCounts(*np.concatenate(tokens, axis=1))
        share_counts(dataset, *self._counted)
        return dataset

    def part_of(self, dataset: datasets.Dataset, rows: np.ndarray) -> datasets.Dataset:
        """Some rows of the dataset that `that_fit` gave, whose tokens are not counted again."""
        part = dataset.select(rows)
        if self._counted is not None:
            processor, counts = self._counted
            share_counts(part, processor, TokenCounts(counts.num_tokens[rows], counts.num_supervised[rows]))
        return part

    def lengths(self, processor: LlavaProcessor, longest: int) -> list[int]:
        """Tokens of all rows that can be encoded, whatever their weight, cut at `longest`; see `that_fit`."""
        found: list[int] = []
        for part in self.parts:
            counted = self._counts_of(part, processor).num_tokens
            found += np.minimum(counted[counted > 0], longest).tolist()
        return found

    def _counts_of(self, part: _Part, processor: LlavaProcessor) -> TokenCounts:
        return token_counts(
            part.dataset, processor, known=lambda: known_counts(self.root, part.source, part.numbers, processor)
        )

    def places(self) -> list[tuple[str, int]]:
        """File and number there of each row that `that_fit` gave, in order."""
        return [(part.source.where, number) for part, rows in self._places for number in part.numbers[rows].tolist()]

    def first(self, number: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """(place, row) of the first rows that `that_fit` gave."""
        for part, rows in self._places:
            for index in rows[:number].tolist():
                yield part.place(index)[0], part.dataset[index]
            number -= min(number, len(rows))

    def _rows_that_fit(self, part: _Part, processor: LlavaProcessor, longest: int) -> tuple[np.ndarray, TokenCounts]:
        """Their places in the part, and the tokens of all its rows."""
        counts = self._counts_of(part, processor)
        too_long = set(np.flatnonzero(counts.num_tokens > longest).tolist())
        nothing = set(np.flatnonzero(counts.num_supervised == 0).tolist())
        fits = np.ones(len(part.dataset), dtype=bool)
        for index in sorted({*counts.refused, *nothing, *too_long}):
            is_cut = False
            if index in counts.refused:
                what, _, todo = counts.refused[index].rpartition("; ")
                problem = part.problem(index, "chat_template", what or todo, todo if what else CHANGE)
            elif index in nothing:
                problem = part.problem(index, "unsupervised", NOTHING_TO_LEARN, CHANGE)
            else:
                what, todo, is_cut = self._over_length(part.dataset[index], processor, longest)
                problem = part.problem(index, "too_long", what, todo)
            if self.on_bad_row == "raise":
                raise UserError(problem.sentence)
            (self.cut if is_cut else self.left_out).append(problem)
            fits[index] = is_cut
        return np.flatnonzero(fits), counts

    @staticmethod
    def _over_length(row: dict[str, Any], processor: LlavaProcessor, longest: int) -> tuple[str, str, bool]:
        [(ids, supervised)] = processor.tokenize_rendered([processor.render(row["messages"])])
        repeats = [processor.num_image_tokens_at(*size) for size in stored_sizes(processor, row["images"])]
        return over_length(ids, supervised, processor, repeats, longest)


def sound_rows(
    data_path: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    *,
    on_bad_row: OnBadRow = "raise",
    allow_outside: bool = False,
    allow_urls: bool = False,
    seed: int = 42,
    cache_dir: str | os.PathLike | None = None,
    columns: SaidOfColumns = None,
) -> SoundRows:
    """
    Open data as `load_data` does.

    Args:
        data_path, image_folder, allow_outside, allow_urls, seed, cache_dir, columns: see `load_data`.
        on_bad_row (`"raise"` or `"skip"`): what a row does that can't be read, or whose image can't be decoded.

    Raises:
        UserError: under `raise`, at the first such row; under both, if a file is no dataset.
    """
    sources = open_source(
        data_path,
        image_folder,
        allow_outside=allow_outside,
        allow_urls=allow_urls,
        cache_dir=cache_dir,
        columns=columns,
    )
    refuse_preferences(sources)
    root = Path(os.path.expanduser(cache_dir or datasets.config.HF_DATASETS_CACHE))
    found = SoundRows([], on_bad_row, seed, root)
    for source in sources:
        try:
            dataset = load_source(source, root)
            numbers = np.arange(1, len(dataset) + 1)
        except UserError as error:
            if on_bad_row == "raise":
                raise
            problems = problems_of(source, root, error)
            try:
                dataset, numbers = _load_without(source, problems, root)
            except UserError:  # a row that was good when the others were found
                problems = problems_of(source, root, error, is_remembered=False)
                dataset, numbers = _load_without(source, problems, root)
            found.left_out += problems
        found.parts.append(_Part(source, dataset, numbers))
    return found


def told_of_skipped(rows: SoundRows, longest: int, output_dir: Path) -> str | None:
    """Lists the rows that are not trained as they stand in `output_dir`; returns a sentence with their numbers, or
    None if there are none."""
    path = output_dir / SKIPPED_FILE
    if not rows.left_out and not rows.cut:
        path.unlink(missing_ok=True)  # of a run before
        return None
    _write_skipped(rows, path)
    num_left_out = len({(problem.file, problem.row) for problem in rows.left_out})
    return (
        f"--on_bad_row skip: rows left out: {num_left_out:,}, cut at {longest} tokens: {len(rows.cut):,}; "
        f"{path} lists them."
    )


def _write_skipped(rows: SoundRows, path: Path) -> None:
    """A line of JSON for each row that is left out or cut: `file`, `row`, `id`, `kind`, `what`, `what_to_do`, and
    `done`, which is "left out" or "cut"."""
    lines = []
    for done, problems in (("left out", rows.left_out), ("cut", rows.cut)):
        lines += [skipped_line(problem, done) for problem in problems]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lines)


def _load_without(source: Source, problems: list[Problem], root: Path) -> tuple[datasets.Dataset, np.ndarray]:
    """The rows that have no problem, and their numbers in the file, `int64[N]`."""
    bad = sorted({problem.row for problem in problems if problem.row is not None})
    rest = Source(WithoutRows(source.container, bad), source.dialect, source.images, source.weight)
    if next(rest.iter_raw(), None) is None:
        raise UserError(f"{source.where}: {_NO_ROW}")
    dataset = load_source(rest, root)
    return dataset, np.setdiff1d(np.arange(1, len(dataset) + len(bad) + 1), bad)
