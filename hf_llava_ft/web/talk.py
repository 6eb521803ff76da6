"""What one visitor of the page says and is told: a conversation, and another one beside it. Knows no Gradio."""

import threading
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from hf_llava_ft.answering.conversation import Conversation
from hf_llava_ft.answering.prompts import context_length, question_of
from hf_llava_ft.answering.saved_chat import save_chat
from hf_llava_ft.answering.shared_base import SharedBase
from hf_llava_ft.errors import UserError
from hf_llava_ft.serving.endpoint_handler import MAX_CHARS_A_TOKEN, MAX_PICTURES

_saving = threading.Lock()  # visitors share the file


@dataclass
class _Asked:
    question: str
    files: list[str]
    answers: list[str]  # so far, on each side
    before: list[list[dict[str, Any]]]  # the messages of each side


@dataclass
class Said:
    """One message as it is shown: by `user` or `assistant`, with the files of its pictures."""

    role: str
    text: str
    files: list[str]
    is_whole: bool = True


class Talk:
    """
    Args:
        models (`SharedBase`): those that can be asked; the first is, at the beginning.
        system (`str`, *optional*): as in [`Conversation`].

    Attributes:
        sides (`list[Conversation]`): one, or two that are asked the same.
        names (`list[str]`): who answers on each side.
        files (`list[str]`): of the pictures, in their order.
    """

    def __init__(self, models: SharedBase, system: str | None = None):
        self.models, self.system = models, system
        self.names = [models.names[0]]
        self._ended = threading.Event()
        self._asked: _Asked | None = None  # while it is being answered
        self.begin()

    def begin(self) -> None:
        """A new conversation with the same models. `UserError` while an answer is being given."""
        self._check_idle()
        self.row_id = uuid.uuid4().hex[:12]
        self.files: list[str] = []
        self.sides = [self._conversation(name) for name in self.names]

    def _check_idle(self) -> None:
        if self._asked:
            raise UserError("an answer is being written: end it first.")

    def _conversation(self, name: str) -> Conversation:
        return Conversation(self.models.model, self.models.processor(name), self.system)

    def choose(self, name: str, beside: str | None) -> None:
        """
        Goes on with these models. What was said stays; who is new on the right takes over what is on the left.

        Raises:
            UserError: if there is no such model, or while an answer is being given.
        """
        self._check_idle()
        names = [name, *([beside] if beside else [])]
        for each in names:
            if each not in self.models.names:
                raise UserError("there is no such model here: choose one of the list.")
        left = self.sides[0]
        left.processor = self.models.processor(name)
        sides = [left]
        if beside and names[1:] == self.names[1:]:
            sides = [left, self.sides[1]]
        elif beside:
            right = self._conversation(beside)
            right.messages, right.images = list(left.messages), list(left.images)
            sides = [left, right]
        self.names, self.sides = names, sides

    def end(self) -> None:
        """Ends the answer that is being given."""
        self._ended.set()

    def ask(self, question: str, pictures: list[Image.Image], files: list[str], **generation: Any) -> Iterator[None]:
        """
        Asks all sides, one after the other; a step for each piece of an answer, which [`columns`] has. A question that
        is not answered to its end on all sides leaves everything as it was.

        Raises:
            UserError: if it cannot be answered, or was ended.
        """
        sides, left = self.sides, self.sides[0]
        limit = context_length(self.models.model)
        if limit and len(question) > limit * MAX_CHARS_A_TOKEN:  # which need not be counted to be too many
            raise UserError(f"the question has {len(question):,} characters, more than the model's context takes.")
        if len(left.images) + len(pictures) > MAX_PICTURES:
            raise UserError(f"a conversation here takes {MAX_PICTURES} pictures at most: begin a new one.")
        before = [(side.messages, side.images) for side in sides]
        answers = [""] * len(sides)
        self._asked = _Asked(question, files, answers, [side.messages for side in sides])
        self._ended.clear()
        try:
            for place, (name, side) in enumerate(zip(self.names, sides, strict=True)):
                with self.models.active(name), closing(side.stream(question, pictures, **generation)) as pieces:
                    for piece in pieces:
                        answers[place] += piece
                        yield
                        if self._ended.is_set():
                            raise UserError("the answer was ended, and the question is as if it had not been asked.")
            self.files = self.files + files
        except BaseException:
            for side, (messages, images) in zip(sides, before, strict=True):
                side.messages, side.images = messages, images
            raise
        finally:
            self._asked = None

    def retry(self, **generation: Any) -> Iterator[None]:
        """Asks the last question again; as [`ask`], and the old answers stay where there are no new ones."""
        sides, all_files = self.sides, self.files
        before = [(side.messages, side.images) for side in sides]
        try:
            content, pictures = [side.take_back() for side in sides][0]
            kept = len(sides[0].images)
            self.files = all_files[:kept]
            yield from self.ask(question_of(content), pictures, all_files[kept:], **generation)
        except BaseException:
            for side, (messages, images) in zip(sides, before, strict=True):
                side.messages, side.images = messages, images
            self.files = all_files
            raise

    def columns(self) -> list[list[Said]]:
        """What is said on each side, with the question that is being answered."""
        asked, found = self._asked, []
        for place, side in enumerate(self.sides):
            column, files = [], iter(self.files)
            for message in asked.before[place] if asked else side.messages:
                pictures = [next(files) for part in message["content"] if part["type"] == "image"]
                if message["role"] != "system":
                    column.append(Said(message["role"], question_of(message["content"]), pictures))
            if asked:
                column.append(Said("user", asked.question, asked.files))
                column.append(Said("assistant", asked.answers[place], [], is_whole=False))
            found.append(column)
        return found

    def keep(self, file: Path) -> str:
        """Puts the conversation on the left into `file`, as a row to train on; gives what to say of it."""
        with _saving:
            number = save_chat(file, self.row_id, self.sides[0].messages, self.sides[0].images)
        has = f"{number} conversation{'s' * (number != 1)}"
        return f"{file} has {has}; train takes it as --data_path {file} --image_folder {file.parent}"

    @property
    def is_cut(self) -> bool:
        """Whether an answer ended because the context is full."""
        return any(side.is_cut for side in self.sides)
