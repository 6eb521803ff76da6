"""A table of one's own: which of its columns is the picture, the question and the answer.

    columns = find_columns(["img", "question", "answer"], {}, "data.csv")
    columns.told()                              # prompt from question, response from answer, image from img
    columns.parse(row, "data.csv", 3)           # Row of data/schema.py

Columns are named with `--columns image=img,prompt=question,response=answer`, or found by the names they usually have.
Where two could be meant, nothing is chosen.

What may surprise:
* A list of answers to one question, as VQA has it, becomes the answer that most people gave, the first of equals.
  Lists of questions and answers of one length are the turns of a conversation.
* A number is no answer: of a class it would be the index, which says nothing. In CSV everything is text.
* An empty cell of a picture is a row of text; an empty question or answer is refused.
"""

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from hf_llava_ft.data.schema import (
    IMAGE_PLACEHOLDER,
    EmptyAnswer,
    Row,
    build_row,
    identify_row,
    refuse_other_media,
)
from hf_llava_ft.data.values import ImageRef, clean_text, image_ref, json_type
from hf_llava_ft.errors import UserError

# Spelled without capitals, spaces and hyphens. Of those in one line, a table has one.
_NAMES = {
    "prompt": ("prompt", "question", "questions", "query", "instruction", "input"),
    "response": ("response", "answer", "answers", "completion", "output", "reply"),
    "image": ("image", "images", "img", "image_path", "img_path", "image_file", "image_name", "file_name")
    + ("filename", "picture", "photo", "path", "file"),
    "system": ("system", "system_prompt"),
}
# Answers too, where nothing is asked.
_CAPTIONS = ("caption", "captions", "text", "description")
# With one of these a table of pictures and captions says more than captions.
_OF_QUESTIONS = ("prompt", "question", "questions", "query", "instruction", "answer", "answers", "response")
ROLES = tuple(_NAMES)
_IN_WORDS = {"prompt": "the question", "response": "the answer", "image": "the picture", "system": "the system turn"}
# What pandas writes for a value that is not there. "Nan" and "none" may be answers.
_NOT_A_VALUE = ("nan", "NaN", "<NA>")
EXAMPLE = "image=img,prompt=question,response=answer"
_MAX_NAMED = 20

# Of each role its columns; none at all where it is not to be looked for.
Given = Mapping[str, tuple[str, ...]]


class Columns(NamedTuple):
    """
    The columns that are read.

    Args:
        prompt (`str`, *optional*): of the question; None where a picture's caption is the answer.
        response (`str`): of the answer.
        image (`tuple[str, ...]`): of the pictures, in reading order.
        system (`str`, *optional*): of the system turn.
        names (`frozenset[str]`): all that were known when these were found.
        settled (`frozenset[str]`): roles that were given, and not found.
        has_lists (`bool`): the first rows have several answers to one question.
    """

    prompt: str | None
    response: str
    image: tuple[str, ...]
    system: str | None
    names: frozenset[str]
    settled: frozenset[str] = frozenset()
    has_lists: bool = False

    def told(self) -> str:
        """`prompt from question, response from answer, image from img`, and what is not read."""
        response = f"{self.response} (of several answers the most frequent)" if self.has_lists else self.response
        chosen = [("prompt", self.prompt), ("response", response), ("image", " and ".join(self.image))]
        chosen.append(("system", self.system))
        read = {self.prompt, self.response, *self.image, self.system, "id"}
        unread = sorted(name for name in self.names if name not in read)
        text = ", ".join(f"{role} from {name}" for role, name in chosen if name)
        return f"{text}; not read: {listed(unread)}" if unread else text

    @property
    def reading(self) -> str:
        """Other columns give other rows of the same file."""
        return json.dumps([self.prompt, self.response, self.image, self.system])

    def parse(self, row: Any, where: str, number: int = 1) -> Row:
        """
        Translate a row of the table.

        Args:
            row (`dict`): by column; a cell that is empty may be missing.
            where (`str`): the file's name, for messages.
            number (`int`): the row's number from 1.

        Raises:
            UserError: if it can't be trained on; the sentence names row and column.
        """
        row_id, place = identify_row(row, where, number)
        refuse_other_media(row, place)
        for name in row:
            if name not in self.names and (role := role_of(name)) and role not in self.settled:
                raise UserError(
                    f"{place} has {name!r}, which the first rows have not; say what it is with --columns "
                    f"{role}={name}, or that it is not read with --columns {role}= ."
                )
        images = [image for name in self.image for image in _images(row.get(name), f"{place}: column {name!r}")]
        answers = _cell(row, self.response, place)
        if answers is None:
            raise EmptyAnswer(f"{place}: column {self.response!r} is empty; write the answer, or remove the row.")
        if self.prompt is None:
            if not images:
                raise UserError(f"{place} has no picture under {listed(self.image)}; write it, or remove the row.")
            turns = [("user", ""), ("assistant", _one_answer(answers, f"{place}: column {self.response!r}"))]
        else:
            turns = self._turns(_cell(row, self.prompt, place), answers, place)
        if images and not any(IMAGE_PLACEHOLDER in text for role, text in turns if role == "user"):
            places = "\n".join([IMAGE_PLACEHOLDER] * len(images))
            turns[0] = ("user", f"{places}\n{turns[0][1]}" if turns[0][1] else places)
        system = None if self.system is None else _cell(row, self.system, place)
        if system is not None:
            system = _text(system, f"{place}: column {self.system!r}")
            if IMAGE_PLACEHOLDER in system:
                raise UserError(f"{place}: column {self.system!r} holds {IMAGE_PLACEHOLDER}; remove it.")
        return build_row(row_id, turns, images, place, system=system)

    def _turns(self, questions: Any, answers: Any, place: str) -> list[tuple[str, str]]:
        at_question, at_answer = f"{place}: column {self.prompt!r}", f"{place}: column {self.response!r}"
        if questions is None:
            raise UserError(f"{at_question} is empty; write the question, or remove the row.")
        if not isinstance(questions, list):
            return [("user", _text(questions, at_question)), ("assistant", _one_answer(answers, at_answer))]
        if not isinstance(answers, list) or len(answers) != len(questions):
            held = f"{len(answers)} answers" if isinstance(answers, list) else "one answer"
            raise UserError(
                f"{place}: {len(questions)} questions under {self.prompt!r} and {held} under {self.response!r}; "
                "write one answer for each question."
            )
        turns = []
        for question, answer in zip(questions, answers, strict=True):
            turns += [("user", _text(question, at_question)), ("assistant", _text(answer, at_answer))]
        return turns


