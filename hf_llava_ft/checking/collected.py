"""What a check keeps of all rows, and which rows a bad picture or a repetition belongs to."""

import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from hf_llava_ft.checking.images import ImageFacts
from hf_llava_ft.checking.result import CheckResult
from hf_llava_ft.checking.rows import RowFindings, Sample
from hf_llava_ft.data.formats import Source
from hf_llava_ft.data.problems import Problem, shown_id
from hf_llava_ft.errors import UserError

_ROWS_AT_ONCE = 64
_MAX_CANDIDATES = 8  # for a sample, until it is known which images can be decoded
_MAX_DEPTH = 32  # of brackets; the deepest that a format has is 8
_BYTES_AT_ONCE = 8 * 2**20  # of rows that hold their pictures


class Collected:
    """What is kept of all rows: columns of numbers, and each image file's path once."""

    def __init__(self, sources: list[Source]):
        self.sources = sources
        self.columns: dict[str, list[np.ndarray]] = {}
        self.paths: dict[str, int] = {}
        self.facts: list[ImageFacts] = []
        self._same_facts: dict[ImageFacts, ImageFacts] = {}  # pictures of one size share one
        self.embedded: list[ImageFacts] = []
        self.has_links = False
        self._candidates: dict[str, list[tuple[int, Sample]]] = {}
        # Of each image place: source, row number, index of the file in `paths`, or -1 - its index in `embedded`.
        self.uses: list[np.ndarray] = []

    def chunks(self, problems: list[Problem]) -> Iterator[tuple[int, list[tuple[int, Any]]]]:
        """Rows of all sources, some at a time; a file that breaks off is a problem of its own."""
        for index, source in enumerate(self.sources):
            number, rows, num_bytes = 0, [], 0
            try:
                for number, raw in source.iter_raw():
                    try:
                        num_bytes += _num_bytes(raw)
                    except RecursionError:
                        raw = _pruned(raw)
                    rows.append((number, raw))
                    if len(rows) == _ROWS_AT_ONCE or num_bytes > _BYTES_AT_ONCE:
                        yield index, rows
                        rows, num_bytes = [], 0
            except UserError as error:
                what, _, todo = error.sentence.removeprefix(source.where).lstrip(": ").rpartition("; ")
                problems.append(Problem(source.where, number + 1, None, "broken_file", what, todo, source.where))
            if rows:
                yield index, rows

    def add(self, index: int, findings: RowFindings, result: CheckResult) -> None:
        """Of the next rows of the source with that index."""
        columns = ("numbers", "num_images", "num_words", "lengths", "supervised", "image_tokens", "excess", "digests")
        for name in columns:
            self.columns.setdefault(name, []).append(getattr(findings, name))
        self.columns.setdefault("source", []).append(np.full(len(findings.numbers), index, dtype=np.int32))
        uses = [(position, self.paths.setdefault(path, len(self.paths))) for position, path in findings.paths]
        for position, facts in findings.embedded:
            self.embedded.append(self._same_facts.setdefault(facts, facts))
            uses.append((position, -len(self.embedded)))
        if uses:
            self.uses.append(
                np.array([(index, findings.numbers[position], image) for position, image in uses], dtype=np.int32)
            )
        self.has_links = self.has_links or findings.has_links
        result.problems += findings.problems
        result.warnings += findings.warnings
        for name, sample in findings.samples.items():
            length = int(findings.lengths[np.searchsorted(findings.numbers, sample.number)])
            candidates = self._candidates.setdefault(name, [])
            candidates.append((length if name == "longest" else 0, sample))
            candidates.sort(key=lambda candidate: -candidate[0])  # stable: the first of each kind stays the first
            del candidates[_MAX_CANDIDATES:]

    def add_images(self, facts: list[ImageFacts]) -> None:
        """Of the next of `paths`."""
        self.facts += [self._same_facts.setdefault(one, one) for one in facts]

    def column(self, name: str) -> np.ndarray:
        """`[N]` of all rows so far: a field of `RowFindings`, or `source`, an index."""
        parts = self.columns.get(name)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def samples(self) -> dict[str, Sample]:
        """Of each kind one whose images can be decoded."""
        chosen = {}
        for name in ("image", "multi_image", "text", "longest"):
            sound = [sample for _, sample in self._candidates.get(name, []) if self._is_sound(sample)]
            if sound:
                chosen[name] = sound[0]
        return chosen

    def _is_sound(self, sample: Sample) -> bool:
        paths = [self.paths[str(image["path"])] for image in sample.images if image["bytes"] is None]
        return all(self.facts[path].failure is None for path in paths)

    def image_uses(self) -> np.ndarray:
        """`int32[P, 3]` of P image places: source, row number, image."""
        return np.concatenate(self.uses) if self.uses else np.zeros((0, 3), dtype=np.int32)

    def facts_of(self, image: int) -> ImageFacts:
        """Of an image as `image_uses` numbers it."""
        return self.facts[image] if image >= 0 else self.embedded[-1 - image]


