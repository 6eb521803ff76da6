"""The rows of an evaluation: questions, what their answers are compared with, and the choices that they offer.

Besides the answer that training reads, a row may have more to compare with: `references` or `answers` (texts, or VQA's
`{"answer": ...}`), and several captions of one picture. Choices are `choices` or `options` of the row, or stand in the
question, a line each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hf_llava_ft.answering.rows import AskedRow, asked_rows
from hf_llava_ft.data.formats import Source
from hf_llava_ft.errors import UserError
from hf_llava_ft.evaluation.held_out import Key
from hf_llava_ft.evaluation.metrics.choices import LETTERS, choices_in, chosen

_REFERENCES = ("references", "answers", "captions")
_CHOICES = ("choices", "options")


@dataclass(frozen=True)
class RowFacts:
    """
    What is kept of a row in memory.

    Args:
        key (`tuple`): its file and number there.
        line (`dict`): `row`, `id`, `prompt`, `images`.
        references (`tuple[str, ...]`): what its answer is compared with.
        choices (`tuple[str, ...]`): see `Given`.
    """

    key: Key
    line: dict[str, Any]
    references: tuple[str, ...]
    choices: tuple[str, ...]


def rows_of(sources: list[Source], keys: set[Key] | None, system: str | None = None) -> Iterator[AskedRow]:
    """
    The rows in order, all of them or those of `keys`.

    Raises:
        UserError: at a row that is wrong.
    """
    for row in asked_rows(sources, system):
        if keys is None or (row.file, row.number) in keys:
            yield row


def facts_of_row(row: AskedRow) -> RowFacts:
    """
    Raises:
        UserError: if a row holds nothing that an answer could be compared with.
    """
    expected = row.line.get("expected")
    raw = row.raw if isinstance(row.raw, dict) else {}
    column = next((name for name in _REFERENCES if isinstance(raw.get(name), (list, tuple)) and raw[name]), None)
    given = [_text(each) for each in raw[column]] if column else []
    references = tuple(text for text in given if text) or ((expected.strip(),) if expected else ())
    if not references:
        raise UserError(f"{row.file}: row {row.number} has no answer to compare with: give the data its answers.")
    options = next((raw[name] for name in _CHOICES if isinstance(raw.get(name), (list, tuple)) and raw[name]), ())
    choices = tuple(str(each) for each in options) or choices_in(row.line["prompt"])
    line = {name: value for name, value in row.line.items() if name != "expected"}
    return RowFacts((row.file, row.number), line, references, choices)


def _text(value: Any) -> str:
    """Of VQA's `{"answer": ..., "answer_confidence": ...}` the answer."""
    value = value.get("answer") if isinstance(value, dict) else value
    return "" if value is None else str(value).strip()


def candidates(facts: RowFacts) -> list[str]:
    """What stands for each choice where it is scored by likelihood: its letter if the data answers so, else itself."""
    reference = facts.references[0]
    names_letter = reference not in facts.choices and chosen(reference, facts.choices) is not None
    if names_letter and len(reference.strip("(). ")) == 1:
        return [reference.replace(reference.strip("(). "), LETTERS[index]) for index in range(len(facts.choices))]
    return list(facts.choices)