def find_columns(names: Sequence[str], given: Given, where: str) -> Columns | None:
    """
    Args:
        names (`list[str]`): all columns.
        given (`dict`): those that were named, by role; the others are found by their usual names.
        where (`str`): for messages.

    Returns:
        `Columns`, or None if no column has a name that says anything.

    Raises:
        UserError: if a column is not there, or more than one could be meant.
    """
    for role, chosen in given.items():
        for name in chosen:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
                hint = f"; did you mean {close[0]}?" if close else "."
                raise UserError(f"--columns {role}={name}: {where} has the columns {listed(names)}{hint}")
    taken = {name for chosen in given.values() for name in chosen}
    found: dict[str, tuple[str, ...]] = dict(given)
    for role in ROLES:
        if role not in given:
            usual = _NAMES[role]
            if role == "response" and not found.get("prompt"):
                usual = (*usual, *_CAPTIONS)
            found[role] = tuple(name for name in names if name not in taken and _plain(name) in usual)
            if len(found[role]) > 1:
                _refuse_several(role, found[role], names, where)
    if not found["response"] and {"conversations", "messages"} & {*names}:
        raise UserError(f"{where} holds whole conversations, of which no column is to be named; leave out --columns.")
    if not found["response"]:
        if not given and not found["prompt"]:
            return None
        raise UserError(
            f"{where} has the columns {listed(names)}, and no name of them is known for the answer; "
            f"say which it is with --columns response=NAME."
        )
    if not found["prompt"] and not found["image"]:
        if not given:
            return None
        raise UserError(
            f"{where} has the columns {listed(names)}, and no name of them is known for the question or the picture; "
            f"say which they are with --columns {EXAMPLE}."
        )
    (response,) = found["response"]
    prompt, system = (found[role][0] if found[role] else None for role in ("prompt", "system"))
    return Columns(prompt, response, found["image"], system, frozenset(names), frozenset(given))


def _refuse_several(role: str, several: Sequence[str], names: Sequence[str], where: str) -> None:
    raise UserError(
        f"{where} has the columns {listed(names)}, and {listed(several, ' and ')} could each be {_IN_WORDS[role]}; "
        f"say which it is with --columns {role}={several[0]}."
    )


def asks_more_than_captions(names: Iterable[str]) -> bool:
    """Whether one of the columns of pictures and captions is a question or its answer by its name."""
    return any(_plain(name) in _OF_QUESTIONS for name in names)


def has_own_picture(names: Iterable[str]) -> bool:
    """Whether a table with a prompt and a completion has its pictures under another name than `image`."""
    return any(_plain(name) in _NAMES["image"] for name in names) and not {"image", "images"} & {*names}


def role_of(name: Any) -> str | None:
    plain = _plain(name)
    return next((role for role, usual in _NAMES.items() if plain in usual), None)


def _plain(name: Any) -> str:
    return str(name).strip().lower().replace(" ", "_").replace("-", "_")


def _cell(row: dict[str, Any], name: str, place: str) -> Any:
    """What a cell holds; None if it is empty."""
    value = row.get(name)
    if value is None or (isinstance(value, (str, list)) and not value) or (isinstance(value, str) and value.isspace()):
        return None
    _refuse_not_a_value(value, f"{place}: column {name!r}")
    return value


def _refuse_not_a_value(value: Any, place: str) -> None:
    if (isinstance(value, float) and value != value) or (isinstance(value, str) and value in _NOT_A_VALUE):
        shown = value if isinstance(value, str) else "NaN"
        raise UserError(
            f"{place} is {shown}, which is written for a value that is missing; fill it in or remove the row."
        )


def _images(value: Any, place: str) -> list[ImageRef]:
    images = []
    for image in value if isinstance(value, list) else [value]:
        if image is not None and image != "":
            _refuse_not_a_value(image, place)
            images.append(image_ref(image, place))
    return images


def _text(value: Any, place: str) -> str:
    _refuse_not_a_value(value, place)
    if not isinstance(value, str):
        raise UserError(f"{place} holds {json_type(value)}; write it as text.")
    return clean_text(value, place)


def _one_answer(answers: Any, place: str) -> str:
    """That which most people gave, if there are several."""
    if not isinstance(answers, list):
        return _text(answers, place)
    # VQA's annotations are objects.
    texts = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    counts = Counter(_text(text, place) for text in texts)
    return max(counts, key=counts.__getitem__)  # which is the first of equals


def listed(names: Iterable[str], last: str = ", ") -> str:
    shown = [name if len(name) <= 40 else f"{name[:37]}..." for name in map(str, names)]
    if len(shown) > _MAX_NAMED:
        return ", ".join(shown[:_MAX_NAMED]) + f" and {len(shown) - _MAX_NAMED} more"
    return last.join(shown) if len(shown) < 3 or last == ", " else ", ".join(shown[:-1]) + last + shown[-1]
