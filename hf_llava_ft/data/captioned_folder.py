"""A folder of pictures with their captions beside them, as rows of LLaVA JSON.

    found = captioned_folder("photos", prompt="Describe the picture.")
    found.rows                                  # [{"id": "cats/1", "image": "cats/1.jpg", "conversations": [...]}]
    found.without_caption, found.without_picture

A caption is the text file of the picture's name (`cats/1.jpg`, `cats/1.txt`) or a row of the one table in the folder.

What may surprise: a table may name a picture without the folder below that it lies in, if no other has that name.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_llava_ft.data.formats.column_choice import SaidOfColumns
from hf_llava_ft.data.formats.dialects import IMAGE_CAPTION
from hf_llava_ft.data.formats.source import Source, open_source
from hf_llava_ft.data.image_folder import MissingImageError
from hf_llava_ft.data.schema import IMAGE_PLACEHOLDER, Row, build_row
from hf_llava_ft.data.values import clean_text
from hf_llava_ft.errors import UserError

PROMPT = "Describe the picture."
TEXT_FILES = "txt"  # in place of a table's name

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
_JSON_TABLES = ("captions.json", "metadata.json")  # any other may be anything
_MAX_CAPTION_BYTES = 2**20
_SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}


@dataclass
class CaptionedFolder:
    """
    Args:
        rows (`list[dict]`): LLaVA JSON; paths are relative to the folder.
        captions (`str`): where the captions are from, in words.
        asked (`str`): the question that was put to every picture; "" if none was.
        without_caption (`list[str]`): pictures that no row shows.
        without_picture (`list[str]`): text files, or rows of the table, whose picture is not there.
        found_below (`int`): pictures that the table names without their folder.
    """

    rows: list[dict[str, Any]]
    captions: str
    asked: str
    without_caption: list[str] = field(default_factory=list)
    without_picture: list[str] = field(default_factory=list)
    found_below: int = 0


def captioned_folder(
    folder: str | os.PathLike, prompt: str | None = None, captions: str | None = None, columns: SaidOfColumns = None
) -> CaptionedFolder:
    """
    Args:
        folder (`str`): of the pictures, and of folders with pictures.
        prompt (`str`, *optional*): what is asked about a picture that comes with a caption and no question;
            [`PROMPT`] by default, and "" for the picture alone.
        captions (`str`, *optional*): `txt`, or a table inside the folder or elsewhere; told from what is there by
            default.
        columns (*optional*): of the table; see `open_source`.

    Raises:
        UserError: if there are no pictures or no captions, if there are two kinds of captions, or at the first
            caption that can't be trained on.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give the one that holds the pictures.")
    pictures, texts = _files_below(root)
    if not pictures:
        raise UserError(f"{root} holds no pictures ({', '.join(_PICTURES)}); give the folder that does.")
    table = _table(root, pictures, texts, captions)
    if table is None:
        if columns:
            raise UserError(f"--columns is for a table of captions, and {root} has text files.")
        return _of_text_files(root, pictures, texts, PROMPT if prompt is None else prompt)
    return _of_table(root, pictures, table, prompt, columns)


def _files_below(root: Path) -> tuple[list[str], list[str]]:
    """Pictures and text files, relative to the folder; none that are hidden."""
    pictures, texts = [], []
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.relpath(os.path.join(parent, name), root)
            ending = os.path.splitext(name)[1].lower()
            if not name.startswith(".") and ending in _PICTURES:
                pictures.append(path)
            elif not name.startswith(".") and ending == ".txt":
                texts.append(path)
    return pictures, texts


def _table(root: Path, pictures: list[str], texts: list[str], captions: str | None) -> Path | None:
    """The table to read; None for text files."""
    if captions == TEXT_FILES:
        return None
    if captions is not None:
        table = next((path for path in (root / captions, Path(captions)) if path.is_file()), None)
        if table is None:
            raise UserError(f"--captions {captions} is no file, here or in {root}; correct it, or write txt.")
        return table
    tables = sorted(p for p in root.iterdir() if p.suffix.lower() in _TABLES or p.name.lower() in _JSON_TABLES)
    stems = {os.path.splitext(path)[0] for path in pictures}
    has_texts = any(os.path.splitext(path)[0] in stems for path in texts)
    found = [*(path.name for path in tables), *(["text files"] if has_texts else [])]
    if len(found) > 1:
        raise UserError(
            f"{root} has captions in {' and in '.join(found)}; say which are meant with --captions "
            f"{tables[0].name}{' or --captions txt' if has_texts else ''}."
        )
    if not found:
        raise UserError(
            f"{root} has no captions beside its {len(pictures):,} pictures: write {Path(pictures[0]).stem}.txt beside "
            f"{pictures[0]}, or one captions.csv with the columns image and caption, or image, question and answer."
        )
    return tables[0] if tables else None


