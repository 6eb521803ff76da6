"""Preferences as TRL's DPOTrainer takes them, read and checked as everything else is.

TRL reads the words of a dataset as they are: `<image>` in a text would stay a text beside the picture. Here each
picture has its place as a part of the prompt, as the chat templates take it.
"""

import os
from typing import Any

import datasets

from hf_llava_ft.data.features import FEATURES
from hf_llava_ft.data.formats.column_choice import SaidOfColumns
from hf_llava_ft.data.formats.dialects import PREFERENCE, parse_preference
from hf_llava_ft.data.formats.source import open_source
from hf_llava_ft.errors import UserError

_MESSAGES = FEATURES["messages"]
PREFERENCE_FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "prompt": _MESSAGES,
        "chosen": _MESSAGES,
        "rejected": _MESSAGES,
        "images": datasets.List(datasets.Image()),
    }
)


def load_preferences(
    data_path: str | os.PathLike, image_folder: str | os.PathLike | None = None, *, columns: SaidOfColumns = None
) -> datasets.Dataset:
    """
    Rows of `prompt`, `chosen` and `rejected`, in memory but for their pictures, which are opened when asked for.

    Args:
        data_path, image_folder, columns: see [`open_source`]; without weights.

    Returns:
        `datasets.Dataset` with `PREFERENCE_FEATURES`: what TRL's DPOTrainer takes as `train_dataset`.

    Raises:
        UserError: at the first row that is wrong, or if it holds no preferences.
    """
    rows: list[dict[str, Any]] = []
    for source in open_source(data_path, image_folder, columns=columns):
        if source.dialect is not PREFERENCE:
            raise UserError(f'{source.where} is {source.format}; preferences have "prompt", "chosen" and "rejected".')
        if source.weight != 1:
            raise UserError(f"{source.where} has the weight {source.weight:g}; preferences have none: leave it out.")
        for number, raw in source.iter_raw():
            preferred, other = parse_preference(raw, source.where, number)
            images = [source.locate(image, source.place(raw, number)) for image in preferred["images"]]
            rows.append(
                {
                    "id": preferred["id"],
                    "prompt": preferred["messages"][:-1],
                    "chosen": preferred["messages"][-1:],
                    "rejected": other["messages"][-1:],
                    "images": images,
                }
            )
    return datasets.Dataset.from_list(rows, features=PREFERENCE_FEATURES)
