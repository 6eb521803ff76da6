"""A chat in a terminal: what its lines mean."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from hf_llava_ft.answering.conversation import ContextFull, Conversation
from hf_llava_ft.answering.pictures import open_image
from hf_llava_ft.answering.prompts import question_of
from hf_llava_ft.answering.saved_chat import save_chat
from hf_llava_ft.answering.shared_base import BASE, SharedBase
from hf_llava_ft.errors import UserError

HELP = (
    "/image PATH_OR_URL adds a picture to the next question, /retry [TEMPERATURE] asks the last one again, /compare "
    "asks it of the base too, /save FILE.json keeps the conversation, /new starts over, /help shows this, /quit ends; "
    "Ctrl-C ends an answer. A question that begins with / begins with a blank."
)


class Chat:
    """
    Args:
        models (`SharedBase`): the model under the first of its names is talked with.
        system: as in [`Conversation`].
        images (`list[PIL.Image.Image]`): that go with the first question.
        write (`Callable`): is given the pieces of answers.
        tell (`Callable`): is given lines about the chat.
        generation: settings of [`Conversation.stream`].
    """

    def __init__(
        self,
        models: SharedBase,
        images: list[Image.Image],
        *,
        system: str | None = None,
        write: Callable[[str], None],
        tell: Callable[[str], None],
        **generation: Any,
    ):
        self.models, self.system = models, system
        self.processor = models.processor(models.names[0])
        self.pending, self.write, self.tell, self.generation = images, write, tell, generation
        self._begin()

    def _begin(self) -> None:
        self.conversation = Conversation(self.models.model, self.processor, self.system)
        self.row_id = uuid.uuid4().hex[:12]  # of the conversation, where it is saved

    def take(self, line: str) -> bool:
        """Does what `line` says; gives whether the chat goes on."""
        if line.startswith("/"):
            return self._command(line.strip())
        if line.strip():
            self._ask(line.strip())
        return True

    def _command(self, line: str) -> bool:
        name, _, rest = line.partition(" ")
        rest = rest.strip().strip("\"'")
        if name in ("/quit", "/exit"):
            return False
        if name == "/help":
            self.tell(HELP)
        elif name == "/new":
            self._begin()
            self.pending = []
            self.tell("A new conversation.")
        elif name in ("/retry", "/compare", "/save"):
            try:
                {"/retry": self._retry, "/compare": self._compare, "/save": self._keep}[name](rest)
            except UserError as error:
                self.tell(f"error: {error.sentence}")
            except KeyboardInterrupt:
                self.tell("\nThe answer was ended.")
        elif name == "/image" and rest:
            self._add_image(rest)
        elif name == "/image":
            self.tell("error: /image wants a path or an address: /image cat.jpg")
        else:
            self.tell(f"error: {name} is no command here; /help names those that are.")
        return True

    def _add_image(self, source: str) -> None:
        try:
            self.pending.append(open_image(os.path.expanduser(source), self.processor.picture_opening))
        except UserError as error:
            self.tell(f"error: {error.sentence}")
            return
        pictures = "it goes" if len(self.pending) == 1 else f"{len(self.pending)} pictures go"
        self.tell(f"{source}: {pictures} with your next question.")

    def _retry(self, temperature: str) -> None:
        generation = self.generation | ({"temperature": _temperature(temperature)} if temperature else {})
        if not generation.get("temperature"):
            self.tell("Greedy answers are the same each time; /retry 0.7 samples.")
        before = self.conversation.messages, self.conversation.images
        content, self.pending = self.conversation.take_back()
        if not self._answered(question_of(content), generation):
            self.conversation.messages, self.conversation.images = before
            self.pending = []

    def _compare(self, rest: str) -> None:
        if self.models.why_no_base:
            raise UserError(self.models.why_no_base)
        asked = self.conversation
        base = Conversation(self.models.model, self.processor, self.system, list(asked.messages), list(asked.images))
        content, pictures = base.take_back()
        answer = asked.messages[-1]["content"][0]["text"]
        self.tell(f"tuned: {answer}")
        self.write("base: ")
        with self.models.active(BASE):
            for piece in base.stream(question_of(content), pictures, **self.generation):
                self.write(piece)
        self.write("\n")

    def _keep(self, path: str) -> None:
        if not path:
            raise UserError("/save wants the name of a file: /save talks.json")
        file = Path(os.path.expanduser(path))
        number = save_chat(file, self.row_id, self.conversation.messages, self.conversation.images)
        has = f"{number} conversation{'s' * (number != 1)}"
        self.tell(f"{file} has {has}; train takes it as --data_path {file} --image_folder {file.parent}")

    def _ask(self, question: str) -> None:
        self._answered(question, self.generation)

    def _answered(self, question: str, generation: dict[str, Any]) -> bool:
        """Whether there is a whole answer, and no reason why not was told."""
        self.write("model: ")
        try:
            with self.models.active(self.models.names[0]):
                for piece in self.conversation.stream(question, self.pending, **generation):
                    self.write(piece)
        except KeyboardInterrupt:
            self.tell("\nThe answer was ended; your next question follows the one before it.")
            return False
        except ContextFull as error:
            self.tell(f"\nerror: {error.sentence} /new starts over.")
            return False
        except UserError as error:
            self.tell(f"\nerror: {error.sentence}")
            return False
        self.write("\n")
        self.pending = []
        if self.conversation.is_cut:
            self.tell("The answer ends here because the model's context is full: /new starts over.")
        return True


def _temperature(said: str) -> float:
    try:
        found = float(said)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise UserError(f"/retry {said}: a temperature is 0 or a number above it.")
    return found
