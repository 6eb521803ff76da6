"""What a check says of rows: what they hold, what is wrong with them, and how many tokens they are.

A [`RowChecker`] is called with some rows at a time, in worker processes, and returns numbers and sentences, never
rows: the whole check keeps only a few bytes of a good row.
"""

import multiprocessing
import os
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from hf_llava_ft.checking.images import ImageFacts, image_facts, image_size
from hf_llava_ft.data.counting.counter import TokenCounter
from hf_llava_ft.data.counting.rendering import Turn
from hf_llava_ft.data.formats import Source
from hf_llava_ft.data.problems import (
    CHANGE,
    KIND_OF_ERROR,
    NOTHING_TO_LEARN,
    SHORTEN,
    Problem,
    over_length,
    problem_of,
    shown_id,
)
from hf_llava_ft.data.schema import Row, count_message_words
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.processing_llava import LlavaProcessor

# No text of this many characters for each token that fits is short enough, and tokenising it could take all memory:
# tokens are words or less. Some vocabularies have one for 128 spaces.
_MAX_CHARS_PER_TOKEN = 200
# Without a model, what most of them take for more than text.
_USUAL_CONTROL_TEXT = ("</s>", "<s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")

UNKNOWN = -1


class Sample(NamedTuple):
    """A row worth showing: its number, the row, and its images undecoded."""

    number: int
    row: Row
    images: list[Any]


