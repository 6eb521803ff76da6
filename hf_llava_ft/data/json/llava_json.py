"""The rows of a LLaVA JSON file: checked, with images that exist."""

from collections.abc import Iterator
from typing import Any, cast

from hf_llava_ft.data.image_folder import ImageFolder
from hf_llava_ft.data.json.rows import iter_json_rows
from hf_llava_ft.data.schema import count_words, parse_llava_row, row_place


def iter_llava_json(path: str, images: ImageFolder) -> Iterator[dict[str, Any]]:
    """
    The rows of a LLaVA JSON or JSONL file, checked, with image paths that exist.

    Args:
        path (`str`):
            The file.
        images (`ImageFolder`):
            Where its image paths lead.

    Yields:
        What [`checked_row`] returns.

    Raises:
        UserError: at the first row that is wrong.
    """
    for number, value in iter_json_rows(path):
        yield checked_row(value, path, number, images)


def checked_row(value: Any, path: str, number: int, images: ImageFolder) -> dict[str, Any]:
    """
    Returns:
        [`parse_llava_row`]'s `Row` with absolute `images`; besides, `num_words` ([`count_words`]) and `num_images`.

    Raises:
        UserError: if the row is wrong.
    """
    row = parse_llava_row(value, path, number)
    if row["images"]:
        place = row_place(path, number, value.get("id"))
        names = cast(list[str], row["images"])  # JSON holds no bytes
        row["images"] = [images.resolve(name, place) for name in names]
    return {**row, "num_words": count_words(value), "num_images": len(row["images"])}
