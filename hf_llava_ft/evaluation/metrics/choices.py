"""Multiple choice: the letter that an answer names, as in ScienceQA, or the choice that the model finds likeliest."""

import re
from collections.abc import Sequence

from hf_llava_ft.evaluation.metrics.given import Given, mean_metric
from hf_llava_ft.evaluation.metrics.short_answers import is_exact

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ALONE = re.compile(r"\(?([A-Z])\)?[.:]?")
_IN_FRONT = re.compile(r"\(?([A-Z])(?:\)|\.|:|\)\.|\):)\s")
_IN_A_SENTENCE = re.compile(r"[Aa]nswer is:? \(?([A-Z])\b")
_LINE = re.compile(r"^\s*\(?([A-Z])[.):]\s*(\S.*?)\s*$", re.MULTILINE)


def chosen(answer: str, choices: Sequence[str]) -> int | None:
    """
    Which of the choices, from 0: by a letter alone (`B`, `(B)`, `B.`), a letter in front (`B. a dog`), `the answer is
    B`, or the words of a choice. None if it is no one's.
    """
    text = answer.strip()
    found = _ALONE.fullmatch(text) or _IN_FRONT.match(f"{text} ")
    named = [found.group(1)] if found else _IN_A_SENTENCE.findall(text)
    if len(named) == 1 and LETTERS.index(named[0]) < len(choices):
        return LETTERS.index(named[0])
    equal = [index for index, choice in enumerate(choices) if is_exact(text, choice)]
    return equal[0] if len(equal) == 1 else None


def choices_in(question: str) -> tuple[str, ...]:
    """The choices that stand in a question, a line each (`A. a dog`), as LLaVA writes ScienceQA; or none."""
    lines = _LINE.findall(question)
    letters = "".join(letter for letter, _ in lines)
    return tuple(text for _, text in lines) if len(lines) > 1 and LETTERS.startswith(letters) else ()


def _by_letter(row: Given) -> float:
    right = chosen(row.references[0], row.choices)
    return float(right is not None and chosen(row.answer, row.choices) == right)


def _by_likelihood(row: Given) -> float:
    losses = row.choice_losses
    return float(bool(losses) and losses.index(min(losses)) == chosen(row.references[0], row.choices))


CHOICE = mean_metric("choice", "Multiple choice, by letter", _by_letter)
CHOICE_LIKELIHOOD = mean_metric(
    "choice_likelihood", "Multiple choice, by likelihood", _by_likelihood, asks=False, needs_choices=True
)
