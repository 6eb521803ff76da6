"""What is wrong with a row, in words that a check, a list of skipped rows and an error share."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_llava_ft.data.image_folder import MissingImageError
from hf_llava_ft.data.schema import EmptyAnswer, MisplacedImage, PlaceholderMismatch, WrongTurnOrder, row_place
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.processing.truncation_llava import CannotTruncate, num_kept

# Kinds of what can be wrong; `problems` of the JSON names them.
KIND_OF_ERROR: dict[type[UserError], str] = {
    PlaceholderMismatch: "placeholder_mismatch",
    WrongTurnOrder: "turn_order",
    EmptyAnswer: "empty_answer",
    MisplacedImage: "image_in_answer",
    MissingImageError: "missing_image",
}

NOTHING_TO_LEARN = "the chat template marks no answer in the conversation, so there would be nothing to learn"
CHANGE = "change the row or choose another --version."
SHORTEN = "shorten it, or raise --model_max_length up to what the language model takes."

_MAX_WHAT_CHARS = 500  # a name may be as long as a row

_MAX_ID_CHARS = 200

_VERBS = ("has ", "is ", "begins ", "ends ", "says ")  # that make a sentence with the row's name before them


class Problem(NamedTuple):
    """
    Args:
        file (`str`): the data file, folder or Hub id.
        row (`int`, *optional*): number in it, from 1; None for the file as a whole.
        id (`str`, *optional*): the row's, where it has one.
        kind (`str`): one word for a program.
        what, what_to_do (`str`): the two halves of the sentence.
        place (`str`): file, row and id as messages name them.
    """

    file: str
    row: int | None
    id: str | None
    kind: str
    what: str
    what_to_do: str
    place: str

    @property
    def sentence(self) -> str:
        colon = "" if self.what.startswith(_VERBS) else ":"
        return f"{self.place}{colon} {self.what}; {self.what_to_do}"


def problem_of(
    error: UserError, where: str, number: int, given_id: Any, place: str, kind: str | None = None
) -> Problem:
    """The two halves of an error's sentence, which names its place first."""
    text = error.sentence.removeprefix(place).removeprefix(row_place(where, number)).lstrip(": ")
    what, _, todo = text.rpartition("; ")
    if not what:
        what, todo = text, ""
    if len(what) > _MAX_WHAT_CHARS:
        what = f"{what[: _MAX_WHAT_CHARS // 2]} ... {what[-_MAX_WHAT_CHARS // 2 :]}"
    kind = kind or KIND_OF_ERROR.get(type(error), "unreadable_row")
    return Problem(where, number, shown_id(given_id), kind, what, todo, place)


def shown_id(given_id: Any) -> str | None:
    """The id that a raw row gives itself, cut to what a table can show."""
    if isinstance(given_id, bool) or not isinstance(given_id, (str, int)):
        return None
    # Half of a surrogate pair can't be written to a file.
    return str(given_id)[:_MAX_ID_CHARS].encode("utf-8", "backslashreplace").decode()


def over_length(
    ids: np.ndarray, supervised: np.ndarray, processor: LlavaProcessor, repeats: Sequence[int], longest: int
) -> tuple[str, str, bool]:
    """What is wrong with a row of more than `longest` tokens, what to do, and whether it can be cut; arguments as in
    `num_kept`."""
    length = len(ids) + sum(repeats) - len(repeats)
    try:
        num_kept(ids, supervised, processor.image_token_id, repeats, longest)
        can_be_cut, treated = True, f"cuts off the last {length - longest}"
    except CannotTruncate as error:
        can_be_cut, treated = False, f"leaves the row out, since {error}"
    return f"has {length} tokens and the limit is {longest} (--on_bad_row skip {treated})", SHORTEN, can_be_cut
