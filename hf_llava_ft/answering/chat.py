"""A chat in a terminal: what its lines mean."""

import os
from collections.abc import Callable
from typing import Any

from PIL import Image

from hf_llava_ft.answering.conversation import ContextFull, Conversation
from hf_llava_ft.answering.pictures import open_image
from hf_llava_ft.errors import UserError

HELP = (
    "/image PATH_OR_URL adds a picture to the next question, /new starts over, /help shows this, /quit ends; "
    "Ctrl-C ends an answer. A question that begins with / begins with a blank."
)


class Chat:
    """
    Args:
        model, processor, system: as in [`Conversation`].
        images (`list[PIL.Image.Image]`): that go with the first question.
        write (`Callable`): is given the pieces of answers.
        tell (`Callable`): is given lines about the chat.
        generation: settings of [`Conversation.stream`].
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        images: list[Image.Image],
        *,
        system: str | None = None,
        write: Callable[[str], None],
        tell: Callable[[str], None],
        **generation: Any,
    ):
        self.model, self.processor, self.system = model, processor, system
        self.pending, self.write, self.tell, self.generation = images, write, tell, generation
        self.conversation = self._new()

    def _new(self) -> Conversation:
        return Conversation(self.model, self.processor, self.system)

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
            self.conversation, self.pending = self._new(), []
            self.tell("A new conversation.")
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

    def _ask(self, question: str) -> None:
        self.write("model: ")
        try:
            for piece in self.conversation.stream(question, self.pending, **self.generation):
                self.write(piece)
        except KeyboardInterrupt:
            self.tell("\nThe answer was ended; your next question follows the one before it.")
            return
        except ContextFull as error:
            self.tell(f"\nerror: {error.sentence} /new starts over.")
            return
        except UserError as error:
            self.tell(f"\nerror: {error.sentence}")
            return
        self.write("\n")
        self.pending = []
        if self.conversation.is_cut:
            self.tell("The answer ends here because the model's context is full: /new starts over.")