def name_rows_of_images(collected: Collected, result: CheckResult) -> None:
    """Problems and warnings of pictures, with the rows that show them."""
    paths = list(collected.paths)
    uses: dict[int, dict[int, list[int]]] = {}
    for source, number, image in collected.image_uses().tolist():
        if collected.facts_of(image).is_remarkable:
            uses.setdefault(source, {}).setdefault(number, []).append(image)
    for index, rows in uses.items():
        source = collected.sources[index]
        for number, raw in islice(source.iter_raw(), max(rows)):
            if number not in rows:
                continue
            place = source.place(raw, number)
            row_id = shown_id(raw.get("id"))
            for image in dict.fromkeys(rows[number]):
                facts = collected.facts_of(image)
                name = "an image" if image < 0 else f"image {_name(paths[image], source)!r}"
                if facts.failure is not None:
                    kind = "decompression_bomb" if facts.is_bomb else "unreadable_image"
                    what = f"{name} can't be decoded ({facts.failure})"
                    todo = f"replace {'it' if image < 0 else 'the file'} or remove the row."
                    result.problems.append(Problem(source.where, number, row_id, kind, what, todo, place))
                else:
                    long, short = max(facts.width, facts.height), min(facts.width, facts.height)
                    what = f"{name} is {facts.width} x {facts.height} pixels, {long / short:.0f} times as long as wide"
                    todo = "look whether it is meant to be trained on."
                    result.warnings.append(Problem(source.where, number, row_id, "extreme_shape", what, todo, place))


def name_duplicates(collected: Collected, result: CheckResult) -> None:
    """A warning for each row that repeats an earlier one."""
    digests, numbers, source_of = (collected.column(name) for name in ("digests", "numbers", "source"))
    readable = np.flatnonzero(collected.column("num_images") >= 0)
    _, first, inverse = np.unique(digests[readable], return_index=True, return_inverse=True)
    originals = readable[first[inverse]]
    repeated = readable != originals
    result.duplicate_rows = int(repeated.sum())
    for again, original in zip(readable[repeated].tolist(), originals[repeated].tolist(), strict=True):
        where = collected.sources[source_of[again]].where
        earlier = collected.sources[source_of[original]].where
        same = f"row {numbers[original]}" if earlier == where else f"row {numbers[original]} of {earlier}"
        what = f"says the same about the same images as {same}"
        number, place = int(numbers[again]), f"{where}: row {numbers[again]}"
        todo = "remove one of them, unless it is meant to count twice."
        result.warnings.append(Problem(where, number, None, "duplicate_row", what, todo, place))


def _name(path: str, source: Source) -> str:
    """A file's name as a row would have it; never a path of this computer outside of the image folder."""
    folder = source.images.folder
    if folder is not None:
        relative = os.path.relpath(path, os.path.realpath(folder))
        if not relative.startswith(".."):
            return relative
    return os.path.basename(path)


def _num_bytes(value: Any, depth: int = 0) -> int:
    """About what a row's texts and pictures take; a `RecursionError` for more than `_MAX_DEPTH` brackets."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if not isinstance(value, (dict, list)):
        return 8
    if depth > _MAX_DEPTH:
        raise RecursionError
    return sum(_num_bytes(inner, depth + 1) for inner in (value.values() if isinstance(value, dict) else value))


def _pruned(value: Any, depth: int = 0) -> Any:
    """`value` with nothing inside what is deeper than any format looks: it could not be passed to a process."""
    if not isinstance(value, (dict, list)):
        return value
    if depth > _MAX_DEPTH:
        return type(value)()
    if isinstance(value, dict):
        return {key: _pruned(inner, depth + 1) for key, inner in value.items()}
    return [_pruned(inner, depth + 1) for inner in value]