@dataclass
class RowFindings:
    """
    Of N rows of one source, in order.

    Args:
        numbers (`int64[N]`): from 1.
        num_images (`int32[N]`): `UNKNOWN` for a row that can't be read.
        num_words (`int32[N]`): the original's measure; `UNKNOWN` likewise.
        lengths, supervised (`int32[N]`): tokens, and those that are learned; `UNKNOWN` without a processor, and for a
            row that is wrong.
        image_tokens (`int32[N]`): placeholders among them.
        excess (`int32[N]`): tokens over the limit, which a cut would take off; `UNKNOWN` for a row that can't be cut.
        digests (`uint64[N]`): equal for rows that say the same about the same images.
        paths (`list[tuple[int, str]]`): (place of the row among the N, image file).
        embedded (`list[tuple[int, ImageFacts]]`): the same for pictures that the rows hold.
        problems, warnings (`list[Problem]`): a row with a problem can't be trained on.
        samples (`dict[str, Sample]`): the first sound row of each kind, and the longest.
        has_links (`bool`): an image file is not where its name says, but where a link leads, or fetched.
    """

    numbers: np.ndarray
    num_images: np.ndarray
    num_words: np.ndarray
    lengths: np.ndarray
    supervised: np.ndarray
    image_tokens: np.ndarray
    excess: np.ndarray
    digests: np.ndarray
    paths: list[tuple[int, str]] = field(default_factory=list)
    embedded: list[tuple[int, ImageFacts]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    samples: dict[str, Sample] = field(default_factory=dict)
    has_links: bool = False


class RowChecker:
    """
    Args:
        sources (`list[Source]`): whose rows are checked.
        processor (`LlavaProcessor`, *optional*): without one, nothing is said of tokens.
        longest (`int`, *optional*): tokens that a row may have.
    """

    def __init__(self, sources: list[Source], processor: LlavaProcessor | None = None, longest: int | None = None):
        self.sources, self.processor, self.longest = sources, processor, longest
        self.control_text = list(_USUAL_CONTROL_TEXT) if processor is None else control_text(processor)
        self.stops = set() if processor is None else stop_texts(processor)
        self.counter = None if processor is None else TokenCounter(processor)
        if processor is not None and not processor.depends_on_image_size:
            processor.num_image_tokens_at(1, 1)  # once for all processes

    def __call__(self, chunk: tuple[int, list[tuple[int, Any]]]) -> RowFindings:
        """The findings of some `(number, raw row)` of the source with the given index."""
        if multiprocessing.parent_process() is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
        index, numbered = chunk
        source = self.sources[index]
        findings = _empty(numbers=np.array([number for number, _ in numbered], dtype=np.int64))
        sound: list[tuple[int, Sample, str]] = []
        for position, (number, raw) in enumerate(numbered):
            sample = self._read(source, position, number, raw, findings)
            if sample is not None:
                sound.append((position, sample, source.place(raw, number)))
        if self.processor is not None:
            self._count_tokens(source, sound, findings)
        _keep_samples(sound, findings)
        return findings

    def _read(self, source: Source, position: int, number: int, raw: Any, findings: RowFindings) -> Sample | None:
        """What can be said without tokens; None if the row is wrong."""
        place = source.place(raw, number)
        given_id = raw.get("id") if isinstance(raw, dict) else None
        try:
            row = source.parse(raw, number)
        except UserError as error:
            findings.problems.append(problem_of(error, source.where, number, given_id, place))
            return None
        findings.num_images[position] = len(row["images"])
        findings.num_words[position] = count_message_words(row["messages"])
        findings.digests[position] = _digest(row)
        images, is_sound = [], True
        for image in row["images"]:
            try:
                stored = source.locate(image, place)
            except UserError as error:
                kind = KIND_OF_ERROR.get(type(error), "refused_image")
                problem = problem_of(error, source.where, number, given_id, place, kind)
                # What is written may be passed on, and need not tell where this computer has its files.
                folder = source.images.folder
                if folder:
                    what, todo = (text.replace(folder, os.path.basename(folder)) for text in problem[4:6])
                    problem = problem._replace(what=what, what_to_do=todo)
                findings.problems.append(problem)
                is_sound = False
                continue
            images.append(stored)
            if stored["bytes"] is None:
                findings.paths.append((position, str(stored["path"])))
                is_there = _is_where_it_says(str(image), str(stored["path"]), source)
                findings.has_links = findings.has_links or not is_there
            else:
                facts = image_facts(stored["bytes"])
                findings.embedded.append((position, facts))
                is_sound = is_sound and facts.failure is None
        findings.warnings += self._control_text_in(row, source.where, number, given_id, place)
        return Sample(number, row, images) if is_sound else None

    def _control_text_in(self, row: Row, where: str, number: int, given_id: Any, place: str) -> list[Problem]:
        warnings = []
        for turn, message in enumerate(row["messages"], start=1):
            text = "".join(part["text"] or "" for part in message["content"])
            for control in self.control_text:
                if control not in text:
                    continue
                if self.processor is None:
                    treated = "most tokenizers read it as a control token"
                elif control == self.processor.stop_string:
                    treated = "which ends an answer under this chat template"
                else:
                    treated = "which the tokenizer reads as the control token of that name, as the original does"
                teaches = ""
                if self.processor is not None and message["role"] == "assistant":
                    teaches = f", so the model learns to {'stop there' if control in self.stops else 'write it'}"
                what = f"turn {turn} holds the literal text {control!r}, {treated}{teaches}"
                todo = "remove it, or write it otherwise, if it is not meant so."
                warnings.append(Problem(where, number, shown_id(given_id), "control_text", what, todo, place))
        return warnings

    def _count_tokens(self, source: Source, sound: list[tuple[int, Sample, str]], findings: RowFindings) -> None:
        processor = self.processor
        assert processor is not None and self.counter is not None
        rendered, rows = [], []
        wrong: set[int] = set()
        for position, sample, place in sound:

            def refuse(kind: str, what: str, todo: str, sample=sample, place=place, position=position) -> None:
                row_id = None if sample.row["id"] == str(sample.number) else shown_id(sample.row["id"])
                findings.problems.append(Problem(source.where, sample.number, row_id, kind, what, todo, place))
                wrong.add(position)

            try:
                text, spans = self.counter.render(_turns(sample.row))
            except ValueError as error:
                refuse("chat_template", str(error).rstrip("."), CHANGE)
                continue
            if self.longest is not None and len(text) > _MAX_CHARS_PER_TOKEN * self.longest:
                refuse("too_long", f"has {len(text):,} characters, far more than {self.longest} tokens", SHORTEN)
                continue
            sizes = self._image_sizes(sample)
            if sizes is None:
                wrong.add(position)  # said when the images are decoded
                continue
            rendered.append((text, spans))
            rows.append((position, sizes, refuse))
        for (position, sizes, refuse), text_and_spans, counted in zip(
            rows, rendered, self.counter.count(rendered), strict=True
        ):
            repeats = [processor.num_image_tokens_at(height, width) for height, width in sizes]
            length = counted.num_ids + sum(repeats) - len(repeats)
            findings.lengths[position], findings.supervised[position] = length, counted.num_supervised
            findings.image_tokens[position] = sum(repeats)
            if not counted.num_supervised:
                refuse("unsupervised", NOTHING_TO_LEARN, CHANGE)
            elif self.longest is not None and length > self.longest:
                [(ids, supervised)] = processor.tokenize_rendered([text_and_spans])
                what, todo, can_be_cut = over_length(ids, supervised, processor, repeats, self.longest)
                findings.excess[position] = length - self.longest if can_be_cut else UNKNOWN
                refuse("too_long", what, todo)
        sound[:] = [item for item in sound if item[0] not in wrong]

    def _image_sizes(self, sample: Sample) -> list[tuple[int, int]] | None:
        """`(height, width)` of each image; None where one can't be read."""
        if self.processor is None or not self.processor.depends_on_image_size:
            return [(1, 1)] * len(sample.images)
        opening = self.processor.picture_opening
        sizes = [image_size(image["bytes"] or str(image["path"]), opening) for image in sample.images]
        return None if None in sizes else [size for size in sizes if size is not None]


def _turns(row: Row) -> list[Turn]:
    return [(message["role"], [part["text"] for part in message["content"]]) for message in row["messages"]]


def _is_where_it_says(image: str, path: str, source: Source) -> bool:
    """Whether no link and no server stands between a row's image and its file."""
    return ".." not in image and path == os.path.normpath(os.path.join(source.images.real_folder, image))


def control_text(processor: LlavaProcessor) -> list[str]:
    """The texts that the tokenizer reads as control tokens wherever they stand, `<image>` apart, and the text that
    ends an answer where the chat template has no token for it."""
    tokenizer = processor.tokenizer
    found = []
    for index, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token.special and token.content.strip() and index != processor.image_token_id:
            if index in tokenizer(f"a{token.content}b", add_special_tokens=False).input_ids:
                found.append(token.content)
    if processor.stop_string:
        found.append(processor.stop_string)
    return found


def stop_texts(processor: LlavaProcessor) -> set[str]:
    """Those of [`control_text`] on which generation stops."""
    tokenizer = processor.tokenizer
    stop = processor.stop_token_id
    ends = None if stop is None else tokenizer.convert_ids_to_tokens(stop)
    return {text for text in (ends, tokenizer.eos_token, processor.stop_string) if text}


def _digest(row: Row) -> int:
    digest = blake2b(repr(row["messages"]).encode("utf-8", "surrogatepass"), digest_size=8)
    for image in row["images"]:
        digest.update(image.encode("utf-8", "surrogatepass") if isinstance(image, str) else image["bytes"])
        digest.update(b"\0")
    return int.from_bytes(digest.digest(), "little")


def _keep_samples(sound: list[tuple[int, Sample, str]], findings: RowFindings) -> None:
    for _, sample, _ in sound:
        findings.samples.setdefault(row_kind(len(sample.images)), sample)
    if sound:
        _, longest, _ = max(sound, key=lambda item: findings.lengths[item[0]])
        findings.samples["longest"] = longest


def row_kind(num_images: int) -> str:
    """ "text", "image" or "multi_image"."""
    return "text" if not num_images else "image" if num_images == 1 else "multi_image"


def _empty(numbers: np.ndarray) -> RowFindings:
    def unknown() -> np.ndarray:
        return np.full(len(numbers), UNKNOWN, dtype=np.int32)

    return RowFindings(
        numbers,
        num_images=unknown(),
        num_words=unknown(),
        lengths=unknown(),
        supervised=unknown(),
        image_tokens=unknown(),
        excess=np.zeros(len(numbers), dtype=np.int32),
        digests=np.zeros(len(numbers), dtype=np.uint64),
    )
