"""The questions of a dataset: its rows up to their first answer, which a row here need not have.

Rows are those that training reads, in every format. Besides, a row may ask and leave the answer open: a `prompt`
without `completion`, a conversation that ends in a question, and a line of the original's question files
(`question_id`, `image`, `text`).
"""

from collections.abc import Iterator
from typing import Any

from hf_llava_ft.answering.batches import Question
from hf_llava_ft.data.formats import Source, open_source
from hf_llava_ft.data.formats.column_choice import SaidOfColumns
from hf_llava_ft.data.formats.containers import Container
from hf_llava_ft.data.formats.dialects import detect_dialect
from hf_llava_ft.data.formats.images import ImageStore
from hf_llava_ft.data.formats.mixture import parse_data_path
from hf_llava_ft.data.formats.opening import open_container
from hf_llava_ft.data.schema import IMAGE_PLACEHOLDER
from hf_llava_ft.errors import UserError

_OPEN = "answer is open"  # a key that is in no row of anybody
_PLACEHOLDER_ANSWER = "?"
_OF_AN_OPEN_PROMPT = {"id", "prompt", "image", "images", "system"}
_ANSWERING = ("assistant", "gpt", "model")


class AskedRow:
    """
    A row that asks.

    Attributes:
        file (`str`): where it is from.
        number (`int`): its number there, from 1.
        line (`dict`): `row`, `id`, `prompt`, `images`, and `expected` where the row holds the answer.
        question (`Question`): what the model is asked.
    """

    def __init__(self, source: Source, raw: Any, number: int, system: str | None):
        row: Any = source.parse(raw, number)
        place = source.place(raw, number)
        stored = [dict(source.locate(image, place)) for image in row["images"]]
        messages = [dict(message) for message in row["messages"]]
        last = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
        asked = messages[:last]
        asked = [{**message, "content": [_part(part) for part in message["content"]]} for message in asked]
        if system is not None:
            asked = [message for message in asked if message["role"] != "system"]
            asked.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        num_images = sum(part["type"] == "image" for message in asked for part in message["content"])
        self.file, self.number = source.where, number
        self.question = Question(asked, stored[:num_images])
        self.line: dict[str, Any] = {"row": number, "id": row["id"], "prompt": _text(asked[-1])}
        self.line["images"] = [_name(image) for image in row["images"][:num_images]]
        if not (isinstance(raw, dict) and raw.get(_OPEN)):
            self.line["expected"] = _text(messages[last])


def open_questions(
    data_path: str, image_folder: str | None = None, *, columns: SaidOfColumns = None, **access: Any
) -> list[Source]:
    """
    The data, as [`open_source`] gives it, with rows that leave their answer open.

    Args:
        columns, access: see [`open_source`]; with `columns`, no answer is open.

    Raises:
        UserError: if it can't be read, or gives a set a weight.
    """
    sets = parse_data_path(data_path)
    for each in sets:
        if each.weight != 1:
            raise UserError(f"{each.path} has the weight {each.weight:g}, and every row is asked once: leave it out.")
    containers = [None if each.is_hub or columns else open_container(each.path, each.split) for each in sets]
    are_open = [each is not None and _is_open(next(each.iter_raw(), (0, None))[1]) for each in containers]
    if not any(are_open):
        return open_source(data_path, image_folder, columns=columns, **access)
    sources = []
    for each, container, is_open in zip(sets, containers, are_open, strict=True):
        if container is None or not is_open:
            name = each.path if each.split is None else f"{each.path}:{each.split}"
            sources += open_source([name], image_folder, **access)
            continue
        dialect = detect_dialect(_with_answer(next(container.iter_raw())[1]))
        assert dialect is not None  # what is open is a row of one that lacks its answer
        images = ImageStore(container.image_folder or image_folder, **access)
        sources.append(Source(_OpenRows(container), dialect, images))
    return sources


def asked_rows(sources: list[Source], system: str | None = None) -> Iterator[AskedRow]:
    """
    The questions of `sources` in order.

    Raises:
        UserError: at a row that is wrong, with file and number.
    """
    for source in sources:
        for number, raw in source.iter_raw():
            yield AskedRow(source, raw, number, system)


class _OpenRows(Container):
    """A container with an answer put in where its rows have none."""

    def __init__(self, container: Container):
        self.container = container
        self.name, self.where, self.files = container.name, container.where, container.files
        self.fingerprint, self.num_rows = container.fingerprint, container.num_rows
        self.image_folder = container.image_folder

    def iter_raw(self) -> Iterator[tuple[int, Any]]:
        for number, raw in self.container.iter_raw():
            yield number, _with_answer(raw) if _is_open(raw) else raw


def _is_open(raw: Any) -> bool:
    if not isinstance(raw, dict):
        return False
    turns = next((raw[key] for key in ("conversations", "messages") if isinstance(raw.get(key), list)), None)
    if turns is not None:
        last = turns[-1] if turns else None
        return isinstance(last, dict) and last.get("from", last.get("role")) not in _ANSWERING
    if "question_id" in raw and isinstance(raw.get("text"), str):
        return True
    given = {key for key, value in raw.items() if value is not None}
    return "prompt" in given and given <= _OF_AN_OPEN_PROMPT  # any other column may be the answer


def _with_answer(raw: dict[str, Any]) -> dict[str, Any]:
    if isinstance(raw.get("conversations"), list):
        answer = {"from": "gpt", "value": _PLACEHOLDER_ANSWER}
        if "from" not in raw["conversations"][-1]:
            answer = {"role": "assistant", "content": _PLACEHOLDER_ANSWER}
        return {**raw, "conversations": [*raw["conversations"], answer], _OPEN: True}
    if isinstance(raw.get("messages"), list):
        turns = [*raw["messages"], {"role": "assistant", "content": _PLACEHOLDER_ANSWER}]
        return {**raw, "messages": turns, _OPEN: True}
    if "prompt" in raw:
        return {**raw, "completion": _PLACEHOLDER_ANSWER, _OPEN: True}
    rest = {key: value for key, value in raw.items() if key not in ("text", "question_id")}
    found = {"id": raw.get("id", raw["question_id"]), "prompt": raw["text"], "completion": _PLACEHOLDER_ANSWER}
    return {**rest, **found, _OPEN: True}


def _part(part: Any) -> dict[str, str]:
    return {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]}


def _text(message: Any) -> str:
    return "".join(part.get("text") or IMAGE_PLACEHOLDER for part in message["content"])


def _name(image: Any) -> str:
    return image if isinstance(image, str) else image.get("path") or "(embedded)"
