"""README.md of a data set: what the Hub and `datasets` read from it, and what a person does."""

import json
import shlex
from typing import Any

from datasets import DatasetInfo, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData

from hf_llava_ft.data.export import ExportedDataset
from hf_llava_ft.data.features import FEATURES
from hf_llava_ft.hub.card_template import card_of
from hf_llava_ft.reports.markdown import Markdown, fence


def dataset_card(
    exported: ExportedDataset, name: str, license: str | None = None, language: list[str] | None = None
) -> str:
    """
    The text of README.md.

    Args:
        exported (`ExportedDataset`): the numbers.
        name (`str`): what users load it by, `user/name` or the folder's name.
        license (`str`, *optional*): as the Hub names it, for whoever may use it.
        language (`list[str]`, *optional*): codes such as `en`.
    """
    splits = SplitDict()
    splits.add(SplitInfo("train", num_bytes=exported.num_bytes, num_examples=exported.num_rows))
    info = DatasetInfo(
        features=FEATURES, splits=splits, download_size=exported.download_bytes, dataset_size=exported.num_bytes
    )
    stated: dict[str, Any] = {name: value for name, value in (("license", license), ("language", language)) if value}
    data = DatasetCardData(task_categories=["image-text-to-text"], tags=["llava"], **stated)
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    data["configs"] = [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}]
    in_python, in_shell = json.dumps(name), shlex.quote(name)
    card = card_of(
        DatasetCard,
        data,
        "dataset_card.md",
        {
            "title": name.rpartition("/")[2],
            "rows": f"{exported.num_rows:,} row{'' if exported.num_rows == 1 else 's'}",
            "images": f"{exported.num_images:,} image{'' if exported.num_images == 1 else 's'}",
            "stated_license": license,
            "languages": language or [],
            # Inside a block that no part of the name can end.
            "name_in_python": Markdown(in_python),
            "name_in_shell": Markdown(in_shell),
            "fence": fence(in_python, in_shell),
        },
    )
    return str(card)