def _of_text_files(root: Path, pictures: list[str], texts: list[str], prompt: str) -> CaptionedFolder:
    of_stem: dict[str, str] = {}
    for path in pictures:
        stem = os.path.splitext(path)[0]
        if stem in of_stem and f"{stem}.txt" in texts:
            raise UserError(
                f"{root / stem}.txt could be of {of_stem[stem]} or of {path}; rename or remove one of them."
            )
        of_stem[stem] = path
    found = CaptionedFolder([], "text files", prompt)
    for path in texts:
        stem = os.path.splitext(path)[0]
        if stem not in of_stem:
            found.without_picture.append(path)
        elif caption := _caption(root / path):
            turns = [("user", _asked(prompt)), ("assistant", caption)]
            row_id = clean_text(Path(stem).as_posix(), f"{root / path}: its name")
            found.rows.append(_llava_row(build_row(row_id, turns, [of_stem[stem]], str(root / path))))
    return _without_captions(found, root, pictures)


def _caption(path: Path) -> str:
    """What a text file says; "" if nothing."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_CAPTION_BYTES + 1)
        if len(content) > _MAX_CAPTION_BYTES:
            raise UserError(f"{path} has more than {_MAX_CAPTION_BYTES:,} bytes, which is no caption; shorten it.")
        return clean_text(content.decode("utf-8-sig").strip(), str(path))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from None
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror or error}); check it.") from None


def _of_table(
    root: Path, pictures: list[str], table: Path, prompt: str | None, columns: SaidOfColumns
) -> CaptionedFolder:
    (source,) = open_source([str(table)], root, columns=columns)
    if source.dialect is not IMAGE_CAPTION and source.dialect.columns is None:
        raise UserError(
            f"{table} is {source.format} already; nothing is to be made of it: "
            f"llava-ft check {table} --image_folder {root}"
        )
    has_questions = source.dialect.columns is not None and source.dialect.columns.prompt is not None
    if has_questions and prompt is not None:
        raise UserError(f"--prompt is for captions, and {table} has questions of its own; leave it out.")
    asked = "" if has_questions else PROMPT if prompt is None else prompt
    columns_told = "" if source.dialect.columns is None else f": {source.dialect.columns.told()}"
    found = CaptionedFolder([], f"{table.name}{columns_told}", asked)
    below = _unique_names(pictures)
    for number, raw in source.iter_raw():
        row, place = source.parse(raw, number), source.place(raw, number)
        images: list[Any] = []
        for image in row["images"]:
            images.append(_path(source, image, place, below, found))
            if images[-1] is None:
                found.without_picture.append(f"row {number} ({image})")
        if None in images:
            continue
        written = _llava_row(Row(id=row["id"], messages=row["messages"], images=images))
        if asked:
            human = next(turn for turn in written["conversations"] if turn["from"] == "human")
            human["value"] += f"\n{asked}"
        found.rows.append(written)
    return _without_captions(found, root, pictures)


def _unique_names(pictures: list[str]) -> dict[str, str]:
    """Path of each picture whose name no other has."""
    named: dict[str, list[str]] = {}
    for path in pictures:
        named.setdefault(os.path.basename(path), []).append(path)
    return {name: paths[0] for name, paths in named.items() if len(paths) == 1}


def _path(source: Source, image: Any, place: str, below: dict[str, str], found: CaptionedFolder) -> str | None:
    """Of a picture, relative to the folder; None if it is not there."""
    if not isinstance(image, str):
        raise UserError(f"{place} holds its picture itself; give the file to llava-ft check and train as it is.")
    try:
        source.locate(image, place)
    except MissingImageError:
        if image not in below:
            return None
        found.found_below += 1
        return below[image]
    return os.path.normpath(image)


def _without_captions(found: CaptionedFolder, root: Path, pictures: list[str]) -> CaptionedFolder:
    if not found.rows:
        without = found.without_picture
        hint = f", and the first caption without one is {without[0]}" if without else ""
        raise UserError(
            f"{root}: no picture has a caption in {found.captions.partition(':')[0]}{hint}; name them alike."
        )
    shown: set[str] = set()
    for row in found.rows:
        image: Any = row.get("image")
        shown.update(image if isinstance(image, list) else [image])
    found.without_caption = [path for path in pictures if path not in shown]
    return found


def _asked(prompt: str) -> str:
    return f"{IMAGE_PLACEHOLDER}\n{prompt}" if prompt else IMAGE_PLACEHOLDER


def _llava_row(row: Row) -> dict[str, Any]:
    images: list[Any] = row["images"]
    conversations = [
        {
            "from": _SPEAKERS[message["role"]],
            "value": "".join(part["text"] or IMAGE_PLACEHOLDER for part in message["content"]),
        }
        for message in row["messages"]
    ]
    shown = {"image": images[0] if len(images) == 1 else images} if images else {}
    return {"id": row["id"], **shown, "conversations": conversations}
