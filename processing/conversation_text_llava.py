"""A conversation as text: what of it is learned, its tokens, and what ends an answer.

What is supervised comes from the chat template's own generation spans, laid over the offsets of the tokens of the
whole text: nothing is tokenised in pieces and nothing is found again by searching.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import Any, cast

import numpy as np
from transformers import ProcessorMixin

from .bounded_template_llava import render_within_bounds
from .own_template_llava import misplaced_mark

_SHORT_ANSWER = "a"
_BYTE_LEVEL_SPACE = "Ġ"


class ConversationText(ProcessorMixin):
    """The part of [`LlavaProcessor`] that deals with text alone."""

    tokenizer: Any
    image_token: str
    image_token_id: int

    def render(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, one placeholder per image, and the `(start, end)` characters of what is
        supervised."""
        if "endgeneration" not in cast(str, self.chat_template):
            return self._render_by_prefixes(messages)
        [text], [spans] = self._rendered(messages, return_assistant_tokens_mask=True)
        return text, [(start, end) for start, end in spans]

    def _render_by_prefixes(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """
        Spans of a tokenizer's own template, which has no generation marks: an answer is what the template adds to the
        prompt it would generate from, up to the stop token.

        Raises:
            ValueError: if the template rewrites earlier turns (as those do that drop a model's reasoning), so that no
                such prefix exists.
        """
        [text], _ = self._rendered(messages)
        stop = self.tokenizer.eos_token
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            [prompt], _ = self._rendered(messages[:index], add_generation_prompt=True)
            [answered], _ = self._rendered(messages[: index + 1])
            found = answered.rfind(stop, len(prompt))
            end = found + len(stop)
            if found < 0 or not text.startswith(prompt) or not text.startswith(answered[:end]):
                raise ValueError(
                    "the tokenizer's own chat template cannot be used for training: it does not render an answer as "
                    f"its prompt, the answer and {stop}. Choose one of ours, e.g. --version chatml."
                )
            spans.append((len(prompt), end))
        return text, spans

    def _rendered(self, messages: list[dict[str, Any]], **options) -> Any:
        """What `render_jinja_template` returns for one conversation; what the template refuses is a `ValueError`."""
        special_tokens = self.tokenizer.special_tokens_map
        try:
            return render_within_bounds(
                conversations=[messages], chat_template=cast(str, self.chat_template), **options, **special_tokens
            )
        except Exception as error:  # jinja2's TemplateError, and whatever a template may run into
            raise ValueError(f"the chat template does not take this conversation: {error}") from error

    def begins_with_bos(self, text: str) -> bool:
        """Whether the template has written the token already that the tokenizer would add."""
        bos = self.tokenizer.bos_token
        return bos is not None and text.startswith(bos)

    def _tokenize(self, text: str, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        return self.tokenize_rendered([(text, spans)])[0]

    def tokenize_rendered(
        self, rendered: Sequence[tuple[str, list[tuple[int, int]]]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """
        Ids and supervised positions of several conversations in one call, which is faster than one after the other.

        Args:
            rendered: what `render` gave for each.

        Returns:
            For each, ids `int64[K]`, images not yet expanded, and `bool[K]`: whether a token is learned, because it
            lies in one of the spans.
        """
        tokenized: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for add_special_tokens in (True, False):
            places = [
                place for place, (text, _) in enumerate(rendered) if self.begins_with_bos(text) != add_special_tokens
            ]
            if not places:
                continue
            encoding = self.tokenizer(
                [rendered[place][0] for place in places],
                add_special_tokens=add_special_tokens,
                return_offsets_mapping=True,
                verbose=False,
            )
            for place, ids, offsets in zip(places, encoding["input_ids"], encoding["offset_mapping"], strict=True):
                flat = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets))
                ids = np.array(ids, dtype=np.int64)
                tokenized[place] = ids, self._supervised(*rendered[place], ids, flat.reshape(-1, 2))
        return [tokenized[place] for place in range(len(rendered))]

    def _supervised(self, text: str, spans: list[tuple[int, int]], ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """
        `bool[K]`: whether a token belongs to one of `spans`, from ids `int64[K]` and offsets `int64[K, 2]`. It may
        begin in front of one, where a tokenizer joins an answer's space with what stands there, but not end behind
        it: where `<|im_end|>` is no token, `><` of `<|im_end|><|im_start|>` is one of two turns in some vocabularies.
        An added token may take the blanks behind it along (`rstrip`, as Phi-3's `<|end|>`): it is learned too.
        """
        starts, ends = offsets[:, 0].copy(), offsets[:, 1].copy()
        # Where offsets are trimmed (GPT-NeoX), a newline and spaces that are one token lack the spaces, and these may
        # be the answer's.
        for start, _ in spans:
            index = int(np.searchsorted(ends, start, side="right")) - 1
            if 0 <= index < len(ids) - 1 and ends[index] < starts[index + 1]:
                token = cast(str, self.tokenizer.convert_ids_to_tokens(int(ids[index])))
                ends[index] += len(token) - len(token.rstrip(_BYTE_LEVEL_SPACE))
        # There, a token of spaces alone is the empty range at its end: it began where the token before it ended.
        starts[1:] = np.where(starts[1:] == ends[1:], ends[:-1], starts[1:])
        # The space that the normaliser adds behind an image reports the image's characters; it belongs to what
        # follows.
        position = text.find(self.image_token)
        while position >= 0:
            image_end = position + len(self.image_token)
            added = (starts >= position) & (starts < image_end) & (ends > starts) & (ids != self.image_token_id)
            starts[added] = image_end
            ends[added] = np.maximum(ends[added], image_end + 1)
            position = text.find(self.image_token, image_end)
        supervised = np.zeros(len(ids), dtype=bool)
        is_added = np.isin(ids, list(self.tokenizer.added_tokens_decoder))
        for start, end in spans:
            ends_inside = (ends <= end) | ((starts < end) & is_added)
            supervised |= (ends > start) & ends_inside & (ends > starts)
        return supervised & (ids != self.image_token_id)

    @cached_property
    def stop_token_id(self) -> int | None:
        """
        The id that ends an answer under the chat template; generation has to stop on it. `None` where no token does,
        see `stop_string`.
        """
        text, spans = self._short_answer
        ids, supervised = self._tokenize(text, spans)
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        stops = [index for index in ids[supervised].tolist() if index in special]
        if stops:
            return stops[-1]
        # A line can end an answer too: that is how `plain` ends a caption.
        return int(ids[supervised][-1]) if spans and text[spans[-1][1] - 1] == "\n" else None

    @cached_property
    def stop_string(self) -> str | None:
        """
        The text that ends an answer under a chat template which ends it in no token, as `###` of the oldest prompts:
        generation has to be given it, `generate(..., stop_strings=[...], tokenizer=...)`, and a chat cuts it off.
        `None` where a token ends it, and where `stop_token_id` is `None` too, as with the templates of the `llava-hf`
        checkpoints: those serve for answering, not for training.
        """
        text, spans = self._short_answer
        if self.stop_token_id is not None or not spans:
            return None
        start, end = spans[-1]
        return text[start:end].partition(_SHORT_ANSWER)[2].strip() or None

    @cached_property
    def misplaced_mark(self) -> str | None:
        """
        What the chat template marks as an answer and is none; `None` where its marks are right, or it has none. Jinja
        tells where a mark stands in what it has written so far, and a macro, a block of `set` or a filter writes all
        at once: marks inside one lie on the header that it begins with.
        """
        return misplaced_mark(cast(str, self.chat_template), self.tokenizer)

    @cached_property
    def _short_answer(self) -> tuple[str, list[tuple[int, int]]]:
        """A rendered conversation about one image, and the characters of its answer; none where the template refuses
        it."""
        example: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "image"}]},
            {"role": "assistant", "content": [{"type": "text", "text": _SHORT_ANSWER}]},
        ]
        try:
            return self.render(example)
        except ValueError:
            return "", []
