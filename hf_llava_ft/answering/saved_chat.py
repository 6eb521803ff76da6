"""A conversation as a row of LLaVA JSON, with its pictures beside the file: what was said in a chat can be trained on.

    talks.json        [{"id": "4f1c...", "image": "talks.images/4f1c...-1.png", "conversations": [...]}]
    talks.images/     one PNG for each picture

The rows of the file that are there stay; a conversation that is saved again takes the place of its row.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from hf_llava_ft.errors import UserError
from hf_llava_ft.whole_files import write_atomically

_NAMES = {"system": "system", "user": "human", "assistant": "gpt"}


def save_chat(path: Path, row_id: str, messages: list[dict[str, Any]], images: list[Image.Image]) -> int:
    """
    Puts the conversation into the file `path`.

    Args:
        row_id (`str`): of its row.
        messages, images: as [`~hf_llava_ft.answering.conversation.Conversation`] has them.

    Returns:
        `int`: how many rows the file has now.

    Raises:
        UserError: if there is nothing to save, an answer is empty, or `path` is no such file or cannot be written.
    """
    if not messages:
        raise UserError("nothing was answered yet, so there is nothing to save.")
    if any(each["role"] == "assistant" and not _text_of(each["content"]).strip() for each in messages):
        raise UserError("an answer of the conversation is empty, which training refuses: ask again, or /new.")
    if path.suffix != ".json":
        raise UserError(f"{path} does not end in .json, as a file of rows does; choose another name.")
    try:
        rows = _rows_of(path)
        pictures = path.with_suffix(".images")
        names = [f"{pictures.name}/{row_id}-{place}.png" for place in range(1, len(images) + 1)]
        for name, image in zip(names, images, strict=True):
            write_atomically(path.parent / name, partial(image.save, format="PNG"))
        row: dict[str, Any] = {"id": row_id}
        if names:
            row["image"] = names[0] if len(names) == 1 else names
        turns = [(_NAMES[message["role"]], _text_of(message["content"])) for message in messages]
        row["conversations"] = [{"from": name, "value": text} for name, text in turns]
        place = next((place for place, each in enumerate(rows) if each.get("id") == row_id), len(rows))
        rows[place : place + 1] = [row]
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        write_atomically(path, lambda file: file.write_text(text, encoding="utf-8", errors="replace"))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    return len(rows)


def _rows_of(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "conversations" in row for row in rows):
        raise UserError(f"{path} is there and holds no rows of conversations; choose another name.")
    return rows


def _text_of(content: list[dict[str, str]]) -> str:
    """With `<image>` where a picture stands; those in front on lines of their own, as LLaVA's data has it."""
    num_in_front = next((place for place, part in enumerate(content) if part["type"] != "image"), len(content))
    rest = "".join("<image>" if part["type"] == "image" else part["text"] for part in content[num_in_front:])
    return "<image>\n" * num_in_front + rest
