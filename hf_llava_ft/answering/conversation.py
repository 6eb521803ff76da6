"""Asking a model: one question after another about pictures, with the answer streamed word by word."""

import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteriaList, TextIteratorStreamer

from hf_llava_ft.answering.prompts import (
    context_length,
    encode_prompt,
    question_content,
    sampling_options,
    stop_options,
    up_to,
)
from hf_llava_ft.errors import UserError


class ContextFull(UserError):
    """A conversation that has no room for another answer."""


@dataclass
class Conversation:
    """
    A chat with one model. Questions and answers accumulate in `messages`, pictures in `images`.

    Args:
        model, processor: as [`~hf_llava_ft.answering.loading.load_for_answering`] gives them.
        system (`str`, *optional*): replaces the chat template's own.

    Attributes:
        is_cut (`bool`): whether the last answer ended because the model's context is full.
    """

    model: Any
    processor: Any
    system: str | None = None
    messages: list[dict] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    is_cut: bool = False
    _num_new: int = field(default=0, init=False, repr=False)
    # Of all its tokens at once: transformers' streamer, up to 5.24, cuts where a character is not whole yet.
    _answer: str = field(default="", init=False, repr=False)

    def ask(self, question: str, images: list[Image.Image] | None = None, **generation) -> str:
        """The whole answer; see [`stream`]."""
        for _ in self.stream(question, images, **generation):
            pass
        return self._answer

    def stream(
        self,
        question: str,
        images: list[Image.Image] | None = None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float | None = None,
    ) -> Generator[str, None, None]:
        """
        Asks `question` about `images`, which are put in front of it as in training, or where `<image>` stands in it,
        and yields the answer piece by piece. A question that is not answered to its end leaves the conversation as it
        was.

        Args:
            max_new_tokens (`int`): longest answer.
            temperature (`float`): 0 is greedy.
            top_p (`float`, *optional*): smallest share of the probability that is sampled from.

        Raises:
            ContextFull: if the conversation leaves no room for an answer.
            UserError: if the chat template does not take the conversation, or the question has other numbers of
                `<image>` and pictures.
        """
        content = question_content(question, len(images or []), self.processor.image_token)
        messages = [*self.messages, {"role": "user", "content": content}]
        if not self.messages and self.system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system}]})
        pictures = [*self.images, *(images or [])]
        inputs = encode_prompt(self.model, self.processor, messages, pictures)
        room = self._room(inputs["input_ids"].shape[1])
        options = {**sampling_options(temperature, top_p), **stop_options(self.processor)}
        longest = max_new_tokens if room is None else min(max_new_tokens, room)
        yield from self._generated(inputs, max_new_tokens=longest, **options)
        self.is_cut = room is not None and self._num_new >= room
        messages.append({"role": "assistant", "content": [{"type": "text", "text": self._answer}]})
        self.messages, self.images = messages, pictures

    def take_back(self) -> tuple[list[dict[str, str]], list[Image.Image]]:
        """
        Forgets the last question and its answer.

        Returns:
            The content of the question, and its pictures.

        Raises:
            UserError: if nothing was asked.
        """
        if not self.messages:
            raise UserError("nothing was asked yet.")
        content = self.messages[-2]["content"]
        num_pictures = sum(part["type"] == "image" for part in content)
        first = len(self.images) - num_pictures
        pictures = self.images[first:]
        # A system message in front goes too: the next question brings it again.
        self.messages = self.messages[:-2] if len(self.messages) > 3 else []
        self.images = self.images[:first]
        return content, pictures

    def _room(self, num_tokens: int) -> int | None:
        limit = context_length(self.model)
        if limit is None or num_tokens < limit:
            return None if limit is None else limit - num_tokens
        what_to_do = (
            "start a new one" if self.messages else "ask a shorter question, or about fewer or smaller pictures"
        )
        raise ContextFull(
            f"the conversation has {num_tokens:,} tokens with this question, and the model's context {limit:,}, which "
            f"leaves no room for an answer: {what_to_do}."
        )

    def _generated(self, inputs: Any, **options: Any) -> Iterator[str]:
        stop = self.processor.stop_string
        pieces = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        ended = threading.Event()  # nobody reads any further
        failure: list[BaseException] = []

        def is_ended(input_ids, scores, **kwargs) -> torch.Tensor:
            return torch.full((len(input_ids),), ended.is_set(), dtype=torch.bool, device=input_ids.device)

        def generate() -> None:
            try:
                with torch.inference_mode():
                    ids = self.model.generate(
                        **inputs, **options, streamer=pieces, stopping_criteria=StoppingCriteriaList([is_ended])
                    )
                new = ids[0, inputs["input_ids"].shape[1] :]
                self._num_new = len(new)
                text = self.processor.tokenizer.decode(new, skip_special_tokens=True)
                self._answer = (text.partition(stop)[0] if stop else text).strip()
            except BaseException as error:
                failure.append(error)
                pieces.end()

        worker = threading.Thread(target=generate, daemon=True)
        worker.start()
        try:
            yield from up_to(stop, pieces) if stop else pieces
        finally:
            ended.set()
            worker.join()
        if failure:
            raise failure[0]
